"""`run` and `exec` without --detach: wait for the process, pass signals and, with a terminal, bytes between ours and the container's.

with foreground.signals() as pending:     from before there is a process: a signal must not end us and leave a container behind
    … create and start …
    status = foreground.attend(pid, console, pending)
"""

from __future__ import annotations

import fcntl
import os
import select
import sys

from nacre.linux.contexts import contextmanager
from nacre.linux.pids import owned, pidfd_open, pidfd_send_signal
from nacre.linux.pids import signals as signal

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Iterator

_OWN = {signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP, signal.SIGURG, signal.SIGPIPE}
_CHUNK = 1 << 16


@contextmanager
def signals() -> Iterator[list[int]]:
    """Signals that come before `attend` are kept in the list, for it to pass on."""
    pending: list[int] = []
    numbers = [number for number in signal.valid_signals() - _OWN if number < 32]
    before = {number: signal.signal(number, lambda got, _frame: pending.append(got)) for number in numbers}
    try:
        yield pending
    finally:
        for restored, handler in before.items():
            signal.signal(restored, handler)


def attend(pid: int, console: int | None, pending: list[int]) -> int:
    """Until child `pid` ends; its exit status, 128+N for signal N. `console` is closed."""
    with owned(pidfd_open(pid)) as pidfd:
        for number in signal.valid_signals() - _OWN:
            if number < 32:
                signal.signal(number, lambda got, _frame: _pass_on(pidfd, got, console))
        for early in pending:
            _pass_on(pidfd, early, console)
        if console is None:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll()
        else:
            _shuttle(pidfd, console)
            os.close(console)
    return _status(pid)


def _status(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _pass_on(pidfd: int, number: int, console: int | None) -> None:
    if number == signal.SIGWINCH and console is not None:
        copy_size(console)
        return
    try:
        pidfd_send_signal(pidfd, number)
    except OSError:
        return  # it has just ended


def copy_size(console: int) -> None:
    """Give the container's terminal the size of ours."""
    import termios

    try:
        size = fcntl.ioctl(sys.stdin.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
        fcntl.ioctl(console, termios.TIOCSWINSZ, size)
    except OSError:
        return  # stdin is no terminal: the container's keeps its size


def _shuttle(pidfd: int, console: int) -> None:
    """Bytes both ways until the process ends and its last output is out."""
    import termios
    import tty

    stdin, stdout = 0, 1
    before = termios.tcgetattr(stdin) if os.isatty(stdin) else None
    if before is not None:
        tty.setraw(stdin, termios.TCSADRAIN)  # what was typed already is the container's
        raw = termios.tcgetattr(stdin)
        raw[tty.OFLAG] |= termios.OPOST  # new lines begin at the left: the container's terminal sends them bare
        termios.tcsetattr(stdin, termios.TCSADRAIN, raw)
        copy_size(console)
    poll = select.poll()
    for fd in (pidfd, console, stdin):
        poll.register(fd, select.POLLIN)
    ended = False
    try:
        while True:
            ready = dict(poll.poll(0 if ended else None))
            if console in ready and not _copy(console, stdout):
                poll.unregister(console)
                ready.pop(console)
            if stdin in ready and not _copy(stdin, console):
                poll.unregister(stdin)
            if ended and console not in ready:
                return
            if pidfd in ready and not ended:
                ended = True
                poll.unregister(pidfd)
    finally:
        if before is not None:
            termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def _copy(source: int, target: int) -> bool:
    """One read's worth; False at the end. A terminal whose last holder is gone reads as EIO."""
    try:
        data = os.read(source, _CHUNK)
    except OSError:
        return False
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
    return bool(data)
