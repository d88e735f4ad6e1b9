"""A seccomp listener on its way to the agent that answers for the container (config-linux.md "The Container Process State").

Once the filter is in force the child can make no call that the filter might hold up: sending the listener is such a call. So the child
says what is coming while it still may, loads the filter, writes the listener's number into memory shared with the parent and waits
there, by reading memory. The parent takes the descriptor out of it (pidfd_getfd(2)), sends it to the agent and writes that it has.
Both wait for the length of a seccomp(2) and a sendmsg(2). Imported before the fork, by whoever plans a container with such a filter.
"""

from __future__ import annotations

import errno
import mmap
import os
import select

from nacre.linux import pids, process
from nacre.linux import sockets as socket
from nacre.linux.libc import SyscallError, syscall
from nacre.linux.memfd import from_bytes
from nacre.linux.pids import owned
from nacre.oci.errors import Failure
from nacre.oci.jsontext import dumps

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Mapping
    from typing import Any

_NUMBER, _TAKEN, _SIZE = 0, 1, 8  # two ints: the listener's number, and whether the parent has it
_SEND_S = 10.0
_LOOKS = 1 << 29  # at some 40 ns each longer than the parent may take; a clock could be a system call


class ListenerLost(Failure):
    """The agent at linux.seccomp.listenerPath could not be given the listener."""


class Offer:
    """The child's side: announced before the filter is loaded, handed over after it."""

    def __init__(self, channel: int) -> None:
        """Returns once the parent is ready; raises OSError when there is none."""
        self._memory = from_bytes("nacre-listener", bytes(_SIZE))
        self._words = memoryview(mmap.mmap(self._memory, _SIZE)).cast("i")
        os.write(channel, dumps({"stage": "listener", "memory": self._memory}).encode())
        if not os.read(channel, 1):
            raise ConnectionResetError("the parent is gone")

    def hand_over(self, listener: int) -> None:
        """Not one system call in here."""
        self._words[_NUMBER] = listener
        for _ in range(_LOOKS):
            if self._words[_TAKEN]:
                return
        raise ListenerLost(what="hand over the seccomp listener", cause="the process that should take it is gone or hangs")


class OpenOffer(Offer):
    """By who is not root, and may only look into a process that lets him. No other process may be in its user namespace by now."""

    def __init__(self, channel: int) -> None:
        process.set_dumpable(enabled=True)  # until execve(2), which decides anew
        super().__init__(channel)


def serve(channel: Socket, pid: int, memory: int, place: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """The parent's side: answers process `pid`, whose shared memory is its descriptor `memory`, and brings the listener to the agent.

    `place` has the agent's `path` and `metadata`. Returns early when the child speaks or ends, for the caller to read why.
    """
    what = f"bring the seccomp listener to {place['path']}"
    try:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent,
            owned(pids.pidfd_open(pid)) as child,
            owned(_taken(child, memory)) as shared,
            memoryview(mmap.mmap(shared, _SIZE)) as raw,
            raw.cast("i") as words,
        ):
            agent.settimeout(_SEND_S)
            _connect(agent, place["path"])  # before there is a filter: a path that is wrong is told, and nothing hangs
            channel.sendall(b".")
            if not _arrives(words, channel):
                return
            with owned(_taken(child, words[_NUMBER])) as listener:
                _send(agent, listener, _process_state(pid, place, state))
            words[_TAKEN] = 1
    except OSError as error:
        raise _lost(what, error) from error


def _connect(agent: socket.socket, path: str) -> None:
    try:
        agent.connect(path)
    except OSError as error:
        raise SyscallError("connect", error.errno or errno.ETIMEDOUT) from error


def _arrives(words: memoryview[int], channel: Socket) -> bool:
    """Whether the listener's number is there; False when the child has said something instead, or ended."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    while not words[_NUMBER]:
        if poll.poll(1):  # memory wakes nobody
            return False
    return True


def _taken(process: int, descriptor: int) -> int:
    """Our copy of another process's descriptor."""
    return syscall("pidfd_getfd", process, descriptor, 0)


def _send(agent: socket.socket, listener: int, document: bytes) -> None:
    sent = socket.send_fds(agent, [document], [listener])
    if sent < len(document):  # an agent that has all of it may have closed its end by now: then even nothing cannot be sent
        agent.sendall(document[sent:])


def _process_state(pid: int, place: Mapping[str, str], state: Mapping[str, Any]) -> bytes:
    document = {"ociVersion": state["ociVersion"], "fds": ["seccompFd"], "pid": pid, "state": {**state}}
    if place.get("metadata"):
        document["metadata"] = place["metadata"]
    return dumps(document).encode()


def _lost(what: str, error: OSError) -> ListenerLost:
    if isinstance(error, SyscallError):
        remedy = "start the agent that listens there, or remove SCMP_ACT_NOTIFY"
        if error.call == "pidfd_getfd":
            remedy = "taking it needs CAP_SYS_PTRACE: run as root, in a new user namespace of the container, or without SCMP_ACT_NOTIFY"
        return ListenerLost(what=what, cause=f"{error.call}(2): {error.strerror} (errno {error.errno})", remedy=remedy)
    cause = f"sendmsg(2): {error.strerror} (errno {error.errno})" if error.strerror else f"it took nothing within {_SEND_S:.0f} s"
    return ListenerLost(what=what, cause=cause, remedy="look at the agent that listens there")
