"""log, exec, attach: relayed to the kubelet of the pod's node.

Logs are copied chunk by chunk; exec and attach are upgraded connections (WebSocket) whose bytes are passed on unread, both ways,
each side paused while the other cannot take more. The server shows the kubelet its own certificate (`apiserver`).
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
from aiohttp import web

from nacre.api import kinds, objects
from nacre.api.kind import Object
from nacre.api.status import Refusal, bad_request, method_not_allowed, not_found, unsupported
from nacre.api.store import Store
from nacre.api.write import Call
from nacre.wire.relay import handshake, relay, send

CONNECT_S = 10.0
HEAD_LIMIT = 64 * 1024
_LOG_PARAMETERS = ("follow", "limitBytes", "previous", "sinceSeconds", "sinceTime", "stream", "tailLines", "timestamps")
# a kubelet's names for the parameters of exec and attach
_STREAM_PARAMETERS = {"stdin": "input", "stdout": "output", "stderr": "error", "tty": "tty"}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A kubelet's node API."""

    node: str
    host: str
    port: int

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Streams:
    def __init__(self, store: Store, pki: str) -> None:
        self._store, self._pki = store, pki
        self._nodes = kinds.require("", "v1", "nodes")
        self._context: ssl.SSLContext | None = None
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def handle(self, request: web.BaseRequest, call: Call) -> web.StreamResponse:
        entry = self._store.get(call.key)
        if entry is None:
            raise not_found(call.kind, call.name)
        pod = objects.load_entry(call.kind, entry)
        if call.subresource == "portforward":
            raise unsupported("pods/portforward is not supported by this nacre yet")
        if call.subresource == "log":
            if request.method != "GET":
                raise method_not_allowed()
            return await self._log(request, pod)
        return await self._upgrade(request, call, pod)

    def _endpoint(self, pod: Object) -> Endpoint:
        """Where the pod's kubelet is, by its Node's status; raises Refusal saying what is missing."""
        name = pod["spec"].get("nodeName", "")
        if not name:
            raise bad_request(f"pod {pod['metadata']['name']} does not have a host assigned")
        entry = self._store.get(self._nodes.key("", name))
        if entry is None:
            raise not_found(self._nodes, name)
        status: dict[str, Any] = objects.load_entry(self._nodes, entry).get("status", {})
        by_type = {one.get("type"): one.get("address") for one in reversed(status.get("addresses", []))}
        host = by_type.get("InternalIP") or by_type.get("Hostname")
        port = status.get("daemonEndpoints", {}).get("kubeletEndpoint", {}).get("Port")
        if not host or not port:
            raise _unreachable(name, "its status has no address or no kubelet port yet")
        return Endpoint(name, host, int(port))

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = ssl.create_default_context(cafile=f"{self._pki}/ca.crt")
            self._context.load_cert_chain(f"{self._pki}/apiserver.crt", f"{self._pki}/apiserver.key")
        return self._context

    # ---- logs

    async def _log(self, request: web.BaseRequest, pod: Object) -> web.StreamResponse:
        endpoint = self._endpoint(pod)
        path = _path("containerLogs", pod, _container(pod, request.query.get("container", "")))
        query = [(key, value) for key, value in request.query.items() if key in _LOG_PARAMETERS]
        url = f"https://{endpoint.authority}{path}?{urlencode(query)}"
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        try:
            async with self._session.get(url, ssl=self._tls(), timeout=timeout) as answer:
                return await _copy(request, answer)
        except aiohttp.ClientConnectorError as error:
            raise _unreachable(endpoint.node, f"dial tcp {endpoint.authority}: {error}") from error
        except aiohttp.ClientError as error:
            raise _unreachable(endpoint.node, f"it ended the connection before it answered: {error}") from error

    # ---- exec and attach

    async def _upgrade(self, request: web.BaseRequest, call: Call, pod: Object) -> web.StreamResponse:
        endpoint = self._endpoint(pod)
        query = [("command", word) for word in request.query.getall("command", [])] if call.subresource == "exec" else []
        if call.subresource == "exec" and not query:
            raise bad_request("you must specify at least one command for the container")
        for ours, theirs in _STREAM_PARAMETERS.items():
            if request.query.get(ours, "").lower() in ("true", "1"):
                query.append((theirs, "1"))
        path = _path(call.subresource, pod, _container(pod, request.query.get("container", "")))
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=self._tls(), limit=HEAD_LIMIT)
        except (OSError, TimeoutError) as error:
            words = str(error) or f"no connection within {CONNECT_S:.0f} s"
            raise _unreachable(endpoint.node, f"dial tcp {endpoint.authority}: {words}") from error
        try:
            writer.write(handshake(request, f"{path}?{urlencode(query)}", endpoint.authority))
            answer = await reader.readuntil(b"\r\n\r\n")
            status = int(answer.split(b" ", 2)[1])
            if status != 101:
                raise await _refusal_of(reader, answer, status)
            return await relay(request, answer, reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, IndexError) as error:
            words = f"it ended the connection before it answered: {error}"
            raise _unreachable(endpoint.node, words) from error
        finally:
            writer.close()


async def _copy(request: web.BaseRequest, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """A kubelet's answer to the client, as it comes; write waits while the client is slow."""
    if answer.status >= 400:
        raise _as_refusal(answer.status, await answer.read())
    response = web.StreamResponse(status=answer.status, headers={"Content-Type": "text/plain"})
    return await send(request, response, answer.content.iter_any())


async def _refusal_of(reader: asyncio.StreamReader, head: bytes, status: int) -> Refusal:
    """What the kubelet said instead of switching protocols; its body is read as far as it says its length."""
    length = 0
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            length = min(int(value), HEAD_LIMIT)
    return _as_refusal(status, await reader.readexactly(length))


def _as_refusal(status: int, body: bytes) -> Refusal:
    try:
        document = objects.decode(body)
    except ValueError:
        document = None
    if isinstance(document, dict) and document.get("kind") == "Status":
        code = document.get("code")
        return Refusal(
            code if isinstance(code, int) else status,
            str(document.get("reason", "")),
            str(document.get("message", "")),
            document.get("details") if isinstance(document.get("details"), dict) else None,
        )
    text = body[:2000].decode(errors="replace").strip() or f"the kubelet answered {status}"
    reasons = {400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound"}
    return Refusal(status, reasons.get(status, "InternalError"), text)


def _path(what: str, pod: Object, container: str) -> str:
    meta = pod["metadata"]
    return f"/{what}/{quote(meta['namespace'])}/{quote(meta['name'])}/{quote(container)}"


def _container(pod: Object, asked: str) -> str:
    """The container meant; raises Refusal 400 in Kubernetes' words."""
    name, spec = pod["metadata"]["name"], pod["spec"]
    plain = [one["name"] for one in spec.get("containers", [])]
    init = [one["name"] for one in spec.get("initContainers", [])]
    if asked:
        if asked not in plain + init:
            raise bad_request(f"container {asked} is not valid for pod {name}")
        return asked
    if len(plain) == 1:
        return str(plain[0])
    wanted = pod["metadata"].get("annotations", {}).get("kubectl.kubernetes.io/default-container")
    if wanted in plain:
        return str(wanted)
    others = f" or one of the init containers: [{' '.join(init)}]" if init else ""
    raise bad_request(f"a container name must be specified for pod {name}, choose one of: [{' '.join(plain)}]{others}")


def _unreachable(node: str, why: str) -> Refusal:
    return Refusal(503, "ServiceUnavailable", f'the kubelet of node "{node}" cannot be reached: {why}')
