"""What all workers of this kubelet share: the clients, the node's facts, and look-ups of what pods refer to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from nacre.config import Config
from nacre.kubelet.events import Events
from nacre.kubelet.expand import Sources
from nacre.kubelet.objects import Objects, Reference
from nacre.kubelet.pulling import Puller
from nacre.linux.cgroups import Layout
from nacre.oci.errors import NotFound
from nacre.wire.cri import Stub
from nacre.wire.kube import ApiError, Kube

log = logging.getLogger("nacre.kubelet")


@dataclass(slots=True, kw_only=True)
class Host:
    """One a kubelet; workers read it and change nothing in it."""

    config: Config
    kube: Kube
    runtime: Stub
    images: Stub
    events: Events
    puller: Puller
    objects: Objects
    layout: Layout
    address: str
    capacity: dict[str, str]
    memory_bytes: int
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    async def sources(self, pod: dict[str, Any]) -> Sources:
        """Everything that the pod's environment and volumes refer to, read from the API server now."""
        wanted = sorted(set(references(pod["spec"])))
        namespace = pod["metadata"]["namespace"]
        found = await asyncio.gather(*(self.objects.get(namespace, kind, name) for kind, name in wanted))
        node = {"address": self.address, "capacity": self.capacity}
        return Sources(pod, dict(zip(wanted, found, strict=True)), node)

    async def handler_of(self, pod: dict[str, Any]) -> str:
        """The runtime handler of the pod's RuntimeClass, "" without one. Raises NotFound when the class is gone."""
        name = pod["spec"].get("runtimeClassName")
        if not name:
            return ""
        try:
            found = await self.kube.get(f"/apis/node.k8s.io/v1/runtimeclasses/{name}")
        except ApiError as error:
            if error.code != 404:
                raise
            raise NotFound(
                what=f"find the runtime of pod {pod['metadata']['name']}",
                cause=f'RuntimeClass "{name}" not found',
                remedy="nacre kubectl get runtimeclasses",
            ) from error
        return str(found["handler"])

    async def pull_secrets(self, pod: dict[str, Any]) -> list[dict[str, Any]]:
        """The imagePullSecrets that exist; a missing one is as good as none, as in Kubernetes."""
        names = [str(one.get("name", "")) for one in pod["spec"].get("imagePullSecrets") or []]
        namespace = pod["metadata"]["namespace"]
        found = await asyncio.gather(*(self.objects.get(namespace, "Secret", name) for name in names if name))
        return [one for one in found if one is not None]

    def background(self, work: Coroutine[Any, Any, Any]) -> None:
        """A task that nobody waits for; what it raises is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("in the background: %s", task.exception(), exc_info=task.exception())


def references(spec: dict[str, Any]) -> Iterator[Reference]:
    """Every ConfigMap and Secret that containers and volumes of `spec` name."""
    for container in (*(spec.get("initContainers") or []), *spec["containers"]):
        for source in container.get("envFrom") or []:
            yield from _named(source, {"configMapRef": "ConfigMap", "secretRef": "Secret"})
        for variable in container.get("env") or []:
            yield from _named(variable.get("valueFrom") or {}, {"configMapKeyRef": "ConfigMap", "secretKeyRef": "Secret"})
    yield from volume_references(spec)


def volume_references(spec: dict[str, Any]) -> Iterator[Reference]:
    """Those that volumes name: what is kept up to date while the pod runs."""
    for volume in spec.get("volumes") or []:
        for source in (volume, *((volume.get("projected") or {}).get("sources") or [])):
            yield from _named(source, {"configMap": "ConfigMap", "secret": "Secret"})


def _named(source: dict[str, Any], fields: dict[str, str]) -> Iterator[Reference]:
    for key, kind in fields.items():
        if key in source:
            name = source[key].get("secretName") or source[key].get("name")
            if name:
                yield kind, str(name)
