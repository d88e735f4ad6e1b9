"""Kubernetes' object structure for the kinds nacre serves, cut out of kubernetes-validate's definitions: `python extract.py OUT`.

Run by the wheel's build (hatch_build.py) as a plain script: standard library only, and the 108 MB package is located, never
imported. OUT is gzip of two JSON lines: first the structure that `schema` loads (types without prose), then the definitions
with their descriptions, from which `openapi` makes its documents on demand.

Structure: {NAME: {"gvk": [[group, version, kind]], "required": […], "fields": {FIELD: TYPE}}}. TYPE is a word ("string",
"boolean", "number", "bytes", "quantity", "intstr", "time", "microtime", "any"), or {"ref": NAME}, {"map": TYPE},
{"list": TYPE, "type": "atomic|set|map", "keys": […], "merge": key, "strategy": "…"}; an atomic struct or map has "atomic": true.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

VERSION = "v1.37.0-local"
CORE, META = "io.k8s.api.core.v1.", "io.k8s.apimachinery.pkg.apis.meta.v1."
ROOTS = (
    *(CORE + kind for kind in ("Pod", "Namespace", "Node", "Event", "ConfigMap", "Secret", "ServiceAccount", "Binding")),
    "io.k8s.api.events.v1.Event",
    "io.k8s.api.node.v1.RuntimeClass",
    "io.k8s.api.coordination.v1.Lease",
    META + "DeleteOptions",
    META + "Status",
)
LISTS = ("Pod", "Namespace", "Node", "Event", "ConfigMap", "Secret", "ServiceAccount", "RuntimeClass", "Lease")
WORDS = {
    "io.k8s.apimachinery.pkg.api.resource.Quantity": "quantity",
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": "intstr",
    META + "Time": "time",
    META + "MicroTime": "microtime",
    META + "FieldsV1": "any",
    "io.k8s.apimachinery.pkg.runtime.RawExtension": "any",
}

Json = dict[str, Any]


def definitions() -> Json:
    """The installed package's definitions by name; FileNotFoundError names the file that a newer package has moved."""
    found = importlib.util.find_spec("kubernetes_validate")  # finds, does not run
    if found is None or found.origin is None:
        raise SystemExit("kubernetes-validate is not installed: it is a build requirement of nacre (pyproject.toml)")
    path = Path(found.origin).parent / "kubernetes-json-schema" / VERSION / "_definitions.json"
    document: Json = json.loads(path.read_text())["$defs"]
    return document


def reachable(everything: Json) -> Json:
    """ROOTS, their lists, and all that they refer to."""
    kept: Json = {}
    waiting = [*ROOTS, *(root + "List" for root in ROOTS if root.rsplit(".", 1)[1] in LISTS)]
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept[name] = everything[name]
            waiting.extend(_references(everything[name]))
    return dict(sorted(kept.items()))


def _references(node: Any) -> list[str]:
    if isinstance(node, list):
        return [name for item in node for name in _references(item)]
    if not isinstance(node, dict):
        return []
    own = [node["$ref"].rsplit("/", 1)[1]] if isinstance(node.get("$ref"), str) else []
    return own + [name for key, value in node.items() if key != "$ref" for name in _references(value)]


def structure(kept: Json) -> Json:
    shapes: Json = {}
    for name, definition in kept.items():
        if name in WORDS:
            continue
        shape: Json = {"fields": {field: _type(node) for field, node in definition.get("properties", {}).items()}}
        kinds = definition.get("x-kubernetes-group-version-kind", [])
        if len(kinds) == 1:  # DeleteOptions and Status belong to every group
            shape["gvk"] = [kinds[0]["group"], kinds[0]["version"], kinds[0]["kind"]]
        if definition.get("required"):
            shape["required"] = definition["required"]
        if definition.get("x-kubernetes-map-type") == "atomic":
            shape["atomic"] = True
        shapes[name] = shape
    return shapes


def _type(node: Json) -> Any:
    if "$ref" in node:
        name = node["$ref"].rsplit("/", 1)[1]
        if name in WORDS:
            return WORDS[name]
        return {"ref": name} | ({"atomic": True} if node.get("x-kubernetes-map-type") == "atomic" else {}) | _merging(node)
    kind = next((word for word in _words(node) if word != "null"), "any")
    if kind == "array":
        found: Json = {"list": _type(node["items"]), "type": node.get("x-kubernetes-list-type", "atomic")}
        if "x-kubernetes-list-map-keys" in node:
            found["keys"] = node["x-kubernetes-list-map-keys"]
        return found | _merging(node)
    if kind == "object":
        if "additionalProperties" not in node:
            return "any"
        atomic = {"atomic": True} if node.get("x-kubernetes-map-type") == "atomic" else {}
        return {"map": _type(node["additionalProperties"])} | atomic
    if kind == "string" and node.get("format") == "byte":
        return "bytes"
    return node.get("format", "int64") if kind == "integer" else kind


def _words(node: Json) -> list[str]:
    kind = node.get("type", [])
    return kind if isinstance(kind, list) else [kind]


def _merging(node: Json) -> Json:
    names = {"x-kubernetes-patch-strategy": "strategy", "x-kubernetes-patch-merge-key": "merge"}
    return {short: node[long] for long, short in names.items() if long in node}


def main() -> None:
    kept = reachable(definitions())
    lines = [json.dumps(part, separators=(",", ":"), sort_keys=True).encode() + b"\n" for part in (structure(kept), kept)]
    target = Path(sys.argv[1])
    aside = target.with_name(target.name + ".tmp")
    aside.write_bytes(b"".join(gzip.compress(line, mtime=0) for line in lines))  # two members: the first is read alone
    aside.rename(target)


if __name__ == "__main__":
    main()
