"""Stdio of the guest's processes: pipes and terminals on one side, streams of the channel on the other."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import termios
from collections.abc import Callable

from nacre.agent.frames import DATA_LIMIT, Channel, Data, Ended, Stopped, Writable
from nacre.agent.loop import Loop

Flush = Callable[[], None]


class Output:
    """What a process writes: read while the host gives credit, ended when the last writer has closed. Owns `fd`."""

    def __init__(self, relay: Relay, stream: int, fd: int) -> None:
        self._relay, self.stream, self.fd = relay, stream, fd
        os.set_blocking(fd, False)
        relay.loop.watch(fd, self.readable)

    def readable(self) -> bool:
        """Pass on one piece; False when there is nothing to read now, or no credit."""
        room = min(self._relay.channel.room(self.stream), DATA_LIMIT)
        if not room:
            self._relay.loop.unwatch(self.fd)  # until credit comes
            return False
        try:
            data = os.read(self.fd, room)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that no process holds any more
                raise
            data = b""
        if data:
            self._relay.channel.send(self.stream, data)
        else:
            self._relay.channel.end(self.stream)
            self.close()
            self._relay.stop_input(self.stream)
        self._relay.flush()
        return bool(data)

    def drain(self) -> None:
        """All that lies there now, as far as there is credit."""
        while self.fd >= 0 and self.readable():
            continue

    def resume(self) -> None:
        if self.fd >= 0:
            self._relay.loop.watch(self.fd, self.readable)

    def close(self) -> None:
        if self.fd >= 0:
            self._relay.loop.unwatch(self.fd)
            os.close(self.fd)
            self.fd = -1
            self._relay.outputs.pop(self.stream, None)


class Input:
    """What the host sends to a process; credit is given as the process takes it. Owns `fd`."""

    def __init__(self, relay: Relay, stream: int, fd: int, *, terminal: bool) -> None:
        self._relay, self.stream, self.fd = relay, stream, fd
        self._terminal = terminal
        self._waiting = bytearray()
        self._ended = False
        os.set_blocking(fd, False)

    def take(self, data: bytes) -> None:
        self._waiting += data
        self.writable()

    def end(self) -> None:
        self._ended = True
        self.writable()

    def writable(self) -> None:
        try:
            count = os.write(self.fd, self._waiting) if self._waiting else 0
        except BlockingIOError:
            count = 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self._relay.stop_input(self.stream)  # nobody reads it any more
            self._relay.flush()
            return
        del self._waiting[:count]
        self._relay.channel.consumed(self.stream, count)
        self._relay.flush()
        if self._waiting:
            self._relay.loop.watch(self.fd, self.writable, write=True)
            return
        self._relay.loop.unwatch(self.fd)
        if self._ended and not self._terminal:  # a terminal hangs up with its last descriptor, the output's
            self.close()

    def close(self) -> None:
        if self.fd >= 0:
            self._relay.loop.unwatch(self.fd)
            os.close(self.fd)
            self.fd = -1
            self._relay.inputs.pop(self.stream, None)


class Relay:
    """Every stream of the session. `flush` writes out what the channel holds."""

    def __init__(self, loop: Loop, channel: Channel, flush: Flush) -> None:
        self.loop, self.channel, self.flush = loop, channel, flush
        self.outputs: dict[int, Output] = {}
        self.inputs: dict[int, Input] = {}

    def output(self, stream: int, fd: int) -> Output:
        made = self.outputs[stream] = Output(self, stream, fd)
        return made

    def input(self, stream: int, fd: int, *, terminal: bool = False) -> None:
        self.inputs[stream] = Input(self, stream, fd, terminal=terminal)

    def console(self, stream: int, master: int) -> Output:
        self.input(stream, os.dup(master), terminal=True)
        return self.output(stream, master)

    def stop_input(self, stream: int) -> None:
        """Whoever read it is gone, or the terminal is."""
        sink = self.inputs.get(stream)
        if sink is not None:
            self.channel.stop(stream)
            sink.close()

    def handle(self, event: Data | Ended | Writable | Stopped) -> None:
        """An event of the channel. What is meant for a process that is gone is dropped."""
        sink, source = self.inputs.get(event.stream), self.outputs.get(event.stream)
        if isinstance(event, Data):
            if sink is not None:
                sink.take(event.data)
        elif isinstance(event, Ended):
            if sink is not None:
                sink.end()
        elif source is not None:
            if isinstance(event, Writable):
                source.resume()
            else:
                source.close()
                self.stop_input(event.stream)

    def reset(self) -> None:
        """The session is over: descriptors of its streams go."""
        for output in list(self.outputs.values()):
            output.close()
        for sink in list(self.inputs.values()):
            sink.close()


def resize(master: int, width: int, height: int) -> None:
    """TIOCSWINSZ; the foreground processes get SIGWINCH."""
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", height & 0xFFFF, width & 0xFFFF, 0, 0))
