"""The kubelet's start and stop. Everything heavy is imported at start, so that the daemon can execute its zygote before."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from nacre.config import Config, node_address

if TYPE_CHECKING:
    from nacre.kubelet.host import Host

log = logging.getLogger("nacre.kubelet")


class Service:
    """The kubelet of this machine; `server_url` is for an API server elsewhere."""

    def __init__(self, config: Config, server_url: str = "") -> None:
        self._config, self._server_url = config, server_url
        self._parts: list[Any] = []  # in the order of starting
        self._closing: list[Callable[[], Awaitable[Any]]] = []

    async def start(self) -> None:
        """Returns when the node is registered and its pods are being looked after. Raises Failure, ApiError."""
        from nacre.kubelet.node import Node
        from nacre.kubelet.pods import Pods
        from nacre.kubelet.rotation import Rotation
        from nacre.kubelet.server import Server
        from nacre.kubelet.watching import Watching

        host = await self._host()
        watching = Watching()
        self._closing.insert(0, _closed(watching))
        pods = Pods(host, watching)
        node = Node(self._config, host.kube, host.runtime, host.events, host.address)
        server = Server(self._config, host.runtime, pods, watching)
        self._closing.insert(0, host.objects.stop)
        for part in (host.events, server, node, pods, Rotation(host.runtime, pods.logs)):
            self._parts.append(part)
            await part.start()
        log.info("kubelet of node %s on %s:%d", self._config.node_name, host.address, self._config.kubelet_port)

    async def stop(self) -> None:
        """Pods go on; the node says that it is not ready."""
        while self._parts:
            await self._parts.pop().stop()
        while self._closing:
            await self._closing.pop(0)()

    async def _host(self) -> Host:
        import grpc

        from nacre.kubelet.events import Events
        from nacre.kubelet.host import Host
        from nacre.kubelet.node import capacity
        from nacre.kubelet.objects import Objects
        from nacre.kubelet.pulling import Puller
        from nacre.kubelet.resources import make_levels, node_memory_bytes
        from nacre.linux import cgroups
        from nacre.wire.cri import CHANNEL_OPTIONS, Stub
        from nacre.wire.kube import Kube, client_context, own_server

        config = self._config
        channel = grpc.aio.insecure_channel(f"unix://{config.cri_socket}", options=list(CHANNEL_OPTIONS))
        kube = Kube(
            self._server_url or own_server(config), client_context(f"{config.data}/pki", "kubelet"), agent="nacre-kubelet"
        )
        self._closing += [kube.close, channel.close]
        layout = cgroups.discover()
        make_levels(layout, config.cgroup_root)
        images, events = Stub(channel, "ImageService"), Events(kube, config.node_name)
        return Host(
            config=config,
            kube=kube,
            runtime=Stub(channel, "RuntimeService"),
            images=images,
            events=events,
            puller=Puller(images, Stub(channel, "RuntimeService"), events),
            objects=Objects(kube),
            layout=layout,
            address=node_address(config),
            capacity=capacity(config.data),
            memory_bytes=node_memory_bytes(),
        )


def _closed(thing: Any) -> Callable[[], Awaitable[None]]:
    async def close() -> None:
        thing.close()

    return close
