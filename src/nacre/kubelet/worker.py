"""One pod's life on this node: a task that wakes for each change, asks `plan` what comes next, and does it.

A worker touches its own pod alone: a runtime call that hangs holds up nobody else. What it learns becomes `.status` at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from nacre.kubelet import ending, making, status, translate
from nacre.kubelet.expand import ConfigError, Sources
from nacre.kubelet.host import Host, references, volume_references
from nacre.kubelet.life import Life
from nacre.kubelet.objects import Reference
from nacre.kubelet.plan import SANDBOX, Action, plan
from nacre.kubelet.times import stamp
from nacre.kubelet.waiting import Interrupted
from nacre.oci import trace
from nacre.oci.errors import Failure, NotFound, WrongStatus
from nacre.wire import cri_pb2 as cri
from nacre.wire.kube import ApiError

log = logging.getLogger("nacre.kubelet")
SHOWN_S = 0.3  # what takes longer is shown in the pod's status before it is done
DONE = -1.0  # a step's answer: there will be no other


class Worker:
    """The life of `pod` on this node. `done` is called when nothing of it is left."""

    def __init__(
        self, host: Host, pod: dict[str, Any], done: Callable[[Worker], None], mirror: dict[str, Any] | None = None
    ) -> None:
        self.life = Life(host, pod)
        self.mirror = mirror  # a static pod's image in the API server, whose status is written; None: the pod is its own
        self.static = mirror is not None
        self._host, self._done = host, done
        self._wake = asyncio.Event()
        self._known = False  # whether the runtime was asked what it has of this pod
        self._gone = False  # the API object (or the manifest) is no more
        self._stale = False  # volumes may show something old
        self._versions: dict[Reference, str] = {}  # of what the pod refers to, as it was last read
        self._written: dict[str, Any] | None = None
        self._recorded = -1  # generation that the recorder has
        self._listeners: list[asyncio.Event] = []
        self.task = asyncio.create_task(self._run())

    # what others tell

    @property
    def pod(self) -> dict[str, Any]:
        return self.life.pod

    def update(self, pod: dict[str, Any]) -> None:
        """The API server has a newer version of the pod. A status, most often our own, is no reason to wake."""
        before, self.life.pod = self.life.pod, pod
        old, new = before["metadata"], pod["metadata"]
        ends = ("deletionTimestamp", "deletionGracePeriodSeconds")
        if any(old.get(key) != new.get(key) for key in ends):
            self.life.hurry.set()
            self._wake.set()
        if before["spec"] != pod["spec"]:
            self._wake.set()
        if any(old.get(key) != new.get(key) for key in ("labels", "annotations")):
            self.refresh_volumes()

    def refresh_volumes(self) -> None:
        """Something that volumes show has changed."""
        if self.life.pod["spec"].get("volumes"):
            self._stale = True
            self._wake.set()

    def object_changed(self, reference: Reference, version: str) -> None:
        """A ConfigMap or Secret that the pod refers to: volumes are brought up to date, and who waited for it waits no more."""
        if self._versions.get(reference, version) == version:
            return
        life = self.life
        for name in [name for name, (word, _message) in life.facts.waiting.items() if word == ConfigError.code] + [SANDBOX]:
            life.not_before.pop(name, None)
        self.refresh_volumes()
        self._wake.set()

    def gone(self, grace_s: int = 0) -> None:
        """The object was taken out by force, or the manifest's file: the pod ends within `grace_s`."""
        self._gone = True
        marks = {"deletionTimestamp": stamp(time.time() + grace_s), "deletionGracePeriodSeconds": grace_s}
        self.life.pod = self.life.pod | {"metadata": self.life.pod["metadata"] | marks}
        self.life.hurry.set()
        self._wake.set()

    def mirrored(self, mirror: dict[str, Any]) -> None:
        """The static pod's image in the API server, {} while there is none."""
        fresh = bool(mirror) and (not self.mirror or self.mirror["metadata"]["uid"] != mirror["metadata"]["uid"])
        self.mirror = mirror
        if fresh:
            self._written = None
            self._wake.set()

    def runtime_event(self, event: Any) -> None:
        """The runtime's word about one of this pod's containers or its sandbox."""
        if event.HasField("pod_sandbox_status"):
            self.life.note_sandbox(event.pod_sandbox_status)
        for one in event.containers_statuses:
            self.life.note(one, event.pod_sandbox_status.id)
        self._tell_listeners()
        self._wake.set()

    def runtime_unknown(self) -> None:
        """Events may have been missed."""
        self._known = False
        self._wake.set()

    async def stop(self) -> None:
        """The kubelet ends; the pod does not."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.life.end_probes()

    # the loop

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            wait_s: float | None = making.RETRY_S
            try:
                if not self._known:
                    await self.life.ask_runtime()
                    self._known = True
                wait_s = await self._step()
            except making.SandboxLost:
                wait_s = 0.0
            except (ApiError, Failure, OSError) as error:
                log.warning("pod %s: %s", self.life.title, error.sentence() if isinstance(error, Failure) else error)
                self._known = False
            except Exception:
                log.exception("pod %s", self.life.title)
                self._known = False
            self._tell_listeners()
            if wait_s == DONE:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()

    async def _step(self) -> float | None:
        """One decision carried out; answers when to look again: seconds, None for when something happens, or DONE."""
        self._record_pod()
        life = self.life
        for name, one in life.running():
            making.watch(life, name, one.id, self._wake)
        action = plan(life.pod, life.view(), life.not_before, time.time())
        if action.stop_all == "deleted":
            return await self._delete()
        if action.stop_all or action.finished:
            if action.stop_all:
                await self._out_of_time(action.stop_all)
            await self._finish()
            return None
        if self._stale or action.make_sandbox or action.start:
            await self._shown(self._make(action))
        await self._restart_unhealthy()
        for name in action.replace:
            words = f"Container {name} definition changed, will be restarted"
            await ending.stop_container(life, name, life.facts.statuses[name].id, why=words)
        self._note_waiting(action)
        await self._write_status()
        again = plan(life.pod, life.view(), life.not_before, time.time())
        return 0.0 if again.make_sandbox or again.start or again.finished or again.stop_all else again.wake_s

    async def _shown(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`; what takes its time is shown meanwhile: a pod that waits says so."""
        task = asyncio.ensure_future(work)
        try:
            _done, pending = await asyncio.wait({task}, timeout=SHOWN_S)
            if pending:
                await self._write_status()
            await task
        finally:
            task.cancel()

    async def _make(self, action: Action) -> None:
        life = self.life
        sources = await self._host.sources(life.pod)
        self._follow(sources)
        if self._stale and life.sandbox_ready:
            await self._refresh(sources)
        try:
            if action.make_sandbox:
                await making.make_sandbox(life, sources)
                if life.sandbox_ready:
                    action = plan(life.pod, life.view(), life.not_before, time.time())
            for name in action.start if life.sandbox_ready else ():
                await making.start(life, name, sources)
                one = life.facts.statuses.get(name)
                if one is not None and one.state == cri.CONTAINER_RUNNING:
                    making.watch(life, name, one.id, self._wake)
        except Interrupted:
            self._wake.set()

    def _follow(self, sources: Sources) -> None:
        """Be told when what volumes show changes; what environments take is of interest only while it is missing."""
        spec = self.life.pod["spec"]
        missing = {one for one in references(spec) if not sources.version(*one)}
        wanted = missing | set(volume_references(spec))
        self._versions = {one: sources.version(*one) for one in wanted}
        self._host.objects.follow(self, self.life.pod["metadata"]["namespace"], wanted)

    async def _refresh(self, sources: Sources) -> None:
        self._stale = False
        life = self.life
        try:
            changed = await asyncio.to_thread(life.volumes.prepare, life.pod, sources)
            if changed and life.pod["spec"].get("runtimeClassName"):
                await making.tell_of_volumes(life)
        except (ConfigError, Failure) as failure:
            self.life.event("FailedMount", f"MountVolume.SetUp failed: {failure.sentence()}", warning=True)

    async def _restart_unhealthy(self) -> None:
        life = self.life
        for name in list(life.unhealthy):
            life.unhealthy.discard(name)
            one = life.facts.statuses.get(name)
            if one is not None and one.state == cri.CONTAINER_RUNNING:
                kind = "startup" if life.facts.started.get(name) is False else "liveness"
                words = f"Container {name} failed {kind} probe, will be restarted"
                grace_s = life.container(name).get(f"{kind}Probe", {}).get("terminationGracePeriodSeconds")
                await ending.stop_container(life, name, one.id, why=words, grace_s=grace_s)

    # ends

    async def _delete(self) -> float:
        life = self.life
        await life.end_probes()
        await ending.stop_for_deletion(life)
        await ending.take_away(life)
        if not self._gone:
            await self._write_status()
        await ending.clean(life)
        if not self._gone:
            await ending.delete_object(life, life.pod["metadata"])
        elif self.mirror:
            await ending.delete_object(life, self.mirror["metadata"])
        self._host.objects.follow(self, "", set())
        self._done(self)
        return DONE

    async def _finish(self) -> None:
        """Nothing runs any more: final status, then the sandbox stops; its containers stay for their logs."""
        life = self.life
        await life.end_probes()
        await self._write_status()
        if life.sandbox_ready:
            await ending.stop_containers(life, None)
            await ending.stop_sandbox(life)
            await self._write_status()

    async def _out_of_time(self, why: str) -> None:
        words = "Pod was active on the node longer than the specified deadline"
        if not self.life.facts.ended:
            self.life.event(why, words)
        self.life.facts.ended = (why, words)
        if self.life.running():
            await ending.stop_containers(self.life, None)

    # telling

    def _note_waiting(self, action: Action) -> None:
        """Containers that wait for their next attempt: CrashLoopBackOff, once an end."""
        life = self.life
        title = f"{life.pod['metadata']['name']}_{life.pod['metadata']['namespace']}({life.uid})"
        for name in action.waiting:
            one, seconds = life.facts.statuses.get(name), int(life.backoff_s.get(name, 0))
            if one is None or one.state != cri.CONTAINER_EXITED or life.facts.waiting.get(name) or not seconds:
                continue
            life.event("BackOff", f"Back-off restarting failed container {name} in pod {title}", container=name, warning=True)
            life.facts.waiting[name] = ("CrashLoopBackOff", f"back-off {seconds}s restarting failed container={name} pod={title}")

    async def _write_status(self) -> None:
        subject = self.mirror if self.static else self.life.pod
        if not subject:
            return  # the mirror pod is still to be made
        made = status.pod_status(subject | {"spec": self.life.pod["spec"]}, self.life.facts, time.time())
        current = subject.get("status") or {}
        if made == self._written or made == {key: current.get(key) for key in made}:
            return
        metadata = subject["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/status"
        try:
            answer = await self._host.kube.patch(path, {"metadata": {"uid": metadata["uid"]}, "status": made}, "merge")
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            return  # gone, or another pod's name by now: the watch tells
        self._written = made
        self._keep_status(answer.get("status") or made)

    def _keep_status(self, told: dict[str, Any]) -> None:
        if self.mirror:
            self.mirror = self.mirror | {"status": told}
        self.life.pod = self.life.pod | {"status": told}

    def _record_pod(self) -> None:
        generation = int(self.pod["metadata"].get("generation") or 0)
        if generation != self._recorded:
            self._recorded = generation
            document = {key: value for key, value in self.pod.items() if key != "status"}
            trace.record(self._host.config.trace_dir, self.life.uid, "api", "Pod", document)

    # what the node API asks

    def container_id(self, name: str) -> str:
        """Raises NotFound, WrongStatus."""
        one = self.life.facts.statuses.get(name)
        if one is None or one.state != cri.CONTAINER_RUNNING:
            what = f'find container "{name}" of pod {self.life.title}'
            self._must_name(name, what)
            raise WrongStatus(what=what, cause=f"container not found ({self._state(name)})")
        return str(one.id)

    def log_path(self, name: str, *, previous: bool) -> str:
        """Raises NotFound, WrongStatus in Kubernetes' words."""
        title = f'container "{name}" in pod "{self.pod["metadata"]["name"]}"'
        self._must_name(name, f"read logs of {title}")
        one = self.life.facts.statuses.get(name)
        if previous and (one is None or not one.metadata.attempt):
            raise WrongStatus(what=f"read logs of {title}", cause=f"previous terminated {title} not found")
        if one is None and not self.life.next_attempt(name):
            raise WrongStatus(what=f"read logs of {title}", cause=f"{title} is waiting to start: {self._state(name)}")
        attempt = self.life.next_attempt(name) - 1 - previous
        return translate.log_file(self.life.frame, self.pod, name, attempt)

    def has_ended(self, name: str) -> bool:
        one = self.life.facts.statuses.get(name)
        return self.task.done() or one is None or one.state == cri.CONTAINER_EXITED

    def subscribe(self, wake: asyncio.Event) -> None:
        self._listeners.append(wake)

    def unsubscribe(self, wake: asyncio.Event) -> None:
        self._listeners.remove(wake)

    def _tell_listeners(self) -> None:
        for event in self._listeners:
            event.set()

    def _must_name(self, name: str, what: str) -> None:
        if name not in {one["name"] for one in self.life.containers()}:
            raise NotFound(what=what, cause=f"container {name} is not valid for pod {self.pod['metadata']['name']}")

    def _state(self, name: str) -> str:
        waiting = self.life.facts.waiting.get(name)
        one = self.life.facts.statuses.get(name)
        if one is not None and one.state == cri.CONTAINER_EXITED:
            return "it has ended"
        return waiting[0] if waiting else status.not_yet(self.pod, name)
