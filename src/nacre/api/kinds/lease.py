"""Leases (coordination.k8s.io/v1): the kubelet's heartbeat."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from nacre.api.kind import AGE, NAME, Column, Kind, Object, created
from nacre.api.status import Cause, invalid_value


def _check(thing: Object) -> list[Cause]:
    spec = thing.get("spec", {})
    causes = []
    if spec.get("leaseDurationSeconds", 1) <= 0:
        causes.append(invalid_value("spec.leaseDurationSeconds", spec["leaseDurationSeconds"], "must be greater than 0"))
    if spec.get("leaseTransitions", 0) < 0:
        causes.append(invalid_value("spec.leaseTransitions", spec["leaseTransitions"], "must be greater than or equal to 0"))
    return causes


def _row(thing: Object, now: datetime) -> list[Any]:
    return [thing["metadata"]["name"], thing.get("spec", {}).get("holderIdentity", ""), created(thing, now)]


KIND = Kind(
    group="coordination.k8s.io",
    version="v1",
    name="Lease",
    plural="leases",
    singular="lease",
    struct_name="io.k8s.api.coordination.v1.Lease",
    namespaced=True,
    columns=(NAME, Column(name="Holder", description="Who holds it."), AGE),
    row=_row,
    check=_check,
)
