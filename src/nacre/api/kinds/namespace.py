"""Namespaces (core/v1): Active until deleted, then Terminating until the controller has emptied and finalized them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from nacre.api.kind import AGE, NAME, STATUS, Column, Kind, Object, Subresource, at, created, label_name

FINALIZER = "kubernetes"


def _prepare(thing: Object) -> None:
    thing["status"] = {"phase": "Active"}
    finalizers = thing.setdefault("spec", {}).setdefault("finalizers", [])
    if FINALIZER not in finalizers:
        finalizers.append(FINALIZER)


def _defaults(thing: Object) -> None:
    meta = thing["metadata"]
    if meta.get("name"):
        meta.setdefault("labels", {})["kubernetes.io/metadata.name"] = meta["name"]


def _keep(new: Object, old: Object) -> None:
    """Finalizers change through /finalize alone."""
    new["spec"] = old.get("spec", {})


def _row(thing: Object, now: datetime) -> list[Any]:
    return [thing["metadata"]["name"], thing.get("status", {}).get("phase", ""), created(thing, now)]


KIND = Kind(
    group="",
    version="v1",
    name="Namespace",
    plural="namespaces",
    singular="namespace",
    struct_name="io.k8s.api.core.v1.Namespace",
    namespaced=False,
    short=("ns",),
    verbs=("create", "delete", "get", "list", "patch", "update", "watch"),
    subresources=(Subresource(path="finalize", verbs=("update",)), STATUS),
    columns=(NAME, Column(name="Status", description="Active or Terminating."), AGE),
    row=_row,
    defaults=_defaults,
    prepare_create=_prepare,
    prepare_update=_keep,
    returns_deleted=True,
    check_name=label_name,
    fields={"status.phase": at("status", "phase"), "name": at("metadata", "name")},
)
