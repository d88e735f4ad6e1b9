"""seccomp: filters in the form that the kernel takes, kept by the hash of the OCI profile they were compiled from, and loaded.

    CACHE/HASH.bpf    struct sock_filter array; written whole (temporary name, rename)

`loader` is what the child needs: one raw system call. config-linux.md "Seccomp", seccomp(2).
"""

from __future__ import annotations

import errno
import os
from _blake2 import blake2b  # hashlib would load OpenSSL, half a megabyte in every process that only wants a name

from nacre.linux import cdata
from nacre.linux.libc import SyscallError, machine, number
from nacre.oci.errors import Failure, Invalid

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


class SeccompRefused(Failure):
    """A profile cannot be compiled or loaded."""


FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 1,
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 32,
}
NEW_LISTENER = 8  # seccomp(2) answers a descriptor, at which the calls of SCMP_ACT_NOTIFY are asked about
_TSYNC_ESRCH = 16  # as TSYNC would answer a thread's number in the same place


class _Program(cdata.Structure):
    _fields_ = [("len", cdata.c_ushort), ("filter", cdata.c_void_p)]


def key(profile: Mapping[str, Any]) -> str:
    """What names the compiled form: the profile's content, the machine, the version of this code's rules."""
    return str(blake2b(f"4 {machine()} {_ordered(profile)!r}".encode(), digest_size=16).hexdigest())


def _ordered(tree: Any) -> Any:
    if isinstance(tree, dict):
        return sorted((key, _ordered(value)) for key, value in tree.items())
    return [_ordered(value) for value in tree] if isinstance(tree, list | tuple) else tree


def compiled(profile: Mapping[str, Any], cache: str) -> str:
    """The path of the profile's program below directory `cache`, compiled now if it is not there. Raises SeccompRefused, Invalid."""
    path = os.path.join(cache, key(profile) + ".bpf")
    if os.path.exists(path):
        return path
    from nacre.linux.seccomp_compiler import compile_profile  # once for each profile, so not in what every command loads

    data = compile_profile(profile)
    os.makedirs(cache, 0o700, exist_ok=True)
    fresh = f"{path}.{os.getpid()}"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(fresh, path)
    return path


def read_program(path: str) -> bytes:
    """A compiled program's bytes. Raises SeccompRefused for a file that is none."""
    try:
        with open(path, "rb") as file:
            data = file.read(8 * 4096 + 1)
    except OSError as error:
        raise SeccompRefused(what=f"read the seccomp filter {path}", cause=str(error.strerror)) from error
    if not data or len(data) % 8 or len(data) > 8 * 4096:
        raise SeccompRefused(what=f"read the seccomp filter {path}", cause=f"{len(data)} bytes are no BPF program")
    return data


def flags_of(profile: Mapping[str, Any]) -> int:
    """seccomp(2)'s flags as the profile names them. Raises Invalid."""
    result = 0
    for word in profile.get("flags", ()):
        if word not in FLAGS:
            raise Invalid(what="read linux.seccomp", cause=f"flags has {word!r}", remedy=f"flags are {', '.join(FLAGS)}")
        result |= FLAGS[word]
    if not notifies(profile):
        return result & ~FLAGS["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]  # of listeners; without one the kernel refuses it
    if result & FLAGS["SECCOMP_FILTER_FLAG_TSYNC"]:
        result |= _TSYNC_ESRCH
    return result | NEW_LISTENER


def notifies(profile: Mapping[str, Any]) -> bool:
    """Whether some call is to be asked about at a listener. Raises Invalid when nobody is named who would."""
    rules = profile.get("syscalls", ())
    wanted = "SCMP_ACT_NOTIFY" in (profile.get("defaultAction"), *(rule["action"] for rule in rules))
    if profile.get("listenerMetadata") and not profile.get("listenerPath"):
        raise Invalid(what="read linux.seccomp", cause="listenerMetadata is set without listenerPath")
    if wanted and not profile.get("listenerPath"):
        raise Invalid(
            what="read linux.seccomp",
            cause="SCMP_ACT_NOTIFY is used and listenerPath is not set: nobody would answer",
            remedy="set listenerPath to the socket of a seccomp agent, or use SCMP_ACT_ERRNO",
        )
    return wanted


_raw = cdata.PyDLL(None, use_errno=True)["syscall"]  # bound now: `loader` runs where nothing may be opened
_raw.restype = cdata.c_long


def loader(program: bytes, flags: int) -> Callable[[], int]:
    """What loads `program` (sock_filter array) into the calling thread by one system call; all is allocated here, not there.

    It answers the listener's descriptor for NEW_LISTENER, else 0. The call needs no_new_privs or CAP_SYS_ADMIN.
    It raises SyscallError; `explain` knows the odd ones.
    """
    buffer = cdata.create_string_buffer(program, len(program))
    structure = _Program(len(program) // 8, cdata.addressof(buffer))
    arguments = (cdata.c_long(number("seccomp")), cdata.c_long(1), cdata.c_long(flags), cdata.byref(structure))

    def load() -> int:
        answer = int(_raw(*arguments))
        if answer < 0 or (answer > 0 and not flags & NEW_LISTENER):
            raise SyscallError("seccomp", cdata.get_errno())
        buffer  # noqa: B018  # the program must live until here
        return answer

    return load


def explain(error: SyscallError) -> Failure:
    """Why seccomp(2) refused a filter."""
    remedy = ""
    cause = f"seccomp(2): {error.strerror} (errno {error.errno})"
    if error.errno == 524:  # ENOTSUPP, the kernel's own: no name in libc
        used = ""
        try:
            with open("/proc/sys/net/core/bpf_jit_limit", encoding="ascii") as file:
                used = file.read().strip()
        except OSError:
            pass
        cause = f"seccomp(2): errno 524, the memory for compiled BPF programs is used up (bpf_jit_limit is {used or 'not readable here'})"
        remedy = "sysctl -w net.core.bpf_jit_limit=1000000000"
    elif error.errno in (errno.EINVAL, errno.ENOSYS):
        remedy = "boot a kernel with CONFIG_SECCOMP_FILTER, or remove linux.seccomp"
    elif error.errno in (errno.EACCES, errno.EPERM):
        remedy = "set process.noNewPrivileges, or run as root (CAP_SYS_ADMIN)"
    return SeccompRefused(what="load the seccomp filter", cause=cause, remedy=remedy)
