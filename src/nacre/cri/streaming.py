"""exec and attach by WebSocket: one-time URLs on loopback, the subprotocols v4 and v5.channel.k8s.io.

A binary message's first byte is its channel: 0 stdin, 1 stdout, 2 stderr, 3 the final Status as JSON, 4 resize, and in v5 255, which
closes the channel that the next byte names. Bytes go between the socket and the process's own descriptors; a stream that cannot be
written is not read, on both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import signal
import struct
import termios
from dataclasses import dataclass
from typing import Any

from aiohttp import WSMsgType, web

from nacre.cri.containers import Containers
from nacre.cri.store import ContainerRecord
from nacre.oci.errors import Failure
from nacre.wire.relay import hung_up

log = logging.getLogger("nacre.cri")
PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
OFFER_S = 60.0  # how long a URL stays good
STDIN, STDOUT, STDERR, STATUS, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
READ = 32 * 1024


@dataclass(frozen=True, slots=True)
class Offer:
    kind: str  # exec or attach
    record: ContainerRecord
    request: Any  # ExecRequest or AttachRequest


class Streaming:
    """The HTTP server behind the URLs of Exec and Attach."""

    def __init__(self) -> None:
        self._offers: dict[str, Offer] = {}
        self._runner: web.AppRunner | None = None
        self._base = ""
        self.containers: Containers | None = None

    async def start(self) -> None:
        application = web.Application()
        application.router.add_route("*", "/{kind:exec|attach}/{token}", self._serve)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        address = self._runner.addresses[0]
        self._base = f"http://{address[0]}:{address[1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    def offer(self, kind: str, record: ContainerRecord, request: Any) -> str:
        """A URL that works once, within OFFER_S seconds."""
        token = secrets.token_urlsafe(24)
        self._offers[token] = Offer(kind, record, request)
        asyncio.get_running_loop().call_later(OFFER_S, self._offers.pop, token, None)
        return f"{self._base}/{kind}/{token}"

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        offer = self._offers.pop(request.match_info["token"], None)
        if offer is None or offer.kind != request.match_info["kind"]:
            return web.Response(status=404, text="this URL was used, is older than a minute, or was never given\n")
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return web.Response(status=400, text="streams are offered by WebSocket (v5.channel.k8s.io); SPDY/3.1 is not\n")
        socket = web.WebSocketResponse(protocols=PROTOCOLS, max_msg_size=1 << 22, autoping=True)
        await socket.prepare(request)
        assert request.transport is not None
        client = Client(socket, asyncio.Event())
        with hung_up(request.transport, client.gone):
            try:
                await self._run(offer, client)
            except Failure as failure:
                await client.end(_status_failure(failure.sentence()))
        if client.gone.is_set() and request.transport is not None:
            request.transport.abort()  # a farewell would be waited for
        return socket

    async def _run(self, offer: Offer, client: Client) -> None:
        if offer.kind == "attach":
            await self._attach(offer, client)
        elif offer.request.tty:
            await self._exec_tty(offer, client)
        else:
            await self._exec(offer, client)

    async def _exec(self, offer: Offer, client: Client) -> None:
        assert self.containers is not None
        request, given, ours = offer.request, {}, {}
        for name, wanted in (("stdin", request.stdin), ("stdout", request.stdout), ("stderr", request.stderr)):
            if wanted:
                read, write = os.pipe2(os.O_CLOEXEC)
                given[name], ours[name] = (read, write) if name == "stdin" else (write, read)
        session = Session(client, ours.get("stdin", -1), [(STDOUT, ours.get("stdout", -1)), (STDERR, ours.get("stderr", -1))])
        try:
            exec_id, end = await self.containers.begin_exec(offer.record, list(request.cmd), given, tty=False)
        except BaseException:
            session.close()
            raise
        await self._until_end(offer, session, exec_id, end)

    async def _exec_tty(self, offer: Offer, client: Client) -> None:
        assert self.containers is not None
        exec_id, end, console = await self.containers.begin_terminal(offer.record, list(offer.request.cmd))
        session = Session(client, os.dup(console), [(STDOUT, console)], terminal=True)
        await self._until_end(offer, session, exec_id, end)

    async def _until_end(self, offer: Offer, session: Session, exec_id: str, end: asyncio.Future[dict[str, Any]]) -> None:
        """Until the command ended and all it said is sent; a client that leaves takes the command with it."""
        assert self.containers is not None
        tasks: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(session.serve()),
            asyncio.ensure_future(session.client.gone.wait()),
        ]
        try:
            await asyncio.wait([*tasks, end], return_when=asyncio.FIRST_COMPLETED)
            if not end.done():
                await self.containers.kill_exec(offer.record, exec_id, signal.SIGKILL)
            code = int((await end)["code"])
            if not session.client.gone.is_set():
                await session.drained()
            await session.client.end(_status_exit(code))
        finally:
            for task in tasks:
                task.cancel()
            session.close()

    async def _attach(self, offer: Offer, client: Client) -> None:
        assert self.containers is not None
        request, given, ours = offer.request, {}, {}
        for name, wanted in (
            ("stdin", request.stdin),
            ("stdout", request.stdout),
            ("stderr", request.stderr and not request.tty),
        ):
            if wanted:
                read, write = os.pipe2(os.O_CLOEXEC)
                given[name], ours[name] = (read, write) if name == "stdin" else (write, read)
        session = Session(client, ours.get("stdin", -1), [(STDOUT, ours.get("stdout", -1)), (STDERR, ours.get("stderr", -1))])
        session.on_resize = lambda width, height: self.containers.resize(offer.record, width, height)
        try:
            await self.containers.attach(offer.record, given)
            tasks = [asyncio.ensure_future(work) for work in (session.serve(), session.drained(), client.gone.wait())]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await client.end(json.dumps({"metadata": {}, "status": "Success"}))
        finally:
            session.close()


@dataclass(frozen=True, slots=True)
class Client:
    """Who asked: its WebSocket, and whether it is there no more."""

    socket: web.WebSocketResponse
    gone: asyncio.Event

    async def end(self, status: str) -> None:
        """The last word, to whom is still there."""
        if self.socket.closed or self.gone.is_set():
            return
        with contextlib.suppress(ConnectionError):  # it left this instant
            await self.socket.send_bytes(bytes([STATUS]) + status.encode())
            await self.socket.close()


class Session:
    """One client and the descriptors behind its channels; owns the descriptors."""

    def __init__(self, client: Client, stdin: int, outputs: list[tuple[int, int]], *, terminal: bool = False) -> None:
        self.client = client
        self._stdin, self._terminal = stdin, terminal
        self._loop = asyncio.get_running_loop()
        self._outputs = [(channel, fd) for channel, fd in outputs if fd >= 0]
        for fd in [fd for _channel, fd in self._outputs] + ([stdin] if stdin >= 0 else []):
            os.set_blocking(fd, False)
        self._pumps = [asyncio.ensure_future(self._pump(channel, fd)) for channel, fd in self._outputs]
        self.on_resize: Any = None

    async def serve(self) -> None:
        """What the client sends, until it closes."""
        async for message in self.client.socket:
            if message.type != WSMsgType.BINARY or not message.data:
                continue
            channel, data = message.data[0], message.data[1:]
            if channel == STDIN:
                await self._feed(data)
            elif channel == RESIZE:
                await self._resize(data)
            elif channel == CLOSE and data[:1] == bytes([STDIN]):
                self._close_stdin()

    async def drained(self) -> None:
        if self._pumps:
            await asyncio.wait(self._pumps)

    def close(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        self._close_stdin()
        for _channel, fd in self._outputs:
            self._loop.remove_reader(fd)
            os.close(fd)
        self._outputs = []

    async def _pump(self, channel: int, fd: int) -> None:
        while True:
            await self._ready(fd, self._loop.add_reader, self._loop.remove_reader)
            try:
                data = os.read(fd, READ)
            except BlockingIOError:
                continue
            except OSError:  # EIO: the terminal's last slave is closed
                return
            if not data:
                return
            try:
                await self.client.socket.send_bytes(bytes([channel]) + data)
            except ConnectionError:
                self.client.gone.set()  # `serve` may wait for a command to take more input, which waits for us
                return

    async def _feed(self, data: bytes) -> None:
        view = memoryview(data)
        while view and self._stdin >= 0:
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                await self._ready(self._stdin, self._loop.add_writer, self._loop.remove_writer)
            except OSError:  # EPIPE: the command reads no more
                self._close_stdin()

    async def _ready(self, fd: int, add: Any, remove: Any) -> None:
        event = asyncio.Event()
        add(fd, event.set)
        try:
            await event.wait()
        finally:
            remove(fd)

    async def _resize(self, data: bytes) -> None:
        try:
            size = json.loads(data)
            width, height = int(size["Width"]), int(size["Height"])
            struct.pack("HH", width, height)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, struct.error):
            return  # a client's malformed size is no reason to end its session
        if self._terminal and self._outputs:
            fcntl.ioctl(self._outputs[0][1], termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        elif self.on_resize is not None:
            await self.on_resize(width, height)

    def _close_stdin(self) -> None:
        if self._stdin >= 0:
            self._loop.remove_writer(self._stdin)
            os.close(self._stdin)
            self._stdin = -1


def _status_exit(code: int) -> str:
    if code == 0:
        return json.dumps({"metadata": {}, "status": "Success"})
    return json.dumps(
        {
            "metadata": {},
            "status": "Failure",
            "message": f"command terminated with non-zero exit code: {code}",
            "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
        }
    )


def _status_failure(sentence: str) -> str:
    return json.dumps({"metadata": {}, "status": "Failure", "message": sentence, "reason": "InternalError", "code": 500})
