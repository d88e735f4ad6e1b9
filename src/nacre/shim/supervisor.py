"""One pod as its shim supervises it: its processes, stdio, logs and exit codes are owned here, and outlive the daemon.

Files in STATE/pods/SANDBOX, all written whole (temporary name, rename; /run is memory, so no fsync):
    shim.json                      version, pid, start time, handler: how a new daemon finds it. The daemon that gave the pod
                                   to it writes it, and sandbox.json beside it: what a shim does once costs its memory for good
    shim.sock                      SOCK_SEQPACKET, mode 0600, see `messages`
    containers/ID/exit.json        the Exit of its process: written before anyone is told
A kill of the shim leaves these; the daemon then kills the pod's cgroup and reports 137 for what has no exit.json.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from nacre.kata.handler import KataHandler
from nacre.oci.errors import NotFound, encode, from_exception
from nacre.oci.handler import Exit, Handler, Rootfs, Sandbox, Stdio
from nacre.shim import messages
from nacre.shim.foreign_handler import ForeignHandler
from nacre.shim.held import Held
from nacre.shim.runc_handler import RuncHandler

if TYPE_CHECKING:
    from nacre.shim.shared import Shim


class Supervisor:
    """The pod's state; every public method named `do_OP` serves one request. Owns `listener`."""

    def __init__(self, shim: Shim, directory: str, handler: str, listener: socket.socket) -> None:
        self.directory = directory
        self._shim = shim
        self._listener = listener
        self._clients: dict[int, socket.socket] = {}
        self._containers: dict[str, Held] = {}
        self._lost: dict[str, Any] | None = None
        self._sandbox: Sandbox | None = None
        self._destroyed = False
        self._loop = shim.loop
        self._handler = _make(handler, self)

    # what the handler may ask (handler.Host)

    def watch(self, fd: int, callback: Callable[[], None], *, write: bool = False) -> None:
        self._loop.watch(fd, callback, write=write)

    def unwatch(self, fd: int) -> None:
        self._loop.unwatch(fd)

    def reap(self, pid: int, callback: Callable[[int], None]) -> None:
        self._shim.reap(pid, callback)

    def serve_others(self, pid: int, fd: int) -> int | None:
        """What hangs here (a dead file server behind a mount) must hold up nobody else. This pod's own calls keep their order."""
        waiting = [self._listener, *self._clients.values()]
        for each in waiting:
            self._loop.unwatch(each.fileno())
        ends: list[int] = []
        self._shim.reap(pid, ends.append)
        try:
            self._loop.run_until(fd)
        finally:
            self._shim.reap(pid, None)
            for each in waiting:
                self._watch(each)
        return ends[0] if ends else None

    def inherited(self, name: str) -> int | None:
        return self._shim.inherited.get(name)

    def sandbox_lost(self, failure: dict[str, Any]) -> None:
        self._lost = failure
        self._tell({"event": "sandbox_lost", "failure": failure})

    def exited(self, exit: Exit) -> None:
        held = self._containers.get(exit.container)
        if exit.exec_id or held is None:
            self._tell({"event": "exec_exited", **asdict(exit)})
            return
        held.drain()
        held.end = exit
        try:
            _write(f"{self.directory}/containers/{exit.container}/exit.json", asdict(exit))
        except OSError as error:  # told all the same: only a kill of shim and daemon together could lose it now
            print(f"exit.json of {exit.container}: {error}", file=sys.stderr, flush=True)
        self._tell({"event": "exited", **asdict(exit)})

    # serving

    def listen(self) -> None:
        self._listener.setblocking(False)
        self._watch(self._listener)

    def _accept(self) -> None:
        client, _address = self._listener.accept()
        client.setblocking(False)
        self._clients[client.fileno()] = client
        self._watch(client)

    def _watch(self, sock: socket.socket) -> None:
        if sock.fileno() >= 0:  # a client may have been dropped while it was not watched
            self._loop.watch(sock.fileno(), self._accept if sock is self._listener else lambda: self._request(sock))

    def _drop(self, client: socket.socket) -> None:
        self._loop.unwatch(client.fileno())
        self._clients.pop(client.fileno(), None)
        client.close()

    def _request(self, client: socket.socket) -> None:
        try:
            request, descriptors = messages.receive(client)
        except (OSError, ValueError):
            self._drop(client)
            return
        if request is None:
            self._drop(client)
            return
        given: list[int] = []
        try:
            result = getattr(self, f"do_{request['op']}")(request, descriptors, given)
            answer = {"id": request["id"], "result": result or {}}
        except Exception as error:  # the request failed, not the shim
            answer = {"id": request.get("id"), "failure": encode(from_exception(f"{request.get('op')}", error))}
        finally:
            messages.close(descriptors)  # what an operation keeps it takes out of the list
        self._say(client, answer, given)
        messages.close(given)
        if self._destroyed:
            self._leave()

    def _tell(self, event: dict[str, Any]) -> None:
        for client in list(self._clients.values()):
            self._say(client, event)

    def _say(self, client: socket.socket, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        """A daemon that reads no more is hung up on, never waited for: it connects again and asks for the state."""
        try:
            messages.send(client, message, descriptors or ())
        except OSError:
            self._drop(client)
        except ValueError as error:  # longer than a record may be
            messages.send(client, {"id": message.get("id"), "failure": encode(from_exception("answer", error))})

    # requests

    def do_warm(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        self._handler.warm(request["settings"])

    def do_create_sandbox(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> dict[str, Any]:
        self._sandbox = Sandbox(**request["sandbox"])
        return self._handler.create_sandbox(self._sandbox)

    def do_network_ready(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        self._handler.network_ready(request["attachment"])

    def do_create(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        """container, bundle, rootfs, log_path, stdin, tty."""
        container, tty = request["container"], bool(request["tty"])
        rootfs = Rootfs(**request["rootfs"] | {"lower": tuple(request["rootfs"]["lower"])})
        with ExitStack() as undo:
            tell = partial(self._log_blocked, container)
            held = Held(self._loop, request["log_path"], tell, tty=tty)
            undo.callback(held.close)
            stdio = Stdio(tty=True) if tty else held.pipes(stdin=bool(request["stdin"]))
            console = self._handler.create(container, request["bundle"], rootfs, stdio)
            undo.callback(self._handler.delete, container)
            if console is not None:
                held.console(console)
            self._containers[container] = held
            undo.pop_all()

    def do_start(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> dict[str, Any]:
        held = self._held(request["container"])
        held.pid = self._handler.start(request["container"])
        held.started_ns = time.time_ns()
        return {"pid": held.pid, "at_ns": held.started_ns}

    def do_kill(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        if self._held(request["container"]).end is None:
            self._handler.kill(request["container"], request["signal"], everyone=request.get("everyone", False))

    def do_execute(self, request: dict[str, Any], fds: list[int], given: list[int]) -> None:
        """container, exec_id, process, streams: the names (stdin, stdout, stderr) of the descriptors that came along."""
        self._held(request["container"])
        stdio = Stdio(**dict(zip(request["streams"], fds, strict=True)), tty=bool(request["process"].get("terminal")))
        fds.clear()  # the handler's now
        console = self._handler.execute(request["container"], request["exec_id"], request["process"], stdio)
        if console is not None:
            given.append(console)

    def do_kill_exec(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        self._handler.kill_exec(request["container"], request["exec_id"], request["signal"])

    def do_attach(self, request: dict[str, Any], fds: list[int], _given: list[int]) -> None:
        """container, streams: as for execute; output from now on goes to them too, input comes from stdin until it ends."""
        held = self._held(request["container"])
        for name in request["streams"]:
            fd = fds.pop(0)
            streams = [stream for stream in held.streams if stream.name == name]
            if name == "stdin" and held.input is not None and held.input.fd >= 0:
                held.input.feed(fd, last=bool(request.get("stdin_once")) and not held.tty)
            elif streams:
                streams[0].attach(fd)
            else:
                os.close(fd)

    def do_resize(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        exec_id, width, height = request.get("exec_id", ""), request["width"], request["height"]
        if exec_id or not self._held(request["container"]).resize(width, height):
            self._handler.resize(request["container"], exec_id, width, height)

    def do_reopen_log(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        held = self._held(request["container"])
        held.log.reopen()
        for stream in held.streams:
            stream.resume()

    def do_update(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        self._handler.update(request["container"], request["resources"])

    def do_stats(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> dict[str, Any]:
        answer: dict[str, Any] = self._handler.stats(request["container"])
        return answer

    def do_state(self, _request: dict[str, Any], _fds: list[int], _given: list[int]) -> dict[str, Any]:
        containers = {
            name: {
                "pid": held.pid,
                "started_ns": held.started_ns,
                "exit": asdict(held.end) if held.end else None,
                "blocked": held.log.blocked,
            }
            for name, held in self._containers.items()
        }
        return {"containers": containers, "lost": self._lost}

    def do_delete(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        self._handler.delete(request["container"])
        held = self._containers.pop(request["container"], None)
        if held is not None:
            held.close()

    def do_destroy(self, _request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        """The sandbox off the host; when its caller has been told, the shim holds it no more."""
        self._handler.destroy_sandbox()
        self._destroyed = True

    def do_adopt(self, request: dict[str, Any], fds: list[int], _given: list[int]) -> None:
        """directory, handler, and the listening socket of another pod: the shim takes it up beside this one."""
        self._shim.hold(request["directory"], request["handler"], socket.socket(fileno=fds.pop()))

    # inside

    def _held(self, container: str) -> Held:
        try:
            return self._containers[container]
        except KeyError:
            raise NotFound(what=f"find container {container[:12]}", cause="its shim does not hold it") from None

    def _log_blocked(self, container: str, why: str) -> None:
        self._tell({"event": "log_blocked", "container": container, "why": why})

    def _leave(self) -> None:
        for held in self._containers.values():
            held.close()
        self._containers.clear()
        for client in list(self._clients.values()):
            self._drop(client)
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()
        self._shim.let_go(self)


def _make(name: str, host: Supervisor) -> Handler:
    if name == "kata":
        return KataHandler(host)
    return ForeignHandler(host) if name == "foreign" else RuncHandler(host)


def _write(path: str, document: dict[str, Any]) -> None:
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, json.dumps(document, separators=(",", ":")).encode())
    finally:
        os.close(fd)
    os.rename(path + ".new", path)
