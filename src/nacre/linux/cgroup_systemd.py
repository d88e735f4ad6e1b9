"""Cgroups made by systemd: a container's is a transient scope, delegated to us; a pod's is a slice. systemd.resource-control(5).

Who is no root of the machine speaks to the systemd that the machine runs for him (`systemd --user`). It has a part of cgroup v2, below
which all of his units lie, and it alone may bring a process there that was started elsewhere, such as in a login's session.

systemd sets the limits it has names for, so that a reload does not undo them, and the files are written once more as for every
cgroup: exact, and those it has no names for. Nothing is kept here: the unit is systemd's, its name stands in the container's record.

A scope lives as long as a process is in it, and init enters late. So a placeholder holds it from `create` to `settle`; it ends with its
maker too, and systemd then takes the empty scope away: a kill at any moment leaves nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from nacre.linux import cgroup_names, process
from nacre.linux.bus import Bus, CallRefused, unix_path
from nacre.linux.cgroup_files import CgroupBusy
from nacre.linux.cgroup_layout import Layout
from nacre.linux.cgroup_names import Place
from nacre.linux.cgroups import Cgroup
from nacre.linux.dbus import BusBroken, Message, Variant
from nacre.linux.systemd_properties import Properties, properties_in, properties_of
from nacre.oci.errors import Unsupported

_NAME, _PATH, _MANAGER = "org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"
_JOB_S = 30.0


class Systemd:
    """The system's manager, or the user's own: the few calls that cgroups need."""

    def __init__(self) -> None:
        self._bus = _connect()

    def __enter__(self) -> Systemd:
        return self

    def __exit__(self, *_: object) -> None:
        self._bus.__exit__()

    def _call(self, member: str, signature: str = "", *body: Any) -> tuple[Any, ...]:
        return self._bus.call(_NAME, _PATH, _MANAGER, member, signature, body)

    def start(self, unit: str, properties: Properties) -> None:
        """Make the transient unit and wait until it is there. Raises CgroupBusy when systemd's job does not succeed."""
        self._job(unit, "start", lambda: self._start(unit, properties))

    def _start(self, unit: str, properties: Properties) -> tuple[Any, ...]:
        body = (unit, "replace", properties, ())
        try:
            return self._call("StartTransientUnit", "ssa(sv)a(sa(sv))", *body)
        except CallRefused as refused:
            if not refused.error.endswith(".UnitExists"):
                raise
            self.reset(unit)  # one that failed stays loaded until somebody says that he has seen it
            return self._call("StartTransientUnit", "ssa(sv)a(sa(sv))", *body)

    def stop(self, unit: str) -> None:
        """End what is in the unit and take it away; one that is not there is fine."""
        try:
            self._job(unit, "stop", lambda: self._call("StopUnit", "ss", unit, "replace"))
        except CallRefused as refused:
            if not refused.error.endswith(".NoSuchUnit"):
                raise
        self.reset(unit)

    def reset(self, unit: str) -> None:
        try:
            self._call("ResetFailedUnit", "s", unit)
        except CallRefused as refused:
            if not refused.error.endswith(".NoSuchUnit"):
                raise

    def set(self, unit: str, properties: Properties) -> None:
        """Change properties of a living unit until it ends."""
        self._call("SetUnitProperties", "sba(sv)", unit, True, properties)

    def attach(self, unit: str, pid: int) -> None:
        """Bring the process into the unit, which was delegated."""
        self._call("AttachProcessesToUnit", "ssau", unit, "", [pid])

    def control_group(self) -> str:
        """The cgroup below which the manager's units lie."""
        (answer,) = self._bus.call(_NAME, _PATH, "org.freedesktop.DBus.Properties", "Get", "ss", (_MANAGER, "ControlGroup"))
        return str(answer.value)

    def _job(self, unit: str, act: str, begin: Callable[[], tuple[Any, ...]]) -> None:
        self._call("Subscribe")
        self._bus.listen(_NAME, _PATH, _MANAGER, "JobRemoved")
        (job,) = begin()

        def ours(message: Message) -> bool:
            return message.member == "JobRemoved" and message.signature == "uoss" and message.body[1] == job

        ended = self._bus.await_signal(f"{act} the unit {unit}", ours, _JOB_S)
        if ended.body[3] != "done":
            raise CgroupBusy(
                what=f"{act} the unit {unit}",
                cause=f"systemd's job ended with {ended.body[3]!r}",
                remedy=f"systemctl {'' if _is_system() else '--user '}status {unit}",
            )


def _connect() -> Bus:
    """systemd's own socket, as systemctl takes it: there without a bus daemon, and without its detour; else the bus. Raises BusBroken."""
    system = _is_system()
    tried = []
    for path, daemon in _sockets() if system else _own_sockets():
        try:
            return Bus(path, daemon=daemon)
        except BusBroken as broken:
            tried.append(f"{path}: {broken.cause}")
    raise BusBroken(
        what="speak to systemd" if system else "speak to the user's systemd",
        cause="no D-Bus socket answers",
        evidence=tuple(tried),
        remedy="systemctl start dbus.socket" if system else f"loginctl enable-linger {_host_uid()}, as root",
    )


def _sockets() -> tuple[tuple[str, bool], ...]:
    """(path, whether a bus daemon is behind it)."""
    bus = unix_path(os.environ.get("DBUS_SYSTEM_BUS_ADDRESS", "")) or "/run/dbus/system_bus_socket"
    return (("/run/systemd/private", False), (bus, True))


def _own_sockets() -> tuple[tuple[str, bool], ...]:
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{_host_uid()}"
    bus = unix_path(os.environ.get("DBUS_SESSION_BUS_ADDRESS", "")) or f"{runtime}/bus"
    return ((f"{runtime}/systemd/private", False), (bus, True))


def _host_uid() -> int:
    """Who we are outside of a user namespace."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        for line in file:
            inside, outside, size = map(int, line.split())
            if inside <= os.geteuid() < inside + size:
                return outside + os.geteuid() - inside
    return os.geteuid()


def _is_system() -> bool:
    """Root of the machine, not of a user namespace, whose root is an ordinary user to systemd."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return os.geteuid() == 0 and file.read().split() == ["0", "0", "4294967295"]


# -- a container's scope, a pod's slice


def place(wanted: str, identifier: str) -> Place:
    """Where `wanted`, a linux.cgroupsPath, leads: as `cgroup_names.resolve` says, for a user below his own systemd's cgroup."""
    if _is_system():
        return cgroup_names.resolve(wanted, identifier, systemd=True)
    found = cgroup_names.resolve(wanted, identifier, systemd=True, home="user.slice")
    if not found.unit:
        return found
    with Systemd() as systemd:
        return found.but(path=systemd.control_group().rstrip("/") + found.path)


class ScopeCgroup(Cgroup):
    """A container's cgroup as a transient scope."""

    def __init__(self, layout: Layout, place: Place, annotations: Mapping[str, str] = {}) -> None:
        """`annotations` may name properties of the unit."""
        super().__init__(layout, place.path)
        self._annotations = annotations
        self.by_request = not _is_system()
        self._unit, self._slice = place.unit, place.slice
        self._placeholder: _Placeholder | None = None

    def create(self, *, limits: bool = True) -> None:
        if self.by_request and self.layout.mode != "v2":
            raise Unsupported(
                what=f"make the unit {self._unit} through the user's systemd",
                cause=f"the cgroups of this machine are {self.layout.mode}, and only v2 is delegated to a user",
                remedy="boot with systemd.unified_cgroup_hierarchy=1, or run it as root",
            )
        self._placeholder = _Placeholder()
        properties: Properties = [
            ("Description", Variant("s", f"container {self._unit}")),
            ("Slice", Variant("s", self._slice)),
            ("Delegate", Variant("b", True)),
            ("PIDs", Variant("au", [self._placeholder.pid])),
            ("DefaultDependencies", Variant("b", False)),
            ("CollectMode", Variant("s", "inactive-or-failed")),
            *((f"{name}Accounting", Variant("b", True)) for name in ("CPU", "Memory", "Tasks", _block_name(self.layout))),
        ]
        own = properties_in(self._annotations)
        properties = [one for one in properties if one[0] not in dict(own)] + own
        try:
            with Systemd() as systemd:
                systemd.start(self._unit, properties)
        except BaseException:
            self._leave()
            raise
        # Hierarchies that systemd does not know (cpuset, freezer of v1), and controllers that it did not hand down.
        super().create(limits=limits)
        if self.layout.mode != "v2":
            self.join(self._placeholder.pid)  # at the slice's next change systemd trims what is empty and not its own
        self.oom_kills()  # so that its own can be told from the slice's once it is gone

    def apply(self, resources: dict[str, Any]) -> list[str]:
        if self.by_request:  # who may make no device meets those that he is given: there is nothing to forbid
            resources = {key: value for key, value in resources.items() if key != "devices"}
        return super().apply(resources)

    def gates(self, *, born: bool = False, below: Mapping[str, str] = {}) -> list[tuple[str, int]]:
        return [] if self.by_request and not below else super().gates(born=born, below=below)

    def adopt(self, pid: int) -> None:
        if self.by_request:
            with Systemd() as systemd:
                systemd.attach(self._unit, pid)

    def settle(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._placeholder is not None:
            self._placeholder.end()
            self._placeholder = None

    def _tell(self, resources: dict[str, Any]) -> None:
        _set(self._unit, properties_of(resources, self.layout))

    def remove(self) -> None:
        self._leave()
        with Systemd() as systemd:
            systemd.stop(self._unit)
        super().remove()


class SliceCgroup(Cgroup):
    """A pod's cgroup, or a level of them, as a slice: it holds no process itself."""

    def __init__(self, layout: Layout, path: str) -> None:
        super().__init__(layout, path)
        self._unit = os.path.basename(self.path)

    def create(self, *, limits: bool = True) -> None:
        accounting = [(f"{name}Accounting", Variant("b", True)) for name in ("CPU", "Memory", "Tasks", _block_name(self.layout))]
        with Systemd() as systemd:
            try:
                systemd.start(self._unit, [("DefaultDependencies", Variant("b", False)), *accounting])
            except CallRefused as refused:
                if not refused.error.endswith(".UnitExists"):
                    raise
                systemd.set(self._unit, accounting)  # made by an earlier run of ours, or by systemd for something below it
        super().create(limits=limits)

    def _tell(self, resources: dict[str, Any]) -> None:
        _set(self._unit, properties_of(resources, self.layout))

    def remove(self) -> None:
        with Systemd() as systemd:
            systemd.stop(self._unit)
        super().remove()


def _set(unit: str, properties: Properties) -> None:
    if properties:
        with Systemd() as systemd:
            systemd.set(unit, properties)


def group(layout: Layout, path: str) -> Cgroup:
    """The group at `path`, made and removed by systemd if its name is a unit's and systemd is there."""
    if not cgroup_names.booted() or not path.endswith((".slice", ".scope")):
        return Cgroup(layout, path)
    if path.endswith(".slice"):
        return SliceCgroup(layout, path)
    directory, unit = os.path.split(path)
    return ScopeCgroup(layout, Place(path=path, unit=unit, slice=os.path.basename(directory)))


def stop(path: str) -> None:
    """Have systemd end the slice at `path`, with all that it made there; where none of it is a unit, nothing."""
    if path.endswith(".slice") and cgroup_names.booted():
        with Systemd() as systemd:
            systemd.stop(os.path.basename(path))


def _block_name(layout: Layout) -> str:
    return "IO" if layout.mode == "v2" else "BlockIO"


class _Placeholder:
    """A process that does nothing until its maker says so, or is gone."""

    def __init__(self) -> None:
        read, write = os.pipe2(os.O_CLOEXEC)
        self.pid = process.fork()
        if self.pid == 0:
            try:
                os.close(write)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                os.read(read, 1)
            finally:
                os._exit(0)
        os.close(read)
        self._write = write

    def end(self) -> None:
        """End and reap it; the container's init may hold a copy of our end of the pipe, so closing alone would not do."""
        try:
            os.write(self._write, b".")
        except BrokenPipeError:
            pass  # somebody killed it
        os.close(self._write)
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass
