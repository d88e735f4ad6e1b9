"""The agent's wire: length-prefixed frames, many streams, flow control. Sans-I/O: bytes in, events out; both ends use it.

A frame is 12 bytes, big endian, and a payload: length u32, stream u32, kind u8, three zero bytes. Stream 0 carries control messages,
each one JSON object (kind DATA, at most CONTROL_LIMIT bytes, no flow control). Other streams are opened by the host, which names
their numbers in a request; numbers only rise within a session, and a number used once is never used again. A stream has one direction or
both; each direction is its own:

    DATA    1…DATA_LIMIT bytes; the sender has credit for them (WINDOW bytes at first)
    CREDIT  u32: the receiver has dealt with so many bytes, as many more may come
    END     nothing more comes
    STOP    the receiver wants nothing more; the sender answers END and what is on its way meanwhile is dropped

The other end is hostile: every length, number, kind and JSON shape is checked before it is believed, and what is kept for it is bounded. The
first wrong byte raises BrokenChannel; a channel that raised once takes nothing more.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn

from nacre.oci.errors import Failure, Invalid

CONTROL = 0
CONTROL_LIMIT = 8 << 20  # a volume's files travel whole: a Secret or ConfigMap has at most 1 MiB, a projection a few of them
DATA_LIMIT = 32 << 10
WINDOW = 128 << 10
STREAMS = 1024  # open at once
DEPTH = 64  # of nested JSON
_HEADER = struct.Struct("!IIB3s")
_CREDIT = struct.Struct("!I")
_ZERO = b"\0\0\0"


class BrokenChannel(Failure):
    """The other end of an agent channel does not keep to the protocol."""


class Kind(IntEnum):
    DATA = 0
    CREDIT = 1
    END = 2
    STOP = 3


@dataclass(frozen=True, slots=True)
class Message:
    """One control message."""

    document: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of a stream. Whoever has dealt with them says so with `Channel.consumed`."""

    stream: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """The other end sends nothing more on this stream."""

    stream: int


@dataclass(frozen=True, slots=True)
class Writable:
    """There is credit again (`Channel.room`)."""

    stream: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """The other end wants nothing more of this stream, which has been ended here."""

    stream: int


Event = Message | Data | Ended | Writable | Stopped


@dataclass(slots=True)
class _Stream:
    credit: int  # bytes that may be sent
    sending: bool  # END has not been sent
    allowance: int  # bytes that may come
    receiving: bool  # END has not come
    stopped: bool = False  # STOP has been sent: what comes is dropped


class Channel:
    """One end. `outgoing` is what has to be written; the caller writes and calls `written`."""

    def __init__(self) -> None:
        self.outgoing = bytearray()
        self._incoming = bytearray()
        self._streams: dict[int, _Stream] = {}
        self._highest = 0
        self._broken = False

    def reset(self) -> None:
        """A new session: every stream is forgotten, numbers begin again. The framing goes on."""
        self._streams.clear()
        self._highest = 0

    def written(self, count: int) -> None:
        del self.outgoing[:count]

    # streams

    def open(self, stream: int, *, sends: bool, receives: bool) -> None:
        """Begin a stream as this end sees it. Raises BrokenChannel for a number that is not above all before it."""
        if not self._highest < stream < 1 << 32 or len(self._streams) >= STREAMS:
            self._break(f"stream {stream} cannot be opened: {len(self._streams)} are open, the highest was {self._highest}")
        self._highest = stream
        self._streams[stream] = _Stream(WINDOW if sends else 0, sends, WINDOW if receives else 0, receives)

    def next_stream(self) -> int:
        """The lowest number that is free."""
        return self._highest + 1

    def room(self, stream: int) -> int:
        """How many bytes may be sent now; 0 also for what has ended."""
        held = self._streams.get(stream)
        return held.credit if held is not None and held.sending else 0

    def is_open(self, stream: int) -> bool:
        return stream in self._streams

    def send(self, stream: int, data: bytes | memoryview) -> int:
        """As much of `data` as there is credit for; answers how much."""
        view = memoryview(data)[: self.room(stream)]
        for start in range(0, len(view), DATA_LIMIT):
            self._frame(stream, Kind.DATA, view[start : start + DATA_LIMIT])
        if view:
            self._streams[stream].credit -= len(view)
        return len(view)

    def end(self, stream: int) -> None:
        """Nothing more from here. Again, or on a stream that is gone: nothing."""
        held = self._streams.get(stream)
        if held is not None and held.sending:
            held.sending = False
            self._frame(stream, Kind.END)
            self._settle(stream, held)

    def stop(self, stream: int) -> None:
        """Nothing more is wanted here; what still comes is dropped."""
        held = self._streams.get(stream)
        if held is not None and held.receiving and not held.stopped:
            held.stopped = True
            self._frame(stream, Kind.STOP)

    def consumed(self, stream: int, count: int) -> None:
        """`count` bytes that came are dealt with."""
        held = self._streams.get(stream)
        if held is not None and held.receiving and not held.stopped and count:
            held.allowance += count
            self._frame(stream, Kind.CREDIT, _CREDIT.pack(count))

    def message(self, document: dict[str, Any]) -> None:
        """Send a control message. Raises Invalid when it is larger than the other end takes; nothing is sent then."""
        data = json.dumps(document, separators=(",", ":")).encode()
        if len(data) > CONTROL_LIMIT:
            raise Invalid(what="cross the agent channel", cause=f"a message has {len(data)} bytes, the limit is {CONTROL_LIMIT}")
        self._frame(CONTROL, Kind.DATA, data)

    # what comes

    def receive(self, data: bytes) -> list[Event]:
        """The events in `data` and what was left of earlier. Raises BrokenChannel."""
        if self._broken:
            self._break("it was broken before")
        self._incoming += data
        events: list[Event] = []
        offset = 0
        while len(self._incoming) - offset >= _HEADER.size:
            length, stream, kind, zero = _HEADER.unpack_from(self._incoming, offset)
            self._check(length, stream, kind, zero)
            begin = offset + _HEADER.size
            if len(self._incoming) - begin < length:
                break
            payload = bytes(self._incoming[begin : begin + length])
            offset = begin + length
            event = self._message(payload) if stream == CONTROL else self._stream_frame(stream, Kind(kind), payload)
            if event is not None:
                events.append(event)
        del self._incoming[:offset]
        return events

    def _check(self, length: int, stream: int, kind: int, zero: bytes) -> None:
        """Before a byte of the payload is waited for."""
        if zero != _ZERO:
            self._break("a frame's last header bytes are not zero")
        if stream == CONTROL:
            if kind != Kind.DATA or not 2 <= length <= CONTROL_LIMIT:
                self._break(f"a control frame has kind {kind} and {length} bytes")
            return
        if stream > self._highest:
            self._break(f"stream {stream} was never opened")
        right = {
            Kind.DATA: 1 <= length <= DATA_LIMIT,
            Kind.CREDIT: length == _CREDIT.size,
            Kind.END: not length,
            Kind.STOP: not length,
        }
        if not right.get(kind, False):  # type: ignore[call-overload]  # an int finds its IntEnum
            self._break(f"a frame of stream {stream} has kind {kind} and {length} bytes")

    def _message(self, payload: bytes) -> Message:
        try:
            document = json.loads(payload)
        except (ValueError, RecursionError):
            self._break("a control message is not JSON")
        if not isinstance(document, dict) or _deep(document):
            self._break(f"a control message is no object, or nested more than {DEPTH} deep")
        return Message(document)

    def _stream_frame(self, stream: int, kind: Kind, payload: bytes) -> Event | None:
        held = self._streams.get(stream)
        if kind in (Kind.DATA, Kind.END):
            if held is None or not held.receiving:
                self._break(f"stream {stream} goes on after its end")
            return self._arrived(stream, held, payload) if kind == Kind.DATA else self._ended(stream, held)
        if held is None or not held.sending:
            return None  # said before our END was seen
        if kind == Kind.STOP:
            self.end(stream)
            return Stopped(stream)
        (count,) = _CREDIT.unpack(payload)
        if not 0 < count <= WINDOW - held.credit:
            self._break(f"stream {stream} is given credit for {count} bytes, more than it sent")
        held.credit += count
        return Writable(stream)

    def _arrived(self, stream: int, held: _Stream, payload: bytes) -> Data | None:
        if len(payload) > held.allowance:
            self._break(f"stream {stream} sends {len(payload)} bytes with credit for {held.allowance}")
        held.allowance -= len(payload)
        return None if held.stopped else Data(stream, payload)

    def _ended(self, stream: int, held: _Stream) -> Ended:
        held.receiving = False
        self._settle(stream, held)
        return Ended(stream)

    def _settle(self, stream: int, held: _Stream) -> None:
        if not held.sending and not held.receiving:
            del self._streams[stream]

    def _frame(self, stream: int, kind: Kind, payload: bytes | memoryview = b"") -> None:
        self.outgoing += _HEADER.pack(len(payload), stream, kind, _ZERO)
        self.outgoing += payload

    def _break(self, cause: str) -> NoReturn:
        self._broken = True
        raise BrokenChannel(what="read the agent channel", cause=cause)


def _deep(document: Any) -> bool:
    """Whether anything lies more than DEPTH levels down."""
    level = [document]
    for _ in range(DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is dict or type(child) is list  # all else has nothing below it
        ]
        if not level:
            return False
    return True
