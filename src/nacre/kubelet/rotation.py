"""Logs that have grown: renamed, and the runtime told to open a new file, so that no container fills the disk.

`N.log` becomes `N.log.YYYYMMDD-HHMMSS`; of these the newest KEPT stay. A kill between the rename and the runtime's reopening leaves the
runtime writing to the renamed file: the next look finds no `N.log` and has it opened.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable

import grpc

from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import Stub, failure_of

log = logging.getLogger("nacre.kubelet")
LIMIT, KEPT = 10 * 1024 * 1024, 4  # bytes of a file; older files beside it
LOOK_S = 10.0


class Rotation:
    """Looks at the logs of what runs; `running` answers (container id, log file)."""

    def __init__(self, runtime: Stub, running: Callable[[], Iterable[tuple[str, str]]], *, limit: int = LIMIT) -> None:
        self._runtime, self._running, self._limit = runtime, running, limit
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Rotate what is due; one container's trouble is logged and keeps no other's log from it."""
        for identifier, path in list(self._running()):
            try:
                if rotate(path, self._limit, time.time()):
                    await self._runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=identifier))
            except grpc.RpcError as error:
                log.warning("%s", failure_of(error, f"open a new log for {path}").sentence())
            except OSError as error:
                log.warning("rotate %s: %s", path, error)


def rotate(path: str, limit: int, now: float) -> bool:
    """Whether the runtime must open `path` anew: it was renamed, now or by a kubelet that was killed then."""
    older = older_than(path)
    try:
        if os.stat(path).st_size < limit:
            return False
    except FileNotFoundError:
        return bool(older)
    os.rename(path, f"{path}.{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}")
    for name in older[: max(0, len(older) + 1 - KEPT)]:
        os.unlink(name)
    return True


def older_than(path: str) -> list[str]:
    """The rotated files of log `path`, oldest first."""
    directory, name = os.path.split(path)
    try:
        return [f"{directory}/{one}" for one in sorted(os.listdir(directory)) if one.startswith(name + ".")]
    except FileNotFoundError:
        return []
