"""A blocking connection to a D-Bus: calls and their answers, signals that were asked for. The format is `dbus`'s.

A call has ten seconds; what the bus sends in between is kept for who waits for it.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from nacre.linux import dbus
from nacre.linux.dbus import BusBroken, Kind, Message
from nacre.oci.errors import Failure

CALL_S = 10.0
_MOST_KEPT = 1024
_BUS = "org.freedesktop.DBus"


class CallRefused(Failure):
    """The other side answered a call with an error; `error` is its D-Bus name."""

    error: str = ""


class Bus:
    """One connection. With `daemon` a bus daemon is in between, which wants a greeting and rules for signals."""

    def __init__(self, path: str, *, daemon: bool) -> None:
        self._place, self._daemon, self._serial, self._rest = path, daemon, 0, b""
        self._signals: deque[Message] = deque(maxlen=_MOST_KEPT)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(CALL_S)
            self._socket.connect(path)
            self._socket.sendall(dbus.HANDSHAKE)
            while (taken := dbus.admitted(self._rest)) is None:
                self._receive()
            self._rest = self._rest[taken:]
            if daemon:
                self.call(_BUS, "/org/freedesktop/DBus", _BUS, "Hello")
        except OSError as error:
            self._socket.close()
            raise BusBroken(
                what=f"connect to the D-Bus {path}", cause=f"{error.strerror or error} (errno {error.errno})"
            ) from error
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Bus:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def listen(self, sender: str, path: str, interface: str, member: str) -> None:
        """Have the signals of this description sent here."""
        if self._daemon:
            rule = f"type='signal',sender='{sender}',path='{path}',interface='{interface}',member='{member}'"
            self.call(_BUS, "/org/freedesktop/DBus", _BUS, "AddMatch", "s", (rule,))

    def call(
        self, destination: str, path: str, interface: str, member: str, signature: str = "", body: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        """Call the method and return the values of its answer. Raises CallRefused, BusBroken."""
        self._serial += 1
        message = Message(
            kind=Kind.METHOD_CALL, serial=self._serial, path=path, interface=interface, member=member,
            destination=destination if self._daemon else "", signature=signature, body=tuple(body),
        )  # fmt: skip
        deadline = time.monotonic() + CALL_S
        try:
            self._socket.sendall(dbus.encode(message))
        except OSError as error:
            raise self._gone(member, error) from error
        while True:
            answer = self._next(deadline, f"call {interface}.{member}")
            if answer.reply_serial == message.serial and answer.kind == Kind.METHOD_RETURN:
                return answer.body
            if answer.reply_serial == message.serial and answer.kind == Kind.ERROR:
                raise _refusal(interface, member, answer)
            if answer.kind == Kind.SIGNAL:
                self._signals.append(answer)

    def await_signal(self, what: str, wanted: Callable[[Message], bool], seconds: float) -> Message:
        """The first signal that is `wanted`, kept or yet to come. Raises BusBroken after `seconds`, naming `what`."""
        deadline = time.monotonic() + seconds
        while True:
            while self._signals:
                signal = self._signals.popleft()
                if wanted(signal):
                    return signal
            message = self._next(deadline, what)
            if message.kind == Kind.SIGNAL:
                self._signals.append(message)

    def _next(self, deadline: float, what: str) -> Message:
        while (found := dbus.decode(self._rest)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise BusBroken(what=what, cause=f"no answer over {self._place} in time")
            self._socket.settimeout(left)
            try:
                self._receive()
            except TimeoutError:
                continue  # the deadline says it with more words
            except OSError as error:
                raise self._gone(what, error) from error
        message, taken = found
        self._rest = self._rest[taken:]
        return message

    def _receive(self) -> None:
        data = self._socket.recv(65536)
        if not data:
            raise BusBroken(what="read from D-Bus", cause=f"{self._place} closed the connection")
        self._rest += data

    def _gone(self, what: str, error: OSError) -> BusBroken:
        return BusBroken(what=what, cause=f"{self._place}: {error.strerror or error} (errno {error.errno})")


def _refusal(interface: str, member: str, answer: Message) -> CallRefused:
    words = answer.body[0] if answer.body and isinstance(answer.body[0], str) else "no words"
    failure = CallRefused(what=f"call {interface}.{member}", cause=f"{answer.error_name}: {words}")
    failure.error = answer.error_name
    return failure


def unix_path(address: str) -> str:
    """The socket of a D-Bus address list such as `unix:path=/run/dbus/system_bus_socket,guid=…`; "" where it names none."""
    for one in address.split(";"):
        transport, _, keys = one.partition(":")
        if transport != "unix":
            continue
        for key, _, value in (pair.partition("=") for pair in keys.split(",")):
            if key == "path":
                return os.fsdecode(_unescape(value))
            if key == "abstract":
                return "\0" + os.fsdecode(_unescape(value))
    return ""


def _unescape(text: str) -> bytes:
    from urllib.parse import unquote_to_bytes

    return unquote_to_bytes(text)
