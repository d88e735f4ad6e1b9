"""What a node can leave on a host, read from the kernel and not from nacre's records; two looks are compared by `==`.

`look(prefix)` counts only what carries the prefix or the instance name made of it, so that nodes and tests side by side do not
disturb one another. Namespaces are those that a process of the node is in or that are pinned below the prefix.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nacre.config import Config

_KEPT = ("var/lib/nacre/images", "var/lib/nacre/kata", "var/lib/nacre/pki", "run/nacre/trace", "var/log")


@dataclass(frozen=True, kw_only=True)
class Leftovers:
    """Each thing named as a person would look for it."""

    mounts: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()  # leases, links and the rules that name them
    processes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


def look(prefix: Path, *, cgroup: str = "") -> Leftovers:
    """`cgroup`: a further path below which cgroups and processes count, such as a caller's cgroup_parent."""
    instance = Config(prefix=os.path.realpath(prefix)).instance
    marks = tuple(mark for mark in (f"/{instance}", cgroup) if mark)
    alive = dict(_processes(str(prefix), instance, marks))
    return Leftovers(
        mounts=_mounts(str(prefix)),
        cgroups=_cgroups(marks),
        namespaces=_namespaces(alive),
        addresses=(*_links(instance), *_leases(prefix), *_rules(instance)),
        processes=tuple(sorted(alive.values())),
        files=_files(prefix),
    )


def settled(prefix: Path, wanted: Leftovers, *, cgroup: str = "", limit_s: float = 5.0) -> Leftovers:
    """The first look that equals `wanted`, or the last one within the limit: links and snapshots go in the background."""
    deadline = time.monotonic() + limit_s
    while (found := look(prefix, cgroup=cgroup)) != wanted and time.monotonic() < deadline:
        select.select([], [], [], 0.05)
    return found


def await_no_lease(prefix: Path, limit_s: float = 5.0) -> None:
    """Until the last pod's address is free, which comes in the background: a look before that would miss it afterwards."""
    deadline = time.monotonic() + limit_s
    while _leases(prefix):
        assert time.monotonic() < deadline, _leases(prefix)
        select.select([], [], [], 0.05)


def _mounts(prefix: str) -> tuple[str, ...]:
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        points = (line.split()[4] for line in file)
        return tuple(sorted(point for point in points if point.startswith(prefix + "/")))


def _cgroups(marks: tuple[str, ...]) -> tuple[str, ...]:
    found = [directory for directory, _names, _files in os.walk("/sys/fs/cgroup") if any(mark in directory for mark in marks)]
    return tuple(sorted(found))


def _processes(prefix: str, instance: str, marks: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """By cgroup, command line, environment and working directory; never this process."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        if int(entry) == os.getpid():
            continue
        try:
            groups = Path(f"/proc/{entry}/cgroup").read_text()
            command = Path(f"/proc/{entry}/cmdline").read_bytes()
            told = command + b"\0" + Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:
            continue
        mark = f"NACRE_NODE={instance}".encode() + b"\0"
        named = prefix.encode() + b"\0" in told or prefix.encode() + b"/" in told
        if named or mark in told + b"\0" or any(f"{one}/" in groups or f"{one}\n" in groups for one in marks):
            yield int(entry), Path(f"/proc/{entry}/comm").read_text().strip() + " " + command.replace(b"\0", b" ").decode()[:60]


def _namespaces(alive: dict[int, str]) -> tuple[str, ...]:
    """Those that no process outside the node is in, of the node's processes."""
    own = {os.readlink(f"/proc/self/ns/{kind}") for kind in os.listdir("/proc/self/ns")}
    found = set()
    for pid in alive:
        try:
            found |= {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in os.listdir(f"/proc/{pid}/ns")}
        except OSError:
            continue
    return tuple(sorted(found - own))


def _links(instance: str) -> tuple[str, ...]:
    done = subprocess.run(["ip", "-json", "link"], check=True, capture_output=True, text=True)
    links = json.loads(done.stdout)
    return tuple(sorted(f"link {link['ifname']}" for link in links if instance in (link["ifname"], link.get("master"))))


def _leases(prefix: Path) -> tuple[str, ...]:
    directory = prefix / "var/lib/nacre/network/leases"
    return tuple(sorted(f"lease {name}" for name in os.listdir(directory))) if directory.is_dir() else ()


def _rules(instance: str) -> tuple[str, ...]:
    """Lines of the node's own table, counters and handles left out."""
    done = subprocess.run(["nft", "list", "table", "ip", instance], check=False, capture_output=True, text=True)
    return tuple(re.sub(r"counter packets \d+ bytes \d+", "counter", line.strip()) for line in done.stdout.splitlines())


def _files(prefix: Path) -> tuple[str, ...]:
    """Not the logs, databases, images, keys and records that a node keeps on purpose."""
    found = []
    for directory, names, files in os.walk(prefix):
        relative = os.path.relpath(directory, prefix)
        if relative.startswith(_KEPT) or relative.endswith(".seccomp"):  # compiled filters, by the hash of their profile
            names.clear()
            continue
        found += [f"{relative}/{name}" for name in (*names, *files) if not name.startswith(("api.db", "cri.db", ".seccomp"))]
    return tuple(sorted(found))


def assert_settled(prefix: Path, wanted: Leftovers, *, cgroup: str = "") -> None:
    """Fails naming what came and what went."""
    found = settled(prefix, wanted, cgroup=cgroup)
    for kind in wanted.__dataclass_fields__:
        before, after = set(getattr(wanted, kind)), set(getattr(found, kind))
        assert before == after, f"{kind}: left {sorted(after - before)}, missing {sorted(before - after)}"
