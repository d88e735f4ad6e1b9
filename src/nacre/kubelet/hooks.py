"""Lifecycle hooks: postStart and preStop, by the means that probes have (exec, httpGet, tcpSocket) and sleep."""

from __future__ import annotations

from typing import Any

import aiohttp

from nacre.kubelet import probes
from nacre.kubelet.life import Life
from nacre.oci.errors import Failure

HOOK_S = 60.0


async def run(life: Life, hook: dict[str, Any], container: dict[str, Any], identifier: str, reason: str) -> bool:
    """Whether it succeeded; a failure becomes the event `reason`."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session:
        try:
            passed, words = await probes.attempt(
                life.host.runtime, hook, container, identifier, life.address, HOOK_S, lambda: session
            )
        except (Failure, aiohttp.ClientError, OSError) as error:
            passed, words = False, error.sentence() if isinstance(error, Failure) else str(error)
    if not passed:
        name = {"FailedPostStartHook": "PostStartHook", "FailedPreStopHook": "PreStopHook"}[reason]
        life.event(reason, f"{name} failed: {words}", container=container["name"], warning=True)
    return passed
