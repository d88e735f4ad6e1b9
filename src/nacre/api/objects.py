"""Objects as bytes: how they are stored, and the same bytes with their resourceVersion as they go over the wire.

A stored value begins with HEAD and an empty resourceVersion, so that lists and watches are joined from stored bytes without
decoding them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from nacre.api.kind import Kind
from nacre.api.store import Entry

Object = dict[str, Any]

HEAD = b'{"metadata":{"resourceVersion":"'
_encoder, _decoder = msgspec.json.Encoder(), msgspec.json.Decoder()
encode = _encoder.encode
decode = _decoder.decode


def to_stored(kind: Kind, thing: Object) -> bytes:
    if kind.to_stored is not None:
        thing = kind.to_stored(thing)
    meta = {"resourceVersion": ""} | {key: value for key, value in thing["metadata"].items() if key != "resourceVersion"}
    return encode({"metadata": meta} | {key: value for key, value in thing.items() if key != "metadata"})


def wire(kind: Kind, value: bytes, revision: int) -> bytes:
    """The object's JSON, resourceVersion filled in."""
    data = HEAD + str(revision).encode() + value[len(HEAD) :]
    return data if kind.from_stored is None else encode(kind.from_stored(decode(data)))


def load(kind: Kind, value: bytes, revision: int) -> Object:
    thing: Object = decode(value)
    thing["metadata"]["resourceVersion"] = str(revision)
    return thing if kind.from_stored is None else kind.from_stored(thing)


def load_entry(kind: Kind, entry: Entry) -> Object:
    return load(kind, entry.value, entry.revision)


def now() -> datetime:
    return datetime.now(UTC)


def stamp(instant: datetime) -> str:
    """Kubernetes' Time: RFC 3339, whole seconds, UTC."""
    return instant.strftime("%Y-%m-%dT%H:%M:%SZ")
