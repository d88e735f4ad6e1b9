"""Probes against real servers on loopback: what passes, what fails and in which words, when thresholds tell."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web

from nacre.kubelet import probes
from nacre.oci.errors import Unsupported

CONTAINER: dict[str, Any] = {"name": "main", "ports": [{"name": "http", "containerPort": 8080}]}


async def attempted(action: dict[str, Any]) -> tuple[bool, str]:
    async with aiohttp.ClientSession() as session:
        return await probes.attempt(None, action, CONTAINER, "id", "127.0.0.1", 1.0, lambda: session)  # type: ignore[arg-type]


async def with_web(
    answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], act: Callable[[int], Awaitable[Any]]
) -> Any:
    runner = web.ServerRunner(web.Server(answer))  # type: ignore[arg-type]
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        return await act(runner.addresses[0][1])
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(("status", "passed"), [(200, True), (302, True), (404, False), (500, False)])
def test_http_passes_from_200_to_399(status: int, passed: bool) -> None:
    seen = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        seen.append((request.path, request.headers.get("X-Asked"), request.headers["User-Agent"]))
        return web.Response(status=status, headers={"Location": "http://192.0.2.1/"})

    async def act(port: int) -> tuple[bool, str]:
        headers = [{"name": "X-Asked", "value": "yes"}]
        return await attempted({"httpGet": {"port": port, "path": "/health", "httpHeaders": headers}})

    got, words = asyncio.run(with_web(answer, act))
    assert got == passed and words == f"HTTP probe failed with statuscode: {status}"
    assert seen == [("/health", "yes", "kube-probe/1.37")]


def test_tcp_passes_when_someone_listens() -> None:
    async def answer(_request: web.BaseRequest) -> web.StreamResponse:
        return web.Response()

    async def act(port: int) -> int:
        assert (await attempted({"tcpSocket": {"port": port}}))[0]
        return port

    port = asyncio.run(with_web(answer, act))
    with pytest.raises(OSError, match=r"refused|failed"):
        asyncio.run(attempted({"tcpSocket": {"port": port}}))


def health_asked(service: str, answer: bytes) -> tuple[bool, str, list[bytes]]:
    """(passed, words, the requests that came) of a grpc probe of a server that gives `answer`."""
    asked = []

    async def check(request: bytes, _context: Any) -> bytes:
        asked.append(request)
        return answer

    async def body() -> tuple[bool, str]:
        server = grpc.aio.server()
        method = grpc.unary_unary_rpc_method_handler(check, request_deserializer=bytes, response_serializer=bytes)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": method}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            return await attempted({"grpc": {"port": port, "service": service}})
        finally:
            await server.stop(None)

    return *asyncio.run(body()), asked


@pytest.mark.parametrize(
    ("answer", "passed", "words"),
    [(b"\x08\x01", True, ""), (b"\x08\x02", False, "NOT_SERVING"), (b"", False, "UNKNOWN"), (b"\xff", False, "UNKNOWN")],
)
def test_grpc_health_is_asked_for_the_service_by_name(answer: bytes, passed: bool, words: str) -> None:
    got, said, asked = health_asked("web", answer)
    assert got == passed and words in said and asked == [b"\x0a\x03web"]


def test_the_length_of_a_long_service_name_is_a_varint() -> None:
    got, _said, asked = health_asked("s" * 300, b"\x08\x01")
    assert got and asked == [b"\x0a\xac\x02" + b"s" * 300]


@pytest.mark.parametrize(
    "action",
    [
        {"httpGet": {"port": 80, "path": "/", "httpHeaders": [{"name": "X", "value": "a\r\nb"}]}},
        {"httpGet": {"port": 80, "path": "/", "host": "no host at all"}},
        {"tcpSocket": {"port": "99999"}},
        {"grpc": {"port": 1, "service": "s" * 300}},
    ],
)
def test_a_probe_that_cannot_be_sent_is_a_failed_one(action: dict[str, Any]) -> None:
    failed: list[str] = []

    async def body() -> None:
        told = asyncio.Event()

        def note(_kind: str, _passed: bool, words: str) -> None:
            failed.append(words)
            told.set()

        container = CONTAINER | {"livenessProbe": action | {"failureThreshold": 1}}
        prober = probes.Prober(None, container, "id", "127.0.0.1", note, lambda *_: None)  # type: ignore[arg-type]
        async with asyncio.timeout(5):
            await told.wait()
        await prober.stop()

    asyncio.run(body())
    assert failed and all(failed)


def test_ports_have_names() -> None:
    assert probes.port_number("http", CONTAINER) == probes.port_number(8080, CONTAINER) == probes.port_number("8080", CONTAINER)
    with pytest.raises(Unsupported, match="names no such port"):
        probes.port_number("admin", CONTAINER)


def test_thresholds_and_the_startup_probe_decide_what_is_told() -> None:
    answers = {"/start": iter([500, 500, 200]), "/ready": iter([200, 500, 500, 200])}
    told: list[tuple[str, bool]] = []
    failed: list[str] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=next(answers[request.path], 200))

    async def act(port: int) -> None:
        enough = asyncio.Event()

        def result(kind: str, passed: bool, _words: str) -> None:
            told.append((kind, passed))
            if len(told) == 4:
                enough.set()

        def probe(path: str, failures: int) -> dict[str, Any]:
            return {"httpGet": {"port": port, "path": path}, "periodSeconds": 0.01, "failureThreshold": failures}

        container = CONTAINER | {"startupProbe": probe("/start", 5), "readinessProbe": probe("/ready", 2)}
        prober = probes.Prober(None, container, "id", "127.0.0.1", result, lambda kind, _passed, _words: failed.append(kind))  # type: ignore[arg-type]
        async with asyncio.timeout(10):
            await enough.wait()
        await prober.stop()

    asyncio.run(with_web(answer, act))
    ready = "readinessProbe"
    assert told == [("startupProbe", True), (ready, True), (ready, False), (ready, True)]
    assert failed == ["startupProbe", "startupProbe", ready, ready]
