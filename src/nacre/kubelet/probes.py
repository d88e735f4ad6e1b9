"""Startup, readiness and liveness probes of one container: exec, httpGet, tcpSocket, grpc. A task each, told of by a callback."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import grpc

from nacre.oci.errors import Failure, Unsupported
from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import Stub, failure_of

log = logging.getLogger("nacre.kubelet")
KINDS = {"startupProbe": "Startup", "readinessProbe": "Readiness", "livenessProbe": "Liveness"}
GRPC_HEALTH = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
OUTPUT = 300  # characters of a probe's answer that an event shows
UNREACHED = (aiohttp.ClientError, OSError, ValueError, OverflowError)  # the last two: a header or port that cannot be sent
Result = Callable[[str, bool, str], None]  # (probe kind, passed, words), after the thresholds


class Prober:
    """The probes of one running container; ended by `stop`."""

    def __init__(
        self, runtime: Stub, container: Mapping[str, Any], container_id: str, address: str, result: Result, failed: Result
    ) -> None:
        self._runtime, self._container, self._id, self._address = runtime, container, container_id, address
        self._result, self._failed = result, failed
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None
        if any(kind in container for kind in KINDS):
            self._tasks.append(asyncio.create_task(self._run()))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _run(self) -> None:
        """The startup probe first; the others begin when it has passed."""
        if "startupProbe" in self._container:
            await self._watch("startupProbe", until_passed=True)
        for kind in ("readinessProbe", "livenessProbe"):
            if kind in self._container:
                self._tasks.append(asyncio.create_task(self._watch(kind)))

    async def _watch(self, kind: str, *, until_passed: bool = False) -> None:
        probe = self._container[kind]
        period, threshold = (
            float(probe.get("periodSeconds", 10)),
            {True: int(probe.get("successThreshold", 1)), False: int(probe.get("failureThreshold", 3))},
        )
        await asyncio.sleep(float(probe.get("initialDelaySeconds", 0)))
        last, count, told = None, 0, None
        while True:
            passed, words = await self._once(probe)
            count = count + 1 if passed == last else 1
            last = passed
            if not passed:
                self._failed(kind, passed, words)
            if count >= threshold[passed] and told != passed:
                told = passed
                self._result(kind, passed, words)
                if passed and until_passed:
                    return
            await asyncio.sleep(period)

    async def _once(self, probe: Mapping[str, Any]) -> tuple[bool, str]:
        timeout = float(probe.get("timeoutSeconds", 1))
        try:
            async with asyncio.timeout(timeout + 0.5):
                return await attempt(self._runtime, probe, self._container, self._id, self._address, timeout, self._http)
        except TimeoutError:
            return False, f"no answer within {timeout:g} s"
        except Failure as failure:
            return False, failure.sentence()
        except UNREACHED as error:
            return False, str(error) or type(error).__name__

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False, force_close=True))
        return self._session


async def attempt(
    runtime: Stub,
    action: Mapping[str, Any],
    container: Mapping[str, Any],
    container_id: str,
    address: str,
    timeout: float,
    http: Callable[[], aiohttp.ClientSession],
) -> tuple[bool, str]:
    """One try of a probe's or hook's action: (passed, words). Raises Failure, UNREACHED."""
    if "exec" in action:
        return await _exec(runtime, list(action["exec"]["command"]), container_id, timeout)
    if "httpGet" in action:
        return await _http_get(action["httpGet"], container, address, http())
    if "tcpSocket" in action:
        host = action["tcpSocket"].get("host") or address
        _reader, writer = await asyncio.open_connection(host, port_number(action["tcpSocket"]["port"], container))
        writer.close()
        return True, ""
    if "grpc" in action:
        return await _grpc_health(action["grpc"], address)
    if "sleep" in action:
        await asyncio.sleep(float(action["sleep"]["seconds"]))
        return True, ""
    means = ", ".join(key for key in action if isinstance(action[key], dict)) or "nothing"
    raise Unsupported(
        what="probe a container", cause=f"probes by {means} are not offered", remedy="use exec, httpGet, tcpSocket or grpc"
    )


async def _exec(runtime: Stub, command: list[str], container_id: str, timeout: float) -> tuple[bool, str]:
    try:
        answer = await runtime.ExecSync(cri.ExecSyncRequest(container_id=container_id, cmd=command, timeout=math.ceil(timeout)))
    except grpc.RpcError as error:
        raise failure_of(error, f"run {command[0]}") from error
    text = (answer.stdout + answer.stderr).decode(errors="replace").strip()
    return answer.exit_code == 0, text[:OUTPUT] or f"exit code {answer.exit_code}"


async def _http_get(
    action: Mapping[str, Any], container: Mapping[str, Any], address: str, session: aiohttp.ClientSession
) -> tuple[bool, str]:
    host = action.get("host") or address
    url = f"{action.get('scheme', 'HTTP').lower()}://{host}:{port_number(action['port'], container)}{action.get('path', '/')}"
    headers = {one["name"]: one["value"] for one in action.get("httpHeaders") or []}
    async with session.get(url, headers={"User-Agent": "kube-probe/1.37"} | headers, allow_redirects=False) as answer:
        return 200 <= answer.status < 400, f"HTTP probe failed with statuscode: {answer.status}"


async def _grpc_health(action: Mapping[str, Any], address: str) -> tuple[bool, str]:
    """grpc.health.v1.Health/Check; its two messages have one field each and are read and written by hand."""
    service = str(action.get("service") or "").encode()
    size = len(service)
    length = (
        bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])
    )  # a varint; no service's name is 16 KiB long
    request = b"\x0a" + length + service if service else b""
    async with grpc.aio.insecure_channel(f"{address}:{int(action['port'])}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", request_serializer=bytes, response_deserializer=bytes)
        try:
            answer: bytes = await check(request)
        except grpc.RpcError as error:
            return False, f"service unhealthy (responded with {error.code().name}: {error.details()})"
    word = GRPC_HEALTH.get(answer[1] if answer[:1] == b"\x08" and len(answer) > 1 else 0, "UNKNOWN")
    return word == "SERVING", f'service unhealthy (responded with "{word}")'


def port_number(port: Any, container: Mapping[str, Any]) -> int:
    """A number, or the containerPort of that name. Raises Unsupported naming the port."""
    if isinstance(port, int) or str(port).isdigit():
        return int(port)
    for known in container.get("ports") or []:
        if known.get("name") == port:
            return int(known["containerPort"])
    raise Unsupported(what=f"find port {port}", cause=f"container {container['name']} names no such port")
