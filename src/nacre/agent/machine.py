"""The guest as a machine: who it is after a clone, its link, its memory and processors, the pod's own settings."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace
from typing import Any

from nacre.agent import boot as first
from nacre.agent.protocol import Greeting, Hello, Identify, Machine, Network, Sandbox, Size
from nacre.linux import boot, links, mounts, namespaces, process
from nacre.linux import rtnetlink as rt
from nacre.linux.libc import owned
from nacre.linux.mounts import MountFlag
from nacre.linux.namespaces import Clone
from nacre.linux.netlink import NetlinkSocket, Request
from nacre.oci.errors import Failure, Invalid

_MEMORY = "/sys/devices/system/memory"
_CPUS = "/sys/devices/system/cpu"
_MACHINE_ID = re.compile(r"[0-9a-f]{32}")
_SYSCTL = re.compile(r"[a-zA-Z0-9_-]+([./][a-zA-Z0-9_:-]+)+")


def greet(request: Hello, version: int, nacre: str) -> Greeting:
    return Greeting(
        version=version,
        nonce=request.nonce,
        nacre=nacre,
        kernel=os.uname().release,
        memory_bytes=memory_bytes(),
        cpus=len(_online_cpus()),
    )


def identify(wanted: Identify) -> None:
    """Entropy first: whatever is made after it is the clone's own."""
    if not 32 <= len(wanted.entropy) <= 512:
        raise Invalid(what="identify the guest", cause=f"{len(wanted.entropy)} bytes of entropy; 32 to 512 are wanted")
    if not _MACHINE_ID.fullmatch(wanted.machine_id):
        raise Invalid(what="identify the guest", cause=f"{wanted.machine_id[:64]!r} is no machine-id")
    boot.add_entropy(wanted.entropy)
    time.clock_settime_ns(time.CLOCK_REALTIME, wanted.now_ns)
    namespaces.sethostname(wanted.hostname)
    _write("/etc/machine-id", wanted.machine_id + "\n")


_configured: list[
    tuple[links.Link, list[str]]
] = []  # the one besides lo as it was left: it is there before the template is saved


def configure_network(wanted: Network) -> None:
    """The one link besides lo gets name, MAC, addresses, routes, and loses what it was given before.

    One exchange with the kernel, as the rehearsal has looked for the link.
    """
    with NetlinkSocket() as sock:
        link, former = _configured.pop() if _configured else (_only_link(sock), [])
        sock.transact(*_link_requests(link, former, wanted))
    _configured.append((replace(link, name=wanted.interface, up=True), wanted.addresses))
    _write("/etc/resolv.conf", "".join(line + "\n" for line in wanted.dns))


def _only_link(sock: NetlinkSocket) -> links.Link:
    others = [link for link in links.list_links(on=sock) if not link.loopback]
    if len(others) != 1:
        raise Failure(
            what="configure the guest's network",
            cause=f"it has {len(others)} links besides lo: {[one.name for one in others]}",
        )
    return others[0]


def _link_requests(link: links.Link, former: list[str], wanted: Network) -> list[Request]:
    """In the order in which the kernel takes them: a link that is up keeps its name, one that is down has no routes."""
    changed: dict[str, Any] = {"mac": wanted.mac} if wanted.mac else {}
    if link.name != wanted.interface:
        changed["name"] = wanted.interface
    requests = [rt.set_link(link.index, link.name, up=False)] if link.up else []
    requests += [rt.address(link.index, address, delete=True) for address in former]
    requests.append(rt.set_link(link.index, link.name, mtu=wanted.mtu, **changed))
    requests += [rt.address(link.index, address) for address in wanted.addresses]
    requests.append(rt.set_link(link.index, wanted.interface, up=True))
    return requests + [rt.route(destination, link.index, gateway=gateway) for destination, gateway in _routes(wanted)]


def _routes(wanted: Network) -> list[tuple[str, str]]:
    """Those without a gateway first: the others are reached through them."""
    routes = [(route[0], route[1]) for route in wanted.routes if len(route) == 2]
    if len(routes) != len(wanted.routes):
        raise Invalid(what="configure the guest's network", cause="a route is a pair: destination, gateway")
    if wanted.gateway and not any(destination in ("default", "0.0.0.0/0") for destination, _ in routes):
        routes.append(("default", wanted.gateway))
    return sorted(routes, key=lambda route: bool(route[1]))


# -- memory and processors


def memory_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        return int(file.readline().split()[1]) * 1024


def _online_cpus() -> list[int]:
    return _numbers(_read(f"{_CPUS}/online"))


def _numbers(text: str) -> list[int]:
    """ "0-2,5" as 0, 1, 2, 5."""
    found: list[int] = []
    for part in text.strip().split(","):
        first_number, _, last = part.partition("-")
        found += range(int(first_number), int(last or first_number) + 1) if part else []
    return found


class Plugged:
    """What the host plugs in at run time, beyond what was there at first."""

    def __init__(self) -> None:
        self._booted_bytes = memory_bytes()

    def size(self) -> Size:
        total = memory_bytes()
        return Size(memory_bytes=total, hot_memory_bytes=max(0, total - self._booted_bytes), cpus=len(_online_cpus()))

    def bring_online(self, wanted: Machine) -> bool:
        """Whatever is there and off; answers whether all that is wanted is on now."""
        for block in _numbered(_MEMORY, "memory"):
            if _read(f"{block}/state") == "offline":
                _write(f"{block}/state", "online_kernel")  # for anything: the maps of later memory come from it
        for processor in _numbered(_CPUS, "cpu"):
            more = not wanted.cpus or len(_online_cpus()) < wanted.cpus
            switch = f"{processor}/online"  # the first one has none
            if more and os.path.exists(switch) and _read(switch) == "0":
                _write(switch, "1")
        size = self.size()
        return size.hot_memory_bytes >= wanted.memory_bytes and size.cpus >= wanted.cpus


def _numbered(base: str, word: str) -> list[str]:
    """BASE/WORD0, BASE/WORD1, … as far as there are any."""
    names = os.listdir(base) if os.path.isdir(base) else []
    return [f"{base}/{name}" for name in sorted(names) if name.startswith(word) and name[len(word) :].isdigit()]


# -- the pod


def settle(wanted: Sandbox) -> None:
    """Hostname, sysctls, /dev/shm of the pod."""
    namespaces.sethostname(wanted.hostname)
    for key, value in wanted.sysctls.items():
        set_sysctl(key, value)
    shm = f"{first.RUN}/shm"
    mounts.unmount_all(shm)
    flags = MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC
    mounts.mount("shm", shm, "tmpfs", flags, f"mode=1777,size={wanted.shm_bytes}")


def set_sysctl(key: str, value: str) -> None:
    """Of the guest as a whole, whose one pod it is."""
    what = f"set sysctl {key}"
    if not _SYSCTL.fullmatch(key):
        raise Invalid(what=what, cause="that is no name of a sysctl")
    try:
        _write("/proc/sys/" + key.replace(".", "/"), value)
    except OSError as error:
        raise Failure(what=what, cause=f"{error.filename or key}: {error.strerror}", remedy="take it out of the pod") from error


def fork_pid_init() -> int:
    """The init of a PID namespace that the pod's containers share; it reaps what they leave. Answers its pid."""
    pid = process.fork(Clone.NEWPID)
    if pid:
        return pid
    try:
        process.close_range(3)
        os.setsid()
        process.set_name("nacre-pod-init")
        _write("/proc/self/oom_score_adj", "-1000")  # with it every process of the pod would go
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        while True:
            _reap()
            signal.sigwait({signal.SIGCHLD})
    finally:
        os._exit(1)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return


def _read(path: str) -> str:
    with owned(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        return os.read(fd, 4096).decode("ascii").strip()


def _write(path: str, text: str) -> None:
    with owned(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)) as fd:
        os.write(fd, text.encode())
