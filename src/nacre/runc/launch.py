"""The parent's side of a new process: fork it where it belongs, answer what it asks, and take its word or its death for an answer.

The caller is single-threaded or at least holds no lock another thread could leave taken in the child.
"""

from __future__ import annotations

import errno
import os

from nacre.linux import namespaces, process
from nacre.linux import sockets as socket
from nacre.linux.contexts import ExitStack
from nacre.linux.libc import SyscallError, owned
from nacre.linux.namespaces import KINDS, Clone
from nacre.linux.pids import signal_name, signals
from nacre.oci.errors import Failure, decode
from nacre.oci.jsontext import loads
from nacre.oci.values import Value
from nacre.runc import init, rootless
from nacre.runc.failures import InitDied, step_failed
from nacre.runc.life import hear_execution

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from nacre.oci.state import Record


class Birth(Value):
    """Where the child is born."""

    flags: int = 0  # new namespaces
    visit: Mapping[str, int] = {}  # existing ones, kind to descriptor, joined around the fork
    user: int = -1  # an existing user namespace, joined by an intermediate that ends at once
    uid_map: str = ""  # lines for /proc/PID/uid_map of a new user namespace
    gid_map: str = ""
    time_offsets: str = ""  # lines for /proc/PID/timens_offsets of a new time namespace
    cgroup: int = -1  # a v2 cgroup directory (`Cgroup.cradle`)


class Child:
    """A process that has been set up and waits, or has been executed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.console: int | None = None
        self.warnings: list[str] = []


class Launcher:
    """One fork. `channel` stays open until `release` or `abandon`."""

    def __init__(
        self, orders: init.Orders, birth: Birth, *, gates: Sequence[tuple[str, int]], listener: socket.socket | None
    ) -> None:
        self.orders = orders
        self.ended: int | None = None  # its wait status, where somebody else has reaped it
        self._birth = birth
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.pid = self._fork(theirs, listener, gates)

    def _fork(self, theirs: socket.socket, listener: socket.socket | None, gates: Sequence[tuple[str, int]]) -> int:
        birth = self._birth
        what = f"make the namespaces of container {self.orders.container}"
        try:
            if birth.user >= 0 or (birth.visit and rootless.in_user_namespace()):
                return self._fork_through_another(theirs, listener, gates)
            with ExitStack() as there:
                there.enter_context(namespaces.visiting(birth.visit))
                if birth.time_offsets:
                    there.enter_context(namespaces.time_namespace(birth.time_offsets))
                pid = process.fork(birth.flags, cgroup=birth.cgroup)
                if pid == 0:
                    self._channel.close()
                    init.become(self.orders, theirs, listener, gates)
            return pid
        except OSError as error:
            self._channel.close()
            raise step_failed(what, error) from error

    def _fork_through_another(
        self, theirs: socket.socket, listener: socket.socket | None, gates: Sequence[tuple[str, int]]
    ) -> int:
        """Where this process could not come back from: an intermediate joins the namespaces and is the last that does.

        A user namespace, too, must be entered before the others are made, so that it owns them.
        Its child is its sibling (CLONE_PARENT), that is: ours. It answers the child's pid, or the errno.
        """
        read, write = os.pipe2(os.O_CLOEXEC)
        middle = process.fork()
        if middle == 0:
            try:
                self._join()
                with ExitStack() as there:
                    if self._birth.time_offsets:
                        there.enter_context(namespaces.time_namespace(self._birth.time_offsets))
                    pid = process.fork(self._birth.flags | Clone.PARENT, cgroup=self._birth.cgroup)
                    there.pop_all()  # nobody goes back
                if pid == 0:
                    self._channel.close()
                    init.become(self.orders, theirs, listener, gates)
                os.write(write, f"{pid} 0".encode())
            except OSError as error:
                os.write(write, f"0 {error.errno} {getattr(error, 'call', 'open')}".encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as answer:
            words = answer.read().decode().split()
        os.waitpid(middle, 0)
        if not words or words[0] == "0":
            number, call = (int(words[1]), words[2]) if len(words) > 2 else (0, "setns")
            raise SyscallError(call, number)
        return int(words[0])

    def _join(self) -> None:
        """For good. Who may join a namespace by its own rights does so first: that one need not belong to the user namespace. Others it
        may join as root of the user namespace alone.
        """
        postponed: dict[str, int] = {}
        for kind, fd in self._birth.visit.items():
            try:
                namespaces.setns(fd, KINDS[kind][0])
            except SyscallError as error:
                if error.errno != errno.EPERM or self._birth.user < 0:
                    raise
                postponed[kind] = fd
        if self._birth.user >= 0:
            namespaces.setns(self._birth.user, Clone.NEWUSER)
        for kind, fd in postponed.items():
            namespaces.setns(fd, KINDS[kind][0])

    def fileno(self) -> int:
        """Readable when the child has something to say, or has died."""
        return self._channel.fileno()

    def wait(self, act_from_outside: Callable[[], None] | None = None) -> Child:
        """Serve the child until it says "created" (or "ready", for further orders). Raises what it reports, or InitDied."""
        child = Child(self.pid)
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._channel, 65536, 1, socket.MSG_CMSG_CLOEXEC)
            if descriptors:
                child.console = descriptors[0]
            if not data:
                raise self._died()
            message = loads(data)
            if "failure" in message:
                raise decode(message["failure"])
            stage = message["stage"]
            if stage in ("created", "ready"):
                child.warnings += message["warnings"]
                return child
            if stage == "maps":
                self._write_maps()
            elif stage == "outside" and act_from_outside is not None:
                act_from_outside()
            self._channel.sendall(b".")

    def await_execution(self, child: Child, record: Record) -> None:
        """Until the child has executed its program in the container of `record`. Raises its failure."""
        with self._channel:
            hear_execution(self._channel, child.warnings, record, child.pid)

    def instruct(self, descriptors: Sequence[int]) -> None:
        """Further orders for a child that is ready, in what these name; `wait` again afterwards."""
        socket.send_fds(self._channel, [b"."], descriptors)

    def go(self, child: Child, record: Record) -> None:
        """A child that had further orders executes its program now."""
        self._channel.sendall(b".")
        self.await_execution(child, record)

    def close(self) -> None:
        self._channel.close()

    def release(self) -> None:
        """The child's creation is on record: it may wait at its gate, whoever we are."""
        self._channel.sendall(b".")
        self._channel.close()

    def abandon(self) -> None:
        """Take the child back: it is killed and reaped."""
        self._channel.close()
        if self.ended is not None:
            return  # the number may be another's by now
        try:
            os.kill(self.pid, signals.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass

    def _write_maps(self) -> None:
        birth = self._birth
        if not birth.uid_map:
            return
        files = [("gid_map", birth.gid_map), ("uid_map", birth.uid_map)]
        if os.geteuid() != 0:
            from nacre.runc import subordinate

            if subordinate.is_needed(birth.uid_map, birth.gid_map):
                for name, text in files:
                    subordinate.write_map(self.pid, name, text)
                return
            files.insert(0, ("setgroups", "deny"))  # the price of a group map without privilege: user_namespaces(7)
        for name, text in files:
            place = f"/proc/{self.pid}/{name}"
            try:
                with owned(os.open(place, os.O_WRONLY | os.O_CLOEXEC)) as fd:
                    os.write(fd, text.encode())
            except OSError as error:
                refused = SyscallError("write", error.errno or 0, f"{place} ({text.strip()!r})")
                raise step_failed(f"map the ids of container {self.orders.container}", refused) from error

    def _died(self) -> Failure:
        """The channel closed without a word."""
        ending = "it ended silently"
        try:
            status = os.waitpid(self.pid, 0)[1] if self.ended is None else self.ended
            code = os.waitstatus_to_exitcode(status)
            ending = f"killed by {signal_name(-code)}" if code < 0 else f"it ended with status {code}"
        except ChildProcessError:
            pass
        return InitDied(what=f"set up container {self.orders.container}", cause=f"the process that becomes its init: {ending}")


def namespace_flags(kinds: Mapping[str, Any]) -> int:
    """clone3(2) flags for new namespaces of these OCI kinds; the cgroup namespace is made later, from inside the cgroup."""
    flags = 0
    for kind in kinds:
        if kind != "cgroup":
            flags |= KINDS[kind][0]
    return flags
