"""Bytes both ways between an upgraded request and another connection, unread, with back-pressure.

The client's transport leaves aiohttp's hands (`set_protocol`) the moment the answer's head has been written to it.
"""

from __future__ import annotations

import asyncio
from typing import cast

from aiohttp import web

CHUNK = 64 * 1024


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
        await asyncio.wait((gone, copy), return_when=asyncio.FIRST_COMPLETED)
    finally:
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
