"""The daemon of a node: CRI, API, controllers and kubelet in one asyncio loop, started by `nacre up`.

Files (under the prefix): STATE/node.lock is held (flock) for the daemon's life, STATE/node.json tells which process it is and which
ports are in use, STATE/node.sock takes commands, LOGS/../COMPONENT.log are its logs. A kill at any instant leaves pods running under
their shims; the next daemon takes the lock, overwrites node.json and finds them. The CRI's zygote is executed before anything that
starts threads is imported, hence the imports inside functions.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from logging.handlers import RotatingFileHandler
from typing import Any, Protocol

from nacre import __version__, config
from nacre.cli import control, host
from nacre.config import Config
from nacre.oci.errors import AlreadyExists, Failure, encode, from_exception

SERVICES = ("cri", "api", "controllers", "kubelet")  # in the order of starting; stopped the other way round
LOGGERS = {"cri": ("cri", "images", "network", "shim", "runc"), "kata": ("kata",)}  # log file → packages, where they differ
LOG_LIMIT = 8 * 1024 * 1024  # bytes a file, one older file is kept
log = logging.getLogger("nacre.node")


class Service(Protocol):
    async def start(self) -> None: ...

    async def stop(self) -> None: ...


@dataclass(slots=True)
class Node:
    """What this process holds."""

    config: Config
    only: tuple[str, ...] = SERVICES
    running: dict[str, Service] = field(default_factory=dict)
    started_ns: int = field(default_factory=time.time_ns)
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, report: Callable[[dict[str, Any]], None]) -> None:
        """Start the services in order; what had started is stopped again when one fails."""
        for name in self.only:
            began = time.monotonic()
            report({"starting": name})
            try:
                self.running[name] = service = _make(name, self.config)
                await service.start()
            except BaseException:
                await self.stop()
                raise
            log.info("%s is up after %.0f ms", name, (time.monotonic() - began) * 1000)

    async def stop(self, *names: str) -> None:
        """Stop these services (all), last started first; one that fails to stop does not keep the others."""
        for name in reversed([name for name in self.running if name in names or not names]):
            service = self.running.pop(name)
            try:
                await service.stop()
            except Exception:
                log.exception("stop %s", name)

    async def status(self, _request: dict[str, Any], _progress: control.Progress) -> dict[str, Any]:
        return _identity(self.config) | {"started_ns": self.started_ns, "services": list(self.running)}

    async def down(self, request: dict[str, Any], progress: control.Progress) -> dict[str, Any]:
        """Every pod off the host, then the services; API objects stay in the database and come back with the next `up`."""
        from nacre.cli import drain

        await self.stop("kubelet", "controllers")
        gone = await drain.pods(self.config, float(request.get("grace_s", 5)), progress) if "cri" in self.running else 0
        await self.stop()
        await asyncio.to_thread(drain.rest, self.config)
        asyncio.get_running_loop().call_later(0.05, self.ending.set)  # the answer leaves first
        return {"pods": gone}


def _make(name: str, settings: Config) -> Service:
    from importlib import import_module

    service: Service = import_module(f"nacre.{name}.service").Service(settings)
    return service


def main() -> None:
    """`python -m nacre.cli.node`: not for people. Reports on --report-fd: JSON lines `starting`, then `ready` or `failure`."""
    parser = argparse.ArgumentParser(prog="nacre.cli.node")
    parser.add_argument("--prefix", default=None)
    parser.add_argument("--listen", default="")
    parser.add_argument("--only", default=",".join(SERVICES))
    parser.add_argument("--report-fd", type=int, default=-1)
    options = parser.parse_args()
    os.umask(0o022)
    report = _reporter(options.report_fd)
    try:
        settings = config.load(options.prefix)
        settings = replace(settings, listen=options.listen or settings.listen)
        _directories(settings)
        lock = _lock(settings)
        _logging(settings)
        settings = _with_ports(settings)
        _write_identity(settings)
        asyncio.run(_serve(Node(settings, only=tuple(options.only.split(","))), report))
        os.close(lock)
    except Exception as error:
        failure = from_exception("start the node", error)
        if not isinstance(error, Failure):
            log.exception("start the node")
        report({"failure": encode(failure)})
        sys.exit(1)


async def _serve(node: Node, report: Callable[[dict[str, Any]], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, node.ending.set)
    await node.start(report)
    server = await control.serve(node.config, {"status": node.status, "down": node.down})
    report({"ready": await node.status({}, print)})
    await node.ending.wait()
    log.info("ending")
    server.close()
    await node.stop()
    os.unlink(control.path(node.config))


def _reporter(fd: int) -> Callable[[dict[str, Any]], None]:
    """Writes JSON lines to `fd` until the reader leaves; nothing for -1. Closed after `ready` or `failure`."""
    open_fds = []
    if fd >= 0:  # a copy of our own, above the standard descriptors, which children get
        open_fds.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
        if fd > 2:
            os.close(fd)

    def report(message: dict[str, Any]) -> None:
        if not open_fds:
            return
        try:
            os.write(open_fds[0], json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            message = {"ready": {}}
        if "ready" in message or "failure" in message:
            os.close(open_fds.pop())

    return report


def _directories(settings: Config) -> None:
    for directory, mode in (
        (settings.state, 0o711),
        (settings.trace_dir, 0o700),
        (settings.data, 0o711),
        (settings.etc, 0o755),
        (settings.log_dir, 0o755),
    ):
        os.makedirs(directory, exist_ok=True)
        os.chmod(directory, mode)


def _lock(settings: Config) -> int:
    """The node's lock, held until this process ends; AlreadyExists names the holder."""
    fd = os.open(f"{settings.state}/node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = read_identity(settings).get("pid", "unknown")
        raise AlreadyExists(
            what="start the node", cause=f"a daemon with pid {holder} holds {settings.state}/node.lock", remedy="nacre status"
        ) from error
    return fd


def _logging(settings: Config) -> None:
    directory = os.path.dirname(settings.log_dir)
    form = logging.Formatter("%(asctime)s.%(msecs)03d %(levelname).1s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    for component in ("node", *SERVICES, "kata"):
        handler = RotatingFileHandler(f"{directory}/{component}.log", maxBytes=LOG_LIMIT, backupCount=1)
        handler.setFormatter(form)
        if component == "node":
            logging.getLogger().addHandler(handler)
            continue
        for package in LOGGERS.get(component, (component,)):
            logger = logging.getLogger(f"nacre.{package}")
            logger.addHandler(handler)
            logger.propagate = False
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("nacre").setLevel(logging.INFO)


def _with_ports(settings: Config) -> Config:
    """`settings` with real numbers for ports that were left open: those of the last daemon where still free, else free ones."""
    before = read_identity(settings)
    api = settings.api_port or _free_port(settings.listen, int(before.get("api_port", 0)), {settings.kubelet_port})
    kubelet = settings.kubelet_port or _free_port(settings.listen, int(before.get("kubelet_port", 0)), {api})
    return replace(settings, api_port=api, kubelet_port=kubelet)


def _free_port(address: str, wanted: int, taken: set[int]) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in (wanted, 0, 0, 0):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                continue
            number: int = probe.getsockname()[1]
            if number not in taken:
                return number
    raise Failure(what="choose a free port", cause=f"{address}: none could be bound", remedy="set api_port and kubelet_port")


def _identity(settings: Config) -> dict[str, Any]:
    return {
        "version": __version__,
        "pid": os.getpid(),
        "started": host.start_ticks(os.getpid()),
        "prefix": settings.prefix,
        "instance": settings.instance,
        "node": settings.node_name,
        "listen": settings.listen,
        "api_port": settings.api_port,
        "kubelet_port": settings.kubelet_port,
        "cri": settings.cri_socket,
    }


def _write_identity(settings: Config) -> None:
    name = f"{settings.state}/node.json"
    with open(name + ".new", "w") as file:
        json.dump(_identity(settings), file, indent=1)
    os.replace(name + ".new", name)


def read_identity(settings: Config) -> dict[str, Any]:
    """What the last daemon wrote about itself, {} where none did; it may be long dead."""
    try:
        with open(f"{settings.state}/node.json", "rb") as file:
            document: dict[str, Any] = json.load(file)
    except (FileNotFoundError, ValueError):
        return {}
    return document


def alive(settings: Config) -> int:
    """The pid of a living daemon of this node, 0 if there is none."""
    identity = read_identity(settings)
    try:
        pid = int(identity["pid"])
        return pid if host.start_ticks(pid) == identity["started"] else 0
    except KeyError:
        return 0


if __name__ == "__main__":
    main()
