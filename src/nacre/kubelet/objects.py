"""ConfigMaps and Secrets that pods refer to: read when a pod needs them, watched one by one while it follows them.

A watch is shared by all who follow the object and ends with the last of them. What is kept is the version, not the content.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

from nacre.wire.kube import ApiError, Kube, reflect

log = logging.getLogger("nacre.kubelet")
PLURALS = {"ConfigMap": "configmaps", "Secret": "secrets"}
Reference = tuple[str, str]  # (ConfigMap or Secret, name)
_Key = tuple[str, str, str]  # namespace before it


class Follower(Protocol):
    def object_changed(self, reference: Reference, version: str) -> None:
        """The object is there, in this version; told at the start of the watch too."""


class Objects:
    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._followers: dict[_Key, set[Follower]] = {}
        self._watches: dict[_Key, asyncio.Task[None]] = {}

    async def get(self, namespace: str, kind: str, name: str) -> dict[str, Any] | None:
        try:
            return await self._kube.get(f"/api/v1/namespaces/{namespace}/{PLURALS[kind]}/{name}")
        except ApiError as error:
            if error.code != 404:
                raise
            return None

    def follow(self, follower: Follower, namespace: str, references: set[Reference]) -> None:
        """`follower` is told of these from now on, and of nothing else."""
        wanted = {(namespace, *reference) for reference in references}
        for key in [key for key, followers in self._followers.items() if follower in followers and key not in wanted]:
            self._followers[key].discard(follower)
            if not self._followers[key]:
                del self._followers[key]
                self._watches.pop(key).cancel()
        for key in wanted:
            self._followers.setdefault(key, set()).add(follower)
            if key not in self._watches:
                self._watches[key] = asyncio.create_task(self._watch(key))

    async def stop(self) -> None:
        watches, self._watches, self._followers = list(self._watches.values()), {}, {}
        for task in watches:
            task.cancel()
        await asyncio.gather(*watches, return_exceptions=True)

    async def _watch(self, key: _Key) -> None:
        namespace, kind, name = key
        path = f"/api/v1/namespaces/{namespace}/{PLURALS[kind]}"
        try:
            async for word, thing in reflect(self._kube, path, fieldSelector=f"metadata.name={name}"):
                if thing is not None and word != "DELETED":  # pods keep what a deleted object gave them
                    for follower in list(self._followers.get(key, ())):
                        follower.object_changed((kind, name), str(thing["metadata"]["resourceVersion"]))
        except ApiError as error:
            log.warning("%s %s/%s is not followed: %s", kind, namespace, name, error)
