"""A census: what of one node is on the host, by kind. `down` and `reset` work from it, the demo and tests prove themselves by it.

Nothing here asks the daemon: files under STATE, /proc, /sys and netlink are enough, so it works after a kill -9.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from nacre.config import Config
from nacre.linux import cgroups

SYSCTLS = (
    "net/ipv4/ip_forward",
    "net/ipv6/conf/all/forwarding",
    "net/bridge/bridge-nf-call-iptables",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/conf/all/rp_filter",
    "kernel/panic",
    "vm/overcommit_memory",
    "fs/inotify/max_user_instances",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    pid: int
    started: int  # clock ticks after boot: with the pid it names one process for good
    name: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.name})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """Everything is named as a person would look for it; an empty census is falsy."""

    processes: tuple[Process, ...] = ()
    mounts: tuple[str, ...] = ()  # mount points, deepest first
    links: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()  # nftables, "ip nacre"
    cgroups: tuple[str, ...] = ()  # directories, deepest first

    def __bool__(self) -> bool:
        return any((self.processes, self.mounts, self.links, self.tables, self.cgroups))

    def lines(self) -> list[str]:
        """One line a thing, for people."""
        kinds = (("process", self.processes), ("mount", self.mounts), ("link", self.links), ("table", self.tables))
        return [f"{kind} {thing}" for kind, things in (*kinds, ("cgroup", self.cgroups)) for thing in things]


def census(config: Config) -> Census:
    """What of the node `config` names is on the host now."""
    return Census(
        processes=tuple(processes(config)),
        mounts=tuple(mounts(config)),
        links=tuple(links(config)),
        tables=tuple(tables(config)),
        cgroups=tuple(cgroup_directories(config)),
    )


def processes(config: Config) -> Iterator[Process]:
    """By cgroup, by state file (node.json, shim.json) and by the daemon's mark in the environment; never this process."""
    known = set(_recorded(config))
    members = set(_members(cgroup_directories(config)))
    mark = f"NACRE_NODE={config.instance}".encode()
    for text in filter(str.isdigit, os.listdir("/proc")):
        try:
            started, name, state = _stat(text)
            if state == "Z" or int(text) == os.getpid():
                continue
            if int(text) in members or (int(text), started) in known or mark in _environment(text):
                yield Process(pid=int(text), started=started, name=name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended while we looked, or not ours to see


def _members(directories: list[str]) -> Iterator[int]:
    for directory in directories:
        try:
            with open(f"{directory}/cgroup.procs") as file:
                yield from map(int, file.read().split())
        except OSError:  # removed meanwhile, or a threaded group, whose members its parent lists
            continue


def _recorded(config: Config) -> Iterator[tuple[int, int]]:
    """(pid, start time) from the node's state files."""
    paths = [f"{config.state}/node.json"]
    pods = f"{config.state}/pods"
    if os.path.isdir(pods):
        paths += [f"{pods}/{name}/shim.json" for name in os.listdir(pods)]
    for path in paths:
        try:
            with open(path, "rb") as file:
                document = json.load(file)
            yield int(document["pid"]), int(document.get("started") or document.get("start_time") or 0)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half-written by a killed process: its cgroup and its mark still tell


def start_ticks(pid: int) -> int:
    """When the process started, in clock ticks after boot; 0 when it is gone, or dead and only not reaped yet."""
    try:
        started, _name, state = _stat(str(pid))
        return 0 if state in ("Z", "X") else started
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _stat(pid: str) -> tuple[int, str, str]:
    with open(f"/proc/{pid}/stat", "rb") as file:
        head, _, rest = file.read().rpartition(b")")
    fields = rest.split()
    return int(fields[19]), head.partition(b"(")[2].decode(errors="replace"), fields[0].decode()


def _environment(pid: str) -> list[bytes]:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return file.read().split(b"\0")


def mounts(config: Config) -> list[str]:
    """Mount points under STATE and DATA, deepest first. A mount that was already there before (a disk on DATA itself) is no child."""
    found = []
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            point = line.split()[4].decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")
            if any(point.startswith(root + "/") for root in (config.state, config.data)):
                found.append(point)
    return sorted(found, key=lambda point: point.count("/"), reverse=True)


def links(config: Config) -> list[str]:
    """The bridge and what is plugged into it."""
    here = f"/sys/class/net/{config.bridge}"
    if not os.path.isdir(here):
        return []
    ports = f"{here}/brif"
    return [*(sorted(os.listdir(ports)) if os.path.isdir(ports) else []), config.bridge]


def tables(config: Config) -> list[str]:
    """nftables tables named as this node."""
    from nacre.linux import nftables

    return [f"{family} {name}" for family, name in nftables.list_tables() if name == config.instance]


def cgroup_directories(config: Config) -> list[str]:
    """The node's directories in every hierarchy, deepest first."""
    found = []
    for root in cgroup_roots(config):
        found += [directory for directory, _names, _files in os.walk(root, topdown=False)]
    return found


def cgroup_roots(config: Config) -> list[str]:
    """The node's top directory in each hierarchy that has one."""
    layout = cgroups.discover()
    roots = {layout.directory(hierarchy, config.cgroup_root) for hierarchy in layout.hierarchies}
    return sorted(root for root in roots if os.path.isdir(root))


def sysctls() -> dict[str, str]:
    """The values of SYSCTLS that this kernel has."""
    values = {}
    for name in SYSCTLS:
        try:
            with open(f"/proc/sys/{name}") as file:
                values[name.replace("/", ".")] = file.read().strip()
        except OSError:
            continue
    return values


def addresses() -> list[str]:
    """Names of all network links of this namespace."""
    return sorted(os.listdir("/sys/class/net"))


def document(taken: Census) -> dict[str, object]:
    return asdict(taken)
