"""The API server's life inside the daemon: keys, storage, first objects, listening socket."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import socket
import ssl
import sys

from aiohttp import web

from nacre.api import decode, kubeconfig
from nacre.api.access import MASTERS, User
from nacre.api.admission import Admission
from nacre.api.kinds import require
from nacre.api.server import Api
from nacre.api.status import Refusal
from nacre.api.store import SqliteStore
from nacre.api.write import Call, Writer
from nacre.config import Config, node_address
from nacre.oci.errors import Failure

log = logging.getLogger("nacre.api")

NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")
COMPACT_EVERY_S = 60.0
SHUTDOWN_S = 1.0  # watches are cut after this; their clients resume
_ITSELF = User("system:apiserver", (MASTERS,))


class KeysFailed(Failure):
    """The process that makes certificates ended with an error."""


class PortTaken(Failure):
    """Someone else listens where the API server should."""


class Service:
    """`start` returns when requests are answered; `stop` when nothing of it is left in the process."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._store: SqliteStore | None = None
        self._api: Api | None = None
        self._runner: web.ServerRunner | None = None
        self._compactor: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        """Raises KeysFailed, PortTaken, StorageFailed."""
        config = self._config
        await make_keys(config)
        self._store = SqliteStore(f"{config.data}/api.db")
        self._api = Api(self._store, pki_dir(config))
        await _bootstrap(self._store)
        await self._listen(self._api)
        note_port(config, "api_port", self.port)
        kubeconfig.write(config.admin_conf, server=self.url, pki=pki_dir(config), user="admin")
        self._compactor = asyncio.create_task(self._compact())

    @property
    def url(self) -> str:
        host = self._config.listen
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"https://[{host}]:{self.port}" if ":" in host else f"https://{host}:{self.port}"

    async def stop(self) -> None:
        if self._compactor is not None:
            self._compactor.cancel()
            await asyncio.gather(self._compactor, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        if self._api is not None:
            await self._api.close()
        if self._store is not None:
            await asyncio.to_thread(self._store.close_writer)
            self._store.close()
        self._compactor = self._runner = self._api = self._store = None

    async def _listen(self, api: Api) -> None:
        config = self._config
        server = web.Server(api.handle, request_factory=_request, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=SHUTDOWN_S)
        await self._runner.setup()
        listener = _listener(config.listen, _wanted_port(config))
        self.port = int(listener.getsockname()[1])
        await web.SockSite(self._runner, listener, ssl_context=_server_context(pki_dir(config))).start()

    async def _compact(self) -> None:
        while self._store is not None:
            await asyncio.sleep(COMPACT_EVERY_S)
            try:
                await self._store.compact()
            except Failure as failure:
                log.warning("%s", failure.sentence())


def pki_dir(config: Config) -> str:
    return f"{config.data}/pki"


async def make_keys(config: Config) -> None:
    """Bring DATA/pki up to date in a process of its own, which takes `cryptography` with it."""
    own = (config.listen, node_address(config), "127.0.0.1", "::1", "localhost")
    hosts = dict.fromkeys([*own, config.node_name, socket.gethostname().lower()])
    words = [sys.executable, "-m", "nacre.api.pki", pki_dir(config), "--node", config.node_name]
    for host in hosts:
        if host and host not in ("0.0.0.0", "::"):
            words += ["--host", host]
    process = await asyncio.create_subprocess_exec(
        *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    if process.returncode:
        lines = errors.decode(errors="replace").splitlines()
        cause = lines[-1] if lines else f"exit code {process.returncode}"
        raise KeysFailed(what=f"make the certificates in {pki_dir(config)}", cause=cause, evidence=tuple(lines))


def _request(*arguments: object) -> web.BaseRequest:
    """aiohttp's request with Kubernetes' limit on bodies."""
    message, payload, protocol, writer, task = arguments
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=decode.BODY_LIMIT)  # type: ignore[arg-type]


def _server_context(pki: str) -> ssl.SSLContext:
    """Client certificates are asked for; who shows none is anonymous, who shows a foreign one is refused."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=f"{pki}/ca.crt")
    context.load_cert_chain(f"{pki}/apiserver.crt", f"{pki}/apiserver.key")
    context.verify_mode = ssl.CERT_OPTIONAL
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _wanted_port(config: Config) -> int:
    """The configured port; for 0 the one used last, so that kubeconfigs stay true over a restart."""
    if config.api_port:
        return config.api_port
    try:
        with open(f"{config.state}/node.json", "rb") as file:
            port = json.load(file).get("api_port", 0)
    except (OSError, ValueError):
        return 0
    return port if isinstance(port, int) and not _taken(config.listen, port) else 0


def _taken(host: str, port: int) -> bool:
    try:
        _listener(host, port).close()
    except PortTaken:
        return True
    return False


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        cause = f"bind(2) {host}:{port}: {error.strerror}"
        remedy = "set `listen` or `api_port` in config.toml, or end what listens there (`ss -ltnp`)"
        raise PortTaken(what="listen as the API server", cause=cause, remedy=remedy) from error
    return listener


def note_port(config: Config, key: str, value: int) -> None:
    """Put `key` into STATE/node.json beside what others wrote there."""
    os.makedirs(config.state, exist_ok=True)
    path = f"{config.state}/node.json"
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            with open(path, "rb") as file:
                document = json.load(file)
        except (FileNotFoundError, ValueError):
            document = {}
        if document.get(key) != value:
            kubeconfig.write_atomic(path, json.dumps(document | {key: value}, indent=1).encode(), 0o644)
    finally:
        os.close(lock)


async def _bootstrap(store: SqliteStore) -> None:
    """The namespaces that every cluster has."""
    writer, kind = Writer(store, Admission(store)), require("", "v1", "namespaces")
    for name in NAMESPACES:
        call = Call(kind=kind, namespace="", name=name, subresource="", verb="create", user=_ITSELF, manager="nacre")
        try:
            await writer.create_object(call, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        except Refusal as refusal:
            if refusal.reason != "AlreadyExists":
                raise
