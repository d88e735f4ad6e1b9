"""A shim's process: one event loop and one table of children for the supervisors of one pod or several.

Pods of the handler `runc` share shims, as far as `pods_per_shim` allows: a shim's own memory is most of what an idle pod costs. Each
keeps a directory, a socket and a supervisor of its own, so that nobody who talks to one sees the others; the process ends with the
last of them. What it says of itself goes to shim.log of the pod that has been here longest.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from nacre.linux import process
from nacre.shim.loop import Loop
from nacre.shim.supervisor import Supervisor


class Shim:
    """The process. `inherited` are the descriptors that the zygote keeps for its children, by name."""

    def __init__(self, inherited: dict[str, int]) -> None:
        self.inherited = inherited
        self.loop = Loop(self._child_ended)
        self._children: dict[int, Callable[[int], None]] = {}
        self._pods: list[Supervisor] = []  # in the order in which they came
        self._speaks_in = ""

    def hold(self, directory: str, handler: str, listener: socket.socket) -> None:
        """Supervise one more pod, whose daemon connects to `listener`, ours from here."""
        pod = Supervisor(self, directory, handler, listener)
        self._pods.append(pod)
        self._speak()
        pod.listen()

    def let_go(self, pod: Supervisor) -> None:
        """Its sandbox is off the host."""
        self._pods.remove(pod)
        if self._pods:
            self._speak()
        else:
            self.loop.end()

    def reap(self, pid: int, callback: Callable[[int], None] | None) -> None:
        """Call back with the wait status once child `pid` has ended; None: do not call back any more."""
        if callback is not None:
            self._children[pid] = callback
        else:
            self._children.pop(pid, None)

    def run(self) -> None:
        """Until no pod is left."""
        process.set_child_subreaper()
        process.set_name("nacre-shim")
        self.loop.run()

    def _child_ended(self, pid: int, status: int) -> None:
        callback = self._children.pop(pid, None)
        if callback is not None:
            callback(status)

    def _speak(self) -> None:
        """Into a log that is not deleted under us."""
        directory = self._pods[0].directory
        if directory != self._speaks_in:
            log = os.open(f"{directory}/shim.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            self._speaks_in = directory
