"""A process by its number, and descriptors: what needs no libc of our own, for commands that load little (`runc.life`)."""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    import signal as signals
    from collections.abc import Iterator
else:
    try:
        import _signal as signals  # calls and plain numbers; `signal` makes enumerations of them first, which costs 7 ms
    except ImportError:  # another Python than CPython
        import signal as signals

__all__ = ["ended_children", "owned", "pidfd_open", "pidfd_send_signal", "signal_name", "signals", "status"]


class owned:  # used as a function; a class, since contextlib takes 4 ms to load
    """The descriptor `fd`, closed at the end of the block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def pidfd_open(pid: int) -> int:
    return os.pidfd_open(pid)


def pidfd_send_signal(pidfd: int, number: int) -> None:
    signals.pidfd_send_signal(pidfd, number)


def signal_name(number: int) -> str:
    """ "SIGKILL" of 9, and a sentence's word for a number without a name."""
    names = [name for name, value in vars(signals).items() if name.startswith("SIG") and name.isalnum() and value == number]
    return min(names, default=f"signal {number}")


def ended_children() -> Iterator[tuple[int, int]]:
    """Reap every child that has ended, any child: (pid, wait status), each as it is reaped. Never waits."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def status(pid: int) -> tuple[str, str, int] | None:
    """(name, state letter, start time in clock ticks) of a process; None when there is none. proc(5), /proc/PID/stat."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(fd, 4096)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            return None
        raise
    opening, closing = text.index(b"("), text.rindex(b")")
    fields = text[closing + 2 :].split()
    return text[opening + 1 : closing].decode("latin-1"), fields[0].decode(), int(fields[19])
