"""Answers that go on for long: chunks as they come, and bytes both ways between an upgraded request and another connection.

Relayed bytes are not read, and either side is paused while the other cannot take more. The client's transport leaves aiohttp's
hands (`set_protocol`) the moment the answer's head has been written to it.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import cast

import aiohttp
from aiohttp import web

from nacre.oci.errors import Failure

log = logging.getLogger("nacre.wire")

CHUNK = 64 * 1024
KEEPALIVE_S = 30
_PASSED = (
    "Upgrade",
    "Connection",
    "Sec-WebSocket-Key",
    "Sec-WebSocket-Version",
    "Sec-WebSocket-Protocol",
    "Sec-WebSocket-Extensions",
)


async def send(
    request: web.BaseRequest, response: web.StreamResponse, chunks: AsyncIterator[bytes], first: bytes = b""
) -> web.StreamResponse:
    """`first` and `chunks` as they come. A fault after the head cuts the connection: an orderly end would say that this is all.

    It is not raised: aiohttp would log it as an error of the handler, a client's going away included.
    """
    response.enable_chunked_encoding()
    await response.prepare(request)
    try:
        if first:
            await response.write(first)
        async for chunk in chunks:
            await response.write(chunk)
        await response.write_eof()
    except ConnectionError:
        request.protocol.force_close()
    except Exception as error:
        foreign = isinstance(error, Failure | aiohttp.ClientError)  # the end of whoever is passed on, not a fault of ours
        log.warning("%s %s is cut short: %s", request.method, request.path, error, exc_info=not foreign)
        request.protocol.force_close()
    return response


class _Client(asyncio.Protocol):
    """The client's side after the upgrade: what it sends goes to `writer`, which may make us stop reading."""

    def __init__(self, transport: asyncio.Transport, writer: asyncio.StreamWriter) -> None:
        self._transport, self._writer = transport, writer
        self._free = asyncio.Event()
        self._free.set()
        self._draining: asyncio.Task[None] | None = None
        self.gone = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        if self._writer.is_closing():
            return
        self._writer.write(data)
        if self._draining is None and self._writer.transport.get_write_buffer_size() > CHUNK:
            self._transport.pause_reading()
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            await self._writer.drain()
        except OSError:
            self.gone.set()
        else:
            if not self._transport.is_closing():
                self._transport.resume_reading()
        finally:
            self._draining = None

    def eof_received(self) -> bool:
        self.gone.set()
        return False

    def connection_lost(self, _error: Exception | None) -> None:
        self.gone.set()
        self._free.set()

    def pause_writing(self) -> None:
        self._free.clear()

    def resume_writing(self) -> None:
        self._free.set()

    async def send(self, data: bytes) -> None:
        await self._free.wait()
        if not self._transport.is_closing():
            self._transport.write(data)


def handshake(request: web.BaseRequest, target: str, host: str) -> bytes:
    """The head of the request that asks `host` for the upgrade which `request` asks of us."""
    headers = [f"{name}: {value}" for name in _PASSED for value in request.headers.getall(name, [])]
    return "\r\n".join([f"GET {target} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode("latin-1", "replace")


@contextmanager
def hung_up(transport: asyncio.BaseTransport, gone: asyncio.Event) -> Iterator[None]:
    """`gone` is set when the peer has closed its side or died, also while nothing is read: asyncio does not look then.

    One that dies with more on the way than we take cannot tell its end; keep-alive finds out when its kernel has given up, in minutes.
    """
    loop, connection = asyncio.get_running_loop(), transport.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    with select.epoll() as watch:
        watch.register(connection.fileno(), select.EPOLLRDHUP)  # EPOLLHUP and EPOLLERR always count

        def tell() -> None:
            loop.remove_reader(watch.fileno())
            gone.set()

        loop.add_reader(watch.fileno(), tell)
        try:
            yield
        finally:
            loop.remove_reader(watch.fileno())


async def relay(
    request: web.BaseRequest, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> web.StreamResponse:
    """Answer the request with `head` (a whole 101) and pass bytes on until either side ends; the caller closes `writer`."""
    transport = cast(asyncio.Transport, request.transport)
    client = _Client(transport, writer)
    transport.write(head)
    transport.set_protocol(client)
    transport.resume_reading()
    gone = asyncio.ensure_future(client.gone.wait())
    copy = asyncio.ensure_future(_copy(reader, client))
    try:
        with hung_up(transport, client.gone):
            await asyncio.wait((gone, copy), return_when=asyncio.FIRST_COMPLETED)
    finally:
        if client.gone.is_set():
            writer.transport.abort()  # what it sent and nobody took would be waited for, perhaps for ever
        for task in (gone, copy):
            task.cancel()
        await asyncio.gather(gone, copy, return_exceptions=True)
        transport.close()
        # aiohttp's own protocol no longer hears of the connection: tell it once its handler has returned
        request.protocol.force_close()
        asyncio.get_running_loop().call_soon(request.protocol.connection_lost, None)
    return _Relayed()


async def _copy(reader: asyncio.StreamReader, client: _Client) -> None:
    try:
        while data := await reader.read(CHUNK):
            await client.send(data)
    except OSError:
        return  # the other side is gone: the relay ends


class _Relayed(web.StreamResponse):
    """What the handler returns once the connection is no longer HTTP: nothing is written any more."""

    async def prepare(self, request: web.BaseRequest) -> None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None
