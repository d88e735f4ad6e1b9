"""ServiceAccounts (core/v1)."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from nacre.api.kind import AGE, NAME, Column, Kind, Object, created


def _row(thing: Object, now: datetime) -> list[Any]:
    return [thing["metadata"]["name"], len(thing.get("secrets", [])), created(thing, now)]


KIND = Kind(
    group="",
    version="v1",
    name="ServiceAccount",
    plural="serviceaccounts",
    singular="serviceaccount",
    struct_name="io.k8s.api.core.v1.ServiceAccount",
    namespaced=True,
    short=("sa",),
    columns=(NAME, Column(name="Secrets", description="How many secrets it may use."), AGE),
    row=_row,
)
