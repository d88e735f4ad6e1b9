"""The daemon's side of zygote and shims: requests with ids over SOCK_SEQPACKET in the event loop, events as they come.

The zygote is executed before grpc is imported (it starts threads); shims are forked by it and survive this process. A connection that
closes fails its waiting requests with ShimDied.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nacre.kata.waiting import PATIENCE
from nacre.linux import memfd, process
from nacre.linux.libc import owned
from nacre.oci.errors import Failure, Invalid, decode
from nacre.shim import messages
from nacre.shim.zygote import CHANNEL

log = logging.getLogger("nacre.shim")
Event = Callable[[dict[str, Any]], None]


class ShimDied(Failure):
    """A pod's shim, or the zygote, closed its socket with a request under way."""


class ShimSlow(Failure):
    """A pod's shim did not answer within our own deadline, which ends before the kubelet's (120 s; 240 s for a sandbox)."""


DEADLINE_S = 100.0
DEADLINES_S = {"create_sandbox": 200.0, "warm": 600.0}


class Connection:
    """One socket, many requests at once. Owns it."""

    def __init__(
        self,
        sock: socket.socket,
        who: str,
        on_event: Event,
        on_close: Callable[[], None],
        evidence: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """`evidence` is asked what the other end is doing when it does not answer in time."""
        self._socket, self._who, self._evidence = sock, who, evidence
        self._on_event, self._on_close = on_event, on_close
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        self.closed = False
        self.shared = 0  # pid of a shim that may be given further pods: of handler runc, and forked for us, so of our own code
        self._slow = False
        self.patience = 1  # what its deadlines are multiplied by
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def busy(self) -> bool:
        """Whether the other end has something to do, or was too slow when it last had."""
        return self._slow or bool(self._waiting)

    async def ask(self, op: str, descriptors: Sequence[int] = (), **request: Any) -> tuple[dict[str, Any], list[int]]:
        """(result, descriptors that came with it, the caller's). Raises the Failure that was answered, ShimDied, ShimSlow."""
        if self.closed:
            raise self._died(op)
        number = next(self._numbers)
        future: asyncio.Future[tuple[dict[str, Any], list[int]]] = self._loop.create_future()
        self._waiting[number] = future
        limit_s = DEADLINES_S.get(op, DEADLINE_S) * self.patience
        try:
            await self._send({"id": number, "op": op} | request, descriptors)
            async with asyncio.timeout(limit_s):
                return await future
        except (BrokenPipeError, ConnectionResetError):
            self.close()
            raise self._died(op) from None
        except ValueError as error:
            raise Invalid(what=f"ask {self._who} to {op.replace('_', ' ')}", cause=str(error)) from error
        except TimeoutError:
            self._slow = True
            cause = f"it has not answered for {limit_s:.0f} s"
            what = f"ask {self._who} to {op.replace('_', ' ')}"
            raise ShimSlow(what=what, cause=cause, evidence=self._evidence(), remedy=PATIENCE) from None
        finally:
            self._waiting.pop(number, None)

    async def _send(self, message: dict[str, Any], descriptors: Sequence[int]) -> None:
        """Now, or as soon as the other end has read what lies before it."""
        async with self._sending:  # one watch a descriptor: a second would take the first one's wakening
            await self._send_in_turn(message, descriptors)

    async def _send_in_turn(self, message: dict[str, Any], descriptors: Sequence[int]) -> None:
        while True:
            try:
                messages.send(self._socket, message, descriptors)
                return
            except BlockingIOError:
                room = asyncio.Event()
                self._loop.add_writer(self._socket.fileno(), room.set)
                try:
                    async with asyncio.timeout(DEADLINE_S):
                        await room.wait()
                finally:
                    if not self.closed:
                        self._loop.remove_writer(self._socket.fileno())

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
        except ConnectionResetError:  # it was killed with something of ours unread
            message, descriptors = None, []
        except (OSError, ValueError) as error:
            log.error("%s: %s", self._who, error)
            message, descriptors = None, []
        if message is None:
            self.close()
            return
        self._slow = False
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
        self._starting = asyncio.Lock()

    def execute(self) -> socket.socket:
        """Start the process, first while this process has one thread. Answers our end of its channel.

        It runs from a sealed copy of the interpreter: what a container might reach through /proc/PID/exe of one of its forks can
        neither be changed nor is it the host's file (CVE-2019-5736).
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        python = os.path.realpath(sys.executable)
        with theirs, _sealed(python) as binary:
            given = theirs.fileno()
            program = (
                f"import os, sys; os.dup2({given}, {CHANNEL}); os.closerange({CHANNEL + 1}, {max(given, binary) + 1}); "
                f"sys.path[:] = {sys.path!r}; from nacre.shim import zygote; zygote.main()"
            )
            command = [python, "-I", "-S", "-c", program, "nacre-zygote"]
            if self._process is not None:
                self._process.wait()  # a former zygote: its channel is closed, so it ends
            self._process = subprocess.Popen(
                command, executable=f"/proc/self/fd/{binary}", stdin=subprocess.DEVNULL, pass_fds=(given, binary)
            )
        return ours

    async def start(self, channel: socket.socket | None = None) -> None:
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def event(message: dict[str, Any]) -> None:
            if message["event"] == "ready" and not ready.done():
                ready.set_result(None)

        def closed() -> None:
            if not ready.done():
                ready.set_exception(
                    ShimDied(what="start the zygote", cause="it ended before it was ready", remedy="nacre logs node")
                )

        self._connection = Connection(channel or self.execute(), "the zygote", event, closed)
        await ready
        for name, fd in self._adopted.items():
            await self._connection.ask("adopt", [fd], name=name)

    async def adopt(self, name: str, fd: int) -> None:
        """Give it a descriptor for all later shims; kept here too, for the next zygote."""
        self._adopted[name] = fd
        if self._connection:
            await self._connection.ask("adopt", [fd], name=name)

    async def spawn(
        self,
        directory: str,
        handler: str,
        on_event: Event,
        on_close: Callable[[], None],
        evidence: Callable[[], tuple[str, ...]] = tuple,
        beside: Connection | None = None,
    ) -> Connection:
        """A shim for the pod at `directory`, connected: that of the pod `beside`, else a new one."""
        path = f"{directory}/shim.sock"
        with listening(path) as listener:
            pid = await _adopted(beside, listener, directory, handler) if beside is not None else 0
            pid = pid or await self._forked(listener, directory, handler)
        found = process.status(pid)
        document = {"version": messages.VERSION, "pid": pid, "start_time": found[2] if found else 0, "handler": handler}
        write_json(f"{directory}/shim.json", document)
        made = connect(path, on_event, on_close, evidence)
        made.shared = pid if handler == "runc" else 0
        return made

    async def _forked(self, listener: socket.socket, directory: str, handler: str) -> int:
        try:
            return await self._ask_to_spawn(listener, directory, handler)
        except ShimDied:  # it was killed while we asked: no shim has the socket yet
            return await self._ask_to_spawn(listener, directory, handler)

    async def _ask_to_spawn(self, listener: socket.socket, directory: str, handler: str) -> int:
        async with self._starting:
            if self._connection is None or self._connection.closed:
                log.warning("the zygote is gone, a new one is started; pods are not touched by that")
                await self.start()
        assert self._connection is not None
        answer, _none = await self._connection.ask("spawn", [listener.fileno()], directory=directory, handler=handler)
        return int(answer["pid"])

    async def stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)


async def _adopted(beside: Connection, listener: socket.socket, directory: str, handler: str) -> int:
    """The pid of the shim that has taken the pod up; 0 when that shim has died, so that nobody holds the socket but us."""
    try:
        await beside.ask("adopt", [listener.fileno()], directory=directory, handler=handler)
    except ShimDied:
        return 0
    return beside.shared


def roomy(connections: Iterable[Connection], limit: int) -> Connection | None:
    """A connection of the first shim that holds fewer than `limit` pods and has nothing to do: pods made at once are made by several."""
    shims: dict[int, list[Connection]] = {}
    for connection in connections:
        if connection.shared and not connection.closed:
            shims.setdefault(connection.shared, []).append(connection)
    return next((pods[0] for pods in shims.values() if len(pods) < limit and not any(pod.busy for pod in pods)), None)


def write_json(path: str, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(document, file, separators=(",", ":"))
    os.rename(path + ".new", path)


@contextmanager
def _sealed(path: str) -> Iterator[int]:
    with owned(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as source, owned(memfd.sealed("python3", source)) as copy:
        yield copy


def listening(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        with _short(path) as name:
            listener.bind(name)
        os.chmod(path, 0o600)
        listener.listen(8)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(
    path: str, on_event: Event, on_close: Callable[[], None], evidence: Callable[[], tuple[str, ...]] = tuple
) -> Connection:
    """To a shim that listens. Raises OSError when none does."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        with _short(path) as name:
            sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return Connection(
        sock, f"the shim of pod sandbox {os.path.basename(os.path.dirname(path))[:12]}", on_event, on_close, evidence
    )


@contextmanager
def _short(path: str) -> Iterator[str]:
    """The same socket by a path within sun_path's 107 bytes, however long the prefix is."""
    if len(path.encode()) < 108:
        yield path
        return
    with owned(os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as directory:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
