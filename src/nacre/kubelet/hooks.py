"""Lifecycle hooks: postStart and preStop, by the means that probes have (exec, httpGet, tcpSocket) and sleep."""

from __future__ import annotations

from typing import Any

import aiohttp

from nacre.kubelet import probes
from nacre.kubelet.life import Life
from nacre.oci.errors import Failure

NO_LIMIT_S = 0.0  # the CRI's word for as long as it takes


async def run(
    life: Life, hook: dict[str, Any], container: dict[str, Any], identifier: str, reason: str, limit_s: float = NO_LIMIT_S
) -> bool:
    """Whether it succeeded; a failure becomes the event `reason`. What `limit_s` cuts off is killed in the container too."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session:
        try:
            passed, words = await probes.attempt(
                life.host.runtime, hook, container, identifier, life.address, limit_s, lambda: session
            )
        except (Failure, *probes.UNREACHED) as error:
            passed, words = False, error.sentence() if isinstance(error, Failure) else str(error)
    if not passed:
        name = {"FailedPostStartHook": "PostStartHook", "FailedPreStopHook": "PreStopHook"}[reason]
        life.event(reason, f"{name} failed: {words}", container=container["name"], warning=True)
    return passed
