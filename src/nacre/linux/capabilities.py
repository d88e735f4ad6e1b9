"""Capabilities: names and numbers, the thread's five sets. capabilities(7)."""

from __future__ import annotations

from nacre.linux import cdata
from nacre.linux.libc import SyscallError, syscall
from nacre.linux.process import Prctl, prctl

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Iterable

# fmt: off
NAMES: tuple[str, ...] = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
    "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ",
    "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)
# fmt: on
NUMBERS: dict[str, int] = {name: index for index, name in enumerate(NAMES)}
SYS_ADMIN = 1 << NUMBERS["CAP_SYS_ADMIN"]
SYS_RESOURCE = 1 << NUMBERS["CAP_SYS_RESOURCE"]
_VERSION_3 = 0x20080522


class _Header(cdata.Structure):
    _fields_ = [("version", cdata.c_uint32), ("pid", cdata.c_int)]


class _Data(cdata.Structure):
    _fields_ = [("effective", cdata.c_uint32), ("permitted", cdata.c_uint32), ("inheritable", cdata.c_uint32)]


def mask(names: Iterable[str]) -> int:
    """Bits of the named capabilities; names that this table lacks are left out (see `unknown`)."""
    bits = 0
    for name in names:
        bits |= 1 << NUMBERS[name] if name in NUMBERS else 0
    return bits


def unknown(names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in NUMBERS]


def names(bits: int) -> list[str]:
    return [name for index, name in enumerate(NAMES) if bits >> index & 1]


def capget(pid: int = 0) -> tuple[int, int, int]:
    """(effective, permitted, inheritable) of a thread, 0 the calling one."""
    header, data = _Header(_VERSION_3, pid), (_Data * 2)()
    syscall("capget", cdata.byref(header), cdata.byref(data))
    low, high = data
    return (
        low.effective | high.effective << 32,
        low.permitted | high.permitted << 32,
        low.inheritable | high.inheritable << 32,
    )


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the calling thread's sets. EPERM: a capability was asked for that the thread does not have."""
    data = (_Data * 2)()
    for index in range(2):
        shift = 32 * index
        data[index].effective = effective >> shift & 0xFFFFFFFF
        data[index].permitted = permitted >> shift & 0xFFFFFFFF
        data[index].inheritable = inheritable >> shift & 0xFFFFFFFF
    header = _Header(_VERSION_3, 0)
    syscall("capset", cdata.byref(header), cdata.byref(data))


_last = -1


def last() -> int:
    """The highest capability number of this kernel; asked for once."""
    global _last
    if _last < 0:
        try:
            with open("/proc/sys/kernel/cap_last_cap", "rb") as file:
                _last = int(file.read())
        except OSError:
            _last = len(NAMES) - 1
    return _last


def bound(keep: int, highest: int) -> None:
    """Drop from the bounding set everything but `keep`, up to capability `highest` (see `last`)."""
    for number in range(highest + 1):
        if not keep >> number & 1 and prctl(Prctl.CAPBSET_READ, number):
            prctl(Prctl.CAPBSET_DROP, number)


def set_ambient(bits: int) -> list[int]:
    """Make the ambient set exactly `bits`; answers those the kernel refused (they must be permitted and inheritable)."""
    prctl(Prctl.CAP_AMBIENT, 4)  # PR_CAP_AMBIENT_CLEAR_ALL
    refused: list[int] = []
    for number in range(len(NAMES)):
        if bits >> number & 1:
            try:
                prctl(Prctl.CAP_AMBIENT, 2, number)  # PR_CAP_AMBIENT_RAISE
            except SyscallError:
                refused.append(number)
    return refused
