"""Bundles for tests of nacre-runc: a root filesystem of a static busybox, a config.json to change, and the command line itself."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nacre.linux import cgroups
from nacre.runc import templates

REPOSITORY = Path(__file__).resolve().parents[2]
RUNC = str(Path(sys.executable).parent / "nacre-runc")
SYSTEMD = os.environ.get("NACRE_TEST_CGROUPS") == "systemd"  # in machines whose init it is (tests/vm/test_runc_matrix.py)
RUNTIME = (RUNC, "--systemd-cgroup") if SYSTEMD else (RUNC,)
CGROUP_PARENT = "/nacre-test-runc"
CALL_S = float(os.environ.get("NACRE_TEST_CALL_S", "30"))
APPLETS = """sh cat echo id ls stat pwd env hostname mount umount touch mkdir rm ln sleep true false test kill ps head tail wc grep sed
cut sort seq dd readlink tty stty chmod chown mknod unshare nproc date ip sysctl find ulimit nice tr printf dmesg mkfifo"""


def environment(**more: str) -> dict[str, str]:
    """Ours, with byte code kept as an installed nacre has it: compiling would be most of each call's time."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(REPOSITORY / ".cache" / "pycache")} | more


def busybox() -> str:
    """The static busybox: the machine's, or the one that `./run test` unpacked."""
    for place in (*REPOSITORY.glob(".cache/peers/**/bin/busybox"), Path("/bin/busybox"), Path("/usr/bin/busybox")):
        if place.is_file() and place.read_bytes()[:4] == b"\x7fELF":
            return str(place)
    raise AssertionError("busybox is not unpacked: ./run test does it")


def fill(rootfs: Path) -> None:
    for name in ("bin", "dev", "proc", "sys", "tmp", "etc", "root", "mnt"):
        (rootfs / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(busybox(), rootfs / "bin" / "busybox")
    for applet in APPLETS.split():
        (rootfs / "bin" / applet).symlink_to("busybox")
    (rootfs / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n")


def plain_config(cgroup: str) -> dict[str, Any]:
    """A root shell's worth: all namespaces but user and time, nothing read-only, no terminal."""
    config = templates.spec(rootless=False)
    if {"type": "cgroup"} not in config["linux"]["namespaces"]:  # by default on cgroup v2 alone
        config["linux"]["namespaces"].append({"type": "cgroup"})
    config["process"] |= {"terminal": False, "args": ["true"], "env": ["PATH=/bin"], "noNewPrivileges": False}
    config["process"]["rlimits"] = []
    config["root"]["readonly"] = False
    config["linux"]["cgroupsPath"] = cgroup
    return config


@dataclass
class Bundle:
    """One bundle directory and the runtime's root that its containers live in."""

    path: Path
    root: Path
    name: str
    cgroup: str
    config: dict[str, Any] = field(default_factory=dict)
    runtime: tuple[str, ...] = RUNTIME

    @property
    def rootfs(self) -> Path:
        return self.path / "rootfs"

    @property
    def process(self) -> dict[str, Any]:
        return self.config["process"]

    @process.setter
    def process(self, value: dict[str, Any]) -> None:
        self.config["process"] = value

    @property
    def linux(self) -> dict[str, Any]:
        return self.config["linux"]

    def args(self, *words: str) -> Bundle:
        self.process["args"] = list(words)
        return self

    def script(self, text: str) -> Bundle:
        return self.args("sh", "-c", text)

    def mount(self, destination: str, kind: str, source: str, *options: str, **more: Any) -> Bundle:
        self.config["mounts"].append(
            {"destination": destination, "type": kind, "source": source, "options": list(options)} | more
        )
        return self

    def write(self) -> None:
        (self.path / "config.json").write_text(json.dumps(self.config))

    def call(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`nacre-runc --root ROOT words…`; nothing is raised for a bad end."""
        settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": CALL_S}
        settings |= {"env": environment()} | options
        if "input" in options:
            settings.pop("stdin")
        return subprocess.run([*self.runtime, "--root", str(self.root), *words], check=False, **settings)

    def ok(self, *words: str, **options: Any) -> str:
        done = self.call(*words, **options)
        assert done.returncode == 0, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def quietly(self, *words: str, **options: Any) -> None:
        """For what leaves a process behind: that one would hold our pipes."""
        self.ok(*words, stdout=subprocess.DEVNULL, stderr=None, capture_output=False, **options)

    def fails(self, *words: str, code: int = 1, **options: Any) -> str:
        """What the command says on stderr when it fails, as it must."""
        done = self.call(*words, **options)
        assert done.returncode == code, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr and done.stderr.startswith("nacre-runc: ")
        return done.stderr

    def run(self, script: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
        """The container in the foreground, with `script` as its shell's where one is given."""
        if script:
            self.script(script)
        self.write()
        return self.call("run", "--bundle", str(self.path), self.name, **options)

    def says(self, script: str, **options: Any) -> str:
        """What `script` prints inside; it must end well."""
        done = self.run(script, **options)
        assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def refuses(self, script: str = "") -> str:
        """stderr of a run that must fail in the runtime."""
        done = self.run(script)
        assert done.returncode == 1 and done.stderr.startswith("nacre-runc: "), f"{done.returncode}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stderr

    def create(self, *options: str, **settings: Any) -> None:
        """create, its stdio being files: the runtime returns while init still holds them."""
        self.write()
        with (self.path / "stdout").open("w") as out, (self.path / "stderr").open("w") as err:
            done = self.call(
                "create",
                "--bundle",
                str(self.path),
                *options,
                self.name,
                stdout=out,
                stderr=err,
                capture_output=False,
                **settings,
            )
        assert done.returncode == 0, (self.path / "stderr").read_text()

    def up(self, script: str = "sleep 100", *options: str) -> int:
        """A running container; its pid."""
        self.script(script).create(*options)
        self.ok("start", self.name)
        return self.state()["pid"]

    def state(self) -> dict[str, Any]:
        return json.loads(self.ok("state", self.name))

    def exec(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.call("exec", *words, **options)

    def inside(self, script: str, *options: str) -> str:
        """What a further process in the running container prints."""
        return self.ok("exec", *options, self.name, "sh", "-c", script)

    def output(self) -> str:
        return (self.path / "stdout").read_text()

    def gone(self) -> None:
        """Delete whatever there is, then prove that nothing is left on the host."""
        for identifier in os.listdir(self.root) if self.root.exists() else ():
            if not identifier.startswith("."):
                self.ok("delete", "--force", identifier)
        assert leftovers(self) == []


def leftovers(bundle: Bundle) -> list[str]:
    """Mounts, cgroups, processes and files that a container of this bundle has left on the host."""
    with open("/proc/self/mountinfo") as file:
        found = [f"mount {line.split()[4]}" for line in file if f"{bundle.path}/" in line]
    layout = cgroups.discover()
    for hierarchy in layout.hierarchies:
        directory = layout.directory(hierarchy, bundle.cgroup)
        found += [f"cgroup {directory}"] if os.path.exists(directory) else []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/root").startswith(str(bundle.rootfs)):
                found.append(f"process {pid}")
        except OSError:
            continue
    if bundle.root.exists():
        found += [f"file {name}" for name in os.listdir(bundle.root) if not name.startswith(".")]
    return found


@contextmanager
def made(directory: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Iterator[Bundle]:
    """A bundle below `directory`, and nothing of it on the host afterwards."""
    name = f"t{uuid.uuid4().hex[:10]}"
    bundle = Bundle(path=directory / "bundle", root=directory / "state", name=name, cgroup=f"{CGROUP_PARENT}-{name}")
    fill(bundle.rootfs)
    bundle.config = plain_config(bundle.cgroup)
    if SYSTEMD:
        bundle.cgroup = f"/system.slice/nacre-test-runc-{name}.scope"
        bundle.linux["cgroupsPath"] = f"system.slice:nacre-test-runc:{name}"
    if change is not None:
        change(bundle.config)
    try:
        yield bundle
    finally:
        bundle.gone()


def with_user_namespace(bundle: Bundle, size: int = 65536, first: int = 200000) -> Bundle:
    """Root inside is `first` outside; the root filesystem is given to it."""
    bundle.linux["namespaces"] = [*bundle.linux["namespaces"], {"type": "user"}]
    bundle.linux["uidMappings"] = bundle.linux["gidMappings"] = [{"containerID": 0, "hostID": first, "size": size}]
    for place in (bundle.rootfs, *bundle.rootfs.rglob("*")):
        os.chown(place, first, first, follow_symlinks=False)
    for place in (bundle.path, *bundle.path.parents):
        if place == Path("/tmp"):
            break
        place.chmod(place.stat().st_mode | 0o755)
    return bundle


def changed(config: Mapping[str, Any], path: Sequence[str | int], value: Any) -> dict[str, Any]:
    """A copy with the element at `path` replaced."""
    result = copy.deepcopy(dict(config))
    place: Any = result
    for step in path[:-1]:
        place = place.setdefault(step, {}) if isinstance(place, dict) else place[step]
    place[path[-1]] = value
    return result
