"""The pod as namespaced containers on this host: `nacre.runc` behind the shim's joint. Made by a shim as `RuncHandler(host)`.

Nearly everything is the shim's own work: a forked child that does it pays for each page that it touches, and what a shim keeps of its
work is shared by its pods. Only what must be in a namespace alone, or in a directory, has a child.
"""

from __future__ import annotations

import os
import signal as signals
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, Protocol

from nacre import runc
from nacre.linux import mounts
from nacre.linux.cgroup_names import booted
from nacre.linux.cgroups import Cgroup, Layout, discover
from nacre.linux.libc import owned
from nacre.linux.mounts import UnmountFlag
from nacre.linux.overlay import mount_overlay
from nacre.oci import state as records
from nacre.oci.errors import Failure, Unsupported, encode, from_exception
from nacre.oci.handler import Exit, Host, Rootfs, Sandbox, Stdio
from nacre.shim import pod_namespaces
from nacre.shim.processes import exit_code

runc.load()  # here, once: children forked for a container must find every module in memory


@cache
def host_layout() -> Layout:
    """The host's cgroup layout, found once by the zygote: parsing the mount table in each shim would cost each a megabyte for good."""
    return discover()


class SharedHost(Host, Protocol):
    """A host that has other pods too."""

    def serve_others(self, pid: int, fd: int) -> int | None:
        """Until `fd`, by which child `pid` speaks, is readable: other pods of the shim are served, and this one's requests wait.

        Answers the child's wait status if it has been reaped.
        """


class SandboxInitDied(Failure):
    """The init of a pod's shared PID namespace ended, and every process of the pod with it."""


class RuncHandler:
    """Handler (see `oci.handler.Handler` for every call's meaning)."""

    def __init__(self, host: SharedHost) -> None:
        self._host = host
        self._sandbox: Sandbox | None = None
        self._layout = host_layout()
        self._pids: dict[tuple[str, str], int] = {}  # (container, exec id) → host pid, until it is reaped
        self._groups: dict[str, Cgroup] = {}  # of every container that was not deleted
        self._killed: set[str] = set()  # containers whose end by SIGKILL is our doing
        self._reaper = 0
        self._lifeline = -1

    def warm(self, settings: dict[str, Any]) -> None:
        """Nothing can be done before the pod is known that would cost it time."""

    @property
    def sandbox(self) -> Sandbox:
        if self._sandbox is None:
            raise Failure(what="use the pod sandbox", cause="it was not created")
        return self._sandbox

    @property
    def root(self) -> str:
        """The runtime's state directory."""
        return str(self.sandbox.settings["runc_root"])

    def create_sandbox(self, sandbox: Sandbox) -> dict[str, Any]:
        what = f"create pod sandbox {sandbox.id[:12]}"
        if "user" in sandbox.namespaces:
            raise Unsupported(
                what=what,
                cause="user namespaces (hostUsers: false) are not offered by this handler yet",
                remedy="leave hostUsers out, or use runtimeClassName: kata",
            )
        self._sandbox = sandbox
        held, self._lifeline = os.pipe2(os.O_CLOEXEC)
        try:
            with doing(what):
                self._reaper = pod_namespaces.make(sandbox, self._sandbox_group(), held)
        except BaseException:
            self.destroy_sandbox()
            raise
        finally:
            os.close(held)
        if self._reaper:
            self._host.reap(self._reaper, self._reaper_ended)
        return {"pid": self._reaper}

    def network_ready(self, attachment: dict[str, Any]) -> None:
        """The links are in the pinned namespace already; every container joins it."""
        if any(key.startswith("net.") for key in self.sandbox.sysctls):
            with doing("set the pod's sysctls"):
                pod_namespaces.write_network_sysctls(self.sandbox)

    def create(self, container: str, bundle: str, rootfs: Rootfs, stdio: Stdio) -> int | None:
        with ExitStack() as undo, doing(f"create container {container[:12]}"), closing(stdio):
            mount_rootfs(f"{bundle}/rootfs", rootfs)
            undo.callback(mounts.umount2, f"{bundle}/rootfs", UnmountFlag.DETACH)
            pid, group, console = self._create(container, bundle, stdio)
            undo.pop_all()
        self._groups[container] = Cgroup(self._layout, group)
        self._groups[container].oom_kills()  # so that its own can be told from its siblings' once systemd took it away
        self._own(container, "", pid)
        return console

    def _create(self, container: str, bundle: str, stdio: Stdio) -> tuple[int, str, int | None]:
        """(host pid, path of its cgroup, console)."""
        with standing(stdio) as descriptors:
            launch = runc.create(
                self.root,
                container,
                bundle,
                stdio=descriptors,
                tty=stdio.tty,
                layout=self._layout,
                systemd_cgroup=booted(),
                meanwhile=self._host.serve_others,
            )
        return launch.pid, records.read(self.root, container).cgroup, launch.console

    def start(self, container: str) -> int:
        with doing(f"start container {container[:12]}"):
            runc.start(self.root, container)
        return self._pids.get((container, ""), 0)

    def kill(self, container: str, signal: int, *, everyone: bool = False) -> None:
        if signal == signals.SIGKILL:
            self._killed.add(container)
        if everyone and container in self._groups:
            self._groups[container].kill(signal)
        self.kill_exec(container, "", signal)

    def execute(self, container: str, exec_id: str, process: dict[str, Any], stdio: Stdio) -> int | None:
        with closing(stdio):
            pid, console = self._execute(container, process, stdio)
        self._own(container, exec_id, pid)
        return console

    def _execute(self, container: str, process: dict[str, Any], stdio: Stdio) -> tuple[int, int | None]:
        with standing(stdio) as descriptors:
            launch = runc.execute(self.root, container, process, stdio=descriptors, tty=stdio.tty, layout=self._layout)
        return launch.pid, launch.console

    def kill_exec(self, container: str, exec_id: str, signal: int) -> None:
        pid = self._pids.get((container, exec_id))
        if pid is not None:
            os.kill(pid, signal)  # our child, not yet reaped: the number is still its own

    def resize(self, container: str, exec_id: str, width: int, height: int) -> None:
        """Terminals of this handler are real ones: whoever holds the console sets its size."""

    def update(self, container: str, resources: dict[str, Any]) -> None:
        with doing("update resources"):
            runc.update(self.root, container, resources)

    def stats(self, container: str) -> dict[str, Any]:
        if container and container not in self._groups:
            raise Failure(what=f"read what container {container[:12]} uses", cause="it was deleted")
        group = self._groups[container] if container else Cgroup(self._layout, self.sandbox.cgroups_path)
        return dict(group.stats())

    def delete(self, container: str) -> None:
        self._killed.add(container)
        self._delete(container)
        pod_namespaces.unmount(f"{self.sandbox.directory}/containers/{container}/rootfs")
        self._groups.pop(container, None)
        if (container, "") not in self._pids:
            self._killed.discard(container)

    def _delete(self, container: str) -> None:
        runc.delete(self.root, container, force=True, layout=self._layout)

    def destroy_sandbox(self) -> None:
        if self._sandbox is None:
            return
        reaper, self._reaper = self._reaper, 0
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if reaper:
            os.waitpid(reaper, 0)
        self._sandbox_group().remove()
        pod_namespaces.unmake(self._sandbox.directory)

    # within

    def _sandbox_group(self) -> Cgroup:
        """Of the shared PID namespace's init, beside the containers': on v2 the pod's own group holds no processes."""
        return Cgroup(self._layout, f"{self.sandbox.cgroups_path}/{self.sandbox.id}")

    def _reaper_ended(self, _status: int) -> None:
        if self._reaper:  # else it was asked to
            self._reaper = 0
            what = f"run pod sandbox {self.sandbox.id[:12]}"
            lost = SandboxInitDied(
                what=what, cause="the init of its shared PID namespace was killed", remedy="the pod is made anew"
            )
            self._host.sandbox_lost(encode(lost))

    def _own(self, container: str, exec_id: str, pid: int) -> None:
        self._pids[container, exec_id] = pid
        self._host.reap(pid, lambda status: self._ended(container, exec_id, status))

    def _ended(self, container: str, exec_id: str, status: int) -> None:
        del self._pids[container, exec_id]
        code, oom = exit_code(status), False
        group = self._groups.get(container)
        if not exec_id and group is not None:
            oom = code == 128 + signals.SIGKILL and container not in self._killed and group.oom_kills() > 0
            if group.pids():  # a shared or the host's PID namespace: what init leaves ends with it
                group.kill()
        self._killed.discard(container)
        self._host.exited(Exit(container=container, exec_id=exec_id, code=code, at_ns=time.time_ns(), oom_killed=oom))


def mount_rootfs(target: str, rootfs: Rootfs) -> None:
    """The container's overlay at `target`, on the host, where any OCI runtime finds it. A power cut ends the container and its layer too."""
    os.makedirs(target, exist_ok=True)
    mount_overlay(target, rootfs.lower, rootfs.upper, rootfs.work, volatile=True)


def descriptors_of(stdio: Stdio) -> set[int]:
    return {fd for fd in (stdio.stdin, stdio.stdout, stdio.stderr) if fd is not None}


@contextmanager
def doing(what: str) -> Iterator[None]:
    """What goes wrong in the block goes wrong with this act, unless it says better."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        raise from_exception(what, error) from error


@contextmanager
def closing(stdio: Stdio) -> Iterator[None]:
    try:
        yield
    finally:
        for fd in descriptors_of(stdio):
            os.close(fd)


@contextmanager
def standing(stdio: Stdio) -> Iterator[tuple[int, int, int]]:
    """Three descriptors for the block; what is not wanted is /dev/null."""
    if stdio.tty:
        yield (0, 1, 2)
        return
    with owned(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) as void:
        first, second, third = (void if fd is None else fd for fd in (stdio.stdin, stdio.stdout, stdio.stderr))
        yield (first, second, third)
