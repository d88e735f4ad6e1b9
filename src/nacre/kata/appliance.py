"""The guest that every pod's VM boots: kernel and first root, built on this machine.

    DATA/kata/cache/*.deb              the kernel's package; stays, so that a second build needs no network
    DATA/kata/appliance/VERSION/       vmlinux, initrd, appliance.json; never changed once it has its name
    DATA/kata/appliance/current        link to the VERSION in use, replaced by rename
    DATA/kata/building-PID/            unfinished; what a kill leaves, the next build takes away

VERSION is a hash of all that goes in. Nobody keeps these files open: QEMU reads them when it starts. The version before the current one
stays for whoever has just looked it up, older ones go. DATA/kata/appliance comes into being with the first finished version, at the
first VM pod or by `nacre enable kata`: its existence means that the daemon keeps VMs ready.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from nacre.config import Config
from nacre.kata import appliance_files, appliance_kernel
from nacre.kata.appliance_cpio import Archive
from nacre.linux.libc import owned
from nacre.oci.errors import Failure

Progress = Callable[[str], None]
FORMAT = 2  # raised when what this module writes changes
SHARED_CACHE = "/var/lib/nacre/kata/cache"  # of the node without a prefix: others read it


@dataclass(frozen=True, slots=True, kw_only=True)
class Appliance:
    """A built guest."""

    version: str
    directory: str
    kernel_release: str
    python: str
    sources: str = ""  # hash of nacre's own files in it
    cmdline: str  # what the guest needs; the host may append console and the like *before* " -- "

    @property
    def kernel(self) -> str:
        return f"{self.directory}/vmlinux"

    @property
    def initrd(self) -> str:
        return f"{self.directory}/initrd"


def build(config: Config, progress: Progress) -> Appliance:
    """The appliance for what is installed now; at once when it is there already. Raises Failure."""
    base = f"{config.data}/kata"
    os.makedirs(base, mode=0o700, exist_ok=True)
    with _alone(base):
        _sweep(base)
        cache = f"{base}/cache"
        package = appliance_kernel.package(cache, _other_caches(), progress)
        progress("looking what the agent loads")
        python = appliance_files.interpreter()
        version = _version(package, python)
        there = current(config)
        if there is not None and there.version == version:
            return there
        if there is not None:
            progress("the guest was built of other files than are installed now: it is built anew")
        progress(f"unpacking {os.path.basename(package)}")
        kernel = appliance_kernel.unpack(package)
        draft = f"{base}/building-{os.getpid()}"
        os.mkdir(draft, 0o700)
        try:
            progress(f"packing Python {python.version} and {len(kernel.modules)} modules of Linux {kernel.release}")
            made = _write(draft, version, kernel, python)
            return _publish(base, draft, made)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def current(config: Config) -> Appliance | None:
    """The appliance in use, None before the first build."""
    base = f"{config.data}/kata/appliance"
    try:
        version = os.readlink(f"{base}/current")
        with open(f"{base}/{version}/appliance.json", encoding="utf-8") as file:
            document = json.load(file)
    except FileNotFoundError:
        return None
    return Appliance(**document | {"directory": f"{base}/{version}"})


def refresh(config: Config, progress: Progress) -> None:
    """Build it where there is none (raises Failure), and anew when it holds another nacre than this one.

    Where the latter fails, it is said, and the guest that is there goes on.
    """
    there = current(config)
    if there is None:
        build(config, progress)
        return
    if there.sources == _sources():
        return
    try:
        build(config, progress)
    except Failure as failure:
        progress(
            f"the guest is another nacre's, and could not be built anew ({failure}): it goes on; nacre enable kata tries again"
        )


def _sources() -> str:
    """What nacre puts into the guest, by a hash that is quickly made."""
    whole = hashlib.sha256()
    top = appliance_files.source_directory()
    for package in ("agent", "linux", "oci", "runc"):
        for name in sorted(os.listdir(f"{top}/nacre/{package}")):
            if name.endswith(".py"):
                with open(f"{top}/nacre/{package}/{name}", "rb") as file:
                    whole.update(f"{package}/{name} ".encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def _other_caches() -> tuple[str, ...]:
    named = os.environ.get("NACRE_PACKAGES", "")
    return (*([named] if named else []), SHARED_CACHE)


@contextmanager
def _alone(base: str) -> Iterator[None]:
    """One builder at a time; a second one waits and then finds the work done."""
    with owned(os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sweep(base: str) -> None:
    """What a killed build left; the lock is held, so nobody works on it."""
    for name in os.listdir(base):
        if name.startswith("building-"):
            shutil.rmtree(f"{base}/{name}")


def _version(package: str, python: appliance_files.Interpreter) -> str:
    """A hash of every input: the kernel's package by name, all else by its bytes."""
    whole = hashlib.sha256(
        f"{FORMAT} {_sources()} {os.path.basename(package)} {appliance_kernel.MODULES} {cmdline(python)}".encode()
    )
    inputs = {path: path for path in (python.path, *python.shared)} | python.modules
    for name, path in inputs.items():  # a module by its name: where nacre is installed makes no difference
        with open(path, "rb") as file:
            whole.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def cmdline(python: appliance_files.Interpreter) -> str:
    """The kernel's command line. After "--" come the words of PID 1: isolated, no site, no bytecode written."""
    kernel = "quiet panic=-1 random.trust_cpu=on cgroup_no_v1=all swiotlb=noforce rcupdate.rcu_expedited=1 cryptomgr.notests"
    return f"{kernel} rdinit={python.path} -- -ISB -X utf8 {python.library}/nacre/agent/__main__.pyc"


def _write(draft: str, version: str, kernel: appliance_kernel.Kernel, python: appliance_files.Interpreter) -> Appliance:
    with open(f"{draft}/vmlinux", "wb") as file:
        file.write(kernel.image)
    with open(f"{draft}/initrd", "wb") as file:
        archive = Archive(file)
        appliance_files.write(archive, python, kernel.modules)
        archive.close()
    made = Appliance(
        version=version,
        directory=draft,
        kernel_release=kernel.release,
        python=python.version,
        sources=_sources(),
        cmdline=cmdline(python),
    )
    with open(f"{draft}/appliance.json", "w", encoding="utf-8") as text:
        json.dump(asdict(made), text)
    for name in os.listdir(draft):
        with owned(os.open(f"{draft}/{name}", os.O_RDONLY | os.O_CLOEXEC)) as fd:
            os.fsync(fd)
    return made


def _publish(base: str, draft: str, made: Appliance) -> Appliance:
    """Give the draft its name and make it current; older versions go."""
    home = f"{base}/appliance"
    try:
        os.makedirs(home, mode=0o755, exist_ok=True)
        target = f"{home}/{made.version}"
        shutil.rmtree(target, ignore_errors=True)  # named before, never made current
        os.chmod(draft, 0o755)
        os.rename(draft, target)
        former = os.readlink(f"{home}/current") if os.path.islink(f"{home}/current") else ""
        if os.path.islink(f"{home}/.current"):
            os.unlink(f"{home}/.current")  # of a build that was killed just here
        os.symlink(made.version, f"{home}/.current")
        os.rename(f"{home}/.current", f"{home}/current")
    except OSError as error:
        raise Failure(what="put the appliance in place", cause=f"{error.filename}: {error.strerror}") from error
    for name in os.listdir(home):
        if name not in ("current", made.version, former):
            _remove(f"{home}/{name}")
    return Appliance(**asdict(made) | {"directory": target})


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
