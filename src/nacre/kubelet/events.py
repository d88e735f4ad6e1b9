"""Kubernetes events of this node: one object a (object, part of it, reason, message), its count raised when it happens again.

Events go out in a task of their own, in order; a server that cannot be reached costs a log line and the event, never the pod's progress.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from nacre.kubelet.times import stamp
from nacre.oci.errors import Failure
from nacre.wire.kube import ApiError, Kube

log = logging.getLogger("nacre.kubelet")
KEPT = 1000  # distinct events remembered for counting
NAME_KEPT = 236  # of the object's name in the event's: with a dot and the time it is a name still


class Events:
    """What the kubelet says."""

    def __init__(self, kube: Kube, node: str) -> None:
        self._kube, self._node = kube, node
        self._queue: asyncio.Queue[tuple[dict[str, Any], dict[str, Any]] | None] = asyncio.Queue()
        self._known: dict[tuple[str, ...], dict[str, Any]] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._send())

    async def stop(self) -> None:
        """Send what is queued, then end."""
        if self._task is not None:
            self._queue.put_nowait(None)
            await self._task

    def pod(self, pod: Mapping[str, Any], reason: str, message: str, *, container: str = "", warning: bool = False) -> None:
        metadata = pod["metadata"]
        involved = {
            "kind": "Pod",
            "apiVersion": "v1",
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
            "resourceVersion": metadata.get("resourceVersion", ""),
        }
        if container:
            init = any(one["name"] == container for one in pod["spec"].get("initContainers") or [])
            involved["fieldPath"] = f"spec.{'initContainers' if init else 'containers'}{{{container}}}"
        self._put(involved, metadata["namespace"], reason, message, warning=warning)

    def node(self, reason: str, message: str, *, warning: bool = False) -> None:
        involved = {"kind": "Node", "apiVersion": "v1", "name": self._node, "uid": self._node}
        self._put(involved, "default", reason, message, warning=warning)

    def _put(self, involved: dict[str, Any], namespace: str, reason: str, message: str, *, warning: bool) -> None:
        now = stamp(time.time())
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{involved['name'][:NAME_KEPT].rstrip('-.')}.{time.time_ns():x}", "namespace": namespace},
            "involvedObject": involved,
            "reason": reason,
            "message": message[:1024],
            "type": "Warning" if warning else "Normal",
            "source": {"component": "kubelet", "host": self._node},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "reportingComponent": "kubelet",
            "reportingInstance": self._node,
        }
        self._queue.put_nowait((event, involved))

    async def _send(self) -> None:
        while (item := await self._queue.get()) is not None:
            event, involved = item
            try:
                about = (involved["uid"], involved.get("fieldPath", ""))
                await self._deliver(event, (*about, event["reason"], event["message"]))
            except (ApiError, Failure) as error:
                log.warning("event %s of %s was not stored: %s", event["reason"], involved["name"], error)

    async def _deliver(self, event: dict[str, Any], key: tuple[str, ...]) -> None:
        path = f"/api/v1/namespaces/{event['metadata']['namespace']}/events"
        known = self._known.get(key)
        if known is not None:
            change = {"count": known["count"] + 1, "lastTimestamp": event["lastTimestamp"]}
            try:
                self._known[key] = await self._kube.patch(f"{path}/{known['metadata']['name']}", change, "merge")
                return
            except ApiError as error:
                if error.code != 404:
                    raise
        self._known[key] = await self._kube.create(path, event)
        while len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
