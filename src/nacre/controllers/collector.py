"""What nobody else removes: old events, pods of nodes that are gone, objects whose owners are gone. One look a minute."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

from nacre.oci.errors import Failure
from nacre.wire.kube import ApiError, Kube

log = logging.getLogger("nacre.controllers")

EVERY_S = 60.0
EVENT_LIFE = timedelta(hours=1)
PAGE = 500
Object = dict[str, Any]

# kinds that can own: (apiVersion, kind) -> path; NAMESPACE is the owned object's
_OWNERS = {
    ("v1", "Pod"): "/api/v1/namespaces/NAMESPACE/pods",
    ("v1", "ConfigMap"): "/api/v1/namespaces/NAMESPACE/configmaps",
    ("v1", "Secret"): "/api/v1/namespaces/NAMESPACE/secrets",
    ("v1", "ServiceAccount"): "/api/v1/namespaces/NAMESPACE/serviceaccounts",
    ("v1", "Node"): "/api/v1/nodes",
    ("v1", "Namespace"): "/api/v1/namespaces",
    ("node.k8s.io/v1", "RuntimeClass"): "/apis/node.k8s.io/v1/runtimeclasses",
}
_OWNED = ("/api/v1/pods", "/api/v1/configmaps", "/api/v1/secrets", "/apis/coordination.k8s.io/v1/leases")


class Collector:
    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._orphans: set[str] = set()  # uids of pods without a node at the last look: the second look takes them

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await self.look(datetime.now(UTC))
            except (ApiError, Failure) as error:
                log.warning("collect: %s", error)

    async def look(self, now: datetime) -> None:
        """One round; raises ApiError, Failure."""
        async for event in self._all("/api/v1/events"):
            if _last_seen(event) < now - EVENT_LIFE:
                await self._remove("/api/v1/namespaces/NAMESPACE/events", event)
        nodes = {node["metadata"]["name"] async for node in self._all("/api/v1/nodes")}
        orphans = set()
        for collection in _OWNED:
            base, plural = collection.rsplit("/", 1)
            async for thing in self._all(collection):
                node = thing.get("spec", {}).get("nodeName") if plural == "pods" else None
                uid = thing["metadata"]["uid"]
                if node and node not in nodes:
                    orphans.add(uid)
                    if uid in self._orphans:
                        await self._remove(f"{base}/namespaces/NAMESPACE/{plural}", thing)
                elif await self._is_abandoned(thing):
                    await self._remove(f"{base}/namespaces/NAMESPACE/{plural}", thing, grace=None)
        self._orphans = orphans

    async def _all(self, collection: str) -> AsyncIterator[Object]:
        token = ""
        while True:
            listed = await self._kube.get(collection, limit=PAGE, **({"continue": token} if token else {}))
            for item in listed["items"]:
                yield item
            token = listed["metadata"].get("continue", "")
            if not token:
                return

    async def _is_abandoned(self, thing: Object) -> bool:
        """Whether the object has owners, all of known kinds, and none of them exists any more."""
        owners = thing["metadata"].get("ownerReferences", [])
        if not owners or thing["metadata"].get("deletionTimestamp"):
            return False
        for owner in owners:
            path = _OWNERS.get((owner["apiVersion"], owner["kind"]))
            if path is None:
                return False
            try:
                found = await self._kube.get(f"{path}/{owner['name']}".replace("NAMESPACE", thing["metadata"]["namespace"]))
            except ApiError as error:
                if error.code != 404:
                    raise
                continue
            if found["metadata"]["uid"] == owner["uid"]:
                return False
        return True

    async def _remove(self, collection: str, thing: Object, *, grace: int | None = 0) -> None:
        meta = thing["metadata"]
        path = f"{collection}/{meta['name']}".replace("NAMESPACE", meta["namespace"])
        body: Object = {"preconditions": {"uid": meta["uid"]}}
        try:
            await self._kube.delete(path, body | ({} if grace is None else {"gracePeriodSeconds": grace}))
        except ApiError as error:
            if error.code not in (404, 409):
                raise


def _last_seen(event: Object) -> datetime:
    """The newest of its times: Kubernetes counts an event's life from its last write, whatever times it tells of."""
    told = (event.get("series", {}).get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    texts = [text for text in (*told, event["metadata"]["creationTimestamp"]) if text]
    return max(datetime.fromisoformat(text.replace("Z", "+00:00")) for text in texts)
