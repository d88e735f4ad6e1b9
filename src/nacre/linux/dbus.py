"""The D-Bus wire format: values, messages and the opening handshake, bytes in and values out; no socket is touched here.

Only what a client of systemd needs is there: all value types but file descriptors, method calls, their answers, signals. What
arrives is judged: wrong padding, lengths beyond the message, strings that are not text, containers nested beyond the protocol's
limit each raise BusBroken. (D-Bus specification, "Type System", "Message Protocol", "Authentication Protocol".)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from nacre.oci.errors import Failure

MOST_BYTES = 4 << 20  # the protocol allows 128 MiB; nothing that systemd says to us comes near this
_DEEPEST = 32
_NUMBERS = {"y": "B", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q", "d": "d"}
_TEXTS = {"s", "o"}
_HEADER = "yyyyuua(yv)"
_FIXED_BYTES = 16  # of a header: up to and with the length of its array of fields


class BusBroken(Failure):
    """What came over the bus is no D-Bus, or the bus went away."""


class Variant(NamedTuple):
    """A value that carries its type: one complete type in D-Bus' notation."""

    signature: str
    value: Any


class Kind(IntEnum):
    METHOD_CALL = 1
    METHOD_RETURN = 2
    ERROR = 3
    SIGNAL = 4


class Field(IntEnum):
    PATH = 1
    INTERFACE = 2
    MEMBER = 3
    ERROR_NAME = 4
    REPLY_SERIAL = 5
    DESTINATION = 6
    SENDER = 7
    SIGNATURE = 8


_FIELDS = frozenset(Field)
_FIELD_TYPES = {Field.PATH: "o", Field.REPLY_SERIAL: "u", Field.SIGNATURE: "g"}  # all others: "s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message; `body` has a value for each complete type of `signature`."""

    kind: Kind
    serial: int
    path: str = ""
    interface: str = ""
    member: str = ""
    error_name: str = ""
    reply_serial: int = 0
    destination: str = ""
    sender: str = ""
    signature: str = ""
    body: tuple[Any, ...] = field(default=())


def _broken(cause: str) -> BusBroken:
    return BusBroken(what="read a message from D-Bus", cause=cause)


# -- signatures


def _type_end(signature: str, at: int, depth: int = 0) -> int:
    """Where the complete type that begins at `at` ends. Raises BusBroken."""
    code = signature[at : at + 1]
    if depth > _DEEPEST:
        raise _broken("its signature is nested too deep")
    if code and code in "ybnqiuxtdsogv":
        return at + 1
    if code == "a" and signature[at + 1 : at + 2] == "{":
        end = _type_end(signature, _type_end(signature, at + 2, depth + 1), depth + 1)
        if signature[at + 2] in "(av" or signature[end : end + 1] != "}":
            raise _broken(f"the signature {signature!r} has a dictionary that is none")
        return end + 1
    if code == "a":
        return _type_end(signature, at + 1, depth + 1)
    if code == "(":
        end = _type_end(signature, at + 1, depth + 1)
        while signature[end : end + 1] != ")":
            end = _type_end(signature, end, depth + 1)
        return end + 1
    raise _broken(f"the signature {signature!r} breaks off or has an unknown type at {at}")


def types_of(signature: str) -> list[str]:
    """The complete types that `signature` is made of. Raises BusBroken for one that is malformed."""
    types, at = [], 0
    if len(signature) > 255:
        raise _broken("its signature is longer than 255 bytes")
    while at < len(signature):
        end = _type_end(signature, at)
        types.append(signature[at:end])
        at = end
    return types


def _alignment(code: str) -> int:
    if code in "({":
        return 8
    if code in _NUMBERS:
        return struct.calcsize("=" + _NUMBERS[code])
    return 1 if code in "gv" else 4


# -- writing


def _put(out: bytearray, kind: str, value: Any) -> None:
    """Append `value` of the complete type `kind`, with the padding that its place asks for."""
    code = kind[0]
    out += bytes(-len(out) % _alignment(code))
    if code in _NUMBERS:
        out += struct.pack("<" + _NUMBERS[code], value)
    elif code == "b":
        out += struct.pack("<I", bool(value))
    elif code in _TEXTS:
        text = value.encode()
        out += struct.pack("<I", len(text)) + text + b"\0"
    elif code == "g":
        out += bytes((len(value),)) + value.encode("ascii") + b"\0"
    elif code == "v":
        _put(out, "g", value.signature)
        _put(out, value.signature, value.value)
    elif code == "(":
        for one, part in zip(types_of(kind[1:-1]), value, strict=True):
            _put(out, one, part)
    else:
        _put_array(out, kind[1:], value)


def _put_array(out: bytearray, element: str, value: Any) -> None:
    out += bytes(4)
    place = len(out) - 4
    out += bytes(-len(out) % _alignment(element[0]))
    start = len(out)
    if element == "y":
        out += bytes(value)
    elif element[0] == "{":
        key_type, value_type = types_of(element[1:-1])
        for key, item in value.items():
            out += bytes(-len(out) % 8)
            _put(out, key_type, key)
            _put(out, value_type, item)
    else:
        for item in value:
            _put(out, element, item)
    struct.pack_into("<I", out, place, len(out) - start)


def encode(message: Message) -> bytes:
    """The bytes of `message`, little-endian."""
    body = bytearray()
    for kind, value in zip(types_of(message.signature), message.body, strict=True):
        _put(body, kind, value)
    fields = [
        (name, Variant(_FIELD_TYPES.get(name, "s"), value)) for name in Field if (value := getattr(message, name.name.lower()))
    ]
    out = bytearray()
    _put(out, f"({_HEADER})", (ord("l"), message.kind, 0, 1, len(body), message.serial, fields))
    out += bytes(-len(out) % 8)
    return bytes(out + body)


# -- reading


class _Reader:
    """A position in received bytes. Whatever they are, it answers with values or BusBroken."""

    def __init__(self, data: bytes, order: str) -> None:
        self._data, self._order, self.at, self._depth = data, order, 0, 0

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self.at:
            raise _broken(f"{count} bytes were promised, {len(self._data) - self.at} are there")
        self.at += count
        return self._data[self.at - count : self.at]

    def align(self, boundary: int) -> None:
        if self._take(-self.at % boundary).strip(b"\0"):
            raise _broken("its padding is not zero")

    def _number(self, code: str) -> Any:
        form = self._order + _NUMBERS[code]
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self, length: int, encoding: str) -> str:
        raw = self._take(length)
        if self._take(1) != b"\0" or b"\0" in raw:
            raise _broken("a string does not end where its length says")
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError as error:
            raise _broken(f"a string is not {encoding}") from error

    def value(self, kind: str) -> Any:
        """The value of the complete type `kind` that begins here."""
        code = kind[0]
        self.align(_alignment(code))
        if code in _NUMBERS:
            return self._number(code)
        if code == "b":
            number = self._number("u")
            if number > 1:
                raise _broken(f"a boolean is {number}")
            return number == 1
        if code in _TEXTS:
            return self._text(self._number("u"), "utf-8")
        if code == "g":
            return self._text(self._number("y"), "ascii")
        self._depth += 1
        if self._depth > 2 * _DEEPEST:
            raise _broken("its containers are nested too deep")
        try:
            return self._container(kind)
        finally:
            self._depth -= 1

    def _container(self, kind: str) -> Any:
        if kind[0] == "(":
            return tuple(self.value(one) for one in types_of(kind[1:-1]))
        if kind[0] == "v":
            signature = self.value("g")
            if len(types_of(signature)) != 1:
                raise _broken(f"a variant has the signature {signature!r}")
            return Variant(signature, self.value(signature))
        length = self._number("u")
        self.align(_alignment(kind[1]))
        if kind == "ay":
            return self._take(length)
        end = self.at + length
        if end > len(self._data):
            raise _broken(f"an array of {length} bytes ends beyond its message")
        items = []
        while self.at < end:
            before = self.at
            items.append(self._entry(kind[1:]))
            if self.at > end or self.at == before:
                raise _broken("an array's last element ends beyond it")
        return dict(items) if kind[1] == "{" else items

    def _entry(self, element: str) -> Any:
        if element[0] != "{":
            return self.value(element)
        self.align(8)
        key, item = types_of(element[1:-1])
        return self.value(key), self.value(item)


def decode(data: bytes) -> tuple[Message, int] | None:
    """The first message in `data` and how many bytes it takes; None while it is incomplete. Raises BusBroken."""
    if len(data) < _FIXED_BYTES:
        return None
    order = {b"l": "<", b"B": ">"}.get(data[:1])
    if order is None or data[3] != 1:
        raise _broken(f"it begins with {data[:4].hex(' ')}, which is no message of version 1")
    body_bytes, serial, field_bytes = struct.unpack_from(order + "III", data, 4)
    head = _FIXED_BYTES + field_bytes + -field_bytes % 8
    if head + body_bytes > MOST_BYTES:
        raise _broken(f"it is {head + body_bytes} bytes long, at most {MOST_BYTES} are read")
    if len(data) < head + body_bytes:
        return None
    reader = _Reader(data[:head], order)
    *_, listed = reader.value(f"({_HEADER})")
    reader.align(8)
    known = _fields(listed)
    signature = known.get("signature", "")
    body = _Reader(data[head : head + body_bytes], order)
    values = tuple(body.value(kind) for kind in types_of(signature))
    if body.at != body_bytes:
        raise _broken(f"{body_bytes - body.at} bytes follow its last value")
    try:
        kind = Kind(data[1])
    except ValueError:
        kind = Kind.SIGNAL  # a type from the future is passed over, as a signal nobody waits for is
        known["member"] = ""
    return Message(kind=kind, serial=serial, body=values, **known), head + body_bytes


def _fields(listed: list[tuple[int, Variant]]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for code, (signature, value) in listed:
        if code not in _FIELDS:
            continue  # "unknown fields must be ignored"
        wanted = _FIELD_TYPES.get(Field(code), "s")
        if signature != wanted:
            raise _broken(f"the header field {Field(code).name} has the type {signature!r}, not {wanted!r}")
        known[Field(code).name.lower()] = value
    return known


# -- the opening

# Who we are the bus reads off the socket (SO_PEERCRED): no id is named, so that it is right in a user namespace too.
HANDSHAKE = b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n"


def admitted(answer: bytes) -> int | None:
    """How many bytes the answer to HANDSHAKE took; None while it is incomplete. Raises BusBroken when it is a refusal."""
    lines = answer.split(b"\r\n")
    for word, line in zip((b"DATA", b"OK"), lines[:-1], strict=False):
        if line.split(b" ")[0] != word:
            raise BusBroken(
                what="open D-Bus", cause=f"the bus answered {line[:80].decode(errors='replace')!r} to our credentials"
            )
    if len(lines) < 3:
        if len(answer) > 1024:
            raise BusBroken(what="open D-Bus", cause="its answer to our credentials has no end")
        return None
    return len(lines[0]) + len(lines[1]) + 4
