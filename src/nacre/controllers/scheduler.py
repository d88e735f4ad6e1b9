"""The scheduler: gives each pod that has no node the least loaded one that fits, or says why none does."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from nacre.controllers import fit
from nacre.controllers.events import Recorder, stamp
from nacre.oci.errors import Failure
from nacre.wire.kube import ApiError, Kube, reflect

log = logging.getLogger("nacre.controllers")

NAME = "default-scheduler"
RETRY_S = 30.0  # pods that fit nowhere are looked at again at least this often
Object = dict[str, Any]
Key = tuple[str, str]


class Scheduler:
    """One loop; what it knows of pods and nodes are the watches' last words, and the bindings it has just made."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._events = Recorder(kube, NAME)
        self._pods: dict[Key, Object] = {}
        self._nodes: dict[str, Object] = {}
        self._waiting: set[Key] = set()
        self._refused: dict[Key, str] = {}  # pods that fit nowhere: the sentence they were given
        self._wake = asyncio.Event()
        self._synced = {"pods": False, "nodes": False}

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow_pods())
                tasks.create_task(self._follow_nodes())
                tasks.create_task(self._place())
        finally:
            await self._events.close()

    # ---- what is

    async def _follow_pods(self) -> None:
        async for word, pod in reflect(self._kube, "/api/v1/pods"):
            if pod is None:
                self._note_synced("pods")
                continue
            key = (pod["metadata"]["namespace"], pod["metadata"]["name"])
            before = self._pods.pop(key, None)
            if word != "DELETED":
                self._pods[key] = pod
            if word != "DELETED" and _is_wanting(pod):
                if before is None or self._refused.get(key) is None or before["spec"] != pod["spec"]:
                    self._waiting.add(key)
                    self._wake.set()
            else:
                self._waiting.discard(key)
                self._refused.pop(key, None)
                if before is not None and _holds(before) and (word == "DELETED" or not _holds(pod)):
                    self._look_again()

    async def _follow_nodes(self) -> None:
        async for word, node in reflect(self._kube, "/api/v1/nodes"):
            if node is None:
                self._note_synced("nodes")
                continue
            name = node["metadata"]["name"]
            before = self._nodes.pop(name, None)
            if word != "DELETED":
                self._nodes[name] = node
            if _matters(before) != _matters(self._nodes.get(name)):
                self._look_again()

    def _note_synced(self, what: str) -> None:
        self._synced[what] = True
        self._wake.set()

    def _look_again(self) -> None:
        self._waiting |= self._refused.keys()
        self._wake.set()

    # ---- what to do

    async def _place(self) -> None:
        while True:
            try:
                async with asyncio.timeout(RETRY_S):
                    await self._wake.wait()
            except TimeoutError:
                self._waiting |= self._refused.keys()
            self._wake.clear()
            if not all(self._synced.values()):
                continue
            while self._waiting:
                key = min(self._waiting, key=self._order)
                self._waiting.discard(key)
                pod = self._pods.get(key)
                if pod is not None and _is_wanting(pod):
                    await self._place_one(key, pod)

    def _order(self, key: Key) -> tuple[str, Key]:
        pod = self._pods.get(key)
        return ("" if pod is None else pod["metadata"].get("creationTimestamp", ""), key)

    async def _place_one(self, key: Key, pod: Object) -> None:
        verdicts: dict[str, list[str]] = {}
        for name, node in self._nodes.items():
            verdicts[name] = fit.reasons(pod, node, self._held(name))
        fitting = [name for name, found in verdicts.items() if not found]
        try:
            if fitting:
                await self._bind(key, pod, min(fitting, key=lambda name: (len(self._held(name)), name)))
            else:
                await self._refuse(key, pod, fit.sentence(verdicts))
        except ApiError as error:
            if error.code not in (404, 409):  # gone or bound meanwhile: the watch tells
                log.warning("schedule %s/%s: %s", *key, error)
                self._refused[key] = ""  # tried again, and told again
        except Failure as failure:
            log.warning("schedule %s/%s: %s", *key, failure)
            self._refused[key] = ""

    def _held(self, node: str) -> list[Object]:
        return [pod for pod in self._pods.values() if pod["spec"].get("nodeName") == node and _holds(pod)]

    async def _bind(self, key: Key, pod: Object, node: str) -> None:
        namespace, name = key
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name, "namespace": namespace, "uid": pod["metadata"]["uid"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        await self._kube.create(f"/api/v1/namespaces/{namespace}/pods/{name}/binding", binding)
        self._refused.pop(key, None)
        current = self._pods.get(key)
        if current is not None and current["metadata"]["uid"] == pod["metadata"]["uid"]:
            self._pods[key] = current | {"spec": current["spec"] | {"nodeName": node}}  # counted before the watch says so
        self._events.record(pod, "Normal", "Scheduled", f"Successfully assigned {namespace}/{name} to {node}")

    async def _refuse(self, key: Key, pod: Object, message: str) -> None:
        """Tell it in the pod's condition and in an event, once per sentence."""
        if self._refused.get(key) == message:
            return
        self._refused[key] = message
        namespace, name = key
        self._events.record(pod, "Warning", "FailedScheduling", message)
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        patch = {"status": {"conditions": [condition | {"lastTransitionTime": stamp()}]}}
        await self._kube.patch(f"/api/v1/namespaces/{namespace}/pods/{name}/status", patch)


def _is_wanting(pod: Object) -> bool:
    """Whether the pod waits for this scheduler."""
    spec = pod["spec"]
    ours = spec.get("schedulerName", NAME) == NAME and not spec.get("schedulingGates")
    return ours and not spec.get("nodeName") and not pod["metadata"].get("deletionTimestamp") and _holds(pod)


def _holds(pod: Object) -> bool:
    """Whether the pod takes resources of its node."""
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def _matters(node: Object | None) -> Any:
    """The parts of a node that decide what fits."""
    if node is None:
        return None
    status = node.get("status", {})
    ready = [one.get("status") for one in status.get("conditions", []) if one.get("type") == "Ready"]
    return node.get("spec"), node["metadata"].get("labels"), status.get("allocatable"), ready
