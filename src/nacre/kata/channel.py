"""The host's end of the agent channel: calls that wait, events and streams that come meanwhile. The wire is `agent.frames`.

A request that is not answered in time raises AgentSilent naming the method; a frame that breaks the protocol ends the channel. Bytes for
a pipe that is full wait here, at most a stream's window of them, and are credited to the guest only once written.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable
from typing import Any

from nacre.agent import frames, protocol
from nacre.agent.frames import BrokenChannel, Channel
from nacre.kata.waiting import PATIENCE, Watches
from nacre.oci.errors import Failure, decode

_METHOD_OF = {parameters: (name, result) for name, (parameters, result) in protocol.METHODS.items()}
_READ = 64 * 1024


class AgentSilent(Failure):
    """The guest's agent did not answer in time."""


class AgentGone(Failure):
    """The agent channel closed while an answer was awaited."""


class Agent:
    """One channel. Owns the socket and every descriptor given to `outlet` and `inlet`."""

    def __init__(self, sock: socket.socket, watches: Watches, on_event: Callable[[Any], None]) -> None:
        self._socket, self._watches, self._on_event = sock, watches, on_event
        self._channel = Channel()
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any] | None] = {}
        self._ends: dict[int, _Outlet | _Inlet | _Console] = {}
        self._backlog = -1  # a duplicate of the socket, watched while it takes no more
        self.broken: Failure | None = None
        sock.setblocking(False)
        watches.watch(sock.fileno(), self._readable)

    def call(self, parameters: Any, timeout_s: float = 30.0) -> Any:
        """The method that takes `parameters`. Raises the agent's Failure, AgentSilent, AgentGone, BrokenChannel."""
        return self.answer(self.ask(parameters), timeout_s)

    def ask(self, parameters: Any) -> tuple[int, str, type | None]:
        """Send a request; `answer`, or `abandon`, of what this returns must follow."""
        method, kind = _METHOD_OF[type(parameters)]
        self._must_be_open(method)
        number = next(self._numbers)
        self._channel.message({"id": number, "method": method, "params": protocol.encode(parameters)})
        self._answers[number] = None
        self.flush()
        return number, method, kind

    def abandon(self, asked: tuple[int, str, type | None]) -> None:
        """The answer is not wanted any more."""
        self._answers.pop(asked[0], None)

    def answer(self, asked: tuple[int, str, type | None], timeout_s: float) -> Any:
        number, method, kind = asked
        try:
            if not self._watches.wait(lambda: self._answers[number] is not None or self.broken is not None, timeout_s):
                raise AgentSilent(
                    what=f"{method} in the guest",
                    cause=f"its agent did not answer within {timeout_s:.0f} s",
                    remedy=PATIENCE,
                )
            answer = self._answers[number]
        finally:
            self.abandon(asked)
        if answer is None:
            assert self.broken is not None
            raise type(self.broken)(what=f"{method} in the guest", cause=self.broken.cause, evidence=self.broken.evidence)
        if isinstance(answer.get("failure"), dict):
            raise decode(answer["failure"])
        return protocol.decode(kind, answer.get("result"), method) if kind else _object(answer.get("result"), method)

    def begin(self, timeout_s: float) -> protocol.Greeting:
        """A new session: what an earlier one left, here and there, is forgotten."""
        self._channel = Channel()
        nonce = os.urandom(16).hex()  # `secrets` would load OpenSSL into every shim
        greeting: protocol.Greeting = self.call(protocol.Hello(version=protocol.VERSION, nonce=nonce), timeout_s)
        if greeting.nonce != nonce or greeting.version != protocol.VERSION:
            raise BrokenChannel(
                what="greet the guest's agent",
                cause=f"it speaks version {greeting.version}, not {protocol.VERSION}, or answered somebody else",
            )
        return greeting

    # streams

    def outlet(self, fd: int) -> int:
        """A new stream whose bytes from the guest go to `fd`, which is then closed. Answers its number."""
        return self._open(_Outlet(self, fd, self._forget), sends=False, receives=True)

    def inlet(self, fd: int) -> int:
        """A new stream that carries what is read from `fd` into the guest, after `go`."""
        return self._open(_Inlet(self, fd, self._forget), sends=True, receives=False)

    def console(self, fd: int) -> int:
        """A new stream both ways over the socket `fd`."""
        return self._open(_Console(self, fd, self._forget), sends=True, receives=True)

    def _open(self, end: _Outlet | _Inlet | _Console, *, sends: bool, receives: bool) -> int:
        number = self._channel.next_stream()
        self._channel.open(number, sends=sends, receives=receives)
        self._ends[number] = end
        end.begin(number)
        return number

    def go(self, *streams: int) -> None:
        """The guest has opened these streams too (it answered): what is to be read for it may follow."""
        for stream in streams:
            end = self._ends.get(stream)
            if end is not None:
                end.go()

    def give_up(self, *streams: int) -> None:
        """Streams whose request failed: our ends are closed, the guest's are ended."""
        for stream in streams:
            end = self._ends.pop(stream, None)
            if end is not None:
                end.close()
                self._channel.end(stream)
                self._channel.stop(stream)
        self.flush()

    def _forget(self, stream: int) -> None:
        self._ends.pop(stream, None)

    @property
    def channel(self) -> Channel:
        return self._channel

    @property
    def watches(self) -> Watches:
        return self._watches

    # the socket

    def flush(self) -> None:
        """Send what waits; what the socket does not take is sent when it does."""
        while self._channel.outgoing and self.broken is None:
            try:
                self._channel.written(self._socket.send(memoryview(bytes(self._channel.outgoing[:_READ]))))
            except BlockingIOError:
                self._await_room()
                return
            except OSError as error:
                self._break(AgentGone(what="speak to the guest's agent", cause=f"send: {error.strerror}"))
                return
        self._room_came()

    def _await_room(self) -> None:
        if self._backlog < 0:
            self._backlog = os.dup(self._socket.fileno())
            self._watches.watch(self._backlog, self.flush, write=True)

    def _room_came(self) -> None:
        if self._backlog >= 0:
            self._watches.unwatch(self._backlog)
            os.close(self._backlog)
            self._backlog = -1

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._break(AgentGone(what="listen to the guest's agent", cause="its channel was closed: the machine has ended"))
            return
        try:
            for event in self._channel.receive(data):
                self._take(event)
        except BrokenChannel as failure:
            self._break(failure)
            return
        self.flush()

    def _take(self, event: frames.Event) -> None:
        if isinstance(event, frames.Message):
            self._message(event.document)
            return
        end = self._ends.get(event.stream)
        if end is None:  # given up here: what still comes is not kept
            if isinstance(event, frames.Data):
                self._channel.consumed(event.stream, len(event.data))
        elif isinstance(event, frames.Data):
            end.data(event.data)
        elif isinstance(event, frames.Ended):
            end.ended()
        elif isinstance(event, frames.Writable):
            end.writable()
        else:
            end.stopped()

    def _message(self, document: dict[str, Any]) -> None:
        number, name = document.get("id"), document.get("event")
        if isinstance(number, int) and number in self._answers:
            self._answers[number] = document
        elif isinstance(name, str) and name in protocol.EVENTS:
            try:
                self._on_event(protocol.decode(protocol.EVENTS[name], document.get("params"), name))
            except Failure as failure:
                self._break(BrokenChannel(what="read the agent channel", cause=failure.cause))

    def _must_be_open(self, method: str) -> None:
        if self.broken is not None:
            raise type(self.broken)(what=f"{method} in the guest", cause=self.broken.cause, evidence=self.broken.evidence)

    def _break(self, failure: Failure) -> None:
        """Nothing more is read or sent; every pipe is closed, so that whoever reads them sees their end."""
        if self.broken is None:
            self.broken = failure
            self._watches.unwatch(self._socket.fileno())
            self._room_came()
            for end in list(self._ends.values()):
                end.close()
            self._ends.clear()

    def flush_outlets(self) -> None:
        """Whatever came for a pipe that was full is tried once more."""
        for end in list(self._ends.values()):
            end.push()

    @property
    def has_outlets(self) -> bool:
        """Whether a stream from the guest is still open here."""
        return any(not isinstance(end, _Inlet) for end in self._ends.values())

    def close(self) -> None:
        self._break(AgentGone(what="speak to the guest's agent", cause="its channel was closed here"))
        self._socket.close()


def _object(result: Any, method: str) -> dict[str, Any]:
    if not isinstance(result, dict):
        raise BrokenChannel(what=f"{method} in the guest", cause="its answer has no object as result")
    return result


class _End:
    """Our end of a stream: what a subclass does not expect is nothing to it."""

    def __init__(self, agent: Agent, fd: int, on_done: Callable[[int], None]) -> None:
        self.agent, self.fd, self.stream = agent, fd, 0
        self.on_done = on_done  # called with the stream's number when this end needs nothing more
        os.set_blocking(fd, False)

    def begin(self, stream: int) -> None:
        self.stream = stream

    def data(self, data: bytes) -> None: ...

    def ended(self) -> None: ...

    def writable(self) -> None: ...

    def stopped(self) -> None: ...

    def push(self) -> None: ...

    def go(self) -> None: ...

    def close(self) -> None:
        """The descriptor only."""
        if self.fd >= 0:
            self.agent.watches.unwatch(self.fd)
            os.close(self.fd)
            self.fd = -1


class _Outlet(_End):
    """Bytes from the guest into a pipe."""

    def __init__(self, agent: Agent, fd: int, on_done: Callable[[int], None]) -> None:
        super().__init__(agent, fd, on_done)
        self._kept = bytearray()
        self._ended = False

    def data(self, data: bytes) -> None:
        self._kept += data
        self.push()

    def ended(self) -> None:
        self._ended = True
        self.push()

    def push(self) -> None:
        while self._kept and self.fd >= 0:
            try:
                count = os.write(self.fd, self._kept)
            except BlockingIOError:
                self.agent.watches.watch(self.fd, self._room, write=True)
                return
            except OSError:  # EPIPE: nobody reads any more
                self._kept.clear()
                self.agent.channel.stop(self.stream)
                self._done()
                return
            del self._kept[:count]
            self.agent.channel.consumed(self.stream, count)
        if self.fd >= 0:
            self.agent.watches.unwatch(self.fd)
        if self._ended:
            self._done()

    def _room(self) -> None:
        self.push()
        self.agent.flush()

    def _done(self) -> None:
        self.close()
        self.on_done(self.stream)


class _Inlet(_End):
    """What is read from a pipe, into the guest, while there is credit."""

    def go(self) -> None:
        if self.fd >= 0:
            self.agent.watches.watch(self.fd, self._readable)

    def writable(self) -> None:
        self.go()

    def stopped(self) -> None:
        self.close()
        self.on_done(self.stream)

    def _readable(self) -> None:
        room = self.agent.channel.room(self.stream)
        if not room:
            self.agent.watches.unwatch(self.fd)
            return
        try:
            data = os.read(self.fd, min(room, _READ))
        except BlockingIOError:
            return
        except OSError:  # EIO of a terminal, ECONNRESET of a socket: its end
            data = b""
        if data:
            self.agent.channel.send(self.stream, data)
        else:
            self.agent.channel.end(self.stream)
            self.close()
            self.on_done(self.stream)
        self.agent.flush()


class _Console:
    """A terminal's stream: an outlet and an inlet over the two halves of one socket."""

    def __init__(self, agent: Agent, fd: int, on_done: Callable[[int], None]) -> None:
        self._agent, self._on_done = agent, on_done
        self._out = _Outlet(agent, os.dup(fd), self._output_over)
        self._in = _Inlet(agent, fd, lambda _stream: None)  # who types no more may still read

    def begin(self, stream: int) -> None:
        self._out.begin(stream)
        self._in.begin(stream)

    def data(self, data: bytes) -> None:
        self._out.data(data)

    def ended(self) -> None:
        self._out.ended()

    def writable(self) -> None:
        self._in.writable()

    def stopped(self) -> None:
        self._in.stopped()

    def push(self) -> None:
        self._out.push()

    def go(self) -> None:
        self._in.go()

    def close(self) -> None:
        self._in.close()
        self._out.close()

    def _output_over(self, stream: int) -> None:
        """The terminal is gone, and with it who could read what is typed."""
        self._agent.channel.end(stream)
        self._in.close()
        self._on_done(stream)
