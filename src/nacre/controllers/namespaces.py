"""Namespaces: what each has from the start (default ServiceAccount, the CA's certificate), and their orderly end."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from nacre.oci.errors import Failure
from nacre.wire.kube import ApiError, Kube, reflect

log = logging.getLogger("nacre.controllers")

ACCOUNT, CA_MAP = "default", "kube-root-ca.crt"
FINALIZER = "kubernetes"
FIRST_RETRY_S, LAST_RETRY_S = 0.2, 5.0
Object = dict[str, Any]


class Namespaces:
    """`ca` is the certificate (PEM text) that each namespace's kube-root-ca.crt holds."""

    def __init__(self, kube: Kube, ca: str) -> None:
        self._kube, self._ca = kube, ca
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._live: set[str] = set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow())
                tasks.create_task(self._restore("serviceaccounts", ACCOUNT))
                tasks.create_task(self._restore("configmaps", CA_MAP))
        finally:
            for task in self._ending.values():
                task.cancel()
            await asyncio.gather(*self._ending.values(), return_exceptions=True)

    async def _follow(self) -> None:
        async for word, namespace in reflect(self._kube, "/api/v1/namespaces"):
            if namespace is None:
                continue
            name = namespace["metadata"]["name"]
            if word == "DELETED" or namespace["metadata"].get("deletionTimestamp"):
                self._live.discard(name)
            if word == "DELETED":
                continue
            if namespace["metadata"].get("deletionTimestamp"):
                if name not in self._ending:
                    self._ending[name] = asyncio.create_task(self._end(name))
            elif name not in self._live:
                self._live.add(name)
                await self._furnish(name, ACCOUNT)
                await self._furnish(name, CA_MAP)

    async def _restore(self, plural: str, name: str) -> None:
        """Put back what is deleted, and the certificate where it was changed."""
        async for word, thing in reflect(self._kube, f"/api/v1/{plural}", fieldSelector=f"metadata.name={name}"):
            if thing is None:
                continue
            namespace = thing["metadata"]["namespace"]
            if word == "DELETED" and namespace in self._live:
                await self._furnish(namespace, name)
            elif word != "DELETED" and name == CA_MAP and thing.get("data") != {"ca.crt": self._ca}:
                await self._attempt(self._kube.patch(_path(namespace, plural, name), {"data": {"ca.crt": self._ca}}, "merge"))

    async def _furnish(self, namespace: str, name: str) -> None:
        meta: Object = {"name": name}
        body: Object = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta}
        plural = "serviceaccounts"
        if name == CA_MAP:
            plural, body["kind"], body["data"] = "configmaps", "ConfigMap", {"ca.crt": self._ca}
            words = "Contains a CA bundle that can be used to verify the API server."
            meta["annotations"] = {"kubernetes.io/description": words}
        await self._attempt(self._kube.create(_path(namespace, plural), body))

    async def _attempt(self, call: Any) -> None:
        """A write that may find its object made, gone or ending already."""
        try:
            await call
        except ApiError as error:
            if error.code not in (403, 404, 409):
                log.warning("%s", error)
        except Failure as failure:
            log.warning("%s", failure)

    # ---- the end

    async def _end(self, name: str) -> None:
        """Empty the namespace, wait until it is, take its finalizer away: then the server removes it."""
        try:
            await self._end_patiently(name)
        finally:
            self._ending.pop(name, None)

    async def _end_patiently(self, name: str) -> None:
        pause_s = FIRST_RETRY_S
        while True:
            try:
                left = await self._empty(name)
                if not left:
                    await self._finalize(name)
                    return
            except ApiError as error:
                if error.code == 404:
                    return
                log.warning("end namespace %s: %s", name, error)
            except Failure as failure:
                log.warning("end namespace %s: %s", name, failure)
            await asyncio.sleep(pause_s)  # pods are given their grace
            pause_s = min(pause_s * 1.5, LAST_RETRY_S)

    async def _empty(self, name: str) -> int:
        """Delete what is in the namespace; returns how many objects are still there."""
        left = 0
        for collection in await self._collections():
            path = collection.replace("NAMESPACE", name)
            gone = await self._kube.get(path, limit=1)
            if not gone["items"]:
                continue
            await self._kube.delete(path, {"propagationPolicy": "Background"})
            left += len((await self._kube.get(path))["items"])
        return left

    async def _collections(self) -> list[str]:
        """Paths of all namespaced collections that the server has, by discovery; events last, they tell of the rest."""
        found = []
        groups = (await self._kube.get("/apis"))["groups"]
        bases = ["/api/v1", *(f"/apis/{version['groupVersion']}" for group in groups for version in group["versions"])]
        for base in bases:
            for resource in (await self._kube.get(base))["resources"]:
                if resource["namespaced"] and "/" not in resource["name"] and "deletecollection" in resource["verbs"]:
                    found.append(f"{base}/namespaces/NAMESPACE/{resource['name']}")
        return sorted(found, key=lambda path: path.endswith("/events"))

    async def _finalize(self, name: str) -> None:
        namespace = await self._kube.get(f"/api/v1/namespaces/{name}")
        kept = [one for one in namespace.get("spec", {}).get("finalizers", []) if one != FINALIZER]
        namespace["spec"] = {"finalizers": kept}
        await self._kube.update(f"/api/v1/namespaces/{name}/finalize", namespace)


def _path(namespace: str, plural: str, name: str = "") -> str:
    return f"/api/v1/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")
