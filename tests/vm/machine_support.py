"""Whole Debian machines for tests that need a host other than this one: its cgroup layout, its kernel, an empty /var/lib.

A machine is a QEMU guest under TCG: Debian's cloud kernel, a minbase root filesystem built once by mmdebstrap (kept in
.cache/machines), and one tar of what the test brings, on a second disk. Its init is the script below: it lays out the cgroup
hierarchies as asked, unpacks the tar at / and runs the job; the job's output and exit code come back over the serial line.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache" / "machines"
PACKAGES = "python3,kmod,iproute2,libseccomp2,ca-certificates,procps,busybox-static"
BOOT_MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk")
V1_CONTROLLERS = ("cpu,cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids")
EXIT = re.compile(r"^JOB-EXIT (\d+)\s*$", re.MULTILINE)

INITRD_INIT = """#!/bin/busybox sh
for module in /modules/*.ko; do /bin/busybox insmod $module; done
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t ext4 /dev/vda /root
exec /bin/busybox switch_root /root /machine-init
"""

MACHINE_INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm; mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts; mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run; mount -t tmpfs tmp /tmp
ip link set lo up; hostname machine; mount --make-rshared /
layout=$(sed 's/.*machine.cgroups=\\([a-z0-9]*\\).*/\\1/' /proc/cmdline)
v1() { mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
  for c in %(controllers)s; do mkdir /sys/fs/cgroup/$c; mount -t cgroup -o $c cgroup /sys/fs/cgroup/$c; done
  echo 1 > /sys/fs/cgroup/memory/memory.use_hierarchy 2>/dev/null; }
case $layout in
  v2) mount -t cgroup2 cgroup2 /sys/fs/cgroup ;;
  v1) v1 ;;
  hybrid) v1; mkdir /sys/fs/cgroup/unified; mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified ;;
esac
tar -xf /dev/vdb -C / && sh /job.sh
code=$?; echo; echo "JOB-EXIT $code"
sync; echo o > /proc/sysrq-trigger; read forever
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a job left: its exit code (None: the machine ended without one) and everything the serial line said."""

    code: int | None
    output: str


def run(
    job: str, cgroups: str, files: Iterable[tuple[Path, str]], workdir: Path, timeout_s: int, memory_mib: int = 1536
) -> Outcome:
    """Boot a machine with layout `cgroups` (v1, v2, hybrid), put `files` (host path, guest path) there and run `job` (sh)."""
    kernel, initrd, root = _kernel(), _initrd(), _root()
    payload = workdir / "payload.tar"
    with tarfile.open(payload, "w") as tar:
        for source, target in files:
            tar.add(source, target.lstrip("/"), filter=_payload_member)
        _add(tar, "job.sh", job.encode(), 0o755)
    command = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-smp", "2", "-m", str(memory_mib), "-cpu", "max", "-nodefaults",
        "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio", "-kernel", str(kernel), "-initrd", str(initrd),
        "-append", f"console=ttyS0 quiet panic=-1 machine.cgroups={cgroups}",
        "-drive", f"file={root},format=raw,if=virtio,snapshot=on", "-drive", f"file={payload},format=raw,if=virtio,readonly=on",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False)
        output = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode(errors="replace") + f"\nno end within {timeout_s} s\n"
    match = EXIT.search(output)
    return Outcome(code=int(match[1]) if match else None, output=output)


def _payload_member(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    tar.addfile(member, io.BytesIO(data))


def _kernel_tree() -> Path:
    """The cloud kernel's package, unpacked; downloaded once."""
    tree = CACHE / "kernel"
    if not tree.exists():
        draft = _draft("kernel")
        depends = subprocess.run(["apt-cache", "depends", "linux-image-cloud-amd64"], check=True, capture_output=True, text=True)
        package = re.search(r"Depends: (linux-image-\S+)", depends.stdout)
        assert package, "linux-image-cloud-amd64 names no kernel package"
        subprocess.run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package[1]], cwd=draft, check=True)
        (archive,) = draft.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, draft], check=True)
        archive.unlink()
        draft.rename(tree)
    return tree


def _kernel() -> Path:
    (kernel,) = (_kernel_tree() / "boot").glob("vmlinuz-*")
    return kernel


def _initrd() -> Path:
    initrd = CACHE / "initrd.gz"
    if not initrd.exists():
        draft = _draft("initrd")
        for directory in ("bin", "dev", "root", "modules", "proc"):
            (draft / directory).mkdir()
        shutil.copy(_static_busybox(), draft / "bin/busybox")
        for order, name in enumerate(BOOT_MODULES):
            (module,) = (_kernel_tree() / "lib/modules").rglob(f"{name}.ko")
            shutil.copy(module, draft / "modules" / f"{order:02}-{name}.ko")
        (draft / "init").write_text(INITRD_INIT)
        (draft / "init").chmod(0o755)
        names = subprocess.run(["find", "."], cwd=draft, check=True, capture_output=True).stdout
        archive = subprocess.run(
            ["busybox", "cpio", "-o", "-H", "newc"], cwd=draft, input=names, check=True, capture_output=True
        ).stdout
        unfinished = initrd.with_suffix(".new")
        unfinished.write_bytes(gzip.compress(archive, 1))
        unfinished.rename(initrd)
        shutil.rmtree(draft)
    return initrd


def _static_busybox() -> str:
    found = shutil.which("busybox")
    assert found, "busybox-static is needed to build the machine's initrd: ./run setup test"
    return found


def _root() -> Path:
    """An ext4 image of Debian's minbase with python3 and the kernel's modules."""
    image = CACHE / "root.ext4"
    if not image.exists():
        tree = _draft("root")
        mmdebstrap = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(tree)]
        subprocess.run(mmdebstrap, check=True)
        shutil.copytree(_kernel_tree() / "lib/modules", tree / "lib/modules", dirs_exist_ok=True)
        (release,) = (path.name for path in (_kernel_tree() / "lib/modules").iterdir())
        subprocess.run(["chroot", str(tree), "depmod", release], check=True)
        script = tree / "machine-init"
        script.write_text(MACHINE_INIT % {"controllers": " ".join(V1_CONTROLLERS)})
        script.chmod(0o755)
        unfinished = image.with_suffix(".new")
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(unfinished), "2500M"], check=True)
        unfinished.rename(image)
        shutil.rmtree(tree)
    return image


def _draft(name: str) -> Path:
    draft = CACHE / f"{name}.{os.getpid()}.draft"
    draft.mkdir(parents=True)
    return draft
