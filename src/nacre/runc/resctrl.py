"""linux.intelRdt: a share of the processor's caches and memory bandwidth, by the kernel's resctrl file system (config-linux.md "IntelRdt").

    MOUNT/                  the class that everything is in
    MOUNT/CLASS/            schemata: what it may use; tasks: what is in it
        mon_groups/ID/      tasks that are counted for themselves

A group of the container's own is named after it and goes with it; one that closID names stays. What a process forks is in its group.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from nacre.linux import cgroup_layout
from nacre.linux.cgroup_files import LimitRefused
from nacre.linux.libc import SyscallError
from nacre.oci.errors import Invalid, Unsupported

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from typing import Any


def check(wanted: Mapping[str, Any]) -> str:
    """Where resctrl is mounted. Raises Unsupported when it is not, Invalid for what can be no setting of it."""
    what, name = "read linux.intelRdt", wanted.get("closID", "")
    if name != "/" and ("/" in name or name in (".", "..", "info", "mon_groups", "mon_data")):
        raise Invalid(what=what, cause=f"closID {name!r} is no name of a class")
    if not wanted.get("memBwSchema", "MB:").startswith("MB:"):
        raise Invalid(what=what, cause=f"memBwSchema is {wanted['memBwSchema']!r}", remedy="it begins with MB:")
    for line in lines(wanted):
        if "\n" in line or ":" not in line:
            raise Invalid(what=what, cause=f"{line!r} is no line of a schemata file", remedy="write it as L3:0=7f0;1=1f")
    if wanted.get("enableCMT") or wanted.get("enableMBM"):
        raise Unsupported(what=what, cause="enableCMT and enableMBM were replaced", remedy="set enableMonitoring")
    with open("/proc/self/mountinfo", "rb") as file:
        mount = mount_point(file)
    if not mount:
        raise Unsupported(
            what="give the container a class of service",
            cause="no resctrl file system is mounted here (/proc/self/mountinfo)",
            remedy="mount -t resctrl resctrl /sys/fs/resctrl, on a processor that has it; or remove linux.intelRdt",
        )
    return mount


def mount_point(mountinfo: Iterable[bytes]) -> str:
    """ "" when there is none."""
    for line in mountinfo:
        head, _, tail = line.partition(b" - ")
        if tail.startswith(b"resctrl "):
            return cgroup_layout.unescape(os.fsdecode(head.split(b" ")[4]))
    return ""


def lines(wanted: Mapping[str, Any]) -> list[str]:
    """The lines for the schemata file, in the order in which they are to be written."""
    first = [wanted[key] for key in ("l3CacheSchema", "memBwSchema") if wanted.get(key)]
    return [*first, *wanted.get("schemata", ())]


def prepare(wanted: Mapping[str, Any], identifier: str, mount: str, undo: ExitStack) -> dict[str, str]:
    """Make or find the group; `undo` takes away what was made. Answers what `enter` and `remove` need."""
    name = wanted.get("closID", "")
    group = mount if name == "/" else os.path.join(mount, name or identifier)
    schema = lines(wanted)
    facts = {"tasks": os.path.join(group, "tasks")}
    if os.path.isdir(group):
        if schema:
            _compare(group, schema)
    elif name and not schema:
        raise Invalid(
            what=f"put the container into the class {name}",
            cause=f"there is no {group}, and linux.intelRdt has no schema to make it by",
            remedy=f"mkdir {group}, or give linux.intelRdt schemata",
        )
    else:
        _make(group)
        undo.callback(_remove, group)
        for line in schema:
            _write(group, "schemata", line, mount)
        if not name:
            facts["group"] = group
    if wanted.get("enableMonitoring"):
        monitor = os.path.join(group, "mon_groups", identifier)
        _make(monitor)
        undo.callback(_remove, monitor)
        facts |= {"monitor": monitor, "tasks": os.path.join(monitor, "tasks"), "class": facts["tasks"]}
    return facts


def enter(facts: Mapping[str, str], pid: int) -> None:
    """Put process `pid` into the group, and into the one that counts: only a member of the class may be in that."""
    for key in ("class", "tasks"):
        if key in facts:
            directory, name = os.path.split(facts[key])
            _write(directory, name, str(pid), "")


def update(facts: Mapping[str, str], wanted: Mapping[str, Any]) -> None:
    """Other schemata, which `check` has seen, for the container's class. Raises Invalid for a container that has none."""
    if not facts:
        raise Invalid(
            what="change the class of service", cause="the container has none", remedy="give it linux.intelRdt when it is made"
        )
    group = os.path.dirname(facts.get("class", facts["tasks"]))
    for line in lines(wanted):
        _write(group, "schemata", line, os.path.dirname(group))


def remove(facts: Mapping[str, str]) -> None:
    """What `prepare` made for this container alone."""
    for key in ("monitor", "group"):
        if key in facts:
            _remove(facts[key])


def _compare(group: str, schema: list[str]) -> None:
    """A class that is there already is somebody's: it has to be what is asked for."""
    with open(os.path.join(group, "schemata"), encoding="ascii") as file:
        found = dict(_parsed(line) for line in file)
    for line in schema:
        resource, wanted = _parsed(line)
        if not wanted.items() <= found.get(resource, {}).items():
            raise Invalid(
                what=f"put the container into the class {os.path.basename(group)}",
                cause=f"it exists, and its schemata are not {line!r}",
                evidence=[f"{name}:{values}" for name, values in found.items()],
                remedy="take another closID, or leave the schemata out",
            )


def _parsed(line: str) -> tuple[str, dict[str, int]]:
    """`L3:0=7f0;1=01f` as (L3, domain to value); the kernel writes masks with leading zeros."""
    resource, _, rest = line.strip().partition(":")
    base = 10 if resource.startswith("MB") else 16
    try:
        pairs = [part.split("=") for part in rest.split(";")]
        return resource, {domain.strip(): int(value, base) for domain, value in pairs}
    except ValueError:
        raise Invalid(what="read linux.intelRdt", cause=f"{line.strip()!r} is no line of a schemata file") from None


def _make(directory: str) -> None:
    try:
        os.mkdir(directory)
    except OSError as error:
        raise LimitRefused(
            what=f"make the class of service {directory}",
            cause=f"mkdir(2): {error.strerror} (errno {error.errno})",
            remedy="the processor has a fixed number of classes and of counters: remove one" if error.errno == 28 else "",
        ) from error


def _remove(directory: str) -> None:
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return


def _write(directory: str, name: str, line: str, mount: str) -> None:
    path = os.path.join(directory, name)
    try:
        with open(path, "a", encoding="ascii") as file:
            file.write(line + "\n")
    except OSError as error:
        evidence = []
        if os.path.exists(status := os.path.join(mount, "info/last_cmd_status")):
            with open(status, encoding="ascii") as file:
                evidence = file.read().splitlines()
        raise LimitRefused(
            what=f"write {line!r} to {path}", cause=str(SyscallError("write", error.errno or 0)), evidence=evidence
        ) from error
