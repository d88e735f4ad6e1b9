"""The API client against servers that behave badly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from nacre.wire import kube
from nacre.wire.kube import Kube, Unreachable


@pytest.fixture
async def silent() -> AsyncIterator[str]:
    """A server that begins a watch's answer and never says another word, as one whose machine was cut off."""
    over = asyncio.Event()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'{"type":"ADDED","object":{"metadata":{"name":"one"}}}\n{"type":"ADDED","obj')
        await over.wait()
        return response

    runner = web.ServerRunner(web.Server(answer), shutdown_timeout=0.1)  # type: ignore[arg-type]
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    over.set()
    await runner.cleanup()


async def test_a_watch_of_a_server_that_fell_silent_ends(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube, "REQUEST_TIMEOUT_S", 0.2)
    async with Kube(silent, None) as client, asyncio.timeout(10):
        seen = []
        with pytest.raises(Unreachable):
            async for event in client.watch("/api/v1/pods", timeoutSeconds=0):
                seen.append(event["object"]["metadata"]["name"])
        assert seen == ["one"]
