"""QMP, QEMU's control protocol: JSON lines. `Codec` is bytes in, messages out; `Qmp` a blocking client over one socket.

QEMU is trusted less than this process (a guest may have taken it over): a line is bounded, and anything that is no QMP message
ends the conversation. (qemu/docs/interop/qmp-spec.txt)
"""

from __future__ import annotations

import array
import itertools
import json
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from nacre.kata.waiting import PATIENCE
from nacre.oci.errors import Failure

LINE_LIMIT = 256 * 1024  # bytes; QEMU's longest answer here (query-block of a full VM) is some 10 KiB
RECEIVE = 64 * 1024
DEADLINE_S = 20.0


class QmpRefused(Failure):
    """QEMU answered a command with an error."""


class QmpBroken(Failure):
    """QEMU's control socket closed, or said what is no QMP."""


class QmpSilent(Failure):
    """QEMU lives and did not answer a command in time."""


class Codec:
    """The receiving half; holds the unfinished last line."""

    def __init__(self) -> None:
        self._tail = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages completed by `data`. Raises ValueError for a line too long or one that is no JSON object."""
        self._tail += data
        *lines, rest = self._tail.split(b"\n")
        if any(len(line) > LINE_LIMIT for line in (*lines, rest)):
            raise ValueError(f"a line of QMP is longer than {LINE_LIMIT} bytes")
        self._tail = rest
        return [_message(bytes(line)) for line in lines if line.strip()]


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a line of QMP is no JSON: {line[:80]!r}") from error
    if not isinstance(message, dict):
        raise ValueError(f"a line of QMP is no object: {line[:80]!r}")
    return message


def encode(command: str, arguments: dict[str, Any], number: int) -> bytes:
    message: dict[str, Any] = {"execute": command, "id": number}
    if arguments:
        message["arguments"] = arguments
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Qmp:
    """One conversation. Owns the socket. Events go to `on_event(name, data)`, in order, from whichever call reads them."""

    def __init__(self, sock: socket.socket, on_event: Callable[[str, dict[str, Any]], None], patience: int = 1) -> None:
        self._socket, self._on_event, self._deadline_s = sock, on_event, DEADLINE_S * patience
        self._codec = Codec()
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._awaited: set[int] = set()
        self.closed = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def execute(self, command: str, arguments: dict[str, Any] | None = None, descriptors: Sequence[int] = ()) -> Any:
        """Its return value. Raises QmpRefused with QEMU's words, QmpSilent, QmpBroken."""
        return self.answer(self.send(command, arguments or {}, descriptors))

    def send(self, command: str, arguments: dict[str, Any], descriptors: Sequence[int] = ()) -> tuple[int, str]:
        """Ask without waiting; `answer` of what this returns waits. `descriptors` (for getfd, add-fd) stay the caller's."""
        number = next(self._numbers)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        data = encode(command, arguments, number)
        try:
            sent = self._socket.sendmsg([data], rights)
            self._socket.sendall(data[sent:])
        except OSError as error:
            raise self._broken(command, f"send: {error.strerror}") from error
        self._awaited.add(number)
        return number, command

    def answer(self, asked: tuple[int, str]) -> Any:
        number, command = asked
        deadline = time.monotonic() + self._deadline_s
        try:
            while number not in self._answers:
                if self.closed:
                    raise self._broken(command, "the socket is closed: QEMU has ended")
                if not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    cause = f"no answer within {self._deadline_s:g} s"
                    raise QmpSilent(what=f"ask QEMU to {command}", cause=cause, remedy=PATIENCE)
                self.readable()
            message = self._answers.pop(number)
        finally:
            self._awaited.discard(number)
        if "error" in message:
            error = message["error"] if isinstance(message["error"], dict) else {}
            raise QmpRefused(what=f"ask QEMU to {command}", cause=str(error.get("desc", "it gave no reason"))[:500])
        return message["return"]

    def readable(self) -> None:
        """Take what the socket holds: call it when the descriptor is readable. Sets `closed` at its end."""
        try:
            data = self._socket.recv(RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return
        try:
            messages = self._codec.feed(data)
        except ValueError as error:
            self.closed = True
            raise self._broken("speak QMP", str(error)) from error
        for message in messages:
            self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        number, event = message.get("id"), message.get("event")
        if isinstance(event, str):
            data = message.get("data")
            self._on_event(event, data if isinstance(data, dict) else {})
        elif isinstance(number, int) and number in self._awaited and ("return" in message or "error" in message):
            self._answers[number] = message  # the greeting, and answers nobody awaits, are passed over

    def close(self) -> None:
        self.closed = True
        self._socket.close()

    @staticmethod
    def _broken(command: str, cause: str) -> QmpBroken:
        return QmpBroken(what=f"ask QEMU to {command}", cause=cause)
