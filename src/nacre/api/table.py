"""The Table form of lists and watches (meta/v1): what `kubectl get` prints."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from nacre.api import meta
from nacre.api.kind import Kind, Object


def make(
    kind: Kind,
    things: Iterable[Object],
    list_meta: dict[str, Any],
    now: datetime,
    *,
    version: str = "v1",
    include: str = "Metadata",
    columns: bool = True,
) -> Object:
    """A Table of `things`; `include` is what each row carries along: Metadata, Object or None."""
    return {
        "kind": "Table",
        "apiVersion": f"meta.k8s.io/{version}",
        "metadata": list_meta,
        "columnDefinitions": _definitions(kind) if columns else None,
        "rows": [{"cells": kind.row(thing, now), "object": _carried(thing, include)} for thing in things],
    }


def _carried(thing: Object, include: str) -> Object | None:
    if include == "None":
        return None
    return thing if include == "Object" else meta.partial(thing)


def _definitions(kind: Kind) -> list[Object]:
    return [
        {
            "name": column.name,
            "type": column.type,
            "format": column.format,
            "description": column.description,
            "priority": column.priority,
        }
        for column in kind.columns
    ]
