"""What is left of pods that are no more: taken away once, when the kubelet starts and knows which pods there are."""

from __future__ import annotations

import asyncio
import logging
import os
import re

import grpc

from nacre.kubelet.host import Host
from nacre.kubelet.resources import remove_pod_cgroups
from nacre.kubelet.translate import UID_LABEL
from nacre.kubelet.volumes import PodVolumes
from nacre.oci import trace
from nacre.oci.errors import Failure
from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import failure_of

log = logging.getLogger("nacre.kubelet")
GRACE_S = 5
_UID = re.compile(r"[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}")


async def sweep(host: Host, living: set[str]) -> None:
    """Sandboxes of a kubelet's labels whose pod is not among the `living`, then volumes and cgroups. One's trouble is logged."""
    listed = await host.runtime.ListPodSandbox(cri.ListPodSandboxRequest())
    for item in listed.items:
        uid = item.labels.get(UID_LABEL, "")
        if uid and uid not in living:
            log.info("pod %s/%s is no more: its sandbox is taken away", item.metadata.namespace, item.metadata.name)
            try:
                await _take_away(host, item.id)
            except grpc.RpcError as error:
                log.warning("%s", failure_of(error, f"remove sandbox {item.id[:12]}").sentence())
                living = living | {uid}  # its files are still in use
    for uid in _known(host) - living:
        try:
            await asyncio.to_thread(PodVolumes(host.config.kubelet_dir, uid).teardown)
            trace.forget(host.config.trace_dir, uid)
        except (Failure, OSError) as error:
            log.warning("files of pod %s: %s", uid, error)
    await asyncio.to_thread(remove_pod_cgroups, host.layout, host.config.cgroup_root, living)


async def _take_away(host: Host, sandbox: str) -> None:
    wanted = cri.ContainerFilter(pod_sandbox_id=sandbox)
    listed = await host.runtime.ListContainers(cri.ListContainersRequest(filter=wanted))
    stops = [cri.StopContainerRequest(container_id=one.id, timeout=GRACE_S) for one in listed.containers]
    await asyncio.gather(*(host.runtime.StopContainer(one) for one in stops))
    await host.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=sandbox))
    await host.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=sandbox))


def _known(host: Host) -> set[str]:
    """Uids that have a directory here."""
    try:
        names = os.listdir(f"{host.config.kubelet_dir}/pods")
    except FileNotFoundError:
        return set()
    return {name for name in names if _UID.fullmatch(name)}
