"""Events, one store under two names: core/v1 (as stored) and events.k8s.io/v1 (the same with other field names)."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from nacre.api.kind import Column, Kind, Object, age, at, path_name
from nacre.api.status import Cause, invalid_value

STORE = "core/events"
# events.k8s.io name -> core name; what is absent here is called the same
_NAMES = {
    "regarding": "involvedObject",
    "note": "message",
    "deprecatedSource": "source",
    "deprecatedFirstTimestamp": "firstTimestamp",
    "deprecatedLastTimestamp": "lastTimestamp",
    "deprecatedCount": "count",
    "reportingController": "reportingComponent",
}
_CORE_NAMES = {core: other for other, core in _NAMES.items()}


def to_core(thing: Object) -> Object:
    """An events.k8s.io/v1 Event as core/v1; one that is core already is returned as it is."""
    if thing.get("apiVersion") == "v1":
        return thing
    return {_NAMES.get(key, key): value for key, value in thing.items()} | {"apiVersion": "v1"}


def from_core(thing: Object) -> Object:
    return {_CORE_NAMES.get(key, key): value for key, value in thing.items()} | {"apiVersion": "events.k8s.io/v1"}


def _check(thing: Object) -> list[Cause]:
    about = thing.get("involvedObject", {}).get("namespace", "")
    here = thing["metadata"].get("namespace", "")
    if about != here and not (about == "" and here == "default"):
        return [invalid_value("involvedObject.namespace", about, "does not match event.namespace")]
    return []


def _interval(first: str, last: str, count: int, now: datetime) -> str:
    return f"{last} (x{count} over {first})" if count > 1 else last


def _row(thing: Object, now: datetime) -> list[Any]:
    about = thing.get("involvedObject", {})
    source = thing.get("source", {})
    component = source.get("component") or thing.get("reportingComponent", "")
    host = source.get("host") or thing.get("reportingInstance", "")
    first_at = thing.get("firstTimestamp") or thing.get("eventTime")
    last_at = thing.get("lastTimestamp") or first_at
    count = thing.get("count", 1)
    if series := thing.get("series"):
        last_at, count = series.get("lastObservedTime", last_at), series.get("count", count)
    first, last = age(first_at, now), age(last_at, now)
    return [
        _interval(first, last, count, now),
        thing.get("type", ""),
        thing.get("reason", ""),
        f"{about.get('kind', '').lower()}/{about['name']}" if about.get("name") else about.get("kind", "").lower(),
        about.get("fieldPath", ""),
        ", ".join(part for part in (component, host) if part),
        thing.get("message", "").strip(),
        first,
        count,
        thing["metadata"]["name"],
    ]


_COLUMNS = (
    Column(name="Last Seen", description="When it happened last."),
    Column(name="Type", description="Normal or Warning."),
    Column(name="Reason", description="One word for what happened."),
    Column(name="Object", description="What it is about."),
    Column(name="Subobject", priority=1, description="The part of the object it is about."),
    Column(name="Source", priority=1, description="Who reports it, and from where."),
    Column(name="Message", description="What happened."),
    Column(name="First Seen", priority=1, description="When it happened first."),
    Column(name="Count", priority=1, type="integer", description="How often it happened."),
    Column(name="Name", priority=1, format="name", description="Name of the event object."),
)
_INVOLVED = ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")

CORE = Kind(
    group="",
    version="v1",
    name="Event",
    plural="events",
    singular="event",
    struct_name="io.k8s.api.core.v1.Event",
    namespaced=True,
    short=("ev",),
    columns=_COLUMNS,
    row=_row,
    check=_check,
    check_name=path_name,
    stored_as=STORE,
    fields={
        **{f"involvedObject.{key}": at("involvedObject", key) for key in _INVOLVED},
        "reason": at("reason"),
        "reportingComponent": at("reportingComponent"),
        "source": lambda thing: at("source", "component")(thing) or at("reportingComponent")(thing),
        "type": at("type"),
    },
)
EVENTS = Kind(
    group="events.k8s.io",
    version="v1",
    name="Event",
    plural="events",
    singular="event",
    struct_name="io.k8s.api.events.v1.Event",
    namespaced=True,
    short=("ev",),
    columns=_COLUMNS,
    row=lambda thing, now: _row(to_core(thing), now),
    check=lambda thing: _check(to_core(thing)),
    check_name=path_name,
    stored_as=STORE,
    to_stored=to_core,
    from_stored=from_core,
    fields={
        **{f"regarding.{key}": at("regarding", key) for key in _INVOLVED},
        "reason": at("reason"),
        "reportingController": at("reportingController"),
        "type": at("type"),
    },
)
