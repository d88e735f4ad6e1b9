"""Where each cgroup controller lives on this host: v1, v2, both at once, or nowhere. Found one controller at a time, never assumed.

A process has one path *per hierarchy*; one path for all is the mistake behind half the field's "cgroup not found" reports.
"""

from __future__ import annotations

import os

from nacre.oci.errors import Failure
from nacre.oci.values import Value

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from typing import Any

KNOWN = (
    "cpu",
    "cpuacct",
    "cpuset",
    "memory",
    "devices",
    "freezer",
    "blkio",
    "io",
    "pids",
    "hugetlb",
    "net_cls",
    "net_prio",
    "rdma",
)
_NOWHERE = "/proc/self/mountinfo, which has no cgroup mount"
# v2's own abilities (the device program, freezing, CPU time) need no controller; "io" is what v1 calls "blkio".
_BUILT_IN_V2 = frozenset({"devices", "freezer", "cpuacct"})
# v2's controllers, and what /proc/cgroups calls them.
_OF_V2 = {"io": "blkio"} | {name: name for name in ("cpu", "cpuset", "memory", "pids", "hugetlb", "rdma")}


class CgroupMissing(Failure):
    """A controller that is needed is nowhere mounted; the cause names it and where it was looked for."""


class Hierarchy(Value):
    """One mounted cgroup file system."""

    mount: str  # absolute
    version: int  # 1 or 2
    controllers: frozenset[str]
    name: str = ""  # of a v1 hierarchy without controllers: "systemd"
    own: str = "/"  # this process's cgroup, below `mount`


class Layout(Value):
    """All hierarchies of the host. `root` goes before every cgroup path (tests keep to a corner of their own)."""

    hierarchies: tuple[Hierarchy, ...]
    root: str = "/"
    looked: tuple[str, ...] = ()  # where discover looked, for messages

    @property
    def mode(self) -> str:
        """ "v1", "v2", "hybrid" (controllers on v1, a v2 mount beside them) or "none"."""
        versions = {hierarchy.version for hierarchy in self.hierarchies}
        return {frozenset(): "none", frozenset({1}): "v1", frozenset({2}): "v2"}.get(frozenset(versions), "hybrid")

    @property
    def unified(self) -> Hierarchy | None:
        return next((hierarchy for hierarchy in self.hierarchies if hierarchy.version == 2), None)

    def find(self, controller: str) -> Hierarchy | None:
        """The hierarchy that has `controller` ("blkio" and "io" are one); None when none has."""
        for hierarchy in self.hierarchies:
            if controller in hierarchy.controllers:
                return hierarchy
            if hierarchy.version == 2 and {"blkio": "io"}.get(controller) in hierarchy.controllers:
                return hierarchy
        if controller in _BUILT_IN_V2 and self.mode == "v2":
            return self.unified
        return None

    def need(self, controller: str, what: str) -> Hierarchy:
        """As `find`; raises CgroupMissing, `what` being the act that needs it."""
        found = self.find(controller)
        if found is None:
            raise missing(controller, what, self.looked)
        return found

    def directory(self, hierarchy: Hierarchy, path: str) -> str:
        """The directory of cgroup `path` in `hierarchy`."""
        return os.path.normpath(f"{hierarchy.mount}/{self.root}/{path}")

    def describe(self) -> list[str]:
        """One line per controller: where it was found; for `doctor` and error texts."""
        lines = []
        for controller in KNOWN:
            found = self.find(controller)
            if found is None:
                lines.append(f"{controller}: absent")
            else:
                lines.append(f"{controller}: v{found.version} at {found.mount}, own cgroup {found.own}")
        return lines


def missing(controller: str, what: str, looked: tuple[str, ...]) -> CgroupMissing:
    enabled = _kernel_controllers()
    if all(place.endswith("(v2)") for place in looked) and _OF_V2.get(controller) in enabled:
        return CgroupMissing(
            what=what,
            cause=f"the kernel has the cgroup controller {controller}, and {', '.join(looked)} is not given it",
            remedy=f"have who owns the group above write +{controller} to its cgroup.subtree_control; systemd: Delegate=yes",
        )
    if looked == (_NOWHERE,):
        remedy = "mount -t cgroup2 cgroup2 /sys/fs/cgroup"
    elif controller not in enabled and controller != "io":
        remedy = f"boot a kernel with the {controller} controller (/proc/cgroups has: {', '.join(sorted(enabled)) or 'none'})"
        if controller == "memory":
            remedy = "add cgroup_enable=memory to the kernel command line, or boot a kernel with the memory controller"
    else:
        remedy = f"mount -t cgroup -o {controller} cgroup /sys/fs/cgroup/{controller} (v1), or boot with cgroup v2 only"
    return CgroupMissing(
        what=what,
        cause=f"the cgroup controller {controller} is nowhere mounted; looked in {', '.join(looked) or '/proc/self/mountinfo'}",
        remedy=remedy,
    )


def _kernel_controllers() -> set[str]:
    try:
        with open("/proc/cgroups", encoding="utf-8") as file:
            rows = [line.split() for line in file if not line.startswith("#")]
    except OSError:
        return set()
    return {row[0] for row in rows if len(row) == 4 and row[3] == "1"}


def discover(*required: str, proc: str = "/proc/self") -> Layout:
    """The layout as this process sees it, from PROC/mountinfo and PROC/cgroup.

    Raises CgroupMissing for a controller among `required` that is nowhere. A host without any cgroup file system has an empty layout.
    """
    with open(f"{proc}/mountinfo", "rb") as file:
        mountinfo = os.fsdecode(file.read())
    with open(f"{proc}/cgroup", "rb") as file:
        own = os.fsdecode(file.read())
    layout = parse(mountinfo, own)
    for controller in required:
        layout.need(controller, "find the host's cgroups")
    return layout


def parse(mountinfo: str, own: str) -> Layout:
    """The layout that these two texts describe (proc(5), cgroups(7)); v2's controllers are read from its mount."""
    paths = _own_paths(own)
    hierarchies: list[Hierarchy] = []
    seen: set[Any] = set()
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(tail) < 3 or tail[0] not in ("cgroup", "cgroup2"):
            continue
        root, mount = unescape(fields[3]), unescape(fields[4])
        options = tail[2].split(",")
        named = next((option.removeprefix("name=") for option in options if option.startswith("name=")), "")
        controllers = frozenset(options) & frozenset((*KNOWN, "perf_event", "misc"))
        version = 2 if tail[0] == "cgroup2" else 1
        key = "v2" if version == 2 else (named or controllers)
        if key in seen:
            continue  # mounted twice: the first is as good
        seen.add(key)
        path = paths.get("" if version == 2 else (f"name={named}" if named else min(controllers, default="")), "/")
        if version == 2:
            controllers = _v2_controllers(mount)
        hierarchies.append(Hierarchy(mount=mount, version=version, controllers=controllers, name=named, own=_below(path, root)))
    looked = tuple(f"{hierarchy.mount} (v{hierarchy.version})" for hierarchy in hierarchies)
    return Layout(hierarchies=tuple(hierarchies), looked=looked or (_NOWHERE,))


def _own_paths(text: str) -> dict[str, str]:
    """Controller, "name=NAME" or "" for v2, to this process's path."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            paths[controller] = path
    return paths


def _below(path: str, root: str) -> str:
    """`path` seen from a mount that shows only what lies below `root`."""
    if root != "/" and (path == root or path.startswith(root + "/")):
        return path[len(root) :] or "/"
    return path


def _v2_controllers(mount: str) -> frozenset[str]:
    try:
        with open(f"{mount}/cgroup.controllers", encoding="utf-8") as file:
            return frozenset(file.read().split())
    except OSError:
        return frozenset()


def unescape(text: str) -> str:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    if "\\" not in text:
        return text
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
