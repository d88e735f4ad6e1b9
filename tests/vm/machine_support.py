"""Whole Debian machines for tests that need a host other than this one: its cgroup layout, its init, an empty /var/lib.

A machine is a QEMU guest under TCG. Its disks: a minbase root filesystem, built once, as is the initrd, and kept in
`.cache/machines/DIGEST`; this checkout with its `.venv`, seen in the machine at the path it has here, so that every console script and
every test runs there as it does here; and the job's own files, at /payload. The job's output and exit code come back over the serial
line.
"""

from __future__ import annotations

import atexit
import fcntl
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache" / "machines"
LAYOUTS = ("v2", "v1", "hybrid", "none", "systemd", "systemd-v1")
PACKAGES = (
    "python3",
    "kmod",
    "iproute2",
    "libseccomp2",
    "ca-certificates",
    "procps",
    "busybox-static",
    "systemd",
    "dbus",
    "strace",
)
BOOT_MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk")
V1_CONTROLLERS = ("cpu,cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids")
BROUGHT = (
    "src",
    "tests",
    "examples",
    "pyproject.toml",
    ".venv",
    ".cache/pycache",
    ".cache/peers/bin",
    ".cache/peers/usr/bin/busybox",
    ".cache/peers/usr/bin/newuidmap",
    ".cache/peers/usr/bin/newgidmap",
)
LEFT_HERE = re.compile(r"^(mypy|mypyc|ruff|pip|setuptools|pkg_resources|librt|ast_serialize|kubernetes_validate|.*__mypyc.*|uv)$")
EXIT = re.compile(r"^JOB-EXIT (\d+)\s*$", re.MULTILINE)

INITRD_INIT = """#!/bin/busybox sh
for module in /modules/*.ko; do /bin/busybox insmod $module; done
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mkdir -p /root/payload /root/checkout
/bin/busybox mount -t ext4 -o ro /dev/vdb /root/payload
/bin/busybox mount -t ext4 -o ro /dev/vdc /root/checkout
exec /bin/busybox switch_root /root /bin/sh /payload/init
"""

# Lays out the hierarchies and runs the job, or leaves both to systemd.
MACHINE_INIT = """
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc; mount -t devtmpfs dev /dev
layout=$(sed 's/.*machine.layout=\\([a-z0-9-]*\\).*/\\1/' /proc/cmdline)
case $layout in
  systemd*)
    cp /payload/job.service /etc/systemd/system/
    exec /lib/systemd/systemd --unit=job.service --show-status=no --log-level=warning ;;
esac
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm; mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts; mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
ip link set lo up; hostname machine; mount --make-rshared /
v1() { mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
  for c in %(controllers)s; do mkdir /sys/fs/cgroup/$c; mount -t cgroup -o $c cgroup /sys/fs/cgroup/$c; done
  echo 1 > /sys/fs/cgroup/memory/memory.use_hierarchy 2>/dev/null; }
case $layout in
  v2) mount -t cgroup2 cgroup2 /sys/fs/cgroup ;;
  v1) v1 ;;
  hybrid) v1; mkdir /sys/fs/cgroup/unified; mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified ;;
esac
exec sh /payload/job
"""

JOB_SERVICE = """[Unit]
After=dbus.socket
Wants=dbus.socket
[Service]
Type=oneshot
Delegate=yes
ExecStart=/bin/sh /payload/job
"""

JOB = """
exec </dev/null >/dev/ttyS0 2>&1
export PATH=%(repository)s/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mkdir -p /machine %(repository)s; mount -t tmpfs machine /machine; mkdir /machine/upper /machine/work
mount -t overlay -o lowerdir=/checkout,upperdir=/machine/upper,workdir=/machine/work overlay %(repository)s
cd /root; echo "JOB-START $(cut -d ' ' -f 1 /proc/uptime)"
sh /payload/job.sh
code=$?; echo; echo "JOB-EXIT $code"
sync; echo o > /proc/sysrq-trigger; read forever < /dev/ttyS0
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a job left: its exit code (None: the machine ended without one) and everything the serial line said."""

    code: int | None
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    kernel: Path
    initrd: Path
    root: Path


def run(
    job: str,
    layout: str,
    files: Iterable[tuple[Path, str]],
    workdir: Path,
    timeout_s: int,
    memory_mib: int = 1536,
    packages: tuple[str, ...] = (),
    processors: int = 2,
    kernel_words: str = "",
) -> Outcome:
    """Boot a machine with `layout`, one of LAYOUTS, and `packages` beyond PACKAGES, and run `job` (sh) there.

    `files` (path here, name below /payload) go along.
    """
    assert layout in LAYOUTS, layout
    parts = _parts(packages)
    payload = _pack(job, files, workdir)
    unified = "systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=1" if layout == "systemd-v1" else ""
    command = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-smp", str(processors), "-m", str(memory_mib), "-cpu", "max", "-nodefaults",
        "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio", "-kernel", str(parts.kernel), "-initrd", str(parts.initrd),
        "-append", f"console=ttyS0 quiet panic=-1 random.trust_cpu=on mitigations=off {unified} {kernel_words} machine.layout={layout}",
        "-drive", f"file={parts.root},format=raw,if=virtio,snapshot=on",
        "-drive", f"file={payload},format=raw,if=virtio,readonly=on",
        "-drive", f"file={_checkout()},format=raw,if=virtio,readonly=on",
    ]  # fmt: skip
    console = workdir / f"console.{layout}"  # a file, so that a long job can be watched
    with console.open("wb") as file:
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            file.write(f"\nno end within {timeout_s} s\n".encode())
    output = console.read_text(errors="replace").replace("\r\n", "\n")
    match = EXIT.search(output)
    return Outcome(code=int(match[1]) if match else None, output=output)


# -- what the test brings


def _pack(job: str, files: Iterable[tuple[Path, str]], workdir: Path) -> Path:
    """The disk with the job."""
    image = workdir / "payload.ext4"
    with _scratch(workdir) as tree:
        for source, name in files:
            _bring(source, tree / name)
        (tree / "init").write_text(MACHINE_INIT % {"controllers": " ".join(V1_CONTROLLERS)})
        (tree / "job").write_text(JOB % {"repository": REPOSITORY})
        (tree / "job.service").write_text(JOB_SERVICE)
        (tree / "job.sh").write_text(job)
        _image(tree, image)
    return image


@cache
def _checkout() -> Path:
    """The disk with this checkout, made once per test run."""
    directory = Path(tempfile.mkdtemp(prefix="machine-checkout."))
    atexit.register(shutil.rmtree, directory)
    with _scratch(directory) as tree:
        for name in BROUGHT:
            if (REPOSITORY / name).exists():
                _bring(REPOSITORY / name, tree / name)
        _compile(tree)
        _image(tree, directory / "checkout.ext4")
    return directory / "checkout.ext4"


def _image(tree: Path, image: Path) -> None:
    """An ext4 image, sparse beyond what `tree` holds; who makes the tree need not be root of it."""
    command = ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-E", "root_owner=0:0", "-d", tree, image, "1G"]
    subprocess.run(command, check=True, capture_output=True)


def _compile(tree: Path) -> None:
    """Byte code beside its source, where the machine's interpreter looks; pytest rewrites tests, so theirs is its own."""
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE")}
    python = [sys.executable, "-m"]
    subprocess.run([*python, "compileall", "-q", "src", "tests"], cwd=tree, check=True, env=plain)
    collect = ["pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/host"]
    subprocess.run([*python, *collect], cwd=tree, check=True, env=plain, stdout=subprocess.DEVNULL)


def _bring(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        _link(str(source.resolve()), str(target))
        return
    shutil.copytree(source, target, symlinks=True, ignore=_not_needed, copy_function=_link, dirs_exist_ok=True)


def _not_needed(_directory: str, names: list[str]) -> list[str]:
    return [name for name in names if LEFT_HERE.match(name)]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another file system
        shutil.copy2(source, target, follow_symlinks=False)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=parent, prefix="tree.") as directory:
        yield Path(directory)


# -- kernel, initrd and root filesystem: built once per recipe


def _parts(packages: tuple[str, ...]) -> _Parts:
    installed = (*PACKAGES, *packages)
    recipe = repr((installed, BOOT_MODULES, INITRD_INIT))
    place = CACHE / hashlib.sha256(recipe.encode()).hexdigest()[:12]
    if not place.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.exists():  # nobody else has built it meanwhile
                with _scratch(CACHE) as draft:
                    _build(draft / "parts", draft, installed)
                    (draft / "parts").rename(place)
    return _Parts(kernel=place / "vmlinuz", initrd=place / "initrd.gz", root=place / "root.ext4")


def _build(parts: Path, scratch: Path, packages: tuple[str, ...]) -> None:
    parts.mkdir()
    kernel, tree = _unpacked_kernel(scratch / "kernel"), scratch / "root"
    shutil.copy((*(kernel / "boot").glob("vmlinuz-*"),)[0], parts / "vmlinuz")
    mmdebstrap = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}", "bookworm", str(tree)]
    subprocess.run(mmdebstrap, check=True)
    shutil.copytree(kernel / "lib/modules", tree / "lib/modules", dirs_exist_ok=True)
    (release,) = (path.name for path in (kernel / "lib/modules").iterdir())
    subprocess.run(["chroot", str(tree), "depmod", release], check=True)
    _build_initrd(parts / "initrd.gz", scratch / "initrd", tree, kernel)
    make = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(tree), str(parts / "root.ext4"), "2500M"]
    subprocess.run(make, check=True, capture_output=True)


def _unpacked_kernel(tree: Path) -> Path:
    tree.mkdir()
    depends = subprocess.run(["apt-cache", "depends", "linux-image-cloud-amd64"], check=True, capture_output=True, text=True)
    package = re.search(r"Depends: (linux-image-\S+)", depends.stdout)
    assert package, "linux-image-cloud-amd64 names no kernel package"
    subprocess.run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package[1]], cwd=tree, check=True)
    (archive,) = tree.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, tree], check=True)
    return tree


def _build_initrd(target: Path, draft: Path, root: Path, kernel: Path) -> None:
    """The busybox is the machine's own, and so is the cpio: nothing of this host gets in."""
    for directory in ("bin", "dev", "root", "modules", "proc"):
        (draft / directory).mkdir(parents=True)
    shutil.copy(root / "bin/busybox", draft / "bin/busybox")
    for order, name in enumerate(BOOT_MODULES):
        (module,) = (kernel / "lib/modules").rglob(f"{name}.ko")
        shutil.copy(module, draft / "modules" / f"{order:02}-{name}.ko")
    (draft / "init").write_text(INITRD_INIT)
    (draft / "init").chmod(0o755)
    names = "".join(f"{path.relative_to(draft)}\n" for path in sorted(draft.rglob("*"))).encode()
    cpio = [str(root / "bin/busybox"), "cpio", "-o", "-H", "newc"]
    archive = subprocess.run(cpio, cwd=draft, input=names, check=True, capture_output=True).stdout
    target.write_bytes(gzip.compress(archive, 1))
