"""Children of a shim: work done in a forked child that exits, and what a wait status means."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Collection
from typing import Any

from nacre.linux.process import close_all_but
from nacre.oci.errors import Failure, decode, encode, from_exception
from nacre.shim import messages

Answer = tuple[dict[str, Any], list[int]]
Work = Callable[[], Answer]


def exit_code(status: int) -> int:
    """0…255 from a wait status: the code, or 128 and the signal's number."""
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


class ChildDied(Failure):
    """A set-up child ended without a word."""


def in_child(what: str, work: Work, keep: Collection[int] = ()) -> Answer:
    """Run `work` in a forked child: its memory goes with it, its own children become ours. Of our descriptors it has `keep` alone:
    another pod's pipe, connection or lifeline would not end when we close it.

    Answers what it answers; the descriptors are new here and the caller's. Raises the Failure that it raised, ChildDied if it
    was killed.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        pid = os.fork()
        if pid == 0:
            ours.close()
            _child(what, work, theirs, keep)
        theirs.close()
        answer, descriptors = messages.receive(ours)
    _pid, status = os.waitpid(pid, 0)
    if answer is None:
        raise ChildDied(what=what, cause=f"the set-up process ended with code {exit_code(status)} before it answered")
    if "failure" in answer:
        messages.close(descriptors)
        raise decode(answer["failure"])
    return answer["result"], descriptors


def _child(what: str, work: Work, answers: socket.socket, keep: Collection[int]) -> None:
    """Never returns: an exception of ours must not unwind into the parent's frames."""
    try:
        gc.disable()
        signal.set_wakeup_fd(-1)  # the loop's; its number may soon be another file's
        close_all_but({answers.fileno(), *keep})
        result, descriptors = work()
        messages.send(answers, {"result": result}, descriptors)
        messages.close(descriptors)
        os._exit(0)
    except BaseException as error:
        try:
            messages.send(answers, {"failure": encode(from_exception(what, error))})
        except BaseException as second:  # the socket itself: all that is left is the log
            print(f"{what}: {error!r}, and then {second!r}", file=sys.stderr, flush=True)
        os._exit(1)
