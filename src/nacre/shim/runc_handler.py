"""The pod as namespaced containers on this host: `nacre.runc` behind the shim's joint. Made by a shim as `RuncHandler(host)`.

No pause process: the namespaces are pinned by bind mounts under DIRECTORY/ns, /dev/shm by its mount at DIRECTORY/shm. Whatever reads
JSON, mounts or forks a container runs in a set-up child that exits, so that the shim stays small.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Any

from nacre import runc
from nacre.linux import mounts, namespaces, process
from nacre.linux.cgroups import Cgroup, discover
from nacre.linux.mounts import MountFlag, UnmountFlag
from nacre.linux.namespaces import KINDS, Clone
from nacre.linux.overlay import mount_overlay
from nacre.oci.errors import Failure, Unsupported
from nacre.shim.handler import Exit, Host, Rootfs, Sandbox, Stdio
from nacre.shim.processes import exit_code, in_child

_PINNED = ("network", "ipc", "uts")  # in this order: what is pinned, not what is joined


class RuncHandler:
    """Handler (see `handler.Handler` for every call's meaning)."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._sandbox: Sandbox | None = None
        self._pids: dict[tuple[str, str], int] = {}  # (container, exec id) → host pid, until it is reaped

    def warm(self, settings: dict[str, Any]) -> None:
        """Nothing can be done before the pod is known that would cost it time."""

    @property
    def sandbox(self) -> Sandbox:
        if self._sandbox is None:
            raise Failure(what="use the pod sandbox", cause="it was not created")
        return self._sandbox

    def create_sandbox(self, sandbox: Sandbox) -> dict[str, Any]:
        if "user" in sandbox.namespaces:
            raise Unsupported(
                what=f"create pod sandbox {sandbox.id[:12]}",
                cause="user namespaces (hostUsers: false) are not offered by the handler runc yet",
                remedy="leave hostUsers out, or use runtimeClassName: kata",
            )
        self._sandbox = sandbox
        try:
            in_child(f"create pod sandbox {sandbox.id[:12]}", lambda: (_make_namespaces(sandbox), []))
        except BaseException:
            self.destroy_sandbox()
            raise
        return {"pid": 0}

    def network_ready(self, attachment: dict[str, Any]) -> None:
        """The links are in the pinned namespace already; every container joins it."""

    def create(self, container: str, bundle: str, rootfs: Rootfs, stdio: Stdio) -> int | None:
        root = self._root()

        def work() -> tuple[dict[str, Any], list[int]]:
            mount_rootfs(f"{bundle}/rootfs", rootfs)
            try:
                launch = runc.create(root, container, bundle, stdio=_standard(stdio), tty=stdio.tty)
            except BaseException:
                mounts.umount2(f"{bundle}/rootfs", UnmountFlag.DETACH)
                raise
            return {"pid": launch.pid}, [] if launch.console is None else [launch.console]

        try:
            answer, descriptors = in_child(f"create container {container[:12]}", work)
        finally:
            close(stdio)
        self._own(container, "", int(answer["pid"]))
        return descriptors[0] if descriptors else None

    def start(self, container: str) -> int:
        root = self._root()
        in_child(f"start container {container[:12]}", lambda: _done(runc.start, root, container))
        return self._pids.get((container, ""), 0)

    def kill(self, container: str, signal: int, *, everyone: bool = False) -> None:
        root = self._root()
        in_child("send a signal", lambda: _signalled(root, container, signal, everyone=everyone))

    def execute(self, container: str, exec_id: str, process: dict[str, Any], stdio: Stdio) -> int | None:
        root = self._root()

        def work() -> tuple[dict[str, Any], list[int]]:
            launch = runc.execute(root, container, process, stdio=_standard(stdio), tty=stdio.tty)
            return {"pid": launch.pid}, [] if launch.console is None else [launch.console]

        try:
            answer, descriptors = in_child(f"run a command in container {container[:12]}", work)
        finally:
            close(stdio)
        self._own(container, exec_id, int(answer["pid"]))
        return descriptors[0] if descriptors else None

    def kill_exec(self, container: str, exec_id: str, signal: int) -> None:
        pid = self._pids.get((container, exec_id))
        if pid is not None:
            os.kill(pid, signal)  # our child, not yet reaped: the number is still its own

    def resize(self, container: str, exec_id: str, width: int, height: int) -> None:
        """Terminals of this handler are real ones: whoever holds the console sets its size."""

    def _own(self, container: str, exec_id: str, pid: int) -> None:
        self._pids[container, exec_id] = pid
        self._host.reap(pid, lambda status: self._ended(container, exec_id, status))

    def _ended(self, container: str, exec_id: str, status: int) -> None:
        del self._pids[container, exec_id]
        oom = not exec_id and os.WIFSIGNALED(status) and self._oom_kills(container) > 0
        self._host.exited(
            Exit(container=container, exec_id=exec_id, code=exit_code(status), at_ns=time.time_ns(), oom_killed=oom)
        )

    def _oom_kills(self, container: str) -> int:
        """How often the kernel killed in this container's cgroup, which is younger than the container itself."""
        root = self._root()
        answer, _none = in_child("read the OOM counter", lambda: ({"kills": runc.oom_kills(root, container)}, []))
        return int(answer["kills"])

    def update(self, container: str, resources: dict[str, Any]) -> None:
        root = self._root()
        in_child("update resources", lambda: _done(runc.update, root, container, resources))

    def stats(self, container: str) -> dict[str, Any]:
        root, path = self._root(), self.sandbox.cgroups_path

        def work() -> tuple[dict[str, Any], list[int]]:
            return (runc.stats(root, container) if container else Cgroup(discover(), path).stats()), []

        return in_child("read resource use", work)[0]

    def delete(self, container: str) -> None:
        root, rootfs = self._root(), f"{self.sandbox.directory}/containers/{container}/rootfs"

        def work() -> tuple[dict[str, Any], list[int]]:
            runc.delete(root, container, force=True)
            _unmount(rootfs)
            return {}, []

        in_child(f"delete container {container[:12]}", work)

    def destroy_sandbox(self) -> None:
        if self._sandbox is None:
            return
        directory = self._sandbox.directory
        for kind in _PINNED:
            _unmount(f"{directory}/ns/{KINDS[kind][1]}")
        _unmount(f"{directory}/shm")

    def _root(self) -> str:
        return str(self.sandbox.settings["runc_root"])


def mount_rootfs(target: str, rootfs: Rootfs) -> None:
    """The container's overlay at `target`, on the host, where any OCI runtime finds it."""
    os.makedirs(target, exist_ok=True)
    mount_overlay(target, rootfs.lower, rootfs.upper, rootfs.work)


def close(stdio: Stdio) -> None:
    for fd in {stdio.stdin, stdio.stdout, stdio.stderr} - {None}:
        os.close(fd)  # type: ignore[arg-type]  # None is taken out above


def _standard(stdio: Stdio) -> tuple[int, int, int]:
    """Three descriptors; what is not wanted is /dev/null."""
    if stdio.tty:
        return (0, 1, 2)
    void = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    given = (stdio.stdin, stdio.stdout, stdio.stderr)
    return tuple(void if fd is None else fd for fd in given)  # type: ignore[return-value]  # three in, three out


def _make_namespaces(sandbox: Sandbox) -> dict[str, Any]:
    """In a child of the shim: new namespaces, furnished, pinned on the host's mount table."""
    os.makedirs(f"{sandbox.directory}/ns", exist_ok=True)
    wanted = [kind for kind in _PINNED if sandbox.namespaces.get(kind) == ""]
    flags = Clone(0)
    for kind in wanted:
        flags |= KINDS[kind][0]
    namespaces.unshare(flags)
    if "uts" in wanted:
        namespaces.sethostname(sandbox.hostname)
    if "network" in wanted:
        process.raise_loopback()
    for key, value in sandbox.sysctls.items():
        _write_sysctl(key, value)
    for kind in wanted:
        name = KINDS[kind][1]
        pin = f"{sandbox.directory}/ns/{name}"
        os.close(os.open(pin, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600))
        mounts.mount(f"/proc/self/ns/{name}", pin, None, MountFlag.BIND)
    if "ipc" in wanted:
        shm = f"{sandbox.directory}/shm"
        os.makedirs(shm, exist_ok=True)
        flags_ = MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC
        mounts.mount("shm", shm, "tmpfs", flags_, f"mode=1777,size={sandbox.shm_bytes}")
    return {}


def _write_sysctl(key: str, value: str) -> None:
    path = "/proc/sys/" + key.replace(".", "/")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Failure(
            what=f"set sysctl {key}", cause=f"open {path}: {error.strerror}", remedy="take it out of the pod"
        ) from error
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise Failure(what=f"set sysctl {key} to {value}", cause=f"write {path}: {error.strerror}") from error
    finally:
        os.close(fd)


def _unmount(path: str) -> None:
    """Lazily, so that a mount that leaked elsewhere does not keep the pod; not mounted is fine."""
    try:
        mounts.umount2(path, UnmountFlag.DETACH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def _signalled(root: str, container: str, signal: int, *, everyone: bool) -> tuple[dict[str, Any], list[int]]:
    runc.kill(root, container, signal, everyone=everyone)
    return {}, []


def _done(act: Callable[..., None], *arguments: Any) -> tuple[dict[str, Any], list[int]]:
    act(*arguments)
    return {}, []
