"""A pod's namespaces on this host, without a pause process: made by the shim, which visits them, pinned by bind mounts, furnished.

    DIRECTORY/ns/{net,ipc,uts,pid}   the pins, what OCI documents name as paths to join
    DIRECTORY/shm                    the pod's /dev/shm, a tmpfs that belongs to its ipc namespace

Only a shared PID namespace needs a process: its init, which reaps what containers leave behind. It holds the reading end of a pipe
whose other end is the shim's alone, so it ends with the shim, and all of the namespace with it.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
from collections.abc import Callable
from typing import NoReturn

from nacre.linux import mounts, namespaces, process
from nacre.linux.cgroups import Cgroup
from nacre.linux.libc import owned
from nacre.linux.mounts import MountFlag, UnmountFlag
from nacre.linux.namespaces import KINDS, Clone
from nacre.oci.errors import Failure
from nacre.oci.handler import Sandbox

PINNED = ("network", "ipc", "uts")
_GUARDED = MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC
_NOBODY = 65534


def make(sandbox: Sandbox, cgroup: Cgroup, lifeline: int) -> int:
    """Answers the host pid of a shared PID namespace's init, or 0."""
    directory = sandbox.directory
    os.makedirs(f"{directory}/ns", exist_ok=True)
    wanted = [kind for kind in PINNED if sandbox.namespaces.get(kind) == ""]
    with namespaces.new(wanted):
        if "uts" in wanted:
            namespaces.sethostname(sandbox.hostname)
        if "network" in wanted:
            process.raise_loopback()
        for kind in wanted:
            _pin(directory, kind, "self")
        write_sysctls(sandbox, lambda key: not key.startswith("net."))
        if "ipc" in wanted:
            os.makedirs(f"{directory}/shm", exist_ok=True)
            mounts.mount("shm", f"{directory}/shm", "tmpfs", _GUARDED, f"mode=1777,size={sandbox.shm_bytes}")
        return _start_reaper(directory, cgroup, lifeline) if sandbox.namespaces.get("pid") == "" else 0


def write_network_sysctls(sandbox: Sandbox) -> None:
    """Once the pod's links are there: net.ipv4.conf.eth0… exists only now."""
    with owned(os.open(f"{sandbox.directory}/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as fd, namespaces.visiting({"network": fd}):
        write_sysctls(sandbox, lambda key: key.startswith("net."))


def unmake(directory: str) -> None:
    """The pins and /dev/shm off the host's mount table; what is not there is fine."""
    for kind in (*PINNED, "pid"):
        unmount(f"{directory}/ns/{KINDS[kind][1]}")
    unmount(f"{directory}/shm")


def unmount(path: str) -> None:
    """Lazily, so that a mount that leaked elsewhere does not keep the pod; not mounted is fine."""
    try:
        mounts.umount2(path, UnmountFlag.DETACH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def _pin(directory: str, kind: str, pid: int | str) -> None:
    name = KINDS[kind][1]
    pin = f"{directory}/ns/{name}"
    os.close(os.open(pin, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600))
    mounts.mount(f"/proc/{pid}/ns/{name}", pin, None, MountFlag.BIND)


def write_sysctls(sandbox: Sandbox, wanted: Callable[[str], bool]) -> None:
    for key, value in sandbox.sysctls.items():
        if wanted(key):
            _write_sysctl(key, value)


def _write_sysctl(key: str, value: str) -> None:
    path = "/proc/sys/" + (key if "/" in key else key.replace(".", "/"))
    try:
        with owned(os.open(path, os.O_WRONLY | os.O_CLOEXEC)) as fd:
            os.write(fd, value.encode())
    except OSError as error:
        raise Failure(
            what=f"set sysctl {key} to {value}",
            cause=f"{path}: {error.strerror}",
            remedy="take it out of the pod's securityContext",
        ) from error


def _start_reaper(directory: str, cgroup: Cgroup, lifeline: int) -> int:
    cgroup.create()
    cradle = cgroup.cradle()
    gates = cgroup.gates(born=cradle >= 0)
    pid = process.fork(Clone.NEWPID | Clone.NEWNS, cgroup=cradle)
    if pid == 0:
        try:
            _reap(f"{directory}/ns", gates, lifeline)
        finally:
            os._exit(1)
    for fd in (*(fd for _, fd in gates), *([cradle] if cradle >= 0 else [])):
        os.close(fd)
    try:
        _pin(directory, "pid", pid)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    return pid


def _reap(empty: str, gates: list[tuple[str, int]], lifeline: int) -> NoReturn:
    """The namespace's init: nobody, in an empty root, with no descriptor but the lifeline; the kernel reaps for whom SIGCHLD is ignored."""
    gc.disable()
    process.set_dumpable(enabled=False)
    process.set_name("nacre-reaper")
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for _, fd in gates:
        os.write(fd, b"0")
    mounts.mount(None, "/", None, MountFlag.PRIVATE | MountFlag.REC)
    mounts.mount("none", empty, "tmpfs", _GUARDED | MountFlag.RDONLY, "size=4k")
    os.chdir(empty)
    mounts.pivot_root(".", ".")
    mounts.umount2(".", UnmountFlag.DETACH)
    os.chdir("/")
    os.dup2(lifeline, 0)
    process.close_range(1)
    os.setgroups(())
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    os.read(0, 1)  # returns only when the shim has let go of the other end
    os._exit(0)
