"""One CRI endpoint under test, with its image, its network and its cgroup; made and taken down as a whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from nacre import config as configuration
from nacre.cli import archive, lifecycle, reset
from nacre.linux import cgroups
from nacre.oci.errors import Failure, NotFound
from nacre.wire import cri, cri_pb2

IMAGE = "nacre.local/bench:1"
PAUSE = "nacre.local/pause:1"
CGROUP = "/nacre-bench"


@dataclass(slots=True)
class Engine:
    """`group` holds the daemon, its children and (as parent) all pods; `runtime` and `images` are blocking CRI stubs."""

    name: str
    socket: str
    group: cgroups.Cgroup
    log_root: str
    version: Callable[[], str]
    restart_with: Callable[[int], None] | None = None
    prepare: Callable[[], None] | None = None
    slice: str = ""  # systemd's, for its pods, where that makes the engine's cgroups
    channel: Any = None
    runtime: Any = None
    images: Any = None
    made: int = field(default=0)

    def connect(self) -> None:
        """(Re)connect; waits for the socket to answer."""
        self.close()
        self.channel = grpc.insecure_channel(f"unix://{self.socket}", options=list(cri.CHANNEL_OPTIONS))
        grpc.channel_ready_future(self.channel).result(timeout=30)
        self.runtime = cri.Stub(self.channel, "RuntimeService")
        self.images = cri.Stub(self.channel, "ImageService")

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def restart(self, *, pool: int) -> None:
        """Restart the daemon with another size of the VM pool; only nacre has one."""
        assert self.restart_with is not None, f"{self.name} has no VM pool"
        self.close()
        self.restart_with(pool)
        self.connect()

    def prepare_vm(self) -> None:
        """Build what VM pods need (appliance, template), which is not part of any figure."""
        assert self.prepare is not None, f"{self.name} has no VMs"
        self.prepare()

    def sandbox(self) -> cri_pb2.PodSandboxConfig:
        """A new pod's configuration; names never repeat."""
        self.made += 1
        uid = f"bench-{os.getpid()}-{self.made}"
        logs = f"{self.log_root}/{uid}"
        os.makedirs(logs, exist_ok=True)
        return cri_pb2.PodSandboxConfig(
            metadata=cri_pb2.PodSandboxMetadata(name=f"bench-{self.made}", uid=uid, namespace="bench", attempt=0),
            hostname="bench",
            log_directory=logs,
            linux=cri_pb2.LinuxPodSandboxConfig(
                cgroup_parent=self.slice or f"{CGROUP}/{self.name}/pods/{uid}",
                security_context=cri_pb2.LinuxSandboxSecurityContext(namespace_options=namespaces()),
            ),
        )


def namespaces() -> cri_pb2.NamespaceOption:
    """As a kubelet asks for an ordinary pod: the processes of each container by themselves."""
    return cri_pb2.NamespaceOption(pid=cri_pb2.CONTAINER)


@contextmanager
def workplace() -> Iterator[str]:
    """A directory for everything of the run, removed at the end."""
    place = tempfile.mkdtemp(prefix="nacre-bench-")
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def group(name: str) -> Iterator[cgroups.Cgroup]:
    """The engine's cgroup; what is left in it at the end is killed."""
    layout = cgroups.discover()
    made, leaf = (cgroups.Cgroup(layout, f"{CGROUP}/{name}{end}") for end in ("", "/daemon"))
    leaf.create()  # daemons go into a leaf: on cgroup v2 a group with children holds no processes
    try:
        yield made
    finally:
        made.kill()
        made.remove()
        for hierarchy in layout.hierarchies:  # runc also makes groups in hierarchies without controllers
            for directory, _names, _files in os.walk(layout.directory(hierarchy, f"{CGROUP}/{name}"), topdown=False):
                os.rmdir(directory)
            top = layout.directory(hierarchy, CGROUP)
            if os.path.isdir(top) and not any(entry.is_dir() for entry in os.scandir(top)):
                os.rmdir(top)


def enter(name: str) -> None:
    """Move this process (a child before its exec) into the engine's leaf."""
    cgroups.Cgroup(cgroups.discover(), f"{CGROUP}/{name}/daemon").join(os.getpid())


@contextmanager
def nacre(place: str, image: str) -> Iterator[Engine]:
    """nacre's CRI service alone, under a prefix of its own, with the image imported."""
    prefix = f"{place}/nacre"
    settings = configuration.load(prefix)
    with group("nacre") as own:
        process = _start(settings)

        def restart(pool: int) -> None:
            nonlocal process
            _end(process)
            os.makedirs(settings.etc, exist_ok=True)
            with open(f"{settings.etc}/config.toml", "w") as file:
                file.write(f"[kata]\npool = {pool}\n")
            process = _start(configuration.load(prefix))

        def prepare() -> None:
            from nacre.kata import enable

            enable.prepare(settings, progress=lambda _text: None)

        made = Engine("nacre", settings.cri_socket, own, f"{prefix}/logs", _nacre_version, restart, prepare)
        try:
            made.connect()
            command(
                [sys.executable, "-c", "from nacre.cli.main import main; main()", "--prefix", prefix, "image", "import", image]
            )
            yield made
        finally:
            made.close()
            _end(process)
            lifecycle.stop(settings, force=True, say=lambda _text: None)
            reset.remove(settings, reset.paths(settings))


def _nacre_version() -> str:
    from nacre import __version__

    return f"nacre {__version__}"


def _start(settings: configuration.Config) -> subprocess.Popen[bytes]:
    """Start the CRI-only daemon inside the cgroup and wait for its report."""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "nacre.cli.node", "--prefix", settings.prefix, "--only", "cri", "--report-fd", str(write)],
        pass_fds=(write,),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"NACRE_NODE": settings.instance},
        preexec_fn=lambda: enter("nacre"),
    )
    os.close(write)
    with open(read) as reports:
        for line in reports:
            message = json.loads(line)
            if "failure" in message:
                from nacre.oci.errors import decode

                raise decode(message["failure"])
            if "ready" in message:
                return process
    raise Failure(what="start nacre's CRI", cause="the daemon ended before it was ready")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def command(words: list[str]) -> str:
    """Run to the end; a failure shows the command, ready to paste, and what it said."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = tuple((done.stdout + done.stderr).strip().splitlines())
        raise Failure(what=" ".join(words), cause=f"exit code {done.returncode}", evidence=said)
    return done.stdout


def find_busybox() -> str:
    """A statically linked busybox, of which the pods' image is made."""
    found = shutil.which("busybox")
    if not found:
        raise NotFound(what="build the benchmark's image", cause="no busybox in PATH", remedy="./run bench fetches it")
    with open(found, "rb") as file:
        if file.read(2) == b"#!":  # a wrapper of the set-up: the binary is its last word before the arguments
            file.seek(0)
            found = file.read().decode().split("exec ", 1)[1].split()[0]
    return found


def build_image(place: str) -> str:
    """A docker-archive with two tags, one for the pods and one that containerd uses as its pause image."""
    path = f"{place}/bench.tar"
    with open(find_busybox(), "rb") as file:
        layer = archive.tar(
            {"bin/busybox": file.read()}, links={f"bin/{name}": "busybox" for name in ("sh", "sleep", "true", "cat")}
        )
    archive.write(path, [IMAGE, PAUSE], layer, entrypoint=["/bin/busybox", "sleep", "2147483647"], made_by="nacre bench")
    return path
