"""From the kernel's hand to a guest that can run containers: mounts, modules, the channel's port.

Where a step fails there is nobody to tell but the console, whose last lines are the host's evidence.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time

from nacre.agent.protocol import PORT
from nacre.linux import boot, links, mounts, process
from nacre.linux.mounts import MountFlag
from nacre.oci.errors import Failure

RUN = "/run/nacre"
MODULES = "/lib/nacre/modules"
PORT_WAIT_S = 20.0
_GUARDED = MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC
_MOUNTS = (
    ("proc", "/proc", "proc", _GUARDED, ""),
    ("sysfs", "/sys", "sysfs", _GUARDED, ""),
    ("devtmpfs", "/dev", "devtmpfs", MountFlag.NOSUID, "mode=755"),
    ("devpts", "/dev/pts", "devpts", MountFlag.NOSUID | MountFlag.NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5"),
    ("tmpfs", "/run", "tmpfs", MountFlag.NOSUID | MountFlag.NODEV, "mode=755"),
    ("tmpfs", "/tmp", "tmpfs", MountFlag.NOSUID | MountFlag.NODEV, "mode=1777"),
    (
        "cgroup2",
        "/sys/fs/cgroup",
        "cgroup2",
        _GUARDED,
        "nsdelegate,favordynmods",
    ),  # or each process that enters a group waits 10 ms for RCU
)


class PortMissing(Failure):
    """The guest has no port of the agent's name."""


def prepare() -> None:
    """Root, file systems, modules, loopback. Each once."""
    _movable_root()
    for source, target, kind, flags, data in _MOUNTS:
        os.makedirs(target, exist_ok=True)
        mounts.mount(source, target, kind, flags, data or None)
    for name in ("containers", "runc", "volumes", "shm"):
        os.makedirs(f"{RUN}/{name}", mode=0o711)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")
    os.symlink("/proc/self/fd", "/dev/fd")
    process.set_name("nacre-agent")
    load_modules()
    links.lo_up()


def _movable_root() -> None:
    """pivot_root(2) is refused while the root is the initramfs itself: a bind of it, moved over it, is a root like any other."""
    os.mkdir("/.root")
    mounts.mount("/", "/.root", None, MountFlag.BIND)
    os.chdir("/.root")
    mounts.mount(".", "/", None, MountFlag.MOVE)
    os.chroot(".")
    os.chdir("/")
    os.rmdir("/.root")


def load_modules() -> None:
    """In the order that the appliance wrote down: dependencies first."""
    with open(f"{MODULES}/order", encoding="ascii") as file:
        names = file.read().split()
    for name in names:
        boot.load_module(f"{MODULES}/{name}.ko")


class Uevents:
    """The kernel's announcements of devices (NETLINK_KOBJECT_UEVENT, group 1)."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 15)
        self.socket.bind((0, 1))

    def fileno(self) -> int:
        return self.socket.fileno()

    def drain(self) -> None:
        """Forget what was announced; lost announcements (ENOBUFS) are as good: whoever waits looks for itself."""
        while True:
            try:
                self.socket.recv(8192)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def wait(self, deadline: float) -> bool:
        """Until the next announcement; False at the deadline (of time.monotonic)."""
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([self.socket], [], [], left)[0]:
            return False
        self.drain()
        return True


def open_port(uevents: Uevents) -> int:
    """The channel's port, read and write, not blocking. Raises PortMissing."""
    deadline = time.monotonic() + PORT_WAIT_S
    while True:
        fd = _find_port()
        if fd is not None:
            return fd
        if not uevents.wait(deadline):
            raise PortMissing(
                what="open the agent's port",
                cause=f"no virtio-serial port is called {PORT} after {PORT_WAIT_S:.0f} s",
                evidence=tuple(sorted(_ports().values())),
            )


def _ports() -> dict[str, str]:
    base = "/sys/class/virtio-ports"
    found = {}
    for device in os.listdir(base) if os.path.isdir(base) else ():
        try:
            with open(f"{base}/{device}/name", encoding="ascii", errors="replace") as file:
                found[device] = file.read().strip()
        except FileNotFoundError:
            continue  # its name has not come yet
    return found


def _find_port() -> int | None:
    for device, name in _ports().items():
        if name == PORT:
            try:
                return os.open(f"/dev/{device}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError as error:
                if error.errno not in (errno.ENXIO, errno.ENOENT, errno.EBUSY):  # its node is made before it opens
                    raise
    return None
