"""One worker a pod: fed by the API server's watch of this node's pods, by static manifests, and by the runtime's events.

After the first complete list, what the runtime and the disk still have of pods that are no more is taken away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import grpc

from nacre.kubelet import orphans
from nacre.kubelet.host import Host
from nacre.kubelet.manifests import MIRROR, Manifests
from nacre.kubelet.translate import UID_LABEL
from nacre.kubelet.watching import Watching
from nacre.kubelet.worker import Worker
from nacre.wire import cri_pb2 as cri
from nacre.wire.kube import reflect

log = logging.getLogger("nacre.kubelet")
FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 5.0
RELIST_S = 1.0  # where the runtime has no events


class Pods:
    """All workers, by uid."""

    def __init__(self, host: Host, watching: Watching) -> None:
        self._host = host
        self._workers: dict[str, Worker] = {}
        self._manifests = Manifests(host, watching, self._add_static, self._remove_static)
        self._tasks: list[asyncio.Task[None]] = []
        self._synced = asyncio.Event()

    async def start(self) -> None:
        """Returns when the API server's pods are known."""
        for follow in (self._follow_runtime, self._follow_pods, self._manifests.run):
            self._tasks.append(asyncio.create_task(follow()))
            self._tasks[-1].add_done_callback(_died)
        await self._synced.wait()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in list(self._workers.values())))

    # for the node API

    def find(self, namespace: str, name: str) -> Worker | None:
        def named(worker: Worker) -> bool:
            metadata = worker.pod["metadata"]
            return (metadata["namespace"], metadata["name"]) == (namespace, name)

        found = [worker for worker in self._workers.values() if named(worker)]
        return max(found, key=lambda worker: str(worker.pod["metadata"].get("creationTimestamp", "")), default=None)

    def all(self) -> list[dict[str, Any]]:
        return [worker.pod for worker in self._workers.values()]

    def logs(self) -> Iterator[tuple[str, str]]:
        """(container id, log file) of every container that runs."""
        for worker in self._workers.values():
            for _name, one in worker.life.running():
                if one.log_path:
                    yield str(one.id), str(one.log_path)

    # the API server's pods

    async def _follow_pods(self) -> None:
        selector = f"spec.nodeName={self._host.config.node_name}"
        async for word, pod in reflect(self._host.kube, "/api/v1/pods", fieldSelector=selector):
            if pod is None:
                if not self._synced.is_set():
                    self._host.background(orphans.sweep(self._host, self._living()))
                self._synced.set()
            else:
                try:
                    self._told(word, pod)
                except Exception:  # one pod nobody can make sense of holds up no other
                    log.exception("pod %s/%s", pod["metadata"]["namespace"], pod["metadata"]["name"])

    def _told(self, word: str, pod: dict[str, Any]) -> None:
        if MIRROR in (pod["metadata"].get("annotations") or {}):
            self._mirror(word, pod)
        else:
            self._pod(word, pod)

    def _pod(self, word: str, pod: dict[str, Any]) -> None:
        uid = str(pod["metadata"]["uid"])
        worker = self._workers.get(uid)
        if worker is None and word != "DELETED":
            self._workers[uid] = Worker(self._host, pod, self._done)
        elif worker is not None and word == "DELETED":
            worker.gone()
        elif worker is not None:
            worker.update(pod)

    def _done(self, worker: Worker) -> None:
        self._workers.pop(worker.life.uid, None)

    # static pods and their images in the API server

    def _add_static(self, pod: dict[str, Any]) -> None:
        uid = str(pod["metadata"]["uid"])
        if uid not in self._workers:
            self._workers[uid] = Worker(self._host, pod, self._done, mirror={})
        self._host.background(self._manifests.mirror(pod))

    def _remove_static(self, uid: str) -> None:
        worker = self._workers.get(uid)
        if worker is not None:
            worker.gone(int(worker.pod["spec"].get("terminationGracePeriodSeconds", 30)))

    def _mirror(self, word: str, pod: dict[str, Any]) -> None:
        """A mirror pod is a picture: deleted, it is made again; one without its original is taken out."""
        uid = str(pod["metadata"]["annotations"][MIRROR])
        worker = self._workers.get(uid)
        if worker is None:
            if word != "DELETED" and self._manifests.read_once:
                self._host.background(self._manifests.unmirror(pod))
            return
        if word == "DELETED":
            worker.mirrored({})
            self._host.background(self._manifests.mirror(worker.pod))
        elif pod["metadata"].get("deletionTimestamp"):
            self._host.background(self._manifests.unmirror(pod))
        else:
            worker.mirrored(pod)

    def _living(self) -> set[str]:
        return set(self._workers)

    # the runtime

    async def _follow_runtime(self) -> None:
        """Its events, for ever; each time the stream stands anew, every worker asks what it may have missed."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                stream = self._host.runtime.GetContainerEvents(cri.GetEventsRequest())
                for worker in list(self._workers.values()):
                    worker.runtime_unknown()
                async for event in stream:
                    pause_s = FIRST_PAUSE_S
                    self._runtime_event(event)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                    return await self._relist()
                log.warning("the runtime's events: %s", error.details())
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LAST_PAUSE_S)

    def _runtime_event(self, event: Any) -> None:
        labels = event.pod_sandbox_status.labels if event.HasField("pod_sandbox_status") else {}
        worker = self._workers.get(labels.get(UID_LABEL, ""))
        if worker is not None:
            worker.runtime_event(event)

    async def _relist(self) -> None:
        """For a runtime without events: look every second whether a container's state has changed."""
        log.info("the runtime has no events: its containers are listed every %.0f s", RELIST_S)
        before: dict[str, tuple[str, Any]] = {}
        while True:
            try:
                listed = await self._host.runtime.ListContainers(cri.ListContainersRequest())
            except grpc.RpcError as error:
                log.warning("list the runtime's containers: %s", error.details())
            else:
                now = {one.id: (one.labels.get(UID_LABEL, ""), one.state) for one in listed.containers}
                for uid in {uid for key, (uid, state) in (before | now).items() if before.get(key) != now.get(key)}:
                    if uid in self._workers:
                        self._workers[uid].runtime_unknown()
                before = now
            await asyncio.sleep(RELIST_S)


def _died(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("the kubelet no longer follows its pods: %s", task.exception(), exc_info=task.exception())
