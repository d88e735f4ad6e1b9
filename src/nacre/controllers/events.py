"""Events as Kubernetes' components write them: the same fact about the same object is one event whose count grows."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Any

from nacre.oci.errors import Failure
from nacre.wire.kube import ApiError, Kube

log = logging.getLogger("nacre.controllers")

REMEMBERED = 1024  # events whose count may still grow
NAME_KEPT = 236  # of the object's name in the event's: with a dot and the time it is a name still


def stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Recorder:
    """Writes events in the background; a lost event is logged and never stops the work it tells of."""

    def __init__(self, kube: Kube, component: str) -> None:
        self._kube, self._component = kube, component
        self._known: OrderedDict[tuple[str, str, str], tuple[str, int]] = OrderedDict()  # -> path, count
        self._tasks: set[asyncio.Task[None]] = set()

    def record(self, about: dict[str, Any], kind: str, reason: str, message: str) -> None:
        """`kind` is Normal or Warning; `about` an object with apiVersion and kind."""
        task = asyncio.create_task(self._write(about, kind, reason, message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for what is being written."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self, about: dict[str, Any], kind: str, reason: str, message: str) -> None:
        meta = about["metadata"]
        key = (meta.get("uid", ""), reason, message)
        try:
            if key in self._known and await self._again(key):
                return
            namespace = meta.get("namespace") or "default"
            name = f"{meta['name'][:NAME_KEPT].rstrip('-.')}.{time.time_ns():x}"
            collection = f"/api/v1/namespaces/{namespace}/events"
            await self._kube.create(collection, self._event(about, namespace, name, kind, reason, message))
            self._known[key] = (f"{collection}/{name}", 1)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        except (ApiError, Failure) as error:
            log.warning("event %s of %s is lost: %s", reason, meta.get("name"), error)

    async def _again(self, key: tuple[str, str, str]) -> bool:
        path, count = self._known[key]
        try:
            await self._kube.patch(path, {"count": count + 1, "lastTimestamp": stamp()}, "merge")
        except ApiError as error:
            if error.code != 404:
                raise
            self._known.pop(key, None)  # it has expired
            return False
        self._known[key] = (path, count + 1)
        return True

    def _event(self, about: dict[str, Any], namespace: str, name: str, kind: str, reason: str, message: str) -> dict[str, Any]:
        meta, now = about["metadata"], stamp()
        involved = {
            "apiVersion": about.get("apiVersion", "v1"),
            "kind": about.get("kind", ""),
            "name": meta["name"],
            "namespace": meta.get("namespace", ""),
            "uid": meta.get("uid", ""),
            "resourceVersion": meta.get("resourceVersion", ""),
        }
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": {key: value for key, value in involved.items() if value},
            "reason": reason,
            "message": message,
            "type": kind,
            "source": {"component": self._component},
            "reportingComponent": self._component,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
