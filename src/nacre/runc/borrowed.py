"""A container whose mounts lie in a namespace that others use: the runtime's (linux.namespaces has no "mount"), or one joined by path.

Its root is then a chroot(2), since pivot_root(2) would move the others' root too, and what it mounts outlives its processes: `delete`
takes it away, as does a create that fails. A joined namespace that is not to be found any more has taken the mounts with it.
"""

from __future__ import annotations

import os

from nacre.linux import cgroup_layout, mounts, namespaces, process
from nacre.linux.libc import owned
from nacre.linux.mounts import UnmountFlag
from nacre.linux.namespaces import Clone
from nacre.oci.errors import Failure, Invalid
from nacre.oci.state import Record

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def facts(spec: Mapping[str, Any], rootfs: str) -> dict[str, Any]:
    """What the Record has to remember: nothing for a mount namespace of the container's own. Raises Invalid for a path that is none."""
    kinds = {one["type"]: one.get("path", "") for one in spec.get("linux", {}).get("namespaces", ())}
    if kinds.get("mount", "own") == "":
        return {}
    path = kinds.get("mount", "")
    return {"mount_namespace": path, "mount_identity": _identity(path), "mounts_beneath": _within(path, lambda: _stacked(rootfs))}


def clear(record: Record) -> None:
    """Take away what the container mounted; nothing to do is fine."""
    if record.mounts_beneath < 0:
        return
    try:
        if _identity(record.mount_namespace) != record.mount_identity:
            return
    except Invalid:
        return
    _within(record.mount_namespace, lambda: _unstack(record.rootfs, record.mounts_beneath))


def open_joined(path: str) -> int:
    """A descriptor of the mount namespace to join. Raises Invalid."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Invalid(
            what=f"join the mount namespace {path}", cause=f"open(2): {error.strerror} (errno {error.errno})"
        ) from error


def _identity(path: str) -> str:
    if not path:
        return ""
    with owned(open_joined(path)) as fd:
        found = os.fstat(fd)
    return f"{found.st_dev}:{found.st_ino}"


def _stacked(place: str) -> int:
    """How many mounts lie on `place`, one over the other."""
    with open("/proc/thread-self/mountinfo", "rb") as file:
        return sum(cgroup_layout.unescape(os.fsdecode(line.split(b" ")[4])) == place for line in file)


def _unstack(place: str, keep: int) -> int:
    """Answers how many it took away. Counted anew each time: among shared mounts one takes its copies along."""
    taken = 0
    while _stacked(place) > keep:
        mounts.umount2(place, UnmountFlag.DETACH | UnmountFlag.NOFOLLOW)
        taken += 1
    return taken


def _within(path: str, work: Callable[[], int]) -> int:
    """`work`'s answer, given in the mount namespace `path` ("" is ours): by a child, since joining changes root and directory."""
    if not path:
        return work()
    read, write = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(read, "rb") as answer, owned(open_joined(path)) as namespace:
        pid = process.fork()
        if pid == 0:
            try:
                namespaces.setns(namespace, Clone.NEWNS)
                said = str(work())
            except OSError as error:
                said = str(error)
            finally:
                os.write(write, said.encode())
                os._exit(0)
        os.close(write)
        text = answer.read().decode()
        os.waitpid(pid, 0)
    if not text.lstrip("-").isdigit():
        raise Failure(what=f"look into the mount namespace {path}", cause=text or "the process that looked was killed")
    return int(text)
