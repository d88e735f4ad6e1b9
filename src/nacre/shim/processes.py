"""Children of a shim: work done in a forked child that exits, and what a wait status means."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Collection
from typing import Any

from nacre.linux.libc import owned
from nacre.linux.process import close_all_but, pidfd_open
from nacre.oci.errors import Failure, decode, encode, from_exception
from nacre.shim import messages

Answer = tuple[dict[str, Any], list[int]]
Work = Callable[[], Answer]
_STAY_MS = 10_000  # between the making of a container and its start


def exit_code(status: int) -> int:
    """0…255 from a wait status: the code, or 128 and the signal's number."""
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


class ChildDied(Failure):
    """A set-up child ended without a word."""


def in_child(what: str, work: Work, keep: Collection[int] = ()) -> Answer:
    """Run `work` in a forked child: its memory goes with it, its own children become ours. Of our descriptors it has `keep` alone.

    Answers what it answers; the descriptors are new here and the caller's. Raises the Failure that it raised, ChildDied if it
    was killed.
    """
    child = Child(what, work, keep=keep)
    answer = child.hear(what)
    child.end()
    return answer


class Child:
    """A forked child with something to do now and, if `then` is given, another thing when it is asked for.

    To be asked it stays until the process ends whose "pid" its first answer named, at most some seconds. Its own children become ours
    when it has ended. What it copied of our memory for the first thing, which is most of its cost, serves the second too.

    Of our descriptors it has `keep` and what it inherits as 0 to 2: another pod's pipe, terminal, connection or lifeline that it held
    would not end when we close it.
    """

    def __init__(self, what: str, work: Work, then: Work | None = None, *, keep: Collection[int] = ()) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            self._socket.close()
            _child(what, work, then, theirs, keep)
        theirs.close()

    def hear(self, what: str) -> Answer:
        """What it answers. Raises the Failure that it raised, ChildDied; then it has ended."""
        answer, descriptors = messages.receive(self._socket)
        if answer is None:
            raise ChildDied(what=what, cause=f"the set-up process ended with code {self.end()} before it answered")
        if "failure" in answer:
            messages.close(descriptors)
            self.end()
            raise decode(answer["failure"])
        return answer["result"], descriptors

    def go_on(self, what: str) -> bool:
        """Ask for the second thing and wait until it is done; False when the child has left before it did it."""
        try:
            self._socket.sendall(b".")
            self.hear(what)
        except ChildDied:
            return False
        except OSError:
            self.end()
            return False
        self.end()
        return True

    def end(self) -> int:
        """Hang up and wait for its end; answers its exit code, 0 when the event loop has reaped it before us."""
        self._socket.close()
        try:
            return exit_code(os.waitpid(self._pid, 0)[1])
        except ChildProcessError:
            return 0


def _child(what: str, work: Work, then: Work | None, answers: socket.socket, keep: Collection[int]) -> None:
    """Never returns: an exception of ours must not unwind into the parent's frames."""
    try:
        gc.disable()
        signal.set_wakeup_fd(-1)  # the loop's; its number may soon be another file's
        close_all_but({answers.fileno(), *keep})
        result, descriptors = work()
        messages.send(answers, {"result": result}, descriptors)
        messages.close(descriptors)
        if then is not None and _asked(answers, result["pid"]):
            messages.send(answers, {"result": then()[0]})
        os._exit(0)
    except BaseException as error:
        try:
            messages.send(answers, {"failure": encode(from_exception(what, error))})
        except BaseException as second:  # the socket itself: all that is left is the log
            print(f"{what}: {error!r}, and then {second!r}", file=sys.stderr, flush=True)
        os._exit(1)


def _asked(answers: socket.socket, pid: int) -> bool:
    """Whether the parent speaks before it hangs up, `pid` ends or we have waited long enough."""
    poll = select.poll()
    with owned(pidfd_open(pid)) as pidfd:
        for fd in (answers.fileno(), pidfd):
            poll.register(fd, select.POLLIN)
        ready = [fd for fd, _events in poll.poll(_STAY_MS)]
    return answers.fileno() in ready and bool(answers.recv(1))
