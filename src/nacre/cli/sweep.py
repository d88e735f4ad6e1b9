"""Taking off the host what a node left: after `down`, after a kill -9, before `reset`. Works from the census, never from memory.

Order: processes (they hold the rest), mounts, the network (which gives ip_forward its former value), cgroups, the state directory.
What had been swept when a kill
comes is gone, the rest is in the next census.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterable

from nacre.cli import host
from nacre.config import Config
from nacre.linux import cgroup_systemd, mounts
from nacre.network import Network
from nacre.oci.errors import Failure

KILL_LIMIT_S = 10.0
EMPTY_LIMIT_S = 5.0  # a large process that has ended may hold its cgroups for a moment yet
ROUNDS = 3  # a process may fork while we kill


class StillThere(Failure):
    """Something of the node could not be taken off the host."""


def sweep(config: Config) -> list[str]:
    """Remove everything in the node's census and STATE but its recorder; answers one sentence a kind of thing removed.

    Raises StillThere with a line for each thing that resisted.
    """
    found = host.census(config)
    refused: list[str] = []
    said = []
    for _round in range(ROUNDS):
        if not (alive := list(host.processes(config))):
            break
        _kill(alive, refused)
    _each("mount", found.mounts, _unmount, refused)
    said += Network(config).stop()
    if found.cgroups:
        cgroup_systemd.stop(config.cgroup_root)
    remove_cgroups(found.cgroups, refused)
    kinds = {"mounts": found.mounts, "links": found.links, "tables": found.tables, "cgroups": found.cgroups}
    for name, names in ({"processes": tuple(map(str, found.processes))} | kinds).items():
        if names:
            said.append(f"{len(names)} {name} were left behind and are removed now: {_few(names)}")
    left = host.census(config)
    if left:
        raise StillThere(
            what="clean the host",
            cause=f"{len(left.lines())} things resist",
            evidence=(*refused[-10:], *left.lines()[-10:]),
            remedy="end what holds them (fuser -vm MOUNT), then nacre down",
        )
    _clear_state(config)
    return said


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _each(kind: str, things: Iterable[str], remove: Callable[[str], None], refused: list[str]) -> None:
    for thing in things:
        try:
            remove(thing)
        except FileNotFoundError:
            continue
        except OSError as error:
            refused.append(f"{kind} {thing}: {error}")


def _kill(processes: list[host.Process], refused: list[str]) -> None:
    """SIGKILL by pidfd, checked against the start time, then wait for each end."""
    ended = {}
    for process in processes:
        try:
            fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        if host.start_ticks(process.pid) == process.started:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            ended[fd] = process
        else:
            os.close(fd)
    for fd, process in ended.items():
        if not select.select([fd], [], [], KILL_LIMIT_S)[0]:
            refused.append(f"{process} did not end within {KILL_LIMIT_S:.0f} s of SIGKILL")
        os.close(fd)


def remove_cgroups(directories: Iterable[str], refused: list[str]) -> None:
    """Each before the one that it is in. Nobody tells when a cgroup of v1 has become empty, so it is tried until it goes."""
    ends = time.monotonic() + EMPTY_LIMIT_S
    while True:
        busy: list[str] = []
        _each("cgroup", directories, os.rmdir, busy)
        if not busy or time.monotonic() > ends:
            break
        select.select([], [], [], 0.01)
    refused += busy


def _unmount(point: str) -> None:
    mounts.umount2(point, mounts.UnmountFlag.DETACH | mounts.UnmountFlag.NOFOLLOW)


def _clear_state(config: Config) -> None:
    """STATE goes, except the recorder's files: `nacre trace` of a pod works while the node is down.

    Nothing is mounted below any more, and each mount point is checked again: a tree with a mount in it is never walked.
    """
    if not os.path.isdir(config.state):
        return
    for name in os.listdir(config.state):
        path = f"{config.state}/{name}"
        if path == config.trace_dir:
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
