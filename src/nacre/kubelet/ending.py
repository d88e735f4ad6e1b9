"""What takes a pod down: containers with their grace, the sandbox, volumes, cgroup, records, and at last the API object."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import time
from collections.abc import Mapping
from typing import Any

from nacre.kubelet import hooks, translate
from nacre.kubelet.life import Life
from nacre.kubelet.times import parse
from nacre.oci import trace
from nacre.wire import cri_pb2 as cri
from nacre.wire.kube import ApiError

LEAST_AFTER_HOOK_S = 2


async def stop_container(life: Life, name: str, identifier: str, *, why: str = "", grace_s: int | None = None) -> None:
    """preStop hook, stop signal, grace, SIGKILL. Returns when the container has ended. Raises Failure."""
    container = life.container(name)
    seconds = int(life.pod["spec"].get("terminationGracePeriodSeconds", 30)) if grace_s is None else grace_s
    life.event("Killing", why or f"Stopping container {name}", container=name)
    hook = (container.get("lifecycle") or {}).get("preStop")
    if hook and seconds > 0:
        began = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await hooks.run(life, hook, container, identifier, "FailedPreStopHook", seconds)
        seconds = max(LEAST_AFTER_HOOK_S, int(seconds - (time.monotonic() - began)))
    request = cri.StopContainerRequest(container_id=identifier, timeout=seconds)
    await life.call(life.host.runtime.StopContainer, request, f"stop container {name}")
    await life.refresh(identifier)


async def stop_containers(life: Life, grace_s: int | None) -> None:
    """All that run: ordinary ones together, then sidecars, which served them."""
    sidecars = {one["name"] for one in life.pod["spec"].get("initContainers") or [] if one.get("restartPolicy") == "Always"}
    for last in (False, True):
        found = [(name, one) for name, one in life.running() if (name in sidecars) == last]
        await asyncio.gather(*(stop_container(life, name, one.id, grace_s=grace_s) for name, one in found))


def grace_left_s(metadata: Mapping[str, Any], now: float) -> int:
    """What is left of the deletion's grace: a kubelet that was started again in the middle gives no new one."""
    whole = int(metadata.get("deletionGracePeriodSeconds") or 0)
    return max(0, min(whole, math.ceil(parse(metadata["deletionTimestamp"]) - now)))


async def stop_for_deletion(life: Life) -> None:
    """Stop all containers within the grace that the deletion gives; one that is shortened on the way counts from then."""
    while life.running():
        life.hurry.clear()
        grace_s = grace_left_s(life.pod["metadata"], time.time())
        stopping = asyncio.ensure_future(stop_containers(life, grace_s))
        hurried = asyncio.ensure_future(life.hurry.wait())
        try:
            await asyncio.wait((stopping, hurried), return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                stopping.result()
                return
        finally:
            hurried.cancel()
            stopping.cancel()
            await asyncio.gather(stopping, return_exceptions=True)


async def stop_sandbox(life: Life) -> None:
    """The pod's network and namespaces away; its containers stay for their logs."""
    request = cri.StopPodSandboxRequest(pod_sandbox_id=life.sandbox)
    await life.call(life.host.runtime.StopPodSandbox, request, "stop the sandbox")
    life.sandbox_ready = life.facts.sandbox_made = False


async def take_away(life: Life) -> None:
    """Every sandbox of the pod, with its containers, off the runtime; what ended on the way is noted."""
    runtime = life.host.runtime
    wanted = cri.PodSandboxFilter(label_selector={translate.UID_LABEL: life.uid})
    listed = await life.call(runtime.ListPodSandbox, cri.ListPodSandboxRequest(filter=wanted), "list the sandboxes")
    for item in listed.items:
        await life.call(runtime.StopPodSandbox, cri.StopPodSandboxRequest(pod_sandbox_id=item.id), "stop the sandbox")
        for _name, one in life.running():
            await life.refresh(one.id)
        await life.call(runtime.RemovePodSandbox, cri.RemovePodSandboxRequest(pod_sandbox_id=item.id), "remove the sandbox")
    life.sandbox, life.sandbox_ready, life.facts.sandbox_made = "", False, False


async def clean(life: Life) -> None:
    """Files and cgroup of a pod that the runtime has no more; its records too. Raises Failure for a mount that stays."""
    await asyncio.to_thread(life.volumes.teardown)
    await asyncio.to_thread(life.cgroup.remove)
    await asyncio.to_thread(shutil.rmtree, life.frame.log_directory(life.pod), ignore_errors=True)
    life.host.puller.forget(life.uid)
    trace.forget(life.host.config.trace_dir, life.uid)


async def delete_object(life: Life, metadata: dict[str, Any]) -> None:
    """The last word of a deletion: gone already, or another pod's name by now, is fine."""
    path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
    try:
        await life.host.kube.delete(path, {"gracePeriodSeconds": 0, "preconditions": {"uid": metadata["uid"]}})
    except ApiError as error:
        if error.code not in (404, 409):
            raise
