"""A cgroup on all hierarchies of the host at once, whatever their versions. Layout and discovery: `cgroup_layout`.

One thing, as every act has to know all hierarchies; what is pure is elsewhere (`cgroup_values`, `cgroup_files`, `cgroup_figures`).
A cgroup is a path; per hierarchy it is a directory. Directories are made and removed here, and nothing is kept elsewhere: a kill
between two writes leaves directories that `remove` takes away.
"""

from __future__ import annotations

import errno
import os
import select
import time

from nacre.linux import cgroup_files as files
from nacre.linux import cgroup_values
from nacre.linux.cgroup_files import CgroupBusy, LimitRefused
from nacre.linux.cgroup_layout import CgroupMissing, Hierarchy, Layout, discover, missing
from nacre.linux.pids import owned, signals
from nacre.oci.errors import Failure

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["Cgroup", "CgroupBusy", "CgroupMissing", "Hierarchy", "Layout", "LimitRefused", "discover", "missing"]

# Joined always; other v1 hierarchies (perf_event, net_cls, rdma …) when a limit has made the cgroup there.
_USED = frozenset({"cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "hugetlb"})
_V2_WANTED = ("cpuset", "cpu", "io", "memory", "pids", "hugetlb")
_DELEGATED = ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads")  # where the kernel does not say
_WAIT_S = 10.0


class Cgroup:
    """The cgroup `path` (absolute, below the layout's root) of every hierarchy that counts."""

    by_request = False  # a process does not enter by itself: somebody has to `adopt` it

    def __init__(self, layout: Layout, path: str) -> None:
        self.layout = layout
        self.path = "/" + os.path.normpath("/" + path).strip("/")
        systemd = os.path.isdir("/run/systemd/system")
        self._directories: list[tuple[Hierarchy, str]] = [
            (hierarchy, directory)
            for hierarchy, directory in ((one, layout.directory(one, self.path)) for one in layout.hierarchies)
            if hierarchy.version == 2
            or hierarchy.controllers & _USED
            or (hierarchy.name == "systemd" and systemd)
            or (self.path != "/" and os.path.isdir(directory))
        ]
        self._made: list[str] = []
        self._killed_beside = 0

    def directories(self) -> list[tuple[Hierarchy, str]]:
        """Each hierarchy that counts, and the cgroup's directory there."""
        return list(self._directories)

    # -- making and removing

    def create(self, *, limits: bool = True) -> None:
        """Make the directories, with their parents; without `limits` no controller is handed down on v2, which a parent with
        processes in it could not. Raises CgroupBusy, LimitRefused or OSError, then having undone what it made.
        """
        try:
            for hierarchy, directory in self._directories:
                self._make(hierarchy, directory, delegate=limits)
        except BaseException:
            self.undo()
            raise

    def settle(self) -> None:
        """The first process has entered: who holds a place for it may let go (see cgroup_systemd)."""

    def _make(self, hierarchy: Hierarchy, directory: str, *, delegate: bool = True) -> None:
        if hierarchy.version == 2 and delegate:
            self._delegate(hierarchy, directory)
        try:
            os.mkdir(directory)
            fresh = [directory]
        except FileExistsError:
            return
        except FileNotFoundError:
            fresh = self._make_with_parents(directory)
        except OSError as error:
            raise self._no_directory(directory, error) from error
        self._made += fresh
        if hierarchy.version == 1 and "cpuset" in hierarchy.controllers:
            for made in fresh:
                files.inherit_cpuset(made)

    def _make_with_parents(self, directory: str) -> list[str]:
        wanted = [directory]
        while not os.path.isdir(os.path.dirname(wanted[-1])):
            wanted.append(os.path.dirname(wanted[-1]))
        made: list[str] = []
        for one in reversed(wanted):
            try:
                os.mkdir(one)
                made.append(one)
            except FileExistsError:
                continue
            except OSError as error:
                self._made += made
                raise self._no_directory(one, error) from error
        return made

    @staticmethod
    def _no_directory(directory: str, error: OSError) -> Failure:
        remedy = ""
        if error.errno == errno.ENOSPC:  # ids of dead cgroups count until their last page is gone
            remedy = (
                "cgroup ids are used up, not the disk: compare num_cgroups in /proc/cgroups with 65535 and remove stale cgroups"
            )
        return CgroupBusy(
            what=f"make cgroup {directory}", cause=f"mkdir(2): {error.strerror} (errno {error.errno})", remedy=remedy
        )

    def _delegate(self, hierarchy: Hierarchy, directory: str) -> None:
        """cgroup v2: have every ancestor hand its controllers down (cgroup.subtree_control)."""
        wanted = [name for name in _V2_WANTED if name in hierarchy.controllers]
        parents = self._above(hierarchy, directory)
        if not wanted or (os.path.isdir(parents[-1]) and files.granted(parents[-1]) >= set(wanted)):
            return
        for parent in parents:
            if not os.path.isdir(parent):
                os.mkdir(parent)
                self._made.append(parent)
            granted = files.granted(parent)
            for name in wanted:
                if name not in granted:
                    self._grant(parent, name)

    @staticmethod
    def _above(hierarchy: Hierarchy, directory: str) -> list[str]:
        """The groups that `directory` is in, from the hierarchy's root down."""
        parents = [os.path.dirname(directory)]
        while len(parents[-1]) > len(hierarchy.mount):
            parents.append(os.path.dirname(parents[-1]))
        return parents[::-1]

    @staticmethod
    def _grant(parent: str, name: str) -> None:
        try:
            files.hand_down(parent, name)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINVAL, errno.EACCES, errno.EPERM):
                return  # not offered by the level above, or not ours to give: a limit that needs it will say so (`_demand`)
            raise files.kept(f"hand the controller {name} down from cgroup {parent}", parent, name, error) from error

    def _demand(self, hierarchy: Hierarchy, directory: str, write: cgroup_values.Write) -> bool:
        """Set a limit that has no file: on v2 its controller may have stayed above. Raises CgroupBusy that says where and why."""
        name = {"blkio": "io"}.get(write.controller, write.controller)
        for parent in self._above(hierarchy, directory) if hierarchy.version == 2 else ():
            if name in files.granted(parent):
                continue
            try:
                files.hand_down(parent, name)
            except OSError as error:
                raise files.kept(f"set {write.files[0]} to {write.value} for cgroup {self.path}", parent, name, error) from error
        return files.set_limit(directory, write)

    def undo(self) -> None:
        """Take away what `create` made, parents too where they are empty again."""
        for directory in reversed(self._made):
            try:
                os.rmdir(directory)
            except OSError:
                continue  # somebody else uses it by now
        self._made.clear()

    def give(self, uid: int) -> None:
        """Make user `uid` the owner of what cgroups(7) "delegation" names. On v2 alone: v1 has no safe way to."""
        unified = self.layout.unified
        if unified is None or self.layout.mode != "v2":
            return
        directory = self.layout.directory(unified, self.path)
        os.chown(directory, uid, -1)
        for name in files.read("/sys/kernel/cgroup", "delegate").split() or _DELEGATED:
            try:
                os.chown(f"{directory}/{name}", uid, -1)
            except FileNotFoundError:
                continue  # not every group has each of them

    def exists(self) -> bool:
        return any(os.path.isdir(directory) for _, directory in self._directories)

    def remove(self) -> None:
        """Remove the cgroup and those below it, waiting a while for ending processes. What is gone already is fine.

        Raises CgroupBusy naming the processes that hold it.
        """
        self._refuse_root("remove")
        deadline = time.monotonic() + _WAIT_S
        for hierarchy, directory in self._directories:
            while not files.remove_tree(directory):
                holders = files.processes(directory, recursive=True)
                if time.monotonic() > deadline:
                    raise CgroupBusy(
                        what=f"remove cgroup {directory}",
                        cause=f"processes {', '.join(map(str, holders)) or '(already ending)'} are in it (v{hierarchy.version})",
                        remedy="end these processes",
                    )
                files.await_end(holders)

    # -- limits

    def apply(self, resources: dict[str, Any]) -> list[str]:
        """Set the limits of `resources` (OCI linux.resources) that are given; answers warnings of what has no place here.

        Raises CgroupMissing for a controller that the host lacks, LimitRefused for a value that the kernel refuses.
        """
        self._check_before(resources.get("memory") or {})
        self._tell(resources)
        left: list[str] = []
        for write in self._cpu_order(self._writes(resources)):
            hierarchy = self.layout.find(write.controller)
            if hierarchy is None:
                if write.optional or write.value in ("-1", "max"):
                    left.append(write.told)
                    continue  # no limit asked, none there
                raise missing(
                    write.controller, f"set {write.files[0]} to {write.value} for cgroup {self.path}", self.layout.looked
                )
            directory = self.layout.directory(hierarchy, self.path)
            if not os.path.isdir(directory):
                self._make(hierarchy, directory)
                if (hierarchy, directory) not in self._directories:
                    self._directories.append((hierarchy, directory))
            if files.set_limit(directory, write):
                continue
            if write.optional:
                left.append(write.told)
            elif write.value not in ("-1", "max") and not self._demand(hierarchy, directory, write):
                raise files.no_file(directory, write)
        if resources.get("devices") is not None:
            self._apply_devices(cgroup_values.device_rules(resources["devices"]))
        return [f"linux.resources.{told} is left out: the cgroups of this host have no file for it" for told in left if told]

    def _tell(self, resources: dict[str, Any]) -> None:
        """Limits that pass the check, to whoever would undo them later (see cgroup_systemd)."""

    def _check_before(self, memory: dict[str, Any]) -> None:
        """memory.checkBeforeUpdate: rather no new limit than one that kills what runs."""
        limit = memory.get("limit") or 0
        if memory.get("checkBeforeUpdate") and limit > 0 and (used := self.stats()["memory_bytes"]) > limit:
            raise LimitRefused(
                what=f"limit the memory of cgroup {self.path} to {limit} bytes",
                cause=f"{used} bytes are in use, and memory.checkBeforeUpdate is set",
                remedy="raise the limit above what is in use, or leave checkBeforeUpdate out",
            )

    def _writes(self, resources: dict[str, Any]) -> list[cgroup_values.Write]:
        if self.layout.mode == "v2":
            return cgroup_values.v2(resources)
        on_v2 = self.layout.unified.controllers if self.layout.unified else frozenset()
        for write in cgroup_values.unified(resources.get("unified") or {}):
            if write.controller not in on_v2:
                raise self._not_on_v2(write.files[0])
        writes = cgroup_values.v1(resources)
        if on_v2:
            writes = [
                write for write in writes if write.controller not in on_v2 and {"blkio": "io"}.get(write.controller) not in on_v2
            ]
            modern = {**resources, "cpu": resources.get("cpu") if "cpu" in on_v2 or "cpuset" in on_v2 else None}
            modern["memory"] = resources.get("memory") if "memory" in on_v2 else None
            writes += [write for write in cgroup_values.v2(modern) if write.controller in on_v2]
        return self._memory_order(writes)

    def _not_on_v2(self, name: str) -> Failure:
        controller = name.partition(".")[0]
        what = f"set {name} as linux.resources.unified asks for cgroup {self.path}"
        found = self.layout.find(controller)
        if found is None:
            return missing(controller, what, self.layout.looked)
        return CgroupMissing(
            what=what,
            cause=f"the controller {controller} is on cgroup v1 here ({found.mount}), unified is for v2 alone",
            remedy="use the v1 form of the limit, or boot with systemd.unified_cgroup_hierarchy=1",
        )

    def _memory_order(self, writes: list[cgroup_values.Write]) -> list[cgroup_values.Write]:
        """v1: limit may never pass memory+swap, so which of the two goes first depends on what is there."""
        names = [write.files[0] for write in writes]
        if "memory.limit_in_bytes" not in names or "memory.memsw.limit_in_bytes" not in names:
            return writes
        first, second = names.index("memory.limit_in_bytes"), names.index("memory.memsw.limit_in_bytes")
        hierarchy = self.layout.find("memory")
        directory = self.layout.directory(hierarchy, self.path) if hierarchy else ""
        now = int(files.read(directory, "memory.memsw.limit_in_bytes") or files.UNLIMITED)
        limit = int(writes[first].value)
        if limit < 0 or limit > now:
            writes[first], writes[second] = writes[second], writes[first]
        return writes

    def _cpu_order(self, writes: list[cgroup_values.Write]) -> list[cgroup_values.Write]:
        """v1: time may at no moment be more of its period than before and after, as the parent may forbid that: a shorter period
        goes behind it."""
        names = [write.files[0] for write in writes]
        hierarchy = self.layout.find("cpu")
        directory = self.layout.directory(hierarchy, self.path) if hierarchy else ""
        for pair in (("cpu.rt_period_us", "cpu.rt_runtime_us"), ("cpu.cfs_period_us", "cpu.cfs_quota_us")):
            if not set(pair) <= set(names):
                continue
            period, time_ = (names.index(name) for name in pair)
            shorter = int(writes[period].value) < files.number(files.read(directory, pair[0]))
            if shorter == (period < time_):
                writes[period], writes[time_] = writes[time_], writes[period]
        return writes

    def _apply_devices(self, rules: list[cgroup_values.DeviceRule]) -> None:
        what = f"limit the devices of cgroup {self.path}"
        if self.layout.mode == "none":
            raise missing("devices", what, self.layout.looked)
        hierarchy = self.layout.find("devices") or self.layout.unified
        if hierarchy is None:
            raise missing("devices", what, self.layout.looked)
        directory = self.layout.directory(hierarchy, self.path)
        try:
            if hierarchy.version == 2:
                from nacre.linux import device_bpf  # with cdata, which most commands do without

                with owned(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
                    device_bpf.attach(fd, rules)
                return
            with (
                owned(os.open(f"{directory}/devices.allow", os.O_WRONLY | os.O_CLOEXEC)) as allow,
                owned(os.open(f"{directory}/devices.deny", os.O_WRONLY | os.O_CLOEXEC)) as deny,
            ):
                for rule in rules:
                    os.write(allow if rule.allow else deny, rule.line().encode())
        except OSError as error:
            call = getattr(error, "call", "write")
            raise LimitRefused(what=what, cause=f"{call}(2): {error.strerror} (errno {error.errno})") from error

    # -- processes

    def join(self, pid: int) -> None:
        """Move process `pid` in; on cgroup v1 each write may wait for other CPUs, so init joins by `gates` instead."""
        for hierarchy, directory in self._directories:
            try:
                files.write(directory, "cgroup.procs", str(pid))
            except OSError as error:
                raise self._no_entry(hierarchy, directory, error) from error

    def cradle(self) -> int:
        """A descriptor of the v2 directory, for a process to be born in (`process.fork`); -1 where it has to enter by a gate.

        Entering costs up to 12 ms, as the kernel waits for all CPUs; being born in it costs nothing, but then the set-up's memory is
        the group's, so only where v2 counts none. The caller owns it.
        """
        unified = self.layout.unified
        if unified is None or "memory" in unified.controllers:
            return -1
        return os.open(self.layout.directory(unified, self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def gates(self, *, born: bool = False, below: Mapping[str, str] = {}) -> list[tuple[str, int]]:
        """(directory, descriptor) per hierarchy: a single-threaded process enters by writing "0" to each. The caller owns them.

        On v1 this is the file `tasks`: moving one's own only thread spares the kernel's global lock (up to 12 ms a hierarchy).
        `born`: without v2's, in which the process is already (`cradle`). `below`: controller to a path below the group, in its hierarchy.
        Raises CgroupMissing for a controller that is nowhere.
        """
        deeper = {self.layout.need(controller, f"enter cgroup {self.path}/{path}"): path for controller, path in below.items()}
        opened: list[tuple[str, int]] = []
        try:
            for hierarchy, directory in self._directories:
                if born and hierarchy.version == 2:
                    continue
                directory = os.path.join(directory, deeper.get(hierarchy, "").lstrip("/")).rstrip("/")
                name = "cgroup.procs" if hierarchy.version == 2 else "tasks"
                opened.append((directory, os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CLOEXEC)))
        except BaseException:
            for _, fd in opened:
                os.close(fd)
            raise
        return opened

    @staticmethod
    def _no_entry(hierarchy: Hierarchy, directory: str, error: OSError) -> Failure:
        remedy = ""
        if hierarchy.version == 2 and error.errno in (errno.EBUSY, errno.EOPNOTSUPP):
            remedy = (
                f"processes go into leaves of type domain; this one is {files.read(directory, 'cgroup.type').strip() or 'a root'}"
            )
        return CgroupBusy(
            what=f"enter cgroup {directory}", cause=f"write(2): {error.strerror} (errno {error.errno})", remedy=remedy
        )

    def adopt(self, pid: int) -> None:
        """Have process `pid` brought in, where it cannot enter by `gates` (`by_request`)."""

    def pids(self) -> list[int]:
        """Every process in the cgroup and below it; empty when it is gone."""
        directory = self._best("pids", "freezer", "memory")
        return [] if directory is None else sorted(set(files.processes(directory, recursive=True)))

    def kill(self, number: int = signals.SIGKILL) -> None:
        """Send `number` to every process in the cgroup; SIGKILL leaves none that could fork meanwhile."""
        self._refuse_root("kill")
        unified = self.layout.unified
        if number == signals.SIGKILL and unified is not None:
            directory = self.layout.directory(unified, self.path)
            try:
                files.write(directory, "cgroup.kill", "1")
                return
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP):
                    raise
        if number != signals.SIGKILL:
            self._signal(number)
            return
        while self._kill_frozen():
            pass

    def _kill_frozen(self) -> bool:
        """SIGKILL for everyone; whether somebody is there now who did not get it, the child of a fork(2) that was under way."""
        freezes = self.layout.find("freezer") is not None
        if freezes:
            self._freezer("FROZEN", wait=False)
        try:
            reached = self._signal(signals.SIGKILL)
        finally:
            if freezes:
                self._freezer("THAWED", wait=False)
        return not reached.issuperset(self.pids())

    def _signal(self, number: int) -> set[int]:
        """Answers who was there."""
        there = set(self.pids())
        for pid in there:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        return there

    def _refuse_root(self, act: str) -> None:
        """The root of a hierarchy holds the whole machine."""
        if self.path == self.layout.root == "/":
            raise CgroupBusy(what=f"{act} cgroup /", cause="it is the root, which holds every process of this machine")

    def freeze(self) -> None:
        """Stop every process until `thaw`. Raises CgroupBusy when one does not stop in ten seconds (uninterruptible sleep)."""
        self._refuse_root("freeze")
        self._freezer("FROZEN", wait=True)

    def thaw(self) -> None:
        self._freezer("THAWED", wait=True)

    def is_frozen(self) -> bool:
        """Whether it, or a group above it, is or is being frozen: what enters stops there. One that is not made yet will be as its parent."""
        hierarchy = self.layout.find("freezer")
        if hierarchy is None:
            return False
        directory = self.layout.directory(hierarchy, self.path)
        while not os.path.isdir(directory):
            directory = os.path.dirname(directory)
        return files.is_freezing(directory, hierarchy)

    def _freezer(self, state: str, *, wait: bool) -> None:
        hierarchy = self.layout.need("freezer", f"freeze cgroup {self.path}")
        directory = self.layout.directory(hierarchy, self.path)
        name, value = ("cgroup.freeze", str(int(state == "FROZEN"))) if hierarchy.version == 2 else ("freezer.state", state)
        try:
            files.write(directory, name, value)
        except FileNotFoundError:
            return
        deadline = time.monotonic() + _WAIT_S
        while wait and files.is_frozen(directory, hierarchy) != (state == "FROZEN"):
            if time.monotonic() > deadline:
                files.write(directory, name, "0" if hierarchy.version == 2 else "THAWED")
                raise CgroupBusy(
                    what=f"freeze cgroup {self.path}", cause=f"not all of {self.pids()} stopped within {_WAIT_S:.0f} s"
                )
            select.select([], [], [], 0.001)  # v1 tells nobody when the last process has stopped
            if hierarchy.version == 1:
                files.write(directory, name, value)  # v1 tries again only when asked again

    # -- figures

    def stats(self) -> dict[str, int]:
        """What the cgroup uses; see `cgroup_figures`, which a container's making does without."""
        from nacre.linux import cgroup_figures

        return cgroup_figures.stats(self.layout, self.path)

    def oom_kills(self) -> int:
        """How many processes the kernel has killed here for want of memory, ever; compare before and after.

        systemd takes a scope away with its last process. The slice around has counted too: whoever asked while the scope was there is
        told what has come to it since.
        """
        hierarchy = self.layout.find("memory")
        if hierarchy is None:
            return 0
        directory = self.layout.directory(hierarchy, self.path)
        if hierarchy.version == 1:
            return files.table(files.read(directory, "memory.oom_control")).get("oom_kill", 0)
        own = files.table(files.read(directory, "memory.events")).get("oom_kill")
        if not self.path.endswith(".scope"):
            return own or 0
        around = files.table(files.read(os.path.dirname(directory), "memory.events")).get("oom_kill", 0)
        if own is None:
            return around - self._killed_beside
        self._killed_beside = around - own
        return own

    def _best(self, *controllers: str) -> str | None:
        """The directory of the first hierarchy that exists: unified, else one of `controllers`, else any."""
        ranked = [self.layout.unified, *(self.layout.find(controller) for controller in controllers), *self.layout.hierarchies]
        for hierarchy in ranked:
            if hierarchy is not None and os.path.isdir(directory := self.layout.directory(hierarchy, self.path)):
                return directory
        return None
