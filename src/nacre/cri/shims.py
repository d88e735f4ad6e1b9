"""The daemon's side of zygote and shims: requests with ids over SOCK_SEQPACKET in the event loop, events as they come.

The zygote is executed before grpc is imported (it starts threads); shims are forked by it and survive this process. A connection that
closes fails its waiting requests with ShimDied.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from nacre.oci.errors import Failure, decode
from nacre.shim import messages
from nacre.shim.zygote import CHANNEL

log = logging.getLogger("nacre.shim")
Event = Callable[[dict[str, Any]], None]


class ShimDied(Failure):
    """A pod's shim, or the zygote, closed its socket with a request under way."""


class Connection:
    """One socket, many requests at once. Owns it."""

    def __init__(self, sock: socket.socket, who: str, on_event: Event, on_close: Callable[[], None]) -> None:
        self._socket, self._who = sock, who
        self._on_event, self._on_close = on_event, on_close
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}
        self._loop = asyncio.get_running_loop()
        self.closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    async def ask(self, op: str, descriptors: Sequence[int] = (), **request: Any) -> tuple[dict[str, Any], list[int]]:
        """(result, descriptors that came with it, the caller's). Raises the Failure that was answered, ShimDied."""
        if self.closed:
            raise self._died(op)
        number = next(self._numbers)
        future: asyncio.Future[tuple[dict[str, Any], list[int]]] = self._loop.create_future()
        self._waiting[number] = future
        try:
            messages.send(self._socket, {"id": number, "op": op} | request, descriptors)
            return await future
        except (BrokenPipeError, ConnectionResetError):
            self.close()
            raise self._died(op) from None
        finally:
            self._waiting.pop(number, None)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for future in list(self._waiting.values()):
            if not future.done():
                future.set_exception(self._died("answer"))
        self._on_close()

    def _readable(self) -> None:
        try:
            message, descriptors = messages.receive(self._socket)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            log.error("%s: %s", self._who, error)
            message, descriptors = None, []
        if message is None:
            self.close()
            return
        future = self._waiting.get(message.get("id", 0))
        if future is None or future.done():
            messages.close(descriptors)
            if "event" in message:
                self._on_event(message)
        elif "failure" in message:
            messages.close(descriptors)
            future.set_exception(decode(message["failure"]))
        else:
            future.set_result((message.get("result", {}), descriptors))

    def _died(self, op: str) -> ShimDied:
        return ShimDied(what=f"ask {self._who} to {op.replace('_', ' ')}", cause="its socket is closed: the process has ended")


class Zygote:
    """The process that shims are forked from."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._adopted: dict[str, int] = {}

    def execute(self) -> socket.socket:
        """Start the process; to be called while this process has one thread. Answers our end of its channel."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            program = (
                f"import os, sys; os.dup2({theirs.fileno()}, {CHANNEL}) if {theirs.fileno()} != {CHANNEL} else None; "
                f"sys.path[:] = {sys.path!r}; from nacre.shim import zygote; zygote.main()"
            )
            command = [os.path.realpath(sys.executable), "-I", "-S", "-c", program, "nacre-zygote"]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), close_fds=True)
        return ours

    async def start(self, channel: socket.socket | None = None) -> None:
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def event(message: dict[str, Any]) -> None:
            if message["event"] == "ready" and not ready.done():
                ready.set_result(None)

        self._connection = Connection(channel or self.execute(), "the zygote", event, lambda: None)
        await ready
        for name, fd in self._adopted.items():
            await self._connection.ask("adopt", [fd], name=name)

    async def adopt(self, name: str, fd: int) -> None:
        """Give it a descriptor for all later shims; kept here too, for the next zygote."""
        self._adopted[name] = fd
        if self._connection:
            await self._connection.ask("adopt", [fd], name=name)

    async def spawn(self, directory: str, handler: str, on_event: Event, on_close: Callable[[], None]) -> Connection:
        """A new shim for the pod at `directory`, connected."""
        if self._connection is None or self._connection.closed:
            await self.start()
        assert self._connection is not None
        path = f"{directory}/shim.sock"
        with listening(path) as listener:
            await self._connection.ask("spawn", [listener.fileno()], directory=directory, handler=handler)
        return connect(path, on_event, on_close)

    async def stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)


def listening(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        listener.bind(_short(path))
        os.chmod(path, 0o600)
        listener.listen(8)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: str, on_event: Event, on_close: Callable[[], None]) -> Connection:
    """To a shim that listens. Raises OSError when none does."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.connect(_short(path))
    except BaseException:
        sock.close()
        raise
    return Connection(sock, f"the shim at {path}", on_event, on_close)


def _short(path: str) -> str:
    """The same socket by a path within sun_path's 107 bytes, however long the prefix is."""
    if len(path.encode()) < 108:
        return path
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    _held.append(directory)
    return f"/proc/self/fd/{directory}/{os.path.basename(path)}"


_held: list[int] = []
