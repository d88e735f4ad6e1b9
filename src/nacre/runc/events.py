"""`nacre-runc events`: the container's figures every so often, and word of each process that is killed for want of memory, until it ends."""

from __future__ import annotations

import os
import select
from collections.abc import Callable

from nacre.linux.cgroups import Cgroup
from nacre.linux.pids import owned, pidfd_open
from nacre.oci import state as store
from nacre.oci.errors import WrongStatus
from nacre.oci.state import Status
from nacre.runc.figures import figures
from nacre.runc.life import cgroup_of, current_status

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from typing import Any

    Tell = Callable[[dict[str, Any]], None]


def once(root: str, identifier: str) -> dict[str, Any]:
    """One event with the figures of now."""
    _, cgroup = _running(root, identifier)
    return {"type": "stats", "id": identifier, "data": figures(cgroup) if cgroup else {}}


def follow(root: str, identifier: str, interval_s: float, tell: Tell) -> None:
    """Returns when the container's process has ended."""
    pid, cgroup = _running(root, identifier)
    with owned(pidfd_open(pid)) as ended, owned(_memory_alarm(cgroup)) as alarm:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(alarm, select.POLLIN)
        killed = cgroup.oom_kills() if cgroup else 0
        while True:
            ready = dict(poll.poll(interval_s * 1000))
            if alarm in ready:
                os.read(alarm, 65536)
            now = cgroup.oom_kills() if cgroup else 0
            for _ in range(now - killed):
                tell({"type": "oom", "id": identifier})
            killed = max(killed, now)
            if ended in ready:
                return
            if not ready:
                tell({"type": "stats", "id": identifier, "data": figures(cgroup) if cgroup else {}})


def _running(root: str, identifier: str) -> tuple[int, Cgroup | None]:
    record = store.read(root, identifier)
    status = current_status(record)
    if status in (Status.CREATING, Status.STOPPED):
        raise WrongStatus(what=f"follow container {identifier}", cause=f"it is not running: it is {status}")
    return record.pid, cgroup_of(record)


def _memory_alarm(cgroup: Cgroup | None) -> int:
    """A descriptor that is readable when the kernel has looked for memory in the cgroup in vain; never, on a host without the controller."""
    hierarchy = cgroup.layout.find("memory") if cgroup else None
    if cgroup is None or hierarchy is None:
        return os.eventfd(0, os.EFD_CLOEXEC)
    directory = cgroup.layout.directory(hierarchy, cgroup.path)
    if hierarchy.version == 2:
        from nacre.linux import inotify

        alarm = inotify.inotify_init()
        inotify.inotify_add_watch(alarm, f"{directory}/memory.events", inotify.Mask.MODIFY)
        return alarm
    alarm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    with (
        owned(os.open(f"{directory}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)) as watched,
        owned(os.open(f"{directory}/cgroup.event_control", os.O_WRONLY | os.O_CLOEXEC)) as control,
    ):
        os.write(control, f"{alarm} {watched}".encode())
    return alarm
