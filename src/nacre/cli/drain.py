"""Taking a node's pods off the host through its own CRI, as `nacre down` does while the daemon still lives."""

from __future__ import annotations

import asyncio
from typing import Any

from nacre.cli.control import Progress
from nacre.config import Config
from nacre.oci.errors import Failure

AT_ONCE = 8  # pods taken down side by side


class DrainIncomplete(Failure):
    """Some pods could not be stopped through the CRI."""


async def pods(config: Config, grace_s: float, progress: Progress) -> int:
    """Stop every container (SIGTERM, `grace_s`, SIGKILL), stop and remove every sandbox; answers how many there were.

    Raises DrainIncomplete naming each pod that stayed, after all others are gone.
    """
    import grpc

    from nacre.wire import cri, cri_pb2

    async with grpc.aio.insecure_channel(f"unix://{config.cri_socket}", options=list(cri.CHANNEL_OPTIONS)) as channel:
        runtime = cri.Stub(channel, "RuntimeService")
        sandboxes = (await runtime.ListPodSandbox(cri_pb2.ListPodSandboxRequest())).items
        containers = (await runtime.ListContainers(cri_pb2.ListContainersRequest())).containers
        turn = asyncio.Semaphore(AT_ONCE)

        async def one(sandbox: Any) -> str:
            name = f"{sandbox.metadata.namespace}/{sandbox.metadata.name}"
            running = [c.id for c in containers if c.pod_sandbox_id == sandbox.id and c.state == cri_pb2.CONTAINER_RUNNING]
            async with turn:
                try:
                    stops = [
                        runtime.StopContainer(cri_pb2.StopContainerRequest(container_id=id, timeout=int(grace_s)))
                        for id in running
                    ]
                    await asyncio.gather(*stops)
                    await runtime.StopPodSandbox(cri_pb2.StopPodSandboxRequest(pod_sandbox_id=sandbox.id))
                    await runtime.RemovePodSandbox(cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=sandbox.id))
                except grpc.RpcError as error:
                    return f"{name}: {error.details()}"
            progress(f"pod {name} is gone")
            return ""

        left = [sentence for sentence in await asyncio.gather(*map(one, sandboxes)) if sentence]
    if left:
        raise DrainIncomplete(
            what=f"stop {len(sandboxes)} pods",
            cause=f"{len(left)} did not go",
            evidence=tuple(left),
            remedy="nacre down --force, which kills what the CRI could not stop",
        )
    return len(sandboxes)


def rest(config: Config) -> None:
    """What pods lay in, once the services have stopped: mounted volumes, cgroups. Raises CgroupBusy naming who is still in one."""
    from nacre.kubelet import volumes
    from nacre.linux import cgroup_systemd, cgroups

    volumes.unmount_all(config.kubelet_dir)
    cgroup_systemd.group(cgroups.discover(), config.cgroup_root).remove()
