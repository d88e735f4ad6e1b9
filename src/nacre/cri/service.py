"""The CRI service's start and stop. The zygote is executed first, before anything that starts threads is imported."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
from typing import TYPE_CHECKING, Any

from nacre.config import Config
from nacre.cri.shims import Zygote
from nacre.linux import cgroup_names
from nacre.oci.errors import AlreadyExists

if TYPE_CHECKING:
    from nacre.cri.runtime import RuntimeService
    from nacre.cri.store import Store

log = logging.getLogger("nacre.cri")


class Service:
    """`nacre cri`, and the CRI part of `nacre up`: serves `config.cri_socket` (mode 0600)."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._zygote = Zygote()
        self._channel = self._zygote.execute()
        self._server: Any = None
        self._store: Store | None = None
        self._parts: list[Any] = []
        self.runtime: RuntimeService | None = None

    async def start(self) -> None:
        """Returns when calls are answered. Raises Failure naming what is in the way."""
        config = self._config
        for directory in (config.state, f"{config.state}/pods", config.trace_dir, config.data, config.log_dir):
            os.makedirs(directory, mode=0o711, exist_ok=True)
        await self._zygote.start(self._channel)
        if config.cgroup_driver == "systemd":
            cgroup_names.require_systemd('start the CRI with cgroup_driver = "systemd"')
        await self._assemble()
        await self._listen()
        log.info("CRI on %s", config.cri_socket)

    async def stop(self) -> None:
        """Stop answering; pods, their shims and their network go on."""
        if self._server is not None:
            await self._server.stop(grace=1.0)
        for part in reversed(self._parts):
            await part.stop()
        if self._store is not None:
            self._store.close()
        await self._zygote.stop()

    async def _assemble(self) -> None:
        from nacre.cri.image_service import ImageService
        from nacre.cri.pods import Pods
        from nacre.cri.recover import recover
        from nacre.cri.runtime import RuntimeService
        from nacre.cri.sandboxes import settings
        from nacre.cri.store import Store
        from nacre.cri.streaming import Streaming
        from nacre.cri.vms import Vms
        from nacre.images import Store as Images
        from nacre.network import Network

        config = self._config
        self._store = Store(f"{config.data}/cri.db")
        self._store.open()
        images = Images(config)
        await images.open()
        network = Network(config)
        await asyncio.to_thread(network.start)
        pods = Pods(config, self._store, self._zygote, network, images)
        streaming = Streaming()
        await streaming.start()
        self._parts += [_Closing(images.close), _Closing(functools.partial(asyncio.to_thread, network.close)), streaming]
        pods.vms = Vms(pods, functools.partial(settings, pods, "kata"))
        await recover(pods)
        self._parts.append(pods.vms)
        pods.vms.start()
        self.runtime = RuntimeService(pods, streaming)
        streaming.containers = self.runtime.containers
        self._images = ImageService(pods)

    async def _listen(self) -> None:
        import grpc.aio

        from nacre.wire import cri as wire

        path = self._config.cri_socket
        _clear(path)
        self._server = grpc.aio.server(options=wire.CHANNEL_OPTIONS)
        self._server.add_generic_rpc_handlers(wire.handlers("RuntimeService", self.runtime))
        self._server.add_generic_rpc_handlers(wire.handlers("ImageService", self._images))
        before = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix://{path}")
            await self._server.start()
        finally:
            os.umask(before)


class _Closing:
    """Something that is closed where services are stopped."""

    def __init__(self, close: Any) -> None:
        self._close = close

    async def stop(self) -> None:
        await self._close()


def _clear(path: str) -> None:
    """Take away a socket that nobody listens on; name who does otherwise."""
    if not os.path.exists(path):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            os.unlink(path)
            return
    raise AlreadyExists(what=f"listen on {path}", cause="another process answers there", remedy="nacre down")
