"""Kubernetes' protobuf bodies into trees: magic, runtime.Unknown, then the object by the field numbers of `protobuf_numbers.txt`.

Types come from the structure (`schema`), numbers from that table, so no message is compiled. Answers are always JSON, which
every client that sends protobuf reads. Hostile bytes end in Malformed, never in anything else.
"""

from __future__ import annotations

import base64
import functools
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from nacre.api import schema
from nacre.api.schema import META, Type
from nacre.api.shape import written

MAGIC = b"k8s\0"
DEPTH = 64
_NUMBERS = os.path.join(os.path.dirname(__file__), "protobuf_numbers.txt")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ZERO_TIME_S = -62135596800  # Go's zero time, which Kubernetes takes for "none"
_SIGNED = {"int32", "int64"}

Field = tuple[int, int, Any]  # number, wire type, int or bytes


class Malformed(ValueError):
    """The bytes are no message of the expected kind; the text says where."""


class Numbers:
    """One message: JSON field by number, and nested messages that JSON inlines."""

    __slots__ = ("fields", "inline")

    def __init__(self) -> None:
        self.fields: dict[int, str] = {}
        self.inline: dict[int, str] = {}


@functools.cache
def numbers() -> dict[str, Numbers]:
    """The table by full struct name; read at the first protobuf body."""
    found: dict[str, Numbers] = {}
    package, current = "", Numbers()
    with open(_NUMBERS, encoding="ascii") as file:
        for line in file:
            if line.startswith("#"):
                continue
            if line.startswith("["):
                package = line.strip("[]\n") + "."
                continue
            head, colon, rest = line.partition(":")
            if colon:
                current = found[package + head] = Numbers()
            for word in (rest if colon else line).split():
                name, _, number = word.partition("=")
                if name.startswith("+"):
                    current.inline[int(number)] = package + name[1:]
                else:
                    current.fields[int(number)] = name
    return found


def decode_object(data: bytes) -> dict[str, Any]:
    """The object in a body, with apiVersion and kind; raises Malformed."""
    if data[:4] != MAGIC:
        raise Malformed("the body does not begin with the magic number")
    envelope = {number: value for number, wire, value in _fields(data[4:]) if wire == _BYTES}
    meta = {number: value for number, wire, value in _fields(envelope.get(1, b"")) if wire == _BYTES}
    api_version, name = _text(meta.get(1, b"")), _text(meta.get(2, b""))
    if envelope.get(3):
        raise Malformed(f"content encoding {_text(envelope[3])!r} is not known")
    struct = _struct_of(api_version, name)
    return {"apiVersion": api_version, "kind": name} | _message(envelope.get(2, b""), struct, 0)


def _struct_of(api_version: str, name: str) -> str:
    if name == "DeleteOptions":
        return META + name
    group, _, version = api_version.rpartition("/")
    wanted = (group, version, name)
    for struct in schema.structs().values():
        if struct.gvk == wanted and struct.name in numbers():
            return struct.name
    raise Malformed(f'no kind "{name}" is registered for version "{api_version}"')


def _message(data: bytes, name: str, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _into(found, data, name, schema.struct(name).fields, depth)
    return found


def _into(found: dict[str, Any], data: bytes, name: str, fields: dict[str, Type], depth: int) -> None:
    """Put the fields of message `name` into `found`; `fields` are the types of the struct that JSON shows."""
    if depth > DEPTH:
        raise Malformed("messages are nested too deeply")
    table = numbers()[name]
    for number, wire, value in _fields(data):
        if number in table.inline:
            _into(found, _expect_bytes(wire, value), table.inline[number], fields, depth + 1)
            continue
        field = table.fields.get(number)
        kind = fields.get(field) if field is not None else None
        if field is None or kind is None:
            continue  # a field newer than this structure: as Kubernetes, protobuf drops it
        if kind.word == "list" and kind.items is not None:
            found.setdefault(field, []).extend(_elements(kind.items, wire, value, depth))
        elif kind.word == "map" and kind.items is not None:
            key, item = _map_entry(kind.items, _expect_bytes(wire, value), depth)
            found.setdefault(field, {})[key] = item
        else:
            item = _value(kind, wire, value, depth)
            if item is not None and item != "":  # the encoder writes empty strings and zero times for "unset"
                found[field] = item


def _elements(items: Type, wire: int, value: Any, depth: int) -> list[Any]:
    if items.word in _SIGNED | {"boolean"} and wire == _BYTES:  # packed
        found, place = [], 0
        while place < len(value):
            number, place = _varint(value, place)
            found.append(_number(items.word, number))
        return found
    return [_value(items, wire, value, depth)]


def _map_entry(items: Type, data: bytes, depth: int) -> tuple[str, Any]:
    key, item = "", None
    for number, wire, value in _fields(data):
        if number == 1:
            key = _text(_expect_bytes(wire, value))
        elif number == 2:
            item = _value(items, wire, value, depth + 1)
    if item is None:
        item = {} if items.word in ("struct", "any", "map") else "0" if items.word == "quantity" else ""
    return key, item


def _value(kind: Type, wire: int, value: Any, depth: int) -> Any:
    word = kind.word
    if word in _SIGNED or word == "boolean":
        if wire != _VARINT:
            raise Malformed(f"wire type {wire} for a number")
        return _number(word, value)
    if word == "number":
        raise Malformed("floating point fields are not decoded")
    data = _expect_bytes(wire, value)
    if word == "string":
        return _text(data)
    if word == "bytes":
        return base64.b64encode(data).decode()
    if word == "struct":
        return _message(data, kind.ref, depth + 1)
    if word == "quantity":
        return _text(_first(data, 1, b""))
    if word in ("time", "microtime"):
        return _time(data, word)
    if word == "intstr":
        return _text(_first(data, 3, b"")) if _first(data, 1, 0) else _number("int32", _first(data, 2, 0))
    if word == "any":
        return _embedded(_first(data, 1, b""))
    raise Malformed(f"a {word} within a {word} is not decoded")


def _embedded(data: bytes) -> Any:
    try:
        return json.loads(data) if data else {}
    except (ValueError, RecursionError) as error:
        raise Malformed("embedded JSON cannot be read") from error


def _first(data: bytes, wanted: int, default: Any) -> Any:
    """The last value of field `wanted`, which must have the default's type."""
    found = default
    for number, _, value in _fields(data):
        if number == wanted:
            found = value
    if type(found) is not type(default):
        raise Malformed(f"field {wanted} has another wire type")
    return found


def _time(data: bytes, word: str) -> str | None:
    seconds, nanos = _number("int64", _first(data, 1, 0)), _number("int32", _first(data, 2, 0))
    if not data or seconds == _ZERO_TIME_S:
        return None
    try:
        instant = _EPOCH + timedelta(seconds=seconds, microseconds=nanos // 1000)
    except OverflowError as error:
        raise Malformed("a time out of range") from error
    return written(instant, word)


def _number(word: str, value: int) -> int | bool:
    if word == "boolean":
        return bool(value)
    bits = 64 if word == "int64" else 32
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Malformed("a string is not UTF-8") from error


def _expect_bytes(wire: int, value: Any) -> bytes:
    if wire != _BYTES:
        raise Malformed(f"wire type {wire} where bytes are expected")
    data: bytes = value
    return data


def _fields(data: bytes) -> Iterator[Field]:
    """The message's fields in order, undecoded."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise Malformed("field number 0")
        if wire == _VARINT:
            value, place = _varint(data, place)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, place = _varint(data, place)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise Malformed(f"wire type {wire}")
        if size > len(data) - place:
            raise Malformed("the message is cut short")
        yield number, wire, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data):
            raise Malformed("a number is cut short")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, place
        shift += 7
        if shift > 63:
            raise Malformed("a number is longer than 64 bits")
