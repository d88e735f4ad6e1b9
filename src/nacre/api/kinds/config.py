"""ConfigMaps and Secrets (core/v1)."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from nacre.api.kind import AGE, NAME, Column, Kind, Object, at, created
from nacre.api.status import Cause, forbidden_field, invalid_value, required, too_long

SIZE_LIMIT = 1024 * 1024  # bytes of all values together
_KEY = re.compile(r"[-._a-zA-Z0-9]+")
_KEY_WORDS = (
    "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', "
    "regex used for validation is '[-._a-zA-Z0-9]+')"
)
# Secret types that need certain keys (core/v1, SecretType)
_NEEDED_KEYS = {
    "kubernetes.io/dockercfg": (".dockercfg",),
    "kubernetes.io/dockerconfigjson": (".dockerconfigjson",),
    "kubernetes.io/ssh-auth": ("ssh-privatekey",),
    "kubernetes.io/tls": ("tls.crt", "tls.key"),
}
_JSON_KEYS = (".dockercfg", ".dockerconfigjson")


def _check_keys(keys: Iterable[str], where: str) -> list[Cause]:
    causes = []
    for key in keys:
        if len(key) > 253:
            causes.append(invalid_value(f"{where}[{key}]", key, "must be no more than 253 bytes"))
        elif not _KEY.fullmatch(key) or key in (".", "..") or key.startswith(".."):
            words = "must not be '.'" if key == "." else "must not start with '..'" if key.startswith("..") else _KEY_WORDS
            causes.append(invalid_value(f"{where}[{key}]", key, words))
    return causes


def _check_immutable(new: Object, old: Object, parts: tuple[str, ...]) -> list[Cause]:
    if not old.get("immutable"):
        return []
    causes = []
    if not new.get("immutable"):
        causes.append(forbidden_field("immutable", "field is immutable when `immutable` is set"))
    return causes + [
        forbidden_field(part, "field is immutable when `immutable` is set") for part in parts if new.get(part) != old.get(part)
    ]


def _check_config_map(thing: Object) -> list[Cause]:
    data, binary = thing.get("data", {}), thing.get("binaryData", {})
    causes = _check_keys(data, "data") + _check_keys(binary, "binaryData")
    twice = sorted(data.keys() & binary.keys())
    causes += [invalid_value(f"data[{key}]", key, "duplicate of key present in binaryData") for key in twice]
    size = sum(len(value.encode()) for value in data.values()) + sum(_decoded_size(value) for value in binary.values())
    return causes + ([too_long("", SIZE_LIMIT)] if size > SIZE_LIMIT else [])


def _default_secret(thing: Object) -> None:
    """stringData is write-only: its values go into data."""
    text = thing.pop("stringData", None)
    if text:
        data = thing.setdefault("data", {})
        for key, value in text.items():
            data[key] = base64.b64encode(value.encode()).decode()
    thing.setdefault("type", "Opaque")
    if not thing["type"]:
        thing["type"] = "Opaque"


def _check_secret(thing: Object) -> list[Cause]:
    data = thing.get("data", {})
    causes = _check_keys(data, "data")
    if sum(_decoded_size(value) for value in data.values()) > SIZE_LIMIT:
        causes.append(too_long("data", SIZE_LIMIT))
    kind = thing.get("type", "")
    for key in _NEEDED_KEYS.get(kind, ()):
        if key not in data:
            causes.append(required(f"data[{key}]"))
        elif key in _JSON_KEYS and not _is_json(base64.b64decode(data[key])):
            causes.append(invalid_value(f"data[{key}]", "<secret contents redacted>", "invalid character: not a JSON document"))
    if kind == "kubernetes.io/basic-auth" and not data.keys() & {"username", "password"}:
        causes += [required("data[username]"), required("data[password]")]
    if kind == "kubernetes.io/service-account-token":
        holder = thing["metadata"].get("annotations", {}).get("kubernetes.io/service-account.name")
        causes += [] if holder else [required("metadata.annotations[kubernetes.io/service-account.name]")]
    return causes


def _check_secret_update(new: Object, old: Object) -> list[Cause]:
    causes = _check_immutable(new, old, ("data",))
    if new.get("type") != old.get("type"):
        causes.append(invalid_value("type", new.get("type"), "field is immutable"))
    return causes


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _decoded_size(text: str) -> int:
    return len(text) * 3 // 4 - text[-2:].count("=")


def _config_map_row(thing: Object, now: datetime) -> list[Any]:
    return [thing["metadata"]["name"], str(len(thing.get("data", {})) + len(thing.get("binaryData", {}))), created(thing, now)]


def _secret_row(thing: Object, now: datetime) -> list[Any]:
    return [thing["metadata"]["name"], thing.get("type", ""), str(len(thing.get("data", {}))), created(thing, now)]


CONFIG_MAP = Kind(
    group="",
    version="v1",
    name="ConfigMap",
    plural="configmaps",
    singular="configmap",
    struct_name="io.k8s.api.core.v1.ConfigMap",
    namespaced=True,
    short=("cm",),
    columns=(NAME, Column(name="Data", description="How many keys it has."), AGE),
    row=_config_map_row,
    check=_check_config_map,
    check_update=lambda new, old: _check_immutable(new, old, ("data", "binaryData")),
)
SECRET = Kind(
    group="",
    version="v1",
    name="Secret",
    plural="secrets",
    singular="secret",
    struct_name="io.k8s.api.core.v1.Secret",
    namespaced=True,
    columns=(
        NAME,
        Column(name="Type", description="What the data is for."),
        Column(name="Data", description="How many keys it has."),
        AGE,
    ),
    row=_secret_row,
    defaults=_default_secret,
    check=_check_secret,
    check_update=_check_secret_update,
    fields={"type": at("type")},
)
