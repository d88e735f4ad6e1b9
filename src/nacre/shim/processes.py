"""Children of a shim: work done in a forked child that exits, and what a wait status means."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from nacre.oci.errors import Failure, decode, encode, from_exception
from nacre.shim import messages


def exit_code(status: int) -> int:
    """0…255 from a wait status: the code, or 128 and the signal's number."""
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


class ChildDied(Failure):
    """A set-up child ended without a word."""


def in_child(what: str, work: Callable[[], tuple[dict[str, Any], list[int]]]) -> tuple[dict[str, Any], list[int]]:
    """Run `work` in a forked child: its memory goes with it, its own children become ours.

    Answers what it answers; the descriptors are new here and the caller's. Raises the Failure that it raised, ChildDied if it
    was killed.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _child(what, work, theirs)
    theirs.close()
    with ours:
        answer, descriptors = messages.receive(ours)
    _pid, status = os.waitpid(pid, 0)
    if answer is None:
        raise ChildDied(what=what, cause=f"the set-up process ended with code {exit_code(status)} before it answered")
    if "failure" in answer:
        messages.close(descriptors)
        raise decode(answer["failure"])
    return answer["result"], descriptors


def _child(what: str, work: Callable[[], tuple[dict[str, Any], list[int]]], answers: socket.socket) -> None:
    """Never returns: an exception of ours must not unwind into the parent's frames."""
    try:
        gc.disable()
        result, descriptors = work()
        messages.send(answers, {"result": result}, descriptors)
        os._exit(0)
    except BaseException as error:
        try:
            messages.send(answers, {"failure": encode(from_exception(what, error))})
        except BaseException as second:  # the socket itself: all that is left is the log
            print(f"{what}: {error!r}, and then {second!r}", file=sys.stderr, flush=True)
        os._exit(1)
