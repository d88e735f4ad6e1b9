"""Kubernetes' object structure at run time: which fields a kind has, their types, how their lists merge.

Loaded from the first line of `definitions.json.gz` (made by `extract` when the wheel is built) at first use, then kept: some
190 structs. Descriptions stay on disk.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
from typing import Any

DEFINITIONS = os.path.join(os.path.dirname(__file__), "definitions.json.gz")
META = "io.k8s.apimachinery.pkg.apis.meta.v1."


class Type:
    """What a field holds. `word` is a scalar's name (see extract), or "struct", "map", "list".

    `items` is the type of a map's values or a list's elements; `list_type`, `keys` are the server-side apply topology,
    `merge`, `strategy` the strategic merge patch one.
    """

    __slots__ = ("atomic", "items", "keys", "list_type", "merge", "ref", "strategy", "word")

    def __init__(self, word: str) -> None:
        self.word = word
        self.ref = ""
        self.items: Type | None = None
        self.list_type = ""
        self.keys: tuple[str, ...] = ()
        self.merge = ""
        self.strategy = ""
        self.atomic = False

    @property
    def struct(self) -> Struct:
        return structs()[self.ref]

    def __repr__(self) -> str:
        return f"Type({self.word}{' ' + self.ref if self.ref else ''})"


class Struct:
    """A named object type with its fields; `gvk` is empty for the parts of kinds."""

    __slots__ = ("atomic", "fields", "gvk", "name", "required")

    def __init__(
        self, name: str, gvk: tuple[str, ...], fields: dict[str, Type], required: tuple[str, ...], *, atomic: bool
    ) -> None:
        self.name, self.gvk, self.fields, self.required, self.atomic = name, gvk, fields, required, atomic

    @property
    def short(self) -> str:
        """The name as Go knows it: "Container"."""
        return self.name.rsplit(".", 1)[1]


@functools.cache
def structs() -> dict[str, Struct]:
    """Every struct by its definition's name."""
    with gzip.open(DEFINITIONS) as file:
        document: dict[str, Any] = json.loads(file.readline())
    return {
        name: Struct(
            name,
            tuple(shape.get("gvk", ())),
            {field: _type(node) for field, node in shape["fields"].items()},
            tuple(shape.get("required", ())),
            atomic=bool(shape.get("atomic")),
        )
        for name, shape in document.items()
    }


def descriptions() -> dict[str, Any]:
    """The definitions whole, read anew each time: `openapi` needs them once."""
    with gzip.open(DEFINITIONS) as file:
        file.readline()
        document: dict[str, Any] = json.loads(file.readline())
    return document


def struct(name: str) -> Struct:
    return structs()[name]


@functools.cache
def _word(word: str) -> Type:
    return Type(word)


def _type(node: Any) -> Type:
    if isinstance(node, str):
        return _word(node)
    found = Type("struct" if "ref" in node else "map" if "map" in node else "list")
    found.ref = node.get("ref", "")
    found.atomic = bool(node.get("atomic"))
    found.merge, found.strategy = node.get("merge", ""), node.get("strategy", "")
    if "map" in node:
        found.items = _type(node["map"])
    elif "list" in node:
        found.items, found.list_type, found.keys = _type(node["list"]), node["type"], tuple(node.get("keys", ()))
    return found
