"""A CRI service alone under a prefix of its own, and the calls a kubelet makes, by blocking gRPC stubs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from nacre import config
from nacre.cli import archive
from nacre.cli.bench.engine import find_busybox
from nacre.oci.errors import Failure
from nacre.wire import cri as wire
from nacre.wire import cri_pb2 as cri

IMAGE = "nacre.local/test:1"
FOREVER = ("sleep", "2147483647")
_APPLETS = (
    "sh cat sleep true false id echo env hostname mount umount touch ls ps wc dd kill head tail grep stat printf rm ln mkdir "
    "chmod nc readlink seq yes df sort mkfifo test sync nproc tr cut awk sed od setsid find"
)
_FILES = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nweb:x:101:102:web:/home/web:/bin/sh\n",
    "etc/group": b"root:x:0:\nweb:x:102:\nextra:x:300:web\n",
    "root/empty": b"",
    "tmp/empty": b"",
}


def build_image(path: Path) -> Path:
    """A docker-archive of busybox; made once a run."""
    if not path.exists():
        with open(find_busybox(), "rb") as file:
            files = {"bin/busybox": file.read()} | _FILES
        layer = archive.tar(files, links={f"bin/{name}": "busybox" for name in _APPLETS.split()})
        archive.write(str(path), [IMAGE], layer, entrypoint=["/bin/busybox", "sleep", "1000"], made_by="tests")
    return path


@dataclass
class Cri:
    """The daemon's process and stubs; `start` again after a kill."""

    prefix: Path
    settings: str = ""
    process: subprocess.Popen[bytes] | None = None
    runtime: Any = None
    images: Any = None
    channel: Any = None
    environment: dict[str, str] = field(default_factory=dict)
    wrapper: tuple[str, ...] = ()  # words before the daemon's own, such as unshare
    made: int = 0

    @property
    def config(self) -> config.Config:
        return config.load(str(self.prefix))

    @property
    def state(self) -> Path:
        return self.prefix / "run/nacre"

    def start(self) -> Cri:
        (self.prefix / "etc/nacre").mkdir(parents=True, exist_ok=True)
        (self.prefix / "etc/nacre/config.toml").write_text(self.settings)
        read, write = os.pipe()
        words = [sys.executable, "-m", "nacre.cli.node", "--prefix", str(self.prefix), "--only", "cri", "--report-fd", str(write)]
        with open(self.prefix / "daemon.out", "ab") as output:
            self.process = subprocess.Popen(
                [*self.wrapper, *words],
                pass_fds=(write,),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | {"NACRE_NODE": self.config.instance} | self.environment,
            )
        os.close(write)
        with open(read) as reports:
            said = [json.loads(line) for line in reports]
        if not said or "ready" not in said[-1]:
            raise AssertionError(f"the daemon did not come up: {said}\n{self.log()}")
        self.connect()
        return self

    def connect(self) -> None:
        self.channel = grpc.insecure_channel(f"unix://{self.config.cri_socket}", options=list(wire.CHANNEL_OPTIONS))
        grpc.channel_ready_future(self.channel).result(timeout=20)
        self.runtime = wire.Stub(self.channel, "RuntimeService")
        self.images = wire.Stub(self.channel, "ImageService")

    def load(self, archive_path: Path) -> None:
        self.nacre("image", "import", str(archive_path))

    def nacre(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", "from nacre.cli.main import main; main()", "--prefix", str(self.prefix), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill(self) -> None:
        """kill -9 of the daemon alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.channel.close()

    def end(self) -> None:
        """The daemon's own ending; pods go on."""
        assert self.process is not None
        self.channel.close()
        self.process.terminate()
        assert self.process.wait(20) == 0

    def reset(self) -> None:
        if self.channel is not None:
            self.channel.close()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.nacre("reset", "--yes")
        shutil.rmtree(self.prefix, ignore_errors=True)

    def log(self) -> str:
        texts = [path.read_text(errors="replace")[-4000:] for path in sorted(self.prefix.glob("var/log/nacre/*.log"))]
        return "\n".join([*texts, (self.prefix / "daemon.out").read_text(errors="replace")[-4000:]])

    # what a kubelet asks

    def pod_config(self, name: str = "", **fields: Any) -> Any:
        self.made += 1
        name = name or f"pod-{self.made}"
        logs = self.prefix / "var/log/nacre/pods" / name
        options = fields.pop("namespaces", None) or cri.NamespaceOption(pid=cri.CONTAINER)
        linux = fields.pop("linux", {})
        linux.setdefault("security_context", cri.LinuxSandboxSecurityContext(namespace_options=options))
        values = {"hostname": name, "log_directory": str(logs), "linux": cri.LinuxPodSandboxConfig(**linux)} | fields
        metadata = cri.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="default", attempt=values.pop("attempt", 0))
        return cri.PodSandboxConfig(metadata=metadata, **values)

    def run_pod(self, name: str = "", *, handler: str = "", **fields: Any) -> Pod:
        wanted = self.pod_config(name, **fields)
        request = cri.RunPodSandboxRequest(config=wanted, runtime_handler=handler)
        return Pod(self, wanted, self.runtime.RunPodSandbox(request).pod_sandbox_id)

    @contextmanager
    def pod(self, name: str = "", **fields: Any) -> Iterator[Pod]:
        made = self.run_pod(name, **fields)
        try:
            yield made
        finally:
            made.remove()

    def status(self, container: str) -> Any:
        return self.runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container)).status

    def ended(self, container: str, limit_s: float = 20.0) -> Any:
        """The container's status once it has exited."""
        return until(lambda: (status := self.status(container)).state == cri.CONTAINER_EXITED and status, limit_s)

    def remove_container(self, container: str) -> None:
        self.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))

    def stop_container(self, container: str, grace_s: int) -> None:
        self.runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=grace_s))

    def exec(self, container: str, *command: str, timeout_s: int = 30) -> Any:
        return self.runtime.ExecSync(cri.ExecSyncRequest(container_id=container, cmd=command, timeout=timeout_s))

    def sh(self, container: str, script: str) -> str:
        """stdout of a script that must succeed."""
        answer = self.exec(container, "sh", "-c", script)
        assert answer.exit_code == 0, answer
        return str(answer.stdout.decode())

    def shim(self, sandbox: str) -> int:
        return int(json.loads((self.state / f"pods/{sandbox}/shim.json").read_text())["pid"])


@dataclass
class Pod:
    cri: Cri
    config: Any
    id: str
    made: int = 0

    def create(self, *command: str, name: str = "", security: dict[str, Any] | None = None, **fields: Any) -> str:
        """A container's id, created; `security` are fields of its LinuxContainerSecurityContext, `resources` of its limits."""
        self.made += 1
        name = name or f"c{self.made}"
        options = fields.pop("namespaces", None) or self.config.linux.security_context.namespace_options
        context = cri.LinuxContainerSecurityContext(**{"namespace_options": options} | (security or {}))
        resources = cri.LinuxContainerResources(**fields.pop("resources", {}))
        wanted = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name=name, attempt=fields.pop("attempt", 0)),
            image=cri.ImageSpec(image=fields.pop("image", IMAGE)),
            command=command,
            log_path=f"{name}.log",
            linux=cri.LinuxContainerConfig(security_context=context, resources=resources),
            **fields,
        )
        request = cri.CreateContainerRequest(pod_sandbox_id=self.id, config=wanted, sandbox_config=self.config)
        return str(self.cri.runtime.CreateContainer(request).container_id)

    def start(self, *command: str, **fields: Any) -> str:
        """The same, running."""
        made = self.create(*command, **fields)
        self.cri.runtime.StartContainer(cri.StartContainerRequest(container_id=made))
        return made

    def run(self, script: str, **fields: Any) -> str:
        """What a script prints as a container's own process, which must succeed."""
        made = self.start("sh", "-c", script, **fields)
        status = self.cri.ended(made)
        text = self.text(f"c{self.made}")
        assert status.exit_code == 0, (status.exit_code, status.message, text)
        return text

    def log_path(self, name: str) -> Path:
        return Path(self.config.log_directory) / f"{name}.log"

    def text(self, name: str, stream: str = "stdout") -> str:
        """What the log says, put together again."""
        out = ""
        for line in log_lines(self.log_path(name)):
            if line.stream == stream:
                out += line.text + ("\n" if line.full else "")
        return out

    def status(self) -> Any:
        return self.cri.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=self.id)).status

    def stop(self) -> None:
        self.cri.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=self.id))

    def remove(self) -> None:
        self.cri.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=self.id))


@dataclass(frozen=True)
class Line:
    stream: str
    full: bool
    text: str


_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (stdout|stderr) ([PF]) (.*)", re.DOTALL)


def log_lines(path: Path) -> list[Line]:
    """A CRI log, each line checked against the format."""
    lines = []
    for raw in path.read_bytes().decode().split("\n")[:-1]:
        match = _LINE.fullmatch(raw)
        assert match, f"not a CRI log line: {raw[:120]!r}"
        lines.append(Line(match[1], match[2] == "F", match[3]))
    return lines


def until(check: Callable[[], Any], limit_s: float = 10.0) -> Any:
    """The first true answer of `check`, asked every few ms: for states that nobody announces."""
    deadline = time.monotonic() + limit_s
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {limit_s} s"
        select.select([], [], [], 0.01)
    return found


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, Failure]:
    """The status and the whole Failure of a call that must not succeed."""
    try:
        answer = call()
    except grpc.RpcError as error:
        return error.code(), wire.failure_of(error, "?")
    raise AssertionError(f"succeeded: {answer}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Streamed:
    """What came over an exec or attach WebSocket."""

    out: bytes = b""
    err: bytes = b""
    status: dict[str, Any] = field(default_factory=dict)
    protocol: str = ""


def stream(
    url: str, *, stdin: bytes | None = None, protocol: str = "v5.channel.k8s.io", first: tuple[bytes, ...] = ()
) -> Streamed:
    """One session to its end: `first` messages, then `stdin` and the channel's end, all answers collected."""
    return asyncio.run(_stream(url, stdin, protocol, first))


async def _stream(url: str, stdin: bytes | None, protocol: str, first: tuple[bytes, ...]) -> Streamed:
    got = Streamed()
    async with aiohttp.ClientSession() as session, session.ws_connect(url, protocols=(protocol,), max_msg_size=0) as ws:
        got.protocol = ws.protocol or ""
        for message in first:
            await ws.send_bytes(message)
        if stdin is not None:
            for start in range(0, len(stdin), 32768):
                await ws.send_bytes(b"\0" + stdin[start : start + 32768])
            await ws.send_bytes(bytes([255, 0]))
        async with asyncio.timeout(60):
            async for message in ws:
                channel, data = message.data[0], message.data[1:]
                if channel == 1:
                    got.out += data
                elif channel == 2:
                    got.err += data
                elif channel == 3:
                    got.status = json.loads(data)
    return got


def killed(pid: int) -> None:
    """kill -9 and wait until it is gone; the process is none of our children."""
    fd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([fd], [], [], 10)
    os.close(fd)


def attach_terminal(service: Cri, container: str, words: bytes) -> bytes:
    """What is heard on a container's terminal after `words` were typed, until it ends."""
    url = service.runtime.Attach(cri.AttachRequest(container_id=container, stdin=True, stdout=True, tty=True)).url
    return stream(url, first=(b"\0" + words,)).out
