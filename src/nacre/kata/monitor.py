"""One container of `nacre-kata`: the process that owns its VM from `create` to its end, and stands for it as its pid.

    ROOT/ID/monitor.json    version, id, bundle, pid, start time, status, exit code; written whole by this process alone
    ROOT/ID/monitor.sock    SOCK_SEQPACKET: one JSON request a record, descriptors beside it, one JSON answer
    ROOT/ID/root.erofs      the bundle's root as the VM's drive; ns/ the pinned network namespace

It ends with its container's exit code, and with it its VM: an engine that waits for the pid, or sends it signals, meets the container. A
kill of it takes QEMU along (PR_SET_PDEATHSIG); `delete` clears what is left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from nacre.kata import link
from nacre.kata.handler import TEMPLATE, KataHandler
from nacre.kata.waiting import Nobody, Watches
from nacre.linux import process
from nacre.linux.cgroups import Cgroup, discover
from nacre.linux.libc import owned
from nacre.oci.errors import Failure, NotFound, encode, from_exception
from nacre.oci.handler import Exit, Rootfs, Sandbox, Stdio

VERSION = 1
_RECORD = 160 * 1024
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_FOREVER_S = 3600.0


class Monitor:
    """Also the handler's Host: its loop is `Watches.wait`."""

    def __init__(self, directory: str, container: str, bundle: str, template: int | None) -> None:
        self._directory, self._container, self._bundle, self._template = directory, container, bundle, template
        self._watches = Watches(Nobody())
        self._execs: dict[str, socket.socket] = {}
        self._code: int | None = None
        self._group = ""
        self._handler = KataHandler(self)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)

    # Host

    def watch(self, fd: int, callback: Callable[[], None], *, write: bool = False) -> None:
        self._watches.watch(fd, callback, write=write)

    def unwatch(self, fd: int) -> None:
        self._watches.unwatch(fd)

    def reap(self, pid: int, callback: Callable[[int], None]) -> None:
        pidfd = process.pidfd_open(pid)

        def ended() -> None:
            self._watches.unwatch(pidfd)
            os.close(pidfd)
            try:
                _pid, status = os.waitpid(pid, 0)
            except ChildProcessError:  # `Vm.end` has waited for it
                return
            callback(status)

        self._watches.watch(pidfd, ended)

    def exited(self, exit: Exit) -> None:
        if exit.failure:
            print(
                f"nacre-kata: {exit.failure['what']}: {exit.failure['cause']}", *exit.failure["evidence"], sep="\n  ", flush=True
            )
        if not exit.exec_id:
            self._code = exit.code
        elif (waiting := self._execs.pop(exit.exec_id, None)) is not None:
            _say(waiting, {"code": exit.code})
            waiting.close()

    def sandbox_lost(self, failure: dict[str, Any]) -> None:
        """Every container's end was told before; without one there is nobody to tell."""
        if self._code is None:
            self._code = 255

    def inherited(self, name: str) -> int | None:
        return self._template if name == TEMPLATE else None

    # its life

    def create(self, sandbox: Sandbox, stdio: Stdio) -> None:
        """The VM with the container in it, not started. Raises Failure with everything undone."""
        self._group = sandbox.cgroups_path
        try:
            self._handler.create_sandbox(sandbox)
            if sandbox.namespaces["network"]:
                attachment = link.adopt(sandbox.namespaces["network"], f"{self._directory}/ns")
                if attachment is not None:
                    self._handler.network_ready(attachment)
            self._handler.create(self._container, self._bundle, Rootfs(erofs=f"{self._directory}/root.erofs"), stdio)
        except BaseException:
            self._destroy()
            raise
        self._listener.bind(f"{self._directory}/monitor.sock")
        self._listener.listen(8)
        self._watches.watch(self._listener.fileno(), self._accept)
        self._remember("created")

    def serve(self) -> int:
        """Until the container has ended; its exit code."""
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in _PASSED_ON:
            signal.signal(number, lambda _number, _frame: None)
        self._watches.watch(read, lambda: self._signalled(read))
        while self._code is None:
            self._watches.wait(lambda: self._code is not None, _FOREVER_S)
        self._handler.vm_flush()
        self._destroy()
        self._remember("stopped")
        return self._code

    def _destroy(self) -> None:
        self._handler.destroy_sandbox()
        Cgroup(discover(), self._group).remove()

    def _signalled(self, read: int) -> None:
        for number in os.read(read, 64):
            if number in _PASSED_ON:
                self._attempt(lambda number=number: self._handler.kill(self._container, number))  # type: ignore[misc]

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Failure as failure:
            print(f"nacre-kata: {failure}", flush=True)

    def _remember(self, status: str) -> None:
        own = process.status(os.getpid())
        document = {
            "version": VERSION,
            "id": self._container,
            "bundle": self._bundle,
            "pid": os.getpid(),
            "start_time": own[2] if own else 0,
            "status": status,
            "code": self._code,
        }
        fresh = f"{self._directory}/monitor.json.new"
        with open(fresh, "w", encoding="utf-8") as file:
            json.dump(document, file)
        os.rename(fresh, f"{self._directory}/monitor.json")

    # requests

    def _accept(self) -> None:
        client, _address = self._listener.accept()
        data, descriptors, _flags, _from = socket.recv_fds(client, _RECORD, 4)
        kept = False
        try:
            request = json.loads(data)
            kept = self._serve(request, descriptors, client)
            if not kept:
                _say(client, {})
        except (Failure, OSError, ValueError, KeyError) as error:
            _say(client, {"failure": encode(from_exception("serve a request", error))})
        finally:
            if not kept:
                client.close()

    def _serve(self, request: dict[str, Any], descriptors: list[int], client: socket.socket) -> bool:
        """Whether the answer comes later."""
        if request["op"] == "start":
            self._handler.start(self._container)
            self._remember("running")
        elif request["op"] == "kill":
            self._handler.kill(self._container, int(request["signal"]), everyone=bool(request.get("all")))
        elif request["op"] == "end":
            self._code = 128 + signal.SIGKILL
        elif request["op"] == "exec":
            stdin, stdout, stderr = descriptors
            self._handler.execute(
                self._container, request["id"], request["process"], Stdio(stdin=stdin, stdout=stdout, stderr=stderr)
            )
            self._execs[request["id"]] = client
            return True
        else:
            raise NotFound(what=f"serve {request['op']}", cause="there is no such request")
        return False


def _say(client: socket.socket, answer: dict[str, Any]) -> None:
    try:
        client.send(json.dumps(answer).encode())
    except OSError:
        return  # it did not wait


def ask(directory: str, request: dict[str, Any], descriptors: tuple[int, ...] = ()) -> dict[str, Any]:
    """A request to the monitor of the container at `directory`. Raises the Failure that it answers; NotFound when it is gone."""
    from nacre.oci.errors import decode

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        try:
            with owned(os.open(directory, os.O_PATH | os.O_CLOEXEC)) as home:  # sun_path is short, roots may be long
                sock.connect(f"/proc/self/fd/{home}/monitor.sock")
            socket.send_fds(sock, [json.dumps(request).encode()], descriptors)
            answer = json.loads(sock.recv(_RECORD))
        except (OSError, ValueError) as error:
            raise NotFound(what=f"{request['op']} the container", cause=f"its monitor is gone: {error}") from error
    if "failure" in answer:
        raise decode(answer["failure"])
    return dict(answer)


def remembered(directory: str) -> dict[str, Any]:
    """monitor.json. Raises NotFound."""
    try:
        with open(f"{directory}/monitor.json", "rb") as file:
            return dict(json.load(file))
    except (OSError, ValueError) as error:
        identifier = os.path.basename(directory)
        raise NotFound(what=f"find container {identifier}", cause=f"there is none below {os.path.dirname(directory)}") from error


def lives(document: dict[str, Any]) -> bool:
    found = process.status(int(document["pid"]))
    return found is not None and found[1] != "Z" and found[2] == document["start_time"]
