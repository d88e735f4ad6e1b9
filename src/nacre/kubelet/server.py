"""The node API: HTTPS with client certificates, what the API server asks of a kubelet about one pod.

Logs are read here; exec and attach go on as the CRI's streaming URLs, whose WebSocket handshake and bytes are passed on unread.
The API server and system:masters may ask; everyone else is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import time
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc
from aiohttp import web

from nacre.config import Config
from nacre.kubelet import logs
from nacre.kubelet.watching import Watching
from nacre.oci.errors import Failure, Invalid, NotFound, Unsupported, WrongStatus
from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import Stub, failure_of
from nacre.wire.relay import handshake, relay, send

log = logging.getLogger("nacre.kubelet")
TRUSTED_USER, TRUSTED_GROUP = "kube-apiserver", "system:masters"
CONNECT_S = 10.0
HEAD_LIMIT = 64 * 1024
_CODES: dict[type[Failure], tuple[int, str]] = {
    Invalid: (400, "BadRequest"),
    NotFound: (404, "NotFound"),
    WrongStatus: (400, "BadRequest"),
    Unsupported: (501, "NotImplemented"),
}


class Pod(Protocol):
    """What the server asks a pod's worker."""

    def container_id(self, name: str) -> str: ...

    def log_path(self, name: str, *, previous: bool) -> str: ...

    def has_ended(self, name: str) -> bool: ...

    def subscribe(self, wake: asyncio.Event) -> None: ...

    def unsubscribe(self, wake: asyncio.Event) -> None: ...


class Pods(Protocol):
    def find(self, namespace: str, name: str) -> Pod | None: ...

    def all(self) -> list[dict[str, Any]]: ...


class Server:
    def __init__(self, config: Config, runtime: Stub, pods: Pods, watching: Watching) -> None:
        self._config, self._runtime, self._pods, self._watching = config, runtime, pods, watching
        self._runner: web.ServerRunner | None = None

    async def start(self) -> None:
        """Raises Failure when the port is taken."""
        # cancelled with its client: a log that nothing is written to would be held open until its container ends
        server = web.Server(self._handle, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await self._runner.setup()
        config = self._config
        site = web.TCPSite(self._runner, config.listen, config.kubelet_port, ssl_context=_context(f"{config.data}/pki"))
        try:
            await site.start()
        except OSError as error:
            raise Failure(
                what="listen as the kubelet",
                cause=f"bind(2) {config.listen}:{config.kubelet_port}: {error.strerror}",
                remedy="set `kubelet_port` in config.toml, or end what listens there (`ss -ltnp`)",
            ) from error

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/healthz":
            return web.Response(text="ok")
        if not _trusted(request):
            return _status(403, "Forbidden", "the kubelet answers the API server and system:masters only")
        try:
            return await self._answer(request)
        except grpc.RpcError as error:
            return _refusal(failure_of(error, f"answer {request.path}"))
        except Failure as failure:
            return _refusal(failure)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        what, *rest = request.path.strip("/").split("/")
        if what == "pods" and not rest:
            items = self._pods.all()
            return _json(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
        if what == "portForward":
            raise Unsupported(what="forward a port", cause="the kubelet of this nacre does not forward ports yet")
        if what not in ("containerLogs", "exec", "attach") or len(rest) != 3:
            raise NotFound(what=f"answer {request.path}", cause="the kubelet has no such path")
        namespace, name, container = rest
        pod = self._pods.find(namespace, name)
        if pod is None:
            raise NotFound(what=f"find pod {namespace}/{name}", cause="it is not on this node")
        if what == "containerLogs":
            return await self._log(request, pod, container)
        return await self._stream(request, what, pod, container)

    # logs

    async def _log(self, request: web.BaseRequest, pod: Pod, container: str) -> web.StreamResponse:
        asked = logs.wanted(dict(request.query), time.time())
        previous = request.query.get("previous") in ("true", "1")
        path = pod.log_path(container, previous=previous)
        wake = asyncio.Event()
        pod.subscribe(wake)
        try:
            lines = logs.read(path, asked, self._watching, lambda: previous or pod.has_ended(container), wake)
            async with contextlib.aclosing(lines):
                first = await anext(lines, b"") if not asked.follow else b""  # a missing file is refused before the head is out
                return await send(request, web.StreamResponse(headers={"Content-Type": "text/plain"}), lines, first)
        finally:
            pod.unsubscribe(wake)

    # exec and attach

    async def _stream(self, request: web.BaseRequest, what: str, pod: Pod, container: str) -> web.StreamResponse:
        wants = {key: request.query.get(key) in ("1", "true") for key in ("input", "output", "error", "tty")}
        streams: dict[str, Any] = {"stdin": wants["input"], "stdout": wants["output"], "tty": wants["tty"]}
        streams |= {"stderr": wants["error"] and not wants["tty"], "container_id": pod.container_id(container)}
        if what == "exec":
            answer = await self._runtime.Exec(cri.ExecRequest(cmd=request.query.getall("command", []), **streams))
        else:
            answer = await self._runtime.Attach(cri.AttachRequest(**streams))
        if (
            request.headers.get("Upgrade", "").lower() != "websocket"
        ):  # asked last: clients that were refused try SPDY and show its answer
            cause = "streams are offered by WebSocket (v5.channel.k8s.io; kubectl 1.30 or newer); SPDY/3.1 is not"
            raise Invalid(what=what, cause=cause)
        return await self._pass_on(request, answer.url)

    async def _pass_on(self, request: web.BaseRequest, url: str) -> web.StreamResponse:
        """The client's handshake to the runtime's URL, then bytes both ways."""
        place = urlsplit(url)
        target = place.path + (f"?{place.query}" if place.query else "")
        what = f"reach the runtime's streaming server at {place.netloc}"
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(place.hostname, place.port or 80, limit=HEAD_LIMIT)
        except (OSError, TimeoutError) as error:
            raise Failure(what=what, cause=str(error) or f"no connection within {CONNECT_S:.0f} s") from error
        try:
            writer.write(handshake(request, target, place.netloc))
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 101"):
                said = (await reader.read(HEAD_LIMIT)).decode(errors="replace").strip()
                raise Failure(what=what, cause=said or answer.split(b"\r\n")[0].decode(errors="replace"))
            return await relay(request, answer, reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise Failure(what=what, cause=f"it ended the connection before it answered: {error}") from error
        finally:
            writer.close()


def _context(pki: str) -> ssl.SSLContext:
    """Client certificates are asked for; without one only /healthz answers."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=f"{pki}/ca.crt")
    context.load_cert_chain(f"{pki}/kubelet.crt", f"{pki}/kubelet.key")
    context.verify_mode = ssl.CERT_OPTIONAL
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _trusted(request: web.BaseRequest) -> bool:
    certificate = (request.transport.get_extra_info("peercert") if request.transport else None) or {}
    names = [pair for part in certificate.get("subject", ()) for pair in part]
    return ("commonName", TRUSTED_USER) in names or ("organizationName", TRUSTED_GROUP) in names


def _refusal(failure: Failure) -> web.Response:
    code, reason = _CODES.get(type(failure), (500, "InternalError"))
    return _status(code, reason, failure.sentence())


def _status(code: int, reason: str, message: str) -> web.Response:
    words = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return _json(code, words | {"message": message, "reason": reason, "code": code})


def _json(code: int, document: dict[str, Any]) -> web.Response:
    return web.Response(status=code, text=json.dumps(document), content_type="application/json")
