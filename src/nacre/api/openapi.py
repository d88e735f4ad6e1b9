"""OpenAPI v3, one document a group version, as kubectl needs it: schemas, and paths that say what each operation takes.

Documents are made at the first request, kept compressed, and named by a hash of their content, so that clients cache them for good.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

from nacre import __version__
from nacre.api import kinds, schema
from nacre.api.kind import Kind
from nacre.api.objects import encode
from nacre.api.write import PATCH_TYPES

Document = dict[str, Any]
_DEFS, _SCHEMAS = "#/$defs/", "#/components/schemas/"
_ACTIONS = {"create": "post", "update": "put", "patch": "patch"}


@functools.cache
def empty_v2() -> bytes:
    """The answer to /openapi/v2: a Document (gnostic's openapi.v2 in protobuf) that defines nothing.

    kubectl asks for it to check a `kind: List` on its own side, skips what it finds no definition of, and fails without the document;
    the server checks each item strictly in any case.
    """
    title, version = b"nacre", __version__.encode()
    info = bytes((0x0A, len(title))) + title + bytes((0x12, len(version))) + version
    return b"\x0a\x032.0" + bytes((0x12, len(info))) + info


@functools.cache
def index() -> bytes:
    """The answer to /openapi/v3."""
    paths = {}
    for group, version in kinds.group_versions():
        name = f"apis/{group}/{version}" if group else f"api/{version}"
        paths[name] = {"serverRelativeURL": f"/openapi/v3/{name}?hash={document(name)[1]}"}
    return encode({"paths": paths})


@functools.cache
def document(name: str) -> tuple[bytes, str]:
    """(gzip of the document, hash) of "api/v1" or "apis/GROUP/VERSION"; KeyError for another name."""
    group, version = ("", name.removeprefix("api/")) if name.startswith("api/") else name.removeprefix("apis/").rsplit("/", 1)
    served = kinds.of_version(group, version)
    if not served:
        raise KeyError(name)
    schemas = schema.descriptions()
    wanted = set()
    waiting = [title for kind in served for title in (kind.struct_name, kind.struct_name + "List")]
    waiting.append(schema.META + "DeleteOptions")
    while waiting:
        title = waiting.pop()
        if title in schemas and title not in wanted:
            wanted.add(title)
            waiting.extend(_references(schemas[title]))
    body = encode(
        {
            "openapi": "3.0.0",
            "info": {"title": "nacre", "version": f"v1.37.0+nacre.{__version__}"},
            "paths": dict(itertools.chain.from_iterable(_paths(kind) for kind in served)),
            "components": {"schemas": {title: _schema(schemas[title]) for title in sorted(wanted)}},
        }
    )
    return gzip.compress(body, 6, mtime=0), hashlib.sha256(body).hexdigest()[:32].upper()


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"].removeprefix(_DEFS)
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _references(item)


def _schema(node: Any) -> Any:
    """JSON schema of the definitions as OpenAPI 3.0 has it: one type, references wrapped, no enums of one kind's name."""
    if isinstance(node, list):
        return [_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        reference = {"$ref": _SCHEMAS + node["$ref"].removeprefix(_DEFS)}
        rest = {key: value for key, value in node.items() if key != "$ref"}
        return {"allOf": [reference], **rest} if rest else reference
    found = {key: _schema(value) for key, value in node.items() if key not in ("type", "enum")}
    words = node.get("type")
    if isinstance(words, list):
        words = next((word for word in words if word != "null"), None)
    if isinstance(words, str | dict):
        found["type"] = _schema(words)
    if isinstance(node.get("enum"), dict):
        found["enum"] = _schema(node["enum"])
    return found


def _paths(kind: Kind) -> Iterator[tuple[str, Document]]:
    base = f"{kind.path}/namespaces/{{namespace}}/{kind.plural}" if kind.namespaced else f"{kind.path}/{kind.plural}"
    place = [_parameter("namespace", "path")] if kind.namespaced else []
    collection: Document = {"parameters": place}
    if "create" in kind.verbs:
        collection["post"] = _operation(kind, "post")
    collection["get"] = _operation(kind, "list")
    if "deletecollection" in kind.verbs:
        collection["delete"] = _operation(kind, "deletecollection")
    yield base, collection
    if kind.namespaced:
        yield f"{kind.path}/{kind.plural}", {"get": _operation(kind, "list")}
    item: Document = {"parameters": [*place, _parameter("name", "path")], "get": _operation(kind, "get")}
    for verb, method in (("update", "put"), ("patch", "patch"), ("delete", "delete")):
        if verb in kind.verbs:
            item[method] = _operation(kind, method)
    yield f"{base}/{{name}}", item
    if kind.has_status:
        status = {"parameters": item["parameters"]} | {method: _operation(kind, method) for method in ("get", "put", "patch")}
        yield f"{base}/{{name}}/status", status


def _operation(kind: Kind, action: str) -> Document:
    answer = kind.struct_name + ("List" if action == "list" else "")
    found: Document = {
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": {"group": kind.group, "version": kind.version, "kind": kind.name},
        "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": {"$ref": _SCHEMAS + answer}}}}},
        "parameters": [],
    }
    if action in ("post", "put", "patch"):
        found["parameters"] = [_parameter(name, "query") for name in ("dryRun", "fieldManager", "fieldValidation")]
        types = PATCH_TYPES if action == "patch" else ("application/json", "application/yaml")
        body = {"$ref": _SCHEMAS + kind.struct_name} if action != "patch" else {"type": "object"}
        found["requestBody"] = {"content": {media: {"schema": body} for media in types}, "required": True}
    if action == "patch":
        found["parameters"].append(_parameter("force", "query", "boolean"))
    if action == "delete":
        options = {"$ref": _SCHEMAS + schema.META + "DeleteOptions"}
        found["parameters"] = [_parameter("dryRun", "query"), _parameter("gracePeriodSeconds", "query", "integer")]
        found["requestBody"] = {"content": {"*/*": {"schema": options}}}
    if action == "list":
        names = ("continue", "fieldSelector", "labelSelector", "limit", "resourceVersion", "timeoutSeconds", "watch")
        found["parameters"] = [_parameter(name, "query") for name in names]
    return found


def _parameter(name: str, where: str, kind: str = "string") -> Document:
    return {"name": name, "in": where, "schema": {"type": kind}} | ({"required": True} if where == "path" else {})
