"""Processes: prctl, pidfds, a fork that sets namespaces and cgroup in one call, execve for after a seccomp filter."""

from __future__ import annotations

import errno
import os

from nacre.linux import cdata
from nacre.linux import sockets as socket
from nacre.linux.flags import Flags
from nacre.linux.libc import CharP, Int, SyscallError, ULong, bind, syscall
from nacre.linux.namespaces import Clone
from nacre.linux.pids import pidfd_open as pidfd_open
from nacre.linux.pids import pidfd_send_signal as pidfd_send_signal
from nacre.linux.pids import signals
from nacre.linux.pids import status as status

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Prctl(Flags):
    """prctl(2)."""

    SET_PDEATHSIG = 1
    SET_DUMPABLE = 4
    SET_KEEPCAPS = 8
    SET_NAME = 15
    CAPBSET_READ = 23
    CAPBSET_DROP = 24
    SET_SECCOMP = 22
    SET_CHILD_SUBREAPER = 36
    SET_NO_NEW_PRIVS = 38
    GET_NO_NEW_PRIVS = 39
    CAP_AMBIENT = 47


_prctl = bind("prctl", Int, ULong, ULong, ULong, ULong)
_prctl_name = bind("prctl", Int, CharP, ULong, ULong, ULong)


_sched_setaffinity = bind("sched_setaffinity", Int, ULong, CharP)
_ALL_CPUS = b"\xff" * 1024  # 8192 of them; the kernel takes those that there are, and of these what the cpuset has


def prctl(option: Prctl, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> int:
    try:
        return _prctl(option, a, b, c, d)
    except SyscallError as error:
        raise SyscallError("prctl", error.errno or 0, option.name) from None


def set_child_subreaper(*, enabled: bool = True) -> None:
    """Orphaned descendants become this process's children."""
    prctl(Prctl.SET_CHILD_SUBREAPER, int(enabled))


def set_parent_death_signal(number: int) -> None:
    """Signal to get when the parent *thread* ends; 0 for none. Cleared by fork and by set-id execs."""
    prctl(Prctl.SET_PDEATHSIG, number)


def set_dumpable(*, enabled: bool) -> None:
    """Whether others of the same user may look into this process (ptrace, /proc/PID/exe, fd, mem)."""
    prctl(Prctl.SET_DUMPABLE, int(enabled))


def set_no_new_privileges() -> None:
    prctl(Prctl.SET_NO_NEW_PRIVS, 1)


def run_on_any_cpu() -> None:
    """Undo what the starter's affinity was; the cgroup's cpuset still counts. sched_setaffinity(2)."""
    _sched_setaffinity(0, len(_ALL_CPUS), _ALL_CPUS)


def set_name(name: str) -> None:
    """The thread's name, 15 bytes; execve sets a new one."""
    _prctl_name(Prctl.SET_NAME, name.encode()[:15], 0, 0, 0)


def close_range(first: int, last: int = 0xFFFFFFFF, *, cloexec: bool = False) -> None:
    """Close (or mark close-on-exec) every descriptor from `first` to `last`; before Linux 5.9 one by one."""
    try:
        syscall("close_range", first, last, 4 if cloexec else 0)
    except SyscallError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL):
            raise
        for name in os.listdir("/proc/self/fd"):
            if first <= int(name) <= last:
                try:
                    os.set_inheritable(int(name), False) if cloexec else os.close(int(name))
                except OSError:
                    continue  # the listing's own descriptor, gone by now


def close_all_but(keep: Iterable[int]) -> None:
    """Every descriptor above 2 that `keep` does not name."""
    first = 3
    for fd in sorted(number for number in keep if number > 2):
        if fd > first:
            close_range(first, fd - 1)
        first = fd + 1
    close_range(first)


class _CloneArgs(cdata.Structure):
    _fields_ = [
        (name, cdata.c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls"),
            *("set_tid", "set_tid_size", "cgroup"),
        )
    ]


def fork(flags: int = 0, *, cgroup: int = -1) -> int:
    """fork(2) with clone3(2)'s flags: the child is born inside new namespaces, and in the v2 cgroup open as `cgroup`.

    For single-threaded processes. Answers the child's pid, 0 in the child. With Clone.PARENT the child is a sibling.
    """
    arguments = _CloneArgs(flags=int(flags), exit_signal=0 if flags & Clone.PARENT else signals.SIGCHLD)
    if cgroup >= 0:
        arguments.flags |= int(Clone.INTO_CGROUP)
        arguments.cgroup = cgroup
    cdata.pythonapi.PyOS_BeforeFork()
    pid, error = -1, None
    try:
        pid = syscall("clone3", cdata.byref(arguments), cdata.sizeof(arguments))
    except SyscallError as refused:
        error = refused
    if pid == 0:
        cdata.pythonapi.PyOS_AfterFork_Child()
    else:
        cdata.pythonapi.PyOS_AfterFork_Parent()
    if error is not None:
        raise error
    return pid


class _SchedAttr(cdata.Structure):
    _fields_ = [
        ("size", cdata.c_uint32),
        ("sched_policy", cdata.c_uint32),
        ("sched_flags", cdata.c_uint64),
        ("sched_nice", cdata.c_int32),
        ("sched_priority", cdata.c_uint32),
        ("sched_runtime", cdata.c_uint64),
        ("sched_deadline", cdata.c_uint64),
        ("sched_period", cdata.c_uint64),
    ]


def sched_setattr(policy: int, flags: int, nice: int, priority: int, deadline: tuple[int, int, int]) -> None:
    """sched_setattr(2) for this thread; `deadline` is (runtime, deadline, period) in ns for SCHED_DEADLINE."""
    attributes = _SchedAttr(cdata.sizeof(_SchedAttr), policy, flags, nice, priority, *deadline)
    syscall("sched_setattr", 0, cdata.byref(attributes), 0)


def set_memory_policy(mode: int, nodes: Sequence[int]) -> None:
    """set_mempolicy(2) for this thread, kept over execve; `mode` has the MPOL_F_… flags in it."""
    size = max(nodes, default=0) // 64 + 1
    mask = (cdata.c_ulong * size)()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    syscall("set_mempolicy", mode, cdata.byref(mask) if nodes else 0, size * 64 + 1 if nodes else 0)


_personality = bind("personality", ULong)


def set_personality(persona: int) -> None:
    """personality(2): execution domain and its flags, kept over execve."""
    _personality(persona)


_execve = bind("execve", CharP, cdata.c_void_p, cdata.c_void_p, path=0)


class Execution:
    """An execve(2) made ready: nothing is allocated, encoded or looked up by `run`, as a seccomp filter may already be in force."""

    def __init__(self, path: str, arguments: Sequence[str], environment: Sequence[str]) -> None:
        self._path = os.fsencode(path)
        self._argv = _array(arguments)
        self._envp = _array(environment)

    def run(self) -> None:
        """Returns only by raising SyscallError."""
        _execve(self._path, self._argv, self._envp)


def _array(words: Sequence[str]) -> cdata.Array[cdata.c_char_p]:
    return (cdata.c_char_p * (len(words) + 1))(*(os.fsencode(word) for word in words), None)


_MADV_POPULATE_WRITE = 23  # Linux 5.14
_madvise = bind("madvise", cdata.c_void_p, ULong, Int)


def own_memory() -> None:
    """Have every page that this process may write for itself now, where a fork has left it shared: later each costs a fault. madvise(2)."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        ranges = [line.split(" ", 2)[0] for line in file if " rw-p " in line]
    for first, last in (words.split("-") for words in ranges):
        try:
            _madvise(int(first, 16), int(last, 16) - int(first, 16), _MADV_POPULATE_WRITE)
        except SyscallError as error:
            if error.errno not in (errno.EINVAL, errno.ENOMEM, errno.EFAULT):
                raise  # an older kernel, or a mapping that has gone: it is dearer later, nothing more


def raise_loopback() -> None:
    """Set interface lo up in the current network namespace; netdevice(7)."""
    from fcntl import ioctl  # here and above all in the caller's preload: never first imported inside a container
    from struct import pack, unpack_from

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        request = bytearray(pack("16sH22x", b"lo", 0))
        ioctl(probe, 0x8913, request)  # SIOCGIFFLAGS
        (flags,) = unpack_from("H", request, 16)
        ioctl(probe, 0x8914, pack("16sH22x", b"lo", flags | 1))  # SIOCSIFFLAGS, IFF_UP


def join_session_keyring(name: str) -> None:
    """A new session keyring, so that the container does not hold its starter's keys. Kernels without keyrings have none to leak."""
    try:
        syscall("keyctl", 1, os.fsencode(name))  # KEYCTL_JOIN_SESSION_KEYRING
    except SyscallError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EDQUOT, errno.EACCES):
            raise
