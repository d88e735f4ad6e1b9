"""Kubernetes' protobuf bodies: what an encoder of the same table writes is read back, and hostile bytes end in Malformed."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nacre.api import protobuf, schema
from nacre.api.protobuf import MAGIC, Malformed, decode_object, numbers
from nacre.api.schema import Type

CORE = "io.k8s.api.core.v1."


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, data: bytes | int) -> bytes:
    if isinstance(data, int):
        return varint(number << 3) + varint(data)
    return varint(number << 3 | 2) + varint(len(data)) + data


def encode(kind: Type, value: Any) -> bytes | int:
    """A value as the wire has it; the reverse of the decoder, written for the test."""
    if kind.word == "struct":
        return message(value, kind.ref)
    if kind.word == "bytes":
        return base64.b64decode(value)
    if kind.word == "quantity":
        return field(1, value.encode())
    if kind.word == "intstr":
        return field(1, 1) + field(3, value.encode()) if isinstance(value, str) else field(1, 0) + field(2, value)
    return value.encode() if isinstance(value, str) else int(value)


def message(tree: dict[str, Any], name: str) -> bytes:
    return _fields(tree, name, schema.struct(name).fields)


def _fields(tree: dict[str, Any], name: str, types: dict[str, Type]) -> bytes:
    table, out = numbers()[name], b""
    for number, title in table.fields.items():
        if title not in tree:
            continue
        kind, value = types[title], tree[title]
        if kind.word == "list":
            assert kind.items is not None
            out += b"".join(field(number, encode(kind.items, item)) for item in value)
        elif kind.word == "map":
            assert kind.items is not None
            out += b"".join(
                field(number, field(1, key.encode()) + field(2, encode(kind.items, item))) for key, item in value.items()
            )
        else:
            out += field(number, encode(kind, value))
    for number, inner in table.inline.items():
        body = _fields(tree, inner, types)
        out += field(number, body) if body else b""
    return out


def envelope(api_version: str, kind: str, body: bytes) -> bytes:
    meta = field(1, api_version.encode()) + field(2, kind.encode())
    return MAGIC + field(1, meta) + field(2, body) + field(3, b"") + field(4, b"")


words = st.text(min_size=1, max_size=5)
pods = st.fixed_dictionaries(
    {
        "metadata": st.fixed_dictionaries(
            {"name": words}, optional={"labels": st.dictionaries(words, st.text(max_size=3), min_size=1)}
        )
    },
    optional={
        "spec": st.fixed_dictionaries(
            {"containers": st.lists(st.fixed_dictionaries({"name": words, "image": words}), min_size=1, max_size=3)},
            optional={
                "hostNetwork": st.booleans(),
                "activeDeadlineSeconds": st.integers(-(1 << 63), (1 << 63) - 1),
                "nodeSelector": st.dictionaries(words, words, min_size=1),
                "volumes": st.just([{"name": "v", "secret": {"secretName": "s", "defaultMode": 256}}]),
            },
        )
    },
)


@given(pods)
def test_a_pod_is_read_as_it_was_written(pod: dict[str, Any]) -> None:
    assert decode_object(envelope("v1", "Pod", message(pod, CORE + "Pod"))) == {"apiVersion": "v1", "kind": "Pod", **pod}


@given(st.dictionaries(words, st.binary(max_size=9), min_size=1))
def test_secret_data_stays_bytes(data: dict[str, bytes]) -> None:
    shown = {key: base64.b64encode(value).decode() for key, value in data.items()}
    body = envelope("v1", "Secret", message({"data": shown}, CORE + "Secret"))
    assert decode_object(body)["data"] == shown


def test_probes_quantities_times_and_inlined_parts_are_where_json_has_them() -> None:
    probe = {"httpGet": {"port": "http", "path": "/"}, "periodSeconds": 3}
    container = {"name": "c", "livenessProbe": probe, "resources": {"limits": {"memory": "64Mi"}}}
    container["env"] = [{"name": "E", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k"}}}]
    pod = {"spec": {"containers": [container], "volumes": [{"name": "v", "hostPath": {"path": "/x"}}]}}
    assert decode_object(envelope("v1", "Pod", message(pod, CORE + "Pod")))["spec"] == pod["spec"]


def test_times_are_told_as_kubernetes_writes_them_and_zero_times_not_at_all() -> None:
    meta = field(1, b"x") + field(8, field(1, 1_700_000_000))
    found = decode_object(envelope("v1", "ConfigMap", field(1, meta)))
    assert found["metadata"]["creationTimestamp"] == "2023-11-14T22:13:20Z"
    assert "creationTimestamp" not in decode_object(envelope("v1", "ConfigMap", field(1, field(8, b""))))["metadata"]


def test_fields_it_does_not_know_are_dropped() -> None:
    assert decode_object(envelope("v1", "ConfigMap", field(999, b"new"))) == {"apiVersion": "v1", "kind": "ConfigMap"}


def test_delete_options_are_of_every_version() -> None:
    found = decode_object(envelope("policy/v1", "DeleteOptions", field(1, 0)))
    assert found["gracePeriodSeconds"] == 0


def test_every_message_of_the_table_has_its_struct() -> None:
    inner = {name for table in numbers().values() for name in table.inline.values()}
    structs = schema.structs()
    for name, table in numbers().items():
        assert name in structs or name in inner, name
        if name in structs and name not in inner:
            assert set(table.fields.values()) <= structs[name].fields.keys(), name


@settings(max_examples=300)
@given(st.binary(max_size=60), st.sampled_from(["Pod", "Event", "Node", "Secret"]))
def test_hostile_bytes_are_malformed_and_nothing_worse(data: bytes, kind: str) -> None:
    for body in (data, MAGIC + data, envelope("v1", kind, data)):
        try:
            decode_object(body)
        except Malformed:
            pass


@given(pods, st.data())
def test_a_cut_or_changed_message_is_malformed_or_another_object(pod: dict[str, Any], data: st.DataObject) -> None:
    body = bytearray(envelope("v1", "Pod", message(pod, CORE + "Pod")))
    body[data.draw(st.integers(4, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    for hostile in (bytes(body), bytes(body[: data.draw(st.integers(0, len(body)))])):
        try:
            decode_object(hostile)
        except Malformed:
            pass


def test_deep_nesting_is_malformed() -> None:
    body = b""
    for _ in range(protobuf.DEPTH * 40):
        body = field(4, body)  # a struct within itself is not in the table: the reader stops at what it does not know
    with pytest.raises(Malformed):
        decode_object(envelope("v1", "Pod", field(2, field(2, b"\x08" + body[:9]))))
