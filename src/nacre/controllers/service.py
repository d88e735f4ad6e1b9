"""The controllers' life inside the daemon: one client of the API, one task per loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from nacre.config import Config
from nacre.controllers.collector import Collector
from nacre.controllers.namespaces import Namespaces
from nacre.controllers.scheduler import Scheduler
from nacre.oci.errors import Failure
from nacre.wire.kube import ApiError, Kube, client_context, own_server

log = logging.getLogger("nacre.controllers")

RESTART_S = 1.0


class Service:
    """`server_url` is for an API server elsewhere; by default it is this node's own, found in STATE/node.json."""

    def __init__(self, config: Config, server_url: str = "") -> None:
        self._config, self._server_url = config, server_url
        self._kube: Kube | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Raises NotFound when no API server has run here. Returns at once; the loops find the server themselves."""
        pki = f"{self._config.data}/pki"
        url = self._server_url or own_server(self._config)
        self._kube = Kube(url, client_context(pki, "controllers"), agent="nacre-controllers")
        with open(f"{pki}/ca.crt", encoding="ascii") as file:
            certificate = file.read()
        for loop in (Scheduler(self._kube).run, Namespaces(self._kube, certificate).run, Collector(self._kube).run):
            self._tasks.append(asyncio.create_task(_keep(loop)))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        kube, self._kube = self._kube, None
        if kube is not None:
            await kube.close()


async def _keep(loop: Callable[[], Awaitable[None]]) -> None:
    """Run `loop` for ever; one that fails is logged whole and started again."""
    while True:
        try:
            await loop()
        except* (ApiError, Failure) as errors:
            log.error("a controller stopped and is started again: %s", errors.exceptions)
        except* Exception:
            log.exception("a controller stopped and is started again")
        await asyncio.sleep(RESTART_S)
