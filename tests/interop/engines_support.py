"""Other people's engines over nacre-runc: podman, buildah, conmon, containerd, each under directories of its own.

They come unpacked from Debian's packages (`run`, TEST_PEERS). One image of a static busybox is made here and loaded: no registry is asked.
What an engine leaves on the host is looked for in `traces`, which a test compares before and after.
"""

from __future__ import annotations

import hashlib
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nacre.cli import archive
from nacre.cli.bench.engine import find_busybox
from nacre.linux import cgroups, mounts
from nacre.linux.mounts import UnmountFlag

REPOSITORY = Path(__file__).resolve().parents[2]
PEERS = REPOSITORY / ".cache" / "peers"
RUNTIME = Path(sys.executable).parent / "nacre-runc"
IMAGE = "nacre.test/busybox:1"
MANAGER = os.environ.get(
    "NACRE_TEST_CGROUPS", "cgroupfs"
)  # "systemd" in machines whose init it is (tests/vm/test_engines_systemd.py)
CALL_S = int(os.environ.get("NACRE_TEST_CALL_S", "120"))
APPLETS = frozenset(
    {"cat", "chmod", "echo", "env", "false", "grep", "hostname", "id", "kill", "ls", "mount", "ps"}
    | {"readlink", "seq", "sh", "sleep", "stat", "touch", "true", "tty", "wc"}
)
HELPERS = [str(PEERS / "usr/lib/podman"), str(PEERS / "usr/libexec/podman"), "/usr/lib/podman", "/usr/libexec/podman"]
# where the hard limits cannot be raised, podman's own defaults could not be set
CONTAINERS_CONF = """[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
seccomp_profile = "{seccomp}"
log_driver = "k8s-file"
[engine]
cgroup_manager = "{manager}"
events_logger = "file"
runtime = "nacre"
conmon_path = ["{conmon}"]
helper_binaries_dir = {helpers}
init_path = "{init}"
tmp_dir = "{place}/tmp"
lock_type = "file"
[engine.runtimes]
nacre = ["{place}/runtime"]
[network]
network_backend = "netavark"
network_config_dir = "{place}/net"
"""


def group(place: Path) -> str:
    """The cgroup that everything of one engine lies in, as `--cgroup-parent` has it: tests may run side by side."""
    own = hashlib.sha256(bytes(place)).hexdigest()[:8]
    return f"nacretestengines{own}.slice" if MANAGER == "systemd" else f"/nacre-test-engines-{own}"


def _path(place: Path) -> str:
    """Its directory below the hierarchies."""
    return "/" + group(place).lstrip("/")


def found(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"no {name} in PATH: ./run test unpacks it"
    return path


def seccomp_profile() -> Path:
    """The profile that Debian's engines use."""
    return next(
        p for p in (PEERS / "usr/share/containers/seccomp.json", Path("/usr/share/containers/seccomp.json")) if p.exists()
    )


def image(place: Path) -> str:
    """A docker-archive of one layer: busybox and the links to it."""
    files = {"bin/busybox": Path(find_busybox()).read_bytes(), "etc/passwd": b"root:x:0:0::/:/bin/sh\n", "tmp/keep": b""}
    layer = archive.tar(files, links={f"bin/{name}": "busybox" for name in APPLETS})
    archive.write(str(place / "image.tar"), [IMAGE], layer, entrypoint=[], made_by="nacre's tests")
    return str(place / "image.tar")


def environment(place: Path) -> dict[str, str]:
    """Ours, with nothing of the machine's own engines; byte code is kept as an installed nacre has it."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {
        "PYTHONPYCACHEPREFIX": str(REPOSITORY / ".cache" / "pycache"),
        "HOME": str(place / "home"),
        "TMPDIR": str(place),
        "CONTAINERS_CONF": str(place / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(place / "storage.conf"),
        "CONTAINERS_REGISTRIES_CONF": str(place / "registries.conf"),
    }


@dataclass(frozen=True, slots=True)
class Engine:
    """`podman` or `buildah` with storage of its own below `place`."""

    place: Path
    program: str

    def call(self, *words: str, timeout_s: int = CALL_S, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        settings = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
        return subprocess.run(
            [found(self.program), *words],
            env=environment(self.place),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            **settings,
        )

    def __call__(self, *words: str, stdin: str | None = None) -> str:
        """What it prints; it must end well."""
        done = self.call(*words, stdin=stdin)
        assert done.returncode == 0, f"{self.program} {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def run(self, *words: str) -> str:
        """podman run --rm without a network."""
        return self("run", "--rm", "--network", "none", "--cgroup-parent", group(self.place), *words)

    def up(self, name: str, *options: str, script: str = "sleep 1000") -> str:
        words = ("run", "-d", "--name", name, "--network", "none", "--cgroup-parent", group(self.place), *options)
        return self(*words, IMAGE, "sh", "-c", script)


def on_a_terminal(words: list[str], settings: dict[str, str] | None = None) -> list[bytes]:
    """What a command, which must end well, says on a terminal of its own: its words."""
    ours, theirs = pty.openpty()
    done = subprocess.Popen(words, env=settings, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        while data := os.read(ours, 4096):
            said += data
    except OSError:
        pass  # the terminal's last user is gone
    os.close(ours)
    assert done.wait(timeout=CALL_S) == 0, said
    return said.split()


def settle(place: Path) -> None:
    """Configuration files, as ./containers.conf(5) and storage.conf(5) want them."""
    (place / "home/.config/containers").mkdir(parents=True)
    (place / "home/.config/containers/policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    (place / "registries.conf").write_text("unqualified-search-registries = []\n")
    (place / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{place}/root"\nrunroot = "{place}/run"\n',
    )
    helpers = [path for path in HELPERS if os.path.isdir(path)]
    init = next(f"{path}/catatonit" for path in helpers if os.path.exists(f"{path}/catatonit"))
    text = CONTAINERS_CONF.format(
        seccomp=seccomp_profile(),
        conmon=found("conmon"),
        helpers=str(helpers).replace("'", '"'),
        init=init,
        place=place,
        manager=MANAGER,
    )
    (place / "containers.conf").write_text(text)
    (place / "runtime").write_text(f'#!/bin/sh\nexec {RUNTIME} --root {place}/state "$@"\n')
    (place / "runtime").chmod(0o755)


@contextmanager
def engine(place: Path) -> Iterator[Engine]:
    """podman with the image loaded; at the end nothing of it is on the host."""
    settle(place)
    podman = Engine(place, "podman")
    try:
        podman("load", "-i", image(place))
        yield podman
    finally:
        for words in (("pod", "rm", "-af", "-t", "0"), ("rm", "-af", "-t", "0"), ("volume", "rm", "-af")):
            podman.call(*words)
        left = traces(place)
        sweep(place)
        assert left == [], left


def traces(place: Path) -> list[str]:
    """Mounts below `place` (the storage's own aside), cgroups and processes of containers; podman keeps its group for conmons."""
    with open("/proc/self/mountinfo") as lines:
        points = [line.split()[4] for line in lines if f"{place}/" in line]
    found = [f"mount {point}" for point in points if point != f"{place}/root/overlay"]
    found += [f"cgroup {path}" for path in _groups(place)]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if str(place).encode() in words and b"conmon" in words:
            found.append(f"process {pid}")
    return found


def _groups(place: Path) -> list[str]:
    """On a hybrid host podman knows the v1 hierarchies alone, and leaves its pods' empty groups in the other one."""
    layout = cgroups.discover()
    made = []
    for hierarchy in layout.hierarchies:
        top = layout.directory(hierarchy, _path(place))
        if os.path.isdir(top) and not (layout.mode == "hybrid" and hierarchy.version == 2):
            made += [entry.path for entry in os.scandir(top) if entry.is_dir() and entry.name != "conmon"]
    return made


def sweep(place: Path) -> None:
    """Whatever happened: no mount below `place`, no cgroup of the tests' parent."""
    with open("/proc/self/mountinfo") as lines:
        points = [line.split()[4] for line in lines if f"{place}/" in line]
    for point in reversed(points):
        mounts.umount2(point, UnmountFlag.DETACH | UnmountFlag.NOFOLLOW)
    layout = cgroups.discover()
    own = cgroups.Cgroup(layout, _path(place))
    own.kill()
    own.remove()
    for hierarchy in layout.hierarchies:  # conmon's group lies in hierarchies without controllers too
        top = layout.directory(hierarchy, _path(place))
        for path, _, _ in os.walk(top, topdown=False) if os.path.isdir(top) else ():
            os.rmdir(path)
        with suppress(OSError):  # `kube play` takes no parent and uses podman's own: not ours while it holds anything
            for path, _, _ in os.walk(layout.directory(hierarchy, "/libpod_parent"), topdown=False):
                os.rmdir(path)
    for entry in os.scandir("/sys/fs/cgroup") if layout.mode != "v2" else ():  # podman makes directories for what is not mounted
        if entry.is_dir(follow_symlinks=False) and not os.path.ismount(entry.path):
            shutil.rmtree(f"{entry.path}{_path(place)}", ignore_errors=True)
            with suppress(OSError):
                os.rmdir(entry.path)
