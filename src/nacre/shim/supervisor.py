"""A shim: the one process that owns a pod's processes, stdio, logs and exit codes, and outlives the daemon.

Files in STATE/pods/SANDBOX, all written whole (temporary name, rename; /run is memory, so no fsync):
    shim.json                      version, pid, start time, handler, the Sandbox: how a new daemon finds it
    shim.sock                      SOCK_SEQPACKET, mode 0600, see `messages`
    containers/ID/exit.json        the Exit of its process: written before anyone is told
A kill of the shim leaves these; the daemon then kills the pod's cgroup and reports 137 for what has no exit.json.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import termios
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from nacre.linux import process
from nacre.oci.errors import NotFound, encode, from_exception
from nacre.shim import messages
from nacre.shim.handler import Exit, Rootfs, Sandbox, Stdio
from nacre.shim.loop import Loop
from nacre.shim.streams import Log, Stream


@dataclass(slots=True)
class Held:
    """One container, as its shim holds it."""

    log: Log
    tty: bool
    started: bool = False
    streams: list[Stream] = field(default_factory=list)
    stdin: int = -1  # the write end of its standard input, or the console
    end: Exit | None = None


class Supervisor:
    """The shim's state; every public method named `do_OP` serves one request."""

    def __init__(self, directory: str, handler: str, listener: socket.socket, inherited: dict[str, int]) -> None:
        self.directory = directory
        self._handler_name = handler
        self._inherited = inherited
        self._listener = listener
        self._clients: dict[int, socket.socket] = {}
        self._containers: dict[str, Held] = {}
        self._children: dict[int, Callable[[int], None]] = {}
        self._lost: dict[str, Any] | None = None
        self._sandbox: Sandbox | None = None
        self.loop = Loop(self._child_ended)
        self._handler = _make(handler, self)

    # what the handler may ask (handler.Host)

    def watch(self, fd: int, callback: Callable[[], None], *, write: bool = False) -> None:
        self.loop.watch(fd, callback, write=write)

    def unwatch(self, fd: int) -> None:
        self.loop.unwatch(fd)

    def reap(self, pid: int, callback: Callable[[int], None]) -> None:
        self._children[pid] = callback

    def inherited(self, name: str) -> int | None:
        return self._inherited.get(name)

    def sandbox_lost(self, failure: dict[str, Any]) -> None:
        self._lost = failure
        self._tell({"event": "sandbox_lost", "failure": failure})

    def exited(self, exit: Exit) -> None:
        held = self._containers.get(exit.container)
        if exit.exec_id or held is None:
            self._tell({"event": "exec_exited", **asdict(exit)})
            return
        for stream in list(held.streams):
            stream.drain()
        held.end = exit
        _write(f"{self.directory}/containers/{exit.container}/exit.json", asdict(exit))
        self._tell({"event": "exited", **asdict(exit)})

    # serving

    def serve(self) -> None:
        process.set_child_subreaper()
        process.set_name("nacre-shim")
        self._remember()
        self._listener.setblocking(False)
        self.loop.watch(self._listener.fileno(), self._accept)
        self.loop.run()

    def _accept(self) -> None:
        client, _address = self._listener.accept()
        self._clients[client.fileno()] = client
        self.loop.watch(client.fileno(), lambda: self._request(client))

    def _drop(self, client: socket.socket) -> None:
        self.loop.unwatch(client.fileno())
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
        try:
            messages.send(client, answer, given)
        except OSError:
            self._drop(client)
        finally:
            messages.close(given)

    def _tell(self, event: dict[str, Any]) -> None:
        for client in list(self._clients.values()):
            try:
                messages.send(client, event)
            except OSError:
                self._drop(client)

    # requests

    def do_warm(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        self._handler.warm(request["settings"])

    def do_create_sandbox(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> dict[str, Any]:
        self._sandbox = Sandbox(**request["sandbox"])
        answer: dict[str, Any] = self._handler.create_sandbox(self._sandbox)
        self._remember()
        return answer

    def do_network_ready(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        self._handler.network_ready(request["attachment"])

    def do_create(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        """container, bundle, rootfs, log_path, stdin, tty."""
        container, tty = request["container"], bool(request["tty"])
        held = Held(log=Log(request["log_path"]), tty=tty)
        rootfs = Rootfs(**request["rootfs"] | {"lower": tuple(request["rootfs"]["lower"])})
        ours, stdio = _pipes(stdin=bool(request["stdin"])) if not tty else ((-1, -1, -1), Stdio(tty=True))
        try:
            console = self._handler.create(container, request["bundle"], rootfs, stdio)
        except BaseException:
            messages.close([fd for fd in ours if fd >= 0])
            held.log.close()
            raise
        self._containers[container] = held
        if console is not None:
            held.streams.append(Stream(self.loop, console, "stdout", held.log, held.streams.remove))
            held.stdin = os.dup(console)
        if not tty:
            held.stdin = ours[0]
            held.streams += [
                Stream(self.loop, fd, name, held.log, held.streams.remove)
                for fd, name in zip(ours[1:], ("stdout", "stderr"), strict=True)
            ]

    def do_start(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> dict[str, Any]:
        held = self._held(request["container"])
        pid = self._handler.start(request["container"])
        held.started = True
        return {"pid": pid}

    def do_kill(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        if self._held(request["container"]).end is None:
            self._handler.kill(request["container"], request["signal"], everyone=request.get("everyone", False))

    def do_execute(self, request: dict[str, Any], fds: list[int], given: list[int]) -> None:
        """container, exec_id, process, streams: the names (stdin, stdout, stderr) of the descriptors that came along."""
        self._held(request["container"])
        stdio = Stdio(**dict(zip(request["streams"], fds, strict=True)), tty=bool(request["process"].get("terminal")))
        console = self._handler.execute(request["container"], request["exec_id"], request["process"], stdio)
        if console is not None:
            given.append(console)

    def do_kill_exec(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        self._handler.kill_exec(request["container"], request["exec_id"], request["signal"])

    def do_attach(self, request: dict[str, Any], fds: list[int], _given: list[int]) -> None:
        """container, streams: as for execute; output from now on goes to them too, input comes from stdin until it ends."""
        held = self._held(request["container"])
        for name, fd in zip(request["streams"], fds, strict=True):
            if name == "stdin":
                self._feed(held, fd, once=bool(request.get("stdin_once")))
                continue
            for stream in held.streams:
                if stream.name == name:
                    stream.attached.append(os.dup(fd))
            os.close(fd)

    def do_resize(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        held, width, height = self._held(request["container"]), request["width"], request["height"]
        if not request.get("exec_id") and held.stdin >= 0 and os.isatty(held.stdin):
            fcntl.ioctl(held.stdin, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        else:
            self._handler.resize(request["container"], request.get("exec_id", ""), width, height)

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
            name: {"started": held.started, "exit": asdict(held.end) if held.end else None, "blocked": held.log.blocked}
            for name, held in self._containers.items()
        }
        return {"containers": containers, "lost": self._lost}

    def do_delete(self, request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        held = self._containers.get(request["container"])
        self._handler.delete(request["container"])
        if held is not None:
            for stream in list(held.streams):
                stream.drain()
                stream.close()
            if held.stdin >= 0:
                os.close(held.stdin)
            held.log.close()
            del self._containers[request["container"]]

    def do_destroy(self, _request: dict[str, Any], _fds: list[int], _given: list[int]) -> None:
        """The sandbox off the host; the shim ends once its caller has hung up."""
        self._handler.destroy_sandbox()
        self.loop.end()

    # inside

    def _held(self, container: str) -> Held:
        try:
            return self._containers[container]
        except KeyError:
            raise NotFound(what=f"find container {container[:12]}", cause="its shim does not hold it") from None

    def _child_ended(self, pid: int, status: int) -> None:
        callback = self._children.pop(pid, None)
        if callback is not None:
            callback(status)

    def _feed(self, held: Held, source: int, *, once: bool) -> None:
        """Pass `source` on to the container's input until it ends; with `once` that ends the input too."""
        os.set_blocking(source, False)

        def readable() -> None:
            try:
                data = os.read(source, 65536)
            except BlockingIOError:
                return
            if data and held.stdin >= 0:
                view = memoryview(data)
                while view:
                    view = view[os.write(held.stdin, view) :]
                return
            self.loop.unwatch(source)
            os.close(source)
            if once and not held.tty and held.stdin >= 0:
                os.close(held.stdin)
                held.stdin = -1

        self.loop.watch(source, readable)

    def _remember(self) -> None:
        own = process.status(os.getpid())
        document = {
            "version": messages.VERSION,
            "pid": os.getpid(),
            "start_time": own[2] if own else 0,
            "handler": self._handler_name,
            "sandbox": asdict(self._sandbox) if self._sandbox else None,
        }
        _write(f"{self.directory}/shim.json", document)


def main(directory: str, handler: str, listener: socket.socket, inherited: dict[str, int]) -> None:
    """What a forked child of the zygote becomes; returns when the sandbox is destroyed."""
    Supervisor(directory, handler, listener, inherited).serve()


def _make(name: str, host: Supervisor) -> Any:
    if name == "kata":
        from nacre.kata.handler import KataHandler

        return KataHandler(host)
    from nacre.shim.runc_handler import RuncHandler

    return RuncHandler(host)


def _pipes(*, stdin: bool) -> tuple[tuple[int, int, int], Stdio]:
    """((write end of stdin or -1, read ends of stdout and stderr), the other ends)."""
    out, err = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    feed = os.pipe2(os.O_CLOEXEC) if stdin else (-1, -1)
    return (feed[1], out[0], err[0]), Stdio(stdin=feed[0] if stdin else None, stdout=out[1], stderr=err[1])


def _write(path: str, document: dict[str, Any]) -> None:
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, json.dumps(document, separators=(",", ":")).encode())
    finally:
        os.close(fd)
    os.rename(path + ".new", path)
