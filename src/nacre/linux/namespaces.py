"""Namespaces: making, joining, naming. The kinds are spelled as in the OCI runtime specification."""

from __future__ import annotations

import os

from nacre.linux.contexts import ExitStack, contextmanager
from nacre.linux.flags import Flags
from nacre.linux.libc import CharP, Int, SyscallError, ULong, bind

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping


class Clone(Flags):
    """clone(2), unshare(2), setns(2)."""

    NEWTIME = 0x00000080
    NEWNS = 0x00020000
    NEWCGROUP = 0x02000000
    NEWUTS = 0x04000000
    NEWIPC = 0x08000000
    NEWUSER = 0x10000000
    NEWPID = 0x20000000
    NEWNET = 0x40000000
    PARENT = 0x00008000
    INTO_CGROUP = 0x200000000


# OCI name of a kind: (clone flag, file below /proc/PID/ns). The order is the one in which namespaces are joined.
KINDS: dict[str, tuple[Clone, str]] = {
    "user": (Clone.NEWUSER, "user"),
    "network": (Clone.NEWNET, "net"),
    "ipc": (Clone.NEWIPC, "ipc"),
    "uts": (Clone.NEWUTS, "uts"),
    "cgroup": (Clone.NEWCGROUP, "cgroup"),
    "time": (Clone.NEWTIME, "time"),
    "pid": (Clone.NEWPID, "pid"),
    "mount": (Clone.NEWNS, "mnt"),
}

_unshare = bind("unshare", Int)
_setns = bind("setns", Int, Int)
_sethostname = bind("sethostname", CharP, ULong)
_setdomainname = bind("setdomainname", CharP, ULong)


def unshare(flags: Clone) -> None:
    _unshare(flags)


def setns(fd: int, flags: int = 0) -> None:
    """Join the namespace that `fd` (of /proc/PID/ns or a bind of it) names; with a pidfd, those of `flags` of that process."""
    _setns(fd, flags)


def open_namespace(kind: str, pid: int | str = "self") -> int:
    """A descriptor of a process's namespace of `kind` (an OCI name); for "pid" of oneself, the one that children get."""
    name = KINDS[kind][1]
    if pid == "self" and name == "pid":
        name = "pid_for_children"
    return os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)


def identity(kind: str, pid: int | str = "self") -> tuple[int, int]:
    """What tells one namespace from another: device and inode."""
    found = os.stat(f"/proc/{pid}/ns/{KINDS[kind][1]}")
    return found.st_dev, found.st_ino


@contextmanager
def visiting(targets: Mapping[str, int]) -> Iterator[None]:
    """This thread inside other namespaces, kind to descriptor, so that a child cloned in the block is born there.

    Not for "user" and "mount", which change more than children. The former namespaces are joined again at the end.
    """
    former: list[tuple[int, Clone]] = []
    try:
        for kind, fd in targets.items():
            before = open_namespace(kind)
            former.append((before, KINDS[kind][0]))
            try:
                setns(fd, KINDS[kind][0])
            except SyscallError as error:
                raise SyscallError(
                    "setns", error.errno or 0, f"{os.readlink(f'/proc/self/fd/{fd}')} as {kind} namespace"
                ) from None
        yield
    finally:
        for before, flag in reversed(former):
            try:
                setns(before, flag)
            finally:
                os.close(before)


@contextmanager
def new(kinds: Collection[str]) -> Iterator[None]:
    """This thread inside new namespaces of these kinds, for the block. Not for "user", "mount" and "pid"."""
    flags = Clone(0)
    for kind in kinds:
        flags |= KINDS[kind][0]
    with ExitStack() as back:
        for kind in kinds:
            former = open_namespace(kind)
            back.callback(os.close, former)
            back.callback(setns, former, KINDS[kind][0])
        unshare(flags)
        yield


@contextmanager
def time_namespace(offsets: str) -> Iterator[None]:
    """A child cloned in the block is born in a new time namespace with `offsets`, lines for /proc/PID/timens_offsets.

    Children alone enter it: the caller's own clocks stay. time_namespaces(7).
    """
    before = open_namespace("time")
    try:
        unshare(Clone.NEWTIME)
        fd = os.open("/proc/self/timens_offsets", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, offsets.encode())
        except OSError as error:
            raise SyscallError("write", error.errno or 0, f"/proc/self/timens_offsets ({offsets.strip()!r})") from error
        finally:
            os.close(fd)
        yield
    finally:
        setns(before, Clone.NEWTIME)
        os.close(before)


def sethostname(name: str) -> None:
    data = name.encode()
    _sethostname(data, len(data))


def setdomainname(name: str) -> None:
    data = name.encode()
    _setdomainname(data, len(data))
