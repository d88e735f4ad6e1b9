"""Nodes (core/v1): a kubelet registers its own and keeps its status."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from nacre.api import quantity
from nacre.api.kind import AGE, NAME, STATUS, Column, Kind, Object, created
from nacre.api.status import Cause, duplicate, forbidden_field, not_supported, required

_ROLE_PREFIX, _ROLE_LABEL = "node-role.kubernetes.io/", "kubernetes.io/role"
TAINT_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


def _defaults(thing: Object) -> None:
    thing.setdefault("spec", {})
    status = thing.setdefault("status", {})
    if status.get("capacity"):
        status.setdefault("allocatable", dict(status["capacity"]))


def _check(thing: Object) -> list[Cause]:
    causes = []
    seen = set()
    for index, taint in enumerate(thing.get("spec", {}).get("taints", [])):
        where = f"spec.taints[{index}]"
        if not taint.get("key"):
            causes.append(required(f"{where}.key"))
        if not taint.get("effect"):
            causes.append(required(f"{where}.effect"))
        elif taint["effect"] not in TAINT_EFFECTS:
            causes.append(not_supported(f"{where}.effect", taint["effect"], TAINT_EFFECTS))
        pair = (taint.get("key"), taint.get("effect"))
        if pair in seen:
            causes.append(duplicate(where, {"key": pair[0], "effect": pair[1]}))
        seen.add(pair)
    return causes


def _check_update(new: Object, old: Object) -> list[Cause]:
    """podCIDR and providerID may be set once, not changed."""
    causes = []
    for key in ("podCIDR", "podCIDRs", "providerID"):
        before, after = old.get("spec", {}).get(key), new.get("spec", {}).get(key)
        if before and before != after:
            causes.append(forbidden_field(f"spec.{key}", "node updates may not change it except from empty to valid"))
    return causes


def schedulable_resources(thing: Object) -> dict[str, int]:
    """Allocatable in nano-units by resource."""
    return {name: quantity.nano(text) for name, text in thing.get("status", {}).get("allocatable", {}).items()}


def _status_words(thing: Object) -> str:
    ready = next((one for one in thing.get("status", {}).get("conditions", []) if one.get("type") == "Ready"), None)
    words = "Unknown" if ready is None else "Ready" if ready.get("status") == "True" else "NotReady"
    return words + (",SchedulingDisabled" if thing.get("spec", {}).get("unschedulable") else "")


def _roles(thing: Object) -> str:
    labels = thing["metadata"].get("labels", {})
    roles = {label.removeprefix(_ROLE_PREFIX) for label in labels if label.startswith(_ROLE_PREFIX)}
    roles |= {labels[_ROLE_LABEL]} if labels.get(_ROLE_LABEL) else set()
    return ",".join(sorted(role for role in roles if role)) or "<none>"


def _row(thing: Object, now: datetime) -> list[Any]:
    status = thing.get("status", {})
    info = status.get("nodeInfo", {})
    addresses = {one.get("type"): one.get("address") for one in reversed(status.get("addresses", []))}
    return [
        thing["metadata"]["name"],
        _status_words(thing),
        _roles(thing),
        created(thing, now),
        info.get("kubeletVersion", ""),
        addresses.get("InternalIP", "<none>"),
        addresses.get("ExternalIP", "<none>"),
        info.get("osImage") or "<unknown>",
        info.get("kernelVersion") or "<unknown>",
        info.get("containerRuntimeVersion") or "<unknown>",
    ]


KIND = Kind(
    group="",
    version="v1",
    name="Node",
    plural="nodes",
    singular="node",
    struct_name="io.k8s.api.core.v1.Node",
    namespaced=False,
    short=("no",),
    subresources=(STATUS,),
    columns=(
        NAME,
        Column(name="Status", description="Ready, NotReady or Unknown, and whether pods may be scheduled."),
        Column(name="Roles", description="From the node's role labels."),
        AGE,
        Column(name="Version", description="The kubelet's version."),
        Column(name="Internal-IP", priority=1, description="The node's address inside."),
        Column(name="External-IP", priority=1, description="The node's address outside."),
        Column(name="OS-Image", priority=1, description="The operating system."),
        Column(name="Kernel-Version", priority=1, description="The kernel."),
        Column(name="Container-Runtime", priority=1, description="The container runtime and its version."),
    ),
    row=_row,
    defaults=_defaults,
    check=_check,
    check_update=_check_update,
    fields={"spec.unschedulable": lambda thing: "true" if thing.get("spec", {}).get("unschedulable") else "false"},
)
