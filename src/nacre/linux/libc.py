"""The one place that knows libc's prototypes, the system call numbers, and how a refused call becomes an exception.

`bind` makes a checked libc function, `syscall` a checked raw call for what libc lacks. Calls are made with the interpreter lock held
(PyDLL): releasing it costs a futex, which a freshly loaded seccomp filter may refuse; anything that may block long is bound with
`blocking=True`.
"""

from __future__ import annotations

import os
import sys

from nacre.linux.cdata import CDLL, PyDLL, c_char_p, c_int, c_long, c_uint, c_ulong, c_void_p, get_errno
from nacre.linux.numbers import machine, number
from nacre.linux.pids import owned

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["AT_EMPTY_PATH", "AT_FDCWD", "AT_RECURSIVE", "SyscallError", "bind", "machine", "number", "owned", "syscall"]

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

_libc = PyDLL(None, use_errno=True)
_libc_blocking = CDLL(None, use_errno=True)


class SyscallError(OSError):
    """A refused system call: an OSError that also knows the call; `filename` is the object, if there was one."""

    def __init__(self, call: str, errno: int, path: str | None = None) -> None:
        super().__init__(errno, os.strerror(errno), path)
        self.call = call

    def __str__(self) -> str:
        place = f" {self.filename}" if self.filename else ""
        return f"{self.call}(2){place}: {self.strerror} (errno {self.errno})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.call, self.errno, self.filename)


def bind(name: str, *argtypes: Any, path: int | None = None, blocking: bool = False) -> Callable[..., int]:
    """libc's `name`, raising SyscallError when it returns -1; `path` is the index of the argument to report."""
    function = (_libc_blocking if blocking else _libc)[name]  # a handle of our own: the attribute libc.name is shared and mutable
    function.argtypes, function.restype = argtypes, c_int

    def check(result: int, _function: object, args: tuple[Any, ...]) -> int:
        if result == -1:
            raise SyscallError(name, get_errno(), None if path is None or args[path] is None else os.fsdecode(args[path]))
        return result

    function.errcheck = check  # type: ignore[assignment]  # ctypes' stub wants its own pointer type
    return function


_syscall = _libc["syscall"]
_syscall.restype = c_long
_syscall_blocking = _libc_blocking["syscall"]
_syscall_blocking.restype = c_long


def syscall(call: str, *args: Any, path: str | None = None, blocking: bool = False) -> int:
    """The raw system call named `call`; integers are passed as longs, bytes as pointers. Raises SyscallError with `path`."""
    function = _syscall_blocking if blocking else _syscall
    result: int = function(c_long(number(call)), *(c_long(arg) if isinstance(arg, int) else arg for arg in args))
    if result == -1:
        raise SyscallError(call, get_errno(), path)
    return result


def little_endian() -> bool:
    return sys.byteorder == "little"


CharP, Int, Long, UInt, ULong, VoidP = c_char_p, c_int, c_long, c_uint, c_ulong, c_void_p
