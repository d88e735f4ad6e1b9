"""Netlink: messages to bytes and back without I/O, and a small blocking socket that drives them (netlink(7), RFC 3549).

A family's attributes are a `Table`, name to (number, kind); a kind is a number, text, bytes, an address, a nested table or a list of
them. `encode` and `decode` walk the tables, so that a message is a plain dictionary on this side. Bytes from outside either decode or
raise Malformed; attributes that a table lacks stay as bytes under "#NUMBER".

The kernel answers a request while it is being sent, so after the send every acknowledgement is already in the socket: `transact` never
waits. A socket is used by one thread at a time.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from types import TracebackType
from typing import Any, Protocol

from nacre.linux.libc import SyscallError
from nacre.linux.namespaces import Clone, setns

RECEIVE_BYTES = 128 * 1024  # the kernel never makes a dump's datagram larger than 32 KiB
DUMP_ATTEMPTS = 5
SOL_NETLINK = 270
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NETLINK_GET_STRICT_CHK = 12


class Flag(IntFlag):
    """nlmsg_flags: CREATE and its neighbours for requests that make something, DUMP for those that list."""

    REQUEST = 0x1
    MULTI = 0x2
    ACK = 0x4
    DUMP_INTR = 0x10
    REPLACE = 0x100
    EXCL = 0x200
    CREATE = 0x400
    APPEND = 0x800
    DUMP = 0x300


CAPPED = 0x100  # flags of an acknowledgement: the request is quoted by its header only
ACK_TLVS = 0x200  # and attributes follow


class Control(IntEnum):
    """nlmsg_type values below those of any family."""

    NOOP = 1
    ERROR = 2
    DONE = 3
    OVERRUN = 4


class Malformed(ValueError):
    """Bytes that are not what netlink's framing or a table says."""


class NetlinkError(SyscallError):
    """A request that the kernel refused: errno, the request as `call`, its object, and the kernel's own words in `detail`."""

    def __init__(self, call: str, number: int, target: str | None = None, detail: str = "") -> None:
        super().__init__(call, number, target)
        self.detail = detail

    def __str__(self) -> str:
        place = f" {self.filename}" if self.filename else ""
        words = f": {self.detail}" if self.detail else ""
        return f"{self.call}{place}: {self.strerror} (errno {self.errno}){words}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.call, self.errno, self.filename, self.detail)


class Kind(Protocol):
    """How one attribute's value crosses the wire."""

    def encode(self, value: Any) -> bytes: ...
    def decode(self, data: bytes) -> Any: ...


class Number:
    """An integer of fixed size; "=" formats are in the host's byte order, ">" in the network's."""

    def __init__(self, form: str) -> None:
        self._struct = struct.Struct(form)

    def encode(self, value: int) -> bytes:
        return self._struct.pack(value)

    def decode(self, data: bytes) -> int:
        if len(data) < self._struct.size:
            raise Malformed(f"{len(data)} bytes where a number of {self._struct.size} stands")
        number: int = self._struct.unpack_from(data)[0]
        return number


class Text:
    """A string with a final NUL."""

    def encode(self, value: str) -> bytes:
        return value.encode() + b"\0"

    def decode(self, data: bytes) -> str:
        return data.partition(b"\0")[0].decode(errors="replace")


class Raw:
    """Bytes as they are."""

    def encode(self, value: bytes) -> bytes:
        return bytes(value)

    def decode(self, data: bytes) -> bytes:
        return data


class Mac:
    """A hardware address as text, "02:00:…"; anything not of six bytes stays hexadecimal without colons."""

    def encode(self, value: str) -> bytes:
        return bytes.fromhex(value.replace(":", ""))

    def decode(self, data: bytes) -> str:
        return data.hex(":") if len(data) == 6 else data.hex()


class Address:
    """An IPv4 or IPv6 address as text, told apart by length."""

    def encode(self, value: str) -> bytes:
        return ipaddress.ip_address(value).packed

    def decode(self, data: bytes) -> str:
        if len(data) == 4:
            return socket.inet_ntop(socket.AF_INET, data)
        if len(data) == 16:
            return socket.inet_ntop(socket.AF_INET6, data)
        raise Malformed(f"an address of {len(data)} bytes")


class Marker:
    """An attribute without a value, true by being there."""

    def encode(self, _value: Any) -> bytes:
        return b""

    def decode(self, _data: bytes) -> bool:
        return True


class Record:
    """A C structure as a tuple; `form` is struct's format. Shorter data is padded with zeros: older kernels know fewer fields."""

    def __init__(self, form: str) -> None:
        self._struct = struct.Struct(form)

    def encode(self, value: Sequence[Any]) -> bytes:
        return self._struct.pack(*value)

    def decode(self, data: bytes) -> tuple[Any, ...]:
        return self._struct.unpack_from(data.ljust(self._struct.size, b"\0"))


U8, U16, U32, U64, S32 = Number("=B"), Number("=H"), Number("=I"), Number("=Q"), Number("=i")
BE16, BE32, BE64 = Number(">H"), Number(">I"), Number(">Q")
TEXT, RAW, MAC, ADDRESS, MARKER = Text(), Raw(), Mac(), Address(), Marker()

_ATTRIBUTE = struct.Struct("=HH")
_HEADER = struct.Struct("=IHHII")
NESTED = 0x8000
_NUMBER_MASK = 0x3FFF
_DEPTH_LIMIT = 12


class Table:
    """A family's attributes: name to (number, kind). Is itself a kind: a nested attribute whose value is a dictionary."""

    flag = NESTED

    def __init__(self, attributes: Mapping[str, tuple[int, Kind]]) -> None:
        self.by_name = dict(attributes)
        self.by_number = {number: (name, kind) for name, (number, kind) in attributes.items()}

    def encode(self, value: Mapping[str, Any]) -> bytes:
        parts = []
        for name, item in value.items():
            number, kind = self.by_name[name]
            parts.append(attribute(number | getattr(kind, "flag", 0), kind.encode(item)))
        return b"".join(parts)

    def decode(self, data: bytes, depth: int = 0) -> dict[str, Any]:
        if depth > _DEPTH_LIMIT:
            raise Malformed(f"attributes nested more than {_DEPTH_LIMIT} deep")
        found: dict[str, Any] = {}
        for number, value in attributes(data):
            name, kind = self.by_number.get(number, (f"#{number}", RAW))
            found[name] = kind.decode(value, depth + 1) if isinstance(kind, Table | ListOf) else kind.decode(value)
        return found


class ListOf:
    """A nested attribute that repeats one kind under `number`; the value is a list."""

    flag = NESTED

    def __init__(self, kind: Kind, number: int = 1) -> None:
        self._kind, self._number = kind, number

    def encode(self, value: Iterable[Any]) -> bytes:
        inner = self._number | getattr(self._kind, "flag", 0)
        return b"".join(attribute(inner, self._kind.encode(item)) for item in value)

    def decode(self, data: bytes, depth: int = 0) -> list[Any]:
        kind = self._kind
        if isinstance(kind, Table | ListOf):
            return [kind.decode(value, depth + 1) for _number, value in attributes(data)]
        return [kind.decode(value) for _number, value in attributes(data)]


def attribute(number: int, data: bytes) -> bytes:
    """One attribute: length, number, value, padded to four bytes."""
    size = 4 + len(data)
    if size > 0xFFFF:
        raise Malformed(f"an attribute of {size} bytes; netlink's limit is 65535")
    return _ATTRIBUTE.pack(size, number) + data + b"\0" * (-size % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number without flags, value) of each attribute in `data`."""
    at = 0
    while at + 4 <= len(data):
        size, number = _ATTRIBUTE.unpack_from(data, at)
        if size < 4 or at + size > len(data):
            raise Malformed(f"attribute {number & _NUMBER_MASK} at byte {at} says {size} bytes, {len(data) - at} are there")
        yield number & _NUMBER_MASK, data[at + 4 : at + size]
        at += (size + 3) & ~3
    if data[at:].strip(b"\0"):
        raise Malformed(f"{len(data) - at} bytes behind the last attribute")


class Layout:
    """The body of one family's messages: a fixed structure, then attributes of `table`."""

    def __init__(self, form: str, names: Sequence[str], table: Table) -> None:
        self._struct, self._names, self.table = struct.Struct(form), tuple(names), table

    def encode(self, fixed: Mapping[str, int], values: Mapping[str, Any]) -> bytes:
        head = self._struct.pack(*(fixed.get(name, 0) for name in self._names))
        return head + b"\0" * (-len(head) % 4) + self.table.encode(values)

    def decode(self, body: bytes) -> dict[str, Any]:
        """The structure's fields and the attributes in one dictionary."""
        if len(body) < self._struct.size:
            raise Malformed(f"a body of {len(body)} bytes, at least {self._struct.size} expected")
        fixed = dict(zip(self._names, self._struct.unpack_from(body), strict=True))
        return fixed | self.table.decode(body[(self._struct.size + 3) & ~3 :])


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: `call` and `target` are for words only, as in "RTM_NEWLINK nacre0"."""

    type: int
    flags: int
    body: bytes = field(repr=False)
    call: str
    target: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it came."""

    type: int
    flags: int
    sequence: int
    port: int
    body: bytes = field(repr=False)


def pack(request: Request, sequence: int, *, acknowledge: bool = False) -> bytes:
    flags = request.flags | Flag.REQUEST | (Flag.ACK if acknowledge else 0)
    size = _HEADER.size + len(request.body)
    return _HEADER.pack(size, request.type, flags, sequence, 0) + request.body + b"\0" * (-size % 4)


def unpack(data: bytes) -> Iterator[Message]:
    """The messages of one datagram."""
    at = 0
    while at < len(data):
        if len(data) - at < _HEADER.size:
            raise Malformed(f"{len(data) - at} bytes where a message header of {_HEADER.size} stands")
        size, kind, flags, sequence, port = _HEADER.unpack_from(data, at)
        if size < _HEADER.size or at + size > len(data):
            raise Malformed(f"message at byte {at} says {size} bytes, {len(data) - at} are there")
        yield Message(kind, flags, sequence, port, data[at + _HEADER.size : at + size])
        at += (size + 3) & ~3


_EXTENDED = Table({"message": (1, TEXT), "offset": (2, U32), "missing_type": (5, U32), "missing_nest": (6, U32)})


def acknowledgement(message: Message) -> tuple[int, str]:
    """(errno or 0, the kernel's words) of a Control.ERROR or Control.DONE message (extended acknowledgements)."""
    if len(message.body) < 4:
        raise Malformed(f"an acknowledgement of {len(message.body)} bytes")
    (code,) = struct.unpack_from("=i", message.body)
    if not message.flags & ACK_TLVS:
        return -code, ""
    start = 4
    if message.type == Control.ERROR:
        if len(message.body) < 4 + _HEADER.size:
            raise Malformed(f"an acknowledgement of {len(message.body)} bytes")
        quoted = _HEADER.unpack_from(message.body, 4)[0]
        start += _HEADER.size if message.flags & CAPPED else (quoted + 3) & ~3
    extended = _EXTENDED.decode(message.body[start:])
    words = [str(extended["message"])] if extended.get("message") else []
    if "missing_type" in extended:
        words.append(f"attribute {extended['missing_type']} is missing")
    if "offset" in extended:
        words.append(f"at byte {extended['offset']} of the request")
    return -code, ", ".join(words)


class NetlinkSocket:
    """A netlink socket, in the network namespace of `netns_fd` if given; that descriptor stays the caller's.

    A socket belongs for good to the namespace it was made in: the calling thread joins the other namespace for that one call.
    """

    def __init__(self, netns_fd: int | None = None, *, protocol: int = socket.NETLINK_ROUTE) -> None:
        if netns_fd is None:
            self._socket = self._open(protocol)
        else:
            with entered(netns_fd):
                self._socket = self._open(protocol)
        self._sequence = 0

    @staticmethod
    def _open(protocol: int) -> socket.socket:
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
            try:
                made.setsockopt(SOL_NETLINK, option, 1)
            except OSError:
                continue  # kernels before 4.12 and 4.20: refusals come without words, dumps unfiltered
        return made

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> NetlinkSocket:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    def transact(self, *requests: Request) -> list[Message]:
        """Send all in one datagram; each is done in order, even behind a refused one. Answers what came beside acknowledgements.

        Raises NetlinkError for the first refused request.
        """
        return self._exchange(requests, len(requests) - 1)

    def batch(self, begin: Request, requests: Sequence[Request], end: Request) -> None:
        """A transaction of nfnetlink: all or nothing. Raises NetlinkError for the first refused request."""
        if requests:
            self._exchange((begin, *requests, end), len(requests))

    def _exchange(self, requests: Sequence[Request], acknowledged: int) -> list[Message]:
        """Only the request at index `acknowledged` asks for an answer; refusals of the others come unasked."""
        first = self._sequence + 1
        sent = dict(enumerate(requests, first))
        self._sequence += len(requests)
        awaited = first + acknowledged
        self._socket.sendto(b"".join(pack(request, n, acknowledge=n == awaited) for n, request in sent.items()), (0, 0))
        answers: list[Message] = []
        refused: NetlinkError | None = None
        done = False
        for message in self._waiting():
            request = sent.get(message.sequence)
            if request is None:
                continue  # of an earlier exchange that was broken off
            if message.type != Control.ERROR:
                answers.append(message)
                continue
            code, words = acknowledgement(message)
            if code and refused is None:
                refused = NetlinkError(request.call, code, request.target or None, words)
            done = done or message.sequence == awaited
        if refused:
            raise refused
        if not done:
            raise NetlinkError(requests[acknowledged].call, errno.EPROTO, None, "the kernel acknowledged nothing")
        return answers

    def _waiting(self) -> Iterator[Message]:
        """What lies in the socket by now."""
        while True:
            try:
                data = self._socket.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            yield from unpack(data)

    def dump(self, request: Request) -> list[Message]:
        """Every message of a listing; begun anew when the kernel says that it changed underneath."""
        for _attempt in range(DUMP_ATTEMPTS):
            found = self._dump_once(request)
            if found is not None:
                return found
        raise NetlinkError(request.call, errno.EAGAIN, request.target or None, f"changed during each of {DUMP_ATTEMPTS} listings")

    def _dump_once(self, request: Request) -> list[Message] | None:
        self._sequence += 1
        asked = Request(request.type, request.flags | Flag.DUMP, request.body, request.call, request.target)
        self._socket.sendto(pack(asked, self._sequence), (0, 0))
        found: list[Message] = []
        interrupted = False
        while True:
            for message in unpack(self._socket.recv(RECEIVE_BYTES)):
                if message.sequence != self._sequence:
                    continue  # the rest of an abandoned listing
                interrupted = interrupted or bool(message.flags & Flag.DUMP_INTR)
                if message.type in (Control.DONE, Control.ERROR):
                    code, words = acknowledgement(message) if len(message.body) >= 4 else (0, "")
                    if code > 0:
                        raise NetlinkError(request.call, code, request.target or None, words)
                    return None if interrupted else found
                found.append(message)


class entered:
    """This thread inside the network namespace `netns_fd` for the block; the descriptor stays the caller's.

    A thread that could not come back would take a pod's network for the host's, so failing to come back aborts the process.
    """

    def __init__(self, netns_fd: int) -> None:
        self._target = netns_fd
        self._home = -1

    def __enter__(self) -> None:
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(self._target, Clone.NEWNET)
        except BaseException:
            os.close(self._home)
            raise

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        try:
            setns(self._home, Clone.NEWNET)
        except OSError as error:
            os.write(2, f"cannot return to this process's network namespace: {error}\n".encode())
            os.abort()
        os.close(self._home)
