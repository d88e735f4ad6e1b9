"""A small Kubernetes API client over aiohttp: kubelet, controllers and tests speak to the API server through it, and only so.

Objects are JSON trees (dict), paths are API paths such as `/api/v1/namespaces/default/pods/web/status`. A refusal of the server
is an `ApiError`, a server that cannot be reached an `Unreachable`; nothing else of aiohttp leaves this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, Literal

import aiohttp
import msgspec

from nacre.config import Config
from nacre.oci.errors import Failure, NotFound

Object = dict[str, Any]
PatchKind = Literal["strategic", "merge", "json", "apply"]

REQUEST_TIMEOUT_S = 30.0
WATCH_TIMEOUT_S = 600  # asked of the server: a watch ends and is resumed now and then
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 5.0
_PATCH_TYPES: dict[str, str] = {
    "strategic": "application/strategic-merge-patch+json",
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "apply": "application/apply-patch+yaml",
}


class ApiError(Exception):
    """The server's refusal: `code` is the HTTP status, `status` the Status object (meta/v1) it answered."""

    def __init__(self, status: Object, code: int) -> None:
        super().__init__(status, code)
        self.status = status
        self.code = code

    @property
    def reason(self) -> str:
        """Kubernetes' word: NotFound, AlreadyExists, Conflict, Invalid, Expired, …"""
        return str(self.status.get("reason", ""))

    @property
    def message(self) -> str:
        return str(self.status.get("message", f"the server answered {self.code}"))

    def __str__(self) -> str:
        return self.message


class Unreachable(Failure):
    """No answer came: refused, reset, TLS failure or deadline."""

    code = "ApiUnreachable"


class Kube:
    """A client of one API server: `async with Kube(url, client_context(pki, "kubelet")) as kube`.

    `ssl_context` None means plain http. The connection pool is made at the first request, in the running loop.
    """

    def __init__(self, server_url: str, ssl_context: ssl.SSLContext | None = None, *, agent: str = "nacre") -> None:
        self.server_url = server_url.rstrip("/")
        self._ssl = ssl_context
        self._agent = agent
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Kube:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def get(self, path: str, **params: Any) -> Object:
        return await self._call("GET", path, params=params)

    async def create(self, path: str, body: Object, **params: Any) -> Object:
        return await self._call("POST", path, body, params)

    async def update(self, path: str, body: Object, **params: Any) -> Object:
        """PUT; a `metadata.resourceVersion` in `body` makes it conditional (ApiError 409)."""
        return await self._call("PUT", path, body, params)

    async def patch(self, path: str, body: Any, kind: PatchKind = "strategic", **params: Any) -> Object:
        return await self._call("PATCH", path, body, params, content_type=_PATCH_TYPES[kind])

    async def delete(self, path: str, body: Object | None = None, **params: Any) -> Object:
        """DELETE; `body` is DeleteOptions (`gracePeriodSeconds`, `preconditions`, `propagationPolicy`)."""
        return await self._call("DELETE", path, body, params)

    async def watch(self, path: str, resource_version: str = "", **params: Any) -> AsyncGenerator[Object, None]:
        """Events `{"type", "object"}` of the collection `path` after `resource_version`, until the server ends the watch.

        An ERROR event becomes ApiError (410 Expired: list again). Close the iterator (`contextlib.aclosing`) to stop early.
        """
        wanted: Object = {"watch": "true", "timeoutSeconds": WATCH_TIMEOUT_S, "allowWatchBookmarks": "true"} | params
        if resource_version:
            wanted["resourceVersion"] = resource_version
        # the server ends a watch at its timeout: who says nothing for longer is gone without a word
        silence_s = int(wanted["timeoutSeconds"]) + REQUEST_TIMEOUT_S
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=REQUEST_TIMEOUT_S, sock_read=silence_s)
        with _translated("GET", path):
            async with self._open().get(
                self.server_url + path, params=_query(wanted), timeout=timeout, ssl=self._tls()
            ) as answer:
                if answer.status >= 400:
                    raise _error(answer.status, await answer.read())
                async for line in _lines(answer.content):
                    event: Object = msgspec.json.decode(line)
                    if event["type"] == "ERROR":
                        raise ApiError(event["object"], int(event["object"].get("code", 500)))
                    yield event

    async def _call(
        self, method: str, path: str, body: Any = None, params: Object | None = None, *, content_type: str = "application/json"
    ) -> Object:
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": content_type} if data is not None else {}
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        with _translated(method, path):
            async with self._open().request(
                method,
                self.server_url + path,
                params=_query(params or {}),
                data=data,
                headers=headers,
                timeout=timeout,
                ssl=self._tls(),
            ) as answer:
                content = await answer.read()
        if answer.status >= 400:
            raise _error(answer.status, content)
        document: Object = msgspec.json.decode(content) if content else {}
        return document

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"User-Agent": self._agent, "Accept": "application/json"}
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)  # watches hold a connection each
            self._session = aiohttp.ClientSession(connector=connector, headers=headers, auto_decompress=True)
        return self._session

    def _tls(self) -> ssl.SSLContext | bool:
        return True if self._ssl is None else self._ssl


def client_context(pki: str, name: str) -> ssl.SSLContext:
    """TLS settings of the identity `name` ("kubelet", "controllers", "admin") whose files lie in directory `pki`."""
    context = ssl.create_default_context(cafile=f"{pki}/ca.crt")
    context.load_cert_chain(f"{pki}/{name}.crt", f"{pki}/{name}.key")
    return context


def own_server(config: Config) -> str:
    """The URL of this node's API server, as STATE/node.json has it. Raises NotFound."""
    path = f"{config.state}/node.json"
    try:
        with open(path, "rb") as file:
            port = json.load(file)["api_port"]
    except (OSError, ValueError, KeyError) as error:
        cause = f"{path} has no api_port ({type(error).__name__})"
        raise NotFound(what="find the API server", cause=cause, remedy="nacre up") from error
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.listen, config.listen)
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


async def reflect(kube: Kube, path: str, **params: Any) -> AsyncGenerator[tuple[str, Object | None], None]:
    """List the collection `path`, then watch it, for ever: what a cache needs to stay equal to the server's state.

    Yields ("ADDED" | "MODIFIED" | "DELETED", object), and ("SYNCED", None) after each complete list. After a lost watch the new
    list is compared with what was yielded before, so every disappearance is told once. `params` are selectors. Failures are
    retried with back-off and never end the iterator; authorization errors (401, 403) do, as ApiError.
    """
    known: dict[tuple[str, str], Object] = {}
    version, pause_s = "", FIRST_RETRY_S
    while True:
        try:
            if not version:
                listed = await kube.get(path, **params)
                for change in _compare(known, listed):
                    yield change
                version = listed["metadata"]["resourceVersion"]
                yield "SYNCED", None
            async with contextlib.aclosing(kube.watch(path, version, **params)) as events:
                async for event in events:
                    thing = event["object"]
                    version = thing["metadata"]["resourceVersion"]
                    pause_s = FIRST_RETRY_S
                    if event["type"] == "BOOKMARK":
                        continue
                    if event["type"] == "DELETED":
                        known.pop(_key(thing), None)
                    else:
                        known[_key(thing)] = thing
                    yield event["type"], thing
        except ApiError as error:
            if error.code in (401, 403):
                raise
            version = ""
            if error.code == 410:
                continue
        except Unreachable:
            pass  # the version stays: the server may come back with its history
        else:
            continue
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, LAST_RETRY_S)


def _compare(known: dict[tuple[str, str], Object], listed: Object) -> Iterator[tuple[str, Object | None]]:
    """The changes that lead from `known` (brought up to date on the way) to the list `listed`."""
    api_version, kind = listed.get("apiVersion"), str(listed.get("kind", "")).removesuffix("List")
    fresh = {_key(item): item for item in listed["items"]}
    for key in [key for key, thing in known.items() if key not in fresh or _uid(fresh[key]) != _uid(thing)]:
        yield "DELETED", known.pop(key)
    for key, item in fresh.items():
        item.setdefault("apiVersion", api_version)  # items of a typed list carry neither
        item.setdefault("kind", kind)
        before = known.get(key)
        known[key] = item
        if before is None:
            yield "ADDED", item
        elif before["metadata"]["resourceVersion"] != item["metadata"]["resourceVersion"]:
            yield "MODIFIED", item


def _key(thing: Object) -> tuple[str, str]:
    return thing["metadata"].get("namespace", ""), thing["metadata"]["name"]


def _uid(thing: Object) -> str:
    return str(thing["metadata"].get("uid", ""))


def _query(params: Object) -> dict[str, str]:
    return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in params.items()}


def _error(code: int, content: bytes) -> ApiError:
    try:
        status = msgspec.json.decode(content)
    except msgspec.DecodeError:
        status = None
    if not isinstance(status, dict):
        status = {"kind": "Status", "status": "Failure", "code": code, "message": content[:500].decode(errors="replace")}
    return ApiError(status, code)


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Non-empty lines of a stream, of any length (StreamReader.readline has a limit)."""
    kept: list[bytes] = []
    async for chunk in content.iter_any():
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            kept.append(line)
            joined = b"".join(kept)
            kept = []
            if joined:
                yield joined
        if rest:
            kept.append(rest)


@contextlib.contextmanager
def _translated(method: str, path: str) -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        cause = str(error) or type(error).__name__
        raise Unreachable(what=f"{method} {path}", cause=cause, remedy="see `nacre status`") from error
