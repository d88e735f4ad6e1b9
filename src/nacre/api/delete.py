"""Deleting: preconditions, grace, finalizers, whole collections (core/v1 Pod, meta/v1 DeleteOptions)."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

from nacre.api import decode, meta, objects
from nacre.api.kind import Kind, Object
from nacre.api.status import bad_request, conflict, forbidden, not_found, unsupported
from nacre.api.store import Entry, Mismatch, Store
from nacre.api.write import RETRIES, Call

GRACE_MAX_S = 1 << 31  # more is no date
IMMORTAL = ("default", "kube-system", "kube-public")


class Deleter:
    def __init__(self, store: Store) -> None:
        self._store = store

    def options(self, call: Call, query: dict[str, str]) -> Object:
        """DeleteOptions of the body, or of the query where the body is silent."""
        options = dict(meta.read_options(decode.body(call.body, call.content_type) if call.body else None))
        if "gracePeriodSeconds" in query:
            options.setdefault("gracePeriodSeconds", _whole(query["gracePeriodSeconds"]))
        if "propagationPolicy" in query:
            options.setdefault("propagationPolicy", query["propagationPolicy"])
        if options.get("dryRun") not in (None, [], ["All"]):
            raise bad_request('dryRun: Unsupported value: supported values: "All"')
        call.dry_run = call.dry_run or bool(options.get("dryRun"))
        policy = options.get("propagationPolicy") or "Background"
        if policy not in ("Background", "Foreground", "Orphan"):
            raise bad_request(
                f'propagationPolicy: Unsupported value: "{policy}": supported values: "Background", "Foreground", "Orphan"'
            )
        if policy == "Orphan" or options.get("orphanDependents"):
            raise unsupported("propagationPolicy Orphan is not supported by this nacre: what the object owns is always collected")
        return options

    async def delete(self, call: Call, options: Object) -> Object:
        """The object as it was, or a Status, as the kind answers."""
        wanted: dict[str, Any] = options.get("preconditions") or {}
        for _ in range(RETRIES):
            entry = self._store.get(call.key)
            if entry is None:
                raise not_found(call.kind, call.name)
            old = objects.load_entry(call.kind, entry)
            meta.precondition(call.kind, old, wanted.get("resourceVersion", ""), wanted.get("uid", ""))
            if call.kind.name == "Namespace" and call.name in IMMORTAL:
                raise forbidden(call.kind, call.name, "this namespace may not be deleted")
            try:
                return await self._delete(call, old, entry, options.get("gracePeriodSeconds"))
            except Mismatch:
                continue  # someone wrote in between: look again
        raise conflict(call.kind, call.name)

    async def _delete(self, call: Call, old: Object, entry: Entry, grace: int | None) -> Object:
        new = copy.deepcopy(old)
        seconds = _grace(call.kind, old, grace)
        marked = old["metadata"].get("deletionTimestamp")
        waits = seconds > 0 or old["metadata"].get("finalizers") or (call.kind.name == "Namespace" and _finalizers(old))
        if not waits:
            if not call.dry_run:
                await self._store.remove(call.key, expect=entry.revision)
            return old if call.kind.returns_deleted else _deleted_status(call.kind, old)
        if marked and old["metadata"].get("deletionGracePeriodSeconds", 0) <= seconds:
            return old  # under way already, and sooner
        start = old["metadata"].get("deletionTimestamp")
        if not start or call.kind.name == "Pod":
            new["metadata"]["deletionTimestamp"] = objects.stamp(objects.now() + timedelta(seconds=seconds))
        new["metadata"]["deletionGracePeriodSeconds"] = seconds
        if call.kind.name == "Namespace":
            new.setdefault("status", {})["phase"] = "Terminating"
        if call.kind.counts_generations and not marked:
            new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
        if not call.dry_run:
            revision = await self._store.put(call.key, objects.to_stored(call.kind, new), expect=entry.revision)
            new["metadata"]["resourceVersion"] = str(revision)
        return new


def _grace(kind: Kind, thing: Object, asked: int | None) -> int:
    """Seconds the object is given: only pods that a kubelet holds, and that still run, get any."""
    if kind.name != "Pod":
        return 0
    spec, phase = thing.get("spec", {}), thing.get("status", {}).get("phase")
    if not spec.get("nodeName") or phase in ("Succeeded", "Failed"):
        return 0
    seconds: int = asked if asked is not None else spec.get("terminationGracePeriodSeconds", 30)
    return 1 if seconds < 0 else min(seconds, GRACE_MAX_S)


def _finalizers(namespace: Object) -> list[str]:
    found: list[str] = namespace.get("spec", {}).get("finalizers", [])
    return found


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise bad_request(f"gracePeriodSeconds: {text!r} is not a whole number") from error


def _deleted_status(kind: Kind, thing: Object) -> Object:
    details = {"name": thing["metadata"]["name"], "kind": kind.plural, "uid": thing["metadata"].get("uid", "")}
    details |= {"group": kind.group} if kind.group else {}
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
