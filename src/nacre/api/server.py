"""HTTP to calls: path, identity and negotiation here; the work is `read`, `write`, `delete`, `streams`.

`Api.handle` is the one request handler of an aiohttp low-level server: no routes, one parse of the path (API conventions,
"Resource paths").
"""

from __future__ import annotations

import contextlib
import gzip
import logging
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from nacre.api import access, decode, discovery, kinds, managed, objects, openapi
from nacre.api.admission import Admission
from nacre.api.binding import bind
from nacre.api.delete import Deleter
from nacre.api.kind import Kind
from nacre.api.read import Form, Reader, parse_query, truth
from nacre.api.status import Refusal, bad_request, method_not_allowed, no_such_path, unsupported
from nacre.api.store import StorageFailed, Store
from nacre.api.streams import Streams
from nacre.api.write import Call, Writer
from nacre.wire.relay import send

log = logging.getLogger("nacre.api")

_JSON = "application/json"
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete", "GET": "get", "HEAD": "get"}
_STREAMED = ("log", "exec", "attach", "portforward")
_FORMS = ("Table", "PartialObjectMetadata", "PartialObjectMetadataList")
_FOREVER = "public, max-age=31536000, immutable"  # of a URL that has its content's hash


@dataclass(frozen=True, slots=True)
class Target:
    """A resource path taken apart; empty strings for what it lacks."""

    group: str
    version: str
    namespace: str
    resource: str
    name: str
    subresource: str


def parse_path(path: str) -> Target | None:
    """None for a path that is no resource's."""
    parts = [unquote(part) for part in path.strip("/").split("/")]
    if any(not part or "/" in part for part in parts):
        return None  # an escaped slash or an empty segment: no name has one
    if parts[0] == "api" and len(parts) >= 3:
        group, version, rest = "", parts[1], parts[2:]
    elif parts[0] == "apis" and len(parts) >= 4:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return None
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2 and not (group == "" and rest[2] in ("status", "finalize") and len(rest) == 3):
        namespace, rest = rest[1], rest[2:]
    if len(rest) > 3:
        return None
    rest += [""] * (3 - len(rest))
    return Target(group, version, namespace, rest[0], rest[1], rest[2])


class Api:
    """The server's parts, wired to one store."""

    def __init__(self, store: Store, pki: str) -> None:
        self._store = store
        self._reader = Reader(store)
        self._writer = Writer(store, Admission(store))
        self._deleter = Deleter(store)
        self._streams = Streams(store, pki)

    async def close(self) -> None:
        await self._streams.close()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except Refusal as refusal:
            return _refused(refusal)
        except StorageFailed as failure:
            log.error("%s", failure.sentence())
            return _refused(Refusal(500, "InternalError", f"Internal error occurred: {failure.sentence()}"))
        except web.HTTPRequestEntityTooLarge:
            words = f"Request entity too large: limit is {decode.BODY_LIMIT}"
            return _refused(Refusal(413, "RequestEntityTooLarge", words))
        except web.RequestPayloadError as error:
            request.content.feed_eof()  # else aiohttp reads on after the answer, and logs the same error as its own
            response = _refused(bad_request(f"the body of the request cannot be read: {error}"))
            response.force_close()
            return response
        except RecursionError:
            return _refused(bad_request("the body of the request is nested too deeply"))
        except ConnectionError:
            raise
        except Exception as error:
            log.exception("%s %s", request.method, request.path)
            return _refused(Refusal(500, "InternalError", f"Internal error occurred: {type(error).__name__}: {error}"))

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        certificate = request.transport.get_extra_info("peercert") if request.transport is not None else None
        user = access.identify(certificate)
        target = parse_path(request.rel_url.raw_path)
        verb = _VERBS.get(request.method)
        if verb is None:
            raise method_not_allowed()
        if target is None:
            access.check_path(user, request.path, verb)
            return self._plain(request)
        kind = kinds.find(target.group, target.version, target.resource)
        query = dict(request.query)
        if not target.name and verb == "get":
            verb = "watch" if truth(query.get("watch")) else "list"
        elif verb == "get" and not target.subresource and truth(query.get("watch")):
            verb = "watch"
        elif not target.name and verb == "delete":
            verb = "deletecollection"
        access.check_resource(user, verb, target.group, target.resource, target.subresource, target.namespace, target.name)
        if kind is None or (target.namespace and not kind.namespaced):
            raise no_such_path()
        call = _call(request, kind, target, verb, user, query)
        if target.subresource:
            return await self._subresource(request, call)
        if verb in ("get", "list", "watch"):
            return await self._read(request, call, query)
        return await self._change(request, call, query)

    # ---- reading

    async def _read(self, request: web.BaseRequest, call: Call, query: dict[str, str]) -> web.StreamResponse:
        form = negotiate(request.headers.get("Accept", ""), query.get("includeObject", "Metadata"))
        if call.verb == "get":
            return _json(self._reader.get(call.kind, call.namespace, call.name, form))
        parsed = parse_query(call.kind, call.namespace, call.name, query, form)
        if call.verb == "list":
            return _json(self._reader.listing(parsed))
        chunks = self._reader.watch(parsed)
        first = await anext(chunks)  # refusals come before the answer's head
        response = web.StreamResponse(headers={"Content-Type": _JSON, "Cache-Control": "no-cache, private"})
        async with contextlib.aclosing(chunks):
            return await send(request, response, chunks, first)

    # ---- writing

    async def _change(self, request: web.BaseRequest, call: Call, query: dict[str, str]) -> web.StreamResponse:
        if (
            call.verb not in call.kind.verbs
            or (call.verb == "create" and call.name)
            or (call.verb in ("update", "patch") and not call.name)
        ):
            raise method_not_allowed()
        if call.kind.namespaced and not call.namespace:
            raise method_not_allowed()
        call.body = await request.read()
        created = False
        if call.verb == "create":
            thing, created = await self._writer.create(call), True
        elif call.verb == "update":
            thing, created = await self._writer.update(call)
        elif call.verb == "patch":
            thing, created = await self._writer.patch(call)
        elif call.verb == "delete":
            thing = await self._deleter.delete(call, self._deleter.options(call, query))
        else:
            thing = await self._delete_all(call, query)
        form = negotiate(request.headers.get("Accept", ""), query.get("includeObject", "Metadata"))
        return _json(_formed(call.kind, thing, form), 201 if created else 200, call.warnings)

    async def _delete_all(self, call: Call, query: dict[str, str]) -> dict[str, Any]:
        options = self._deleter.options(call, query)
        parsed = parse_query(call.kind, call.namespace, "", query, Form())
        gone = []
        for entry in self._reader.entries(parsed):
            thing = objects.load_entry(call.kind, entry)
            call.name, call.namespace = thing["metadata"]["name"], thing["metadata"].get("namespace", "")
            try:
                await self._deleter.delete(call, options)
            except Refusal as refusal:
                if refusal.code != 404:
                    raise
            gone.append(thing)
        list_meta = {"resourceVersion": str(self._store.newest())}
        return {"kind": f"{call.kind.name}List", "apiVersion": call.kind.api_version, "metadata": list_meta, "items": gone}

    async def _subresource(self, request: web.BaseRequest, call: Call) -> web.StreamResponse:
        known = next((sub for sub in call.kind.subresources if sub.path == call.subresource), None)
        if known is None:
            if call.kind.name == "Pod" and call.subresource in ("eviction", "ephemeralcontainers", "resize"):
                raise unsupported(f"pods/{call.subresource} is not supported by this nacre yet")
            raise no_such_path()
        if call.subresource in _STREAMED:
            return await self._streams.handle(request, call)
        if call.verb not in known.verbs:
            raise method_not_allowed()
        if call.verb == "get":
            return _json(self._reader.get(call.kind, call.namespace, call.name, Form()))
        call.body = await request.read()
        if call.subresource == "binding":
            return _json(objects.encode(await bind(self._writer, call)), 201, call.warnings)
        thing, _ = await (self._writer.update(call) if call.verb == "update" else self._writer.patch(call))
        return _json(objects.encode(thing), 200, call.warnings)

    # ---- everything that is no object

    def _plain(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path.rstrip("/") or "/"
        if request.method not in ("GET", "HEAD"):
            raise method_not_allowed()
        if path in ("/livez", "/readyz", "/healthz") or path.startswith(("/livez/", "/readyz/")):
            return web.Response(text="ok")
        if path == "/version":
            return _json(discovery.version())
        if path.startswith("/openapi/"):
            return _openapi(request, path)
        if path in ("/api", "/apis"):
            for part in request.headers.get("Accept", "").split(","):
                media, parameters = _media(part)
                if media == _JSON and parameters.get("g") == "apidiscovery.k8s.io" and parameters.get("v") in ("v2", "v2beta1"):
                    return _aggregated(request, path, parameters["v"])
        body = discovery.plain(path)
        if body is None:
            raise no_such_path()
        return _json(body)


def _call(request: web.BaseRequest, kind: Kind, target: Target, verb: str, user: access.User, query: dict[str, str]) -> Call:
    """Raises Refusal 400 for parameters of a write that cannot be."""
    validation = query.get("fieldValidation") or "Warn"
    if validation not in ("Strict", "Warn", "Ignore"):
        words = f'fieldValidation: Unsupported value: "{validation}": supported values: "Ignore", "Strict", "Warn"'
        raise bad_request(words)
    dry = request.query.getall("dryRun", [])
    if any(word != "All" for word in dry):
        raise bad_request(f'dryRun: Unsupported value: "{dry[0]}": supported values: "All"')
    return Call(
        kind=kind,
        namespace=target.namespace,
        name=target.name,
        subresource=target.subresource,
        verb=verb,
        user=user,
        manager=_manager(query.get("fieldManager", ""), request.headers.get("User-Agent", "")),
        validation=validation,
        dry_run=bool(dry),
        force=truth(query.get("force")),
        content_type=request.headers.get("Content-Type", ""),
    )


def _manager(asked: str, agent: str) -> str:
    """Who owns the fields of a write; raises Refusal 422. Of the client's name only what prints: a header may hold any bytes."""
    causes = managed.check_manager(asked)
    if causes:
        refusal = Refusal(422, "Invalid", f'CreateOptions.meta.k8s.io "" is invalid: {causes[0]}')
        refusal.details["causes"] = [{"reason": one.reason, "message": one.message, "field": one.field} for one in causes]
        raise refusal
    own = "".join(letter for letter in agent.split("/", 1)[0] if letter.isprintable())
    return asked or own[: managed.MANAGER_LIMIT] or "unknown"


# ---- negotiation and answers


def negotiate(accept: str, include: str = "Metadata") -> Form:
    """The first form in the Accept header that can be given; Refusal 406 when there is none."""
    for part in accept.split(",") if accept.strip() else ["*/*"]:
        media, parameters = _media(part)
        if media not in (_JSON, "*/*", "application/*"):
            continue
        word = parameters.get("as", "")
        if not word:
            return Form()
        if parameters.get("g") == "meta.k8s.io" and parameters.get("v") in ("v1", "v1beta1") and word in _FORMS:
            return Form(word, parameters["v"], include or "Metadata")
    raise Refusal(406, "NotAcceptable", f"only the following media types are accepted: {_JSON}")


def _media(part: str) -> tuple[str, dict[str, str]]:
    media, *rest = (piece.strip() for piece in part.split(";"))
    return media, dict(pair.split("=", 1) for pair in rest if "=" in pair)


def _formed(kind: Kind, thing: dict[str, Any], form: Form) -> bytes:
    if form.word == "Table" and thing.get("kind") == kind.name:
        from nacre.api import table

        list_meta = {"resourceVersion": thing["metadata"].get("resourceVersion", "")}
        thing = table.make(kind, [thing], list_meta, objects.now(), version=form.version, include=form.include)
    return objects.encode(thing)


def _json(body: bytes, code: int = 200, warnings: list[str] | None = None) -> web.Response:
    response = web.Response(body=body, status=code, content_type=_JSON, headers={"Cache-Control": "no-cache, private"})
    for text in warnings or ():
        printable = "".join(letter if letter.isprintable() else " " for letter in text[:256])
        escaped = printable.replace("\\", "\\\\").replace('"', '\\"')
        response.headers.add("Warning", f'299 - "{escaped}"')
    return response


def _refused(refusal: Refusal) -> web.Response:
    response = _json(objects.encode(refusal.status()), refusal.code)
    if refusal.code in (429, 504):
        response.headers["Retry-After"] = "1"
    return response


def _aggregated(request: web.BaseRequest, path: str, version: str) -> web.Response:
    body, tag = discovery.aggregated(path, version)
    headers = {
        "ETag": tag,
        "Vary": "Accept",
        "Cache-Control": "public",
        "Content-Type": discovery.AGGREGATED.format(version=version),
    }
    if request.headers.get("If-None-Match") == tag:
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, headers=headers)


def _openapi(request: web.BaseRequest, path: str) -> web.Response:
    if path == "/openapi/v3":
        return _json(openapi.index())
    if path == "/openapi/v2":
        return web.Response(body=openapi.empty_v2(), content_type="application/com.github.proto-openapi.spec.v2.v1.0+protobuf")
    try:
        packed, digest = openapi.document(path.removeprefix("/openapi/v3/"))
    except (KeyError, ValueError) as error:
        raise no_such_path() from error
    headers = {"ETag": f'"{digest}"', "Vary": "Accept-Encoding, Accept", "Content-Type": _JSON}
    wanted = request.query.get("hash")
    if wanted and wanted != digest:  # the client's index is older than this server
        headers["Location"] = f"{path}?hash={digest}"
        return web.Response(status=301, headers=headers)
    if wanted:
        headers["Cache-Control"] = _FOREVER
    if request.headers.get("If-None-Match") == f'"{digest}"':
        return web.Response(status=304, headers=headers)
    if "gzip" in request.headers.get("Accept-Encoding", ""):
        return web.Response(body=packed, headers=headers | {"Content-Encoding": "gzip"})
    return web.Response(body=gzip.decompress(packed), headers=headers)
