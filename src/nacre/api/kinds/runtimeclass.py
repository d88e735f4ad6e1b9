"""RuntimeClasses (node.k8s.io/v1): which handler of the runtime runs a pod, and what that costs beside the containers."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from nacre.api.kind import AGE, NAME, Column, Kind, Object, created, label_name
from nacre.api.status import Cause, invalid_value


def _check(thing: Object) -> list[Cause]:
    return label_name(thing.get("handler", ""), "handler")


def _check_update(new: Object, old: Object) -> list[Cause]:
    if new.get("handler") != old.get("handler"):
        return [invalid_value("handler", new.get("handler"), "field is immutable")]
    return []


def _row(thing: Object, now: datetime) -> list[Any]:
    return [thing["metadata"]["name"], thing.get("handler", ""), created(thing, now)]


KIND = Kind(
    group="node.k8s.io",
    version="v1",
    name="RuntimeClass",
    plural="runtimeclasses",
    singular="runtimeclass",
    struct_name="io.k8s.api.node.v1.RuntimeClass",
    namespaced=False,
    columns=(NAME, Column(name="Handler", description="The handler's name in the runtime's configuration."), AGE),
    row=_row,
    check=_check,
    check_update=_check_update,
)
