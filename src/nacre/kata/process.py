"""One QEMU process, confined: a user of its own, an empty network namespace, the pod's cgroup, the descriptors it needs.

The child does everything between fork and exec itself, so that nothing of ours is ever visible to others half made: the tap is
opened inside QEMU's own namespace and moved to the pod's later. It dies with its parent (PR_SET_PDEATHSIG), never alone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nacre.kata.machine import Wires
from nacre.linux import namespaces, process
from nacre.linux import tap as taps
from nacre.linux.mounts import MountFlag, mount
from nacre.linux.namespaces import Clone
from nacre.oci.errors import Failure, NotFound, decode, encode, from_exception

UID_BASE = 0x6E000000  # plus the starter's pid: a user that nobody else on this host is while the starter lives
TAP = "tap0"
KVM = "/dev/kvm"
_FIRST = 3  # QEMU's descriptors stand here and up, in the order of `Wires`


class QemuMissing(Failure):
    """There is no QEMU to run."""


def find(name: str) -> str | None:
    """The path of the QEMU called `name`."""
    import shutil  # here: shims load this module too, and know the path

    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/libexec")


def missing(name: str, what: str = "start virtual machines") -> QemuMissing:
    remedy = "apt-get install --no-install-recommends qemu-system-x86, or set [kata] qemu"
    return QemuMissing(what=what, cause=f"{name} is not installed", remedy=remedy)


@dataclass(slots=True)
class Running:
    """The starter's ends of a started QEMU; each its owner's from now on."""

    pid: int
    qmp: socket.socket
    agent: socket.socket
    console: socket.socket
    errors: int  # what QEMU says on stderr


def user_of_starter() -> int:
    return UID_BASE + os.getpid()


def start(
    line: Callable[[Wires], Sequence[str]], ram: int, gates: Sequence[tuple[str, int]], extra: Sequence[int] = ()
) -> Running:
    """Start QEMU with the command line that `line` makes of its descriptors.

    `ram` stays the caller's, as do `extra` (inherited under their own numbers) and `gates` (see Cgroup.gates). Raises Failure when
    a step before exec failed; QEMU's own refusals come on `errors` and by its exit.
    """
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) for _ in range(3)]
    errors, report = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        ends = [pair[1].fileno() for pair in pairs]
        _child(line, ends, ram, gates, extra, errors[1], report[1])
    for fd in (errors[1], report[1], *(pair[1].detach() for pair in pairs)):
        os.close(fd)
    running = Running(pid, pairs[0][0], pairs[1][0], pairs[2][0], errors[0])
    said = _read_all(report[0])
    if said:
        close(running)
        os.waitpid(pid, 0)
        raise decode(json.loads(said))
    return running


def close(running: Running) -> None:
    for sock in (running.qmp, running.agent, running.console):
        sock.close()
    os.close(running.errors)


def _read_all(fd: int) -> str:
    """The failure that the child reports before its exec closes the pipe; empty when all went well."""
    with open(fd, "rb") as file:
        return file.read().decode()


def _child(
    line: Callable[[Wires], Sequence[str]],
    ends: Sequence[int],
    ram: int,
    gates: Sequence[tuple[str, int]],
    extra: Sequence[int],
    errors: int,
    report: int,
) -> None:
    """Never returns: becomes QEMU, or says on `report` why not."""
    parent = os.getppid()
    try:
        namespaces.unshare(Clone.NEWNET | Clone.NEWIPC | Clone.NEWUTS | Clone.NEWNS)
        mount(None, "/", None, MountFlag.REC | MountFlag.PRIVATE)
        tap_wire = _tap()
        void = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        _own_devices(kvm=_kvm())
        qmp, agent, console, tap, memory = (
            os.dup(fd) for fd in (*ends, tap_wire, os.open(f"/proc/self/fd/{ram}", os.O_RDWR | os.O_CLOEXEC))
        )
        wires = Wires(qmp=qmp, agent=agent, console=console, tap=tap, ram=memory)
        words = list(line(wires))
        for _directory, gate in gates:
            os.write(gate, b"0")
        os.setsid()
        for source, target in ((void, 0), (errors, 1), (errors, 2)):
            os.dup2(source, target)
        for fd in (*wires.all(), *extra):
            os.set_inheritable(fd, True)
        _give_up_root(parent)
        execution = process.Execution(words[0], words, ("PATH=/usr/bin:/bin", "LANG=C"))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        execution.run()
    except BaseException as error:
        os.write(report, json.dumps(encode(from_exception("start QEMU", error))).encode())
    os._exit(127)


def _tap() -> int:
    try:
        return taps.open_tap(TAP)
    except FileNotFoundError as error:
        cause = f"{taps.DEVICE} is not there: the kernel's tun module is not loaded"
        raise NotFound(what="start QEMU", cause=cause, remedy="modprobe tun") from error


def _kvm() -> int | None:
    """The device number of /dev/kvm, which the host may have or not."""
    try:
        return os.stat(KVM).st_rdev
    except FileNotFoundError:
        return None


def _own_devices(*, kvm: int | None) -> None:
    """A /dev with what QEMU opens by name, and for whom it may: /dev/kvm is often root's alone."""
    mount("dev", "/dev", "tmpfs", MountFlag.NOSUID | MountFlag.NOEXEC, "size=64k,mode=755")
    os.mknod("/dev/null", stat.S_IFCHR, os.makedev(1, 3))
    os.chmod("/dev/null", 0o666)
    if kvm is not None:
        os.mknod(KVM, stat.S_IFCHR, kvm)
        os.chmod(KVM, 0o666)


def _give_up_root(parent: int) -> None:
    """Become the VM's own user."""
    user = UID_BASE + parent
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    process.set_no_new_privileges()
    process.set_parent_death_signal(signal.SIGKILL)  # a change of user clears it, so it comes last
    if os.getppid() != parent:
        raise Failure(what="start QEMU", cause="its starter ended meanwhile")
