"""A container half made ahead: a process in namespaces of its own, with the mounts that every container has, that waits for its orders.

`prepare` forks it for a `Stock`, the part of a document that is known beforehand, and runs the steps that the ordinary plan makes of
that part, in a root of its own. `Stock.rest` compares a real document with it, literally: where the stock part is not the very same, it
answers None, and the container is made in the ordinary way. What is left of the document is planned by the ordinary code and run by the
waiting process, beginning with `Furnish`, which takes the real root and brings the mounts in.

The order of things is the only difference: what the document hides below /proc and /sys is hidden before the container's own mounts
are made, and not after. So a document with a mount of its own there, or where /dev has something, is none for a spare.
"""

from __future__ import annotations

import json
import os
import time

from nacre.linux import capabilities, cgroups, mounts, paths, process, seccomp
from nacre.linux import sockets as socket
from nacre.linux.contexts import ExitStack
from nacre.linux.libc import owned
from nacre.linux.mounts import MountFlag
from nacre.linux.namespaces import Clone
from nacre.oci import spec as oci_spec
from nacre.oci import state as store
from nacre.oci.state import Record, Status
from nacre.oci.values import Value
from nacre.runc import container, init, plan
from nacre.runc import steps as fs
from nacre.runc.launch import Birth, Child, Launcher
from nacre.runc.life import check_executed, remove_directory
from nacre.runc.mount_options import parse as parse_options

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Tree = Mapping[str, Any]

_NAMESPACES = ({"type": "mount"}, {"type": "pid"}, {"type": "cgroup"})
_TAKEN = frozenset(
    {"root", "ociVersion", "process", "mounts", "annotations", "linux", "hooks"}
)  # else the document is none for a spare
_TAKEN_LINUX = frozenset({"namespaces", "resources", "cgroupsPath", "maskedPaths", "readonlyPaths", "seccomp", "devices"})
_OWN_DEV = frozenset({"", "pts", "mqueue", "console", "ptmx", "core", "fd", "stdin", "stdout", "stderr"})
_DESCRIPTORS = 250  # that one message carries (SCM_MAX_FD is 253)


class Stock(Value):
    """What documents have alike. `devices` are the rules of its cgroup."""

    mounts: list[dict[str, Any]]
    masked: list[str]
    readonly: list[str]
    devices: list[dict[str, Any]]

    def document(self, root: str) -> dict[str, Any]:
        """A document of this part alone."""
        linux = {"namespaces": list(_NAMESPACES), "maskedPaths": self.masked, "readonlyPaths": self.readonly}
        return {"ociVersion": oci_spec.VERSION, "root": {"path": root}, "mounts": self.mounts, "linux": linux}

    def rest(self, config: Tree) -> dict[str, Any] | None:
        """The document without the stock part; None when it has another. Its cgroup's path and its hooks are the caller's to take out."""
        linux, own = config.get("linux"), config.get("mounts")
        if not isinstance(linux, dict) or not isinstance(own, list) or not isinstance(config.get("process"), dict):
            return None
        if not config.keys() <= _TAKEN or config.get("hooks") or not linux.keys() <= _TAKEN_LINUX or linux.get("devices"):
            return None
        same = {"namespaces": list(_NAMESPACES), "maskedPaths": self.masked, "readonlyPaths": self.readonly}
        if any(linux.get(key) != value for key, value in same.items()) or own[: len(self.mounts)] != self.mounts:
            return None
        own, resources = own[len(self.mounts) :], linux.get("resources")
        if not self._are_apart(own) or not isinstance(resources, dict) or container.is_tight(resources):
            return None
        kept: dict[str, Any] = {"namespaces": list(_NAMESPACES), "resources": resources}
        if resources.get("devices") == self.devices:
            kept["resources"] = {key: value for key, value in resources.items() if key != "devices"}
        if profile := linux.get("seccomp"):
            if "SCMP_ACT_NOTIFY" in str(profile):
                return None  # what brings its listener out is loaded on demand, and the waiting process loads nothing any more
            kept["seccomp"] = profile
        return {**config, "mounts": own, "linux": kept}

    def _are_apart(self, own: Sequence[Tree]) -> bool:
        """Whether no two of these have one place, none makes a difference to the stock mounts, and one message carries them all."""
        if not all(isinstance(mount, dict) and self._is_apart(mount) for mount in own):
            return False
        return len({plan.clean(mount["destination"]) for mount in own}) == len(own) < _DESCRIPTORS - 4

    def _is_apart(self, mount: Tree) -> bool:
        """Whether it is a bind that makes no difference to the stock mounts, nor they to it."""
        destination, options = mount.get("destination"), mount.get("options", [])
        if not isinstance(destination, str) or not isinstance(options, list) or mount.keys() & {"uidMappings", "gidMappings"}:
            return False
        bind = mount.get("type") in ("bind", "rbind") or "bind" in options or "rbind" in options
        top, _, below = plan.clean(destination)[1:].partition("/")
        if top == "dev":
            return bind and below.split("/")[0] not in _OWN_DEV | {name for name, _major, _minor in plan.DEFAULT_DEVICES}
        return bind and top not in ("", "proc", "sys") and not {"idmap", "ridmap", "tmpcopyup"} & set(map(str, options))


class Furnish(Value, kw_only=False):
    """The real root, a detached tree, takes the place of the one in which the stock mounts were made; copies of these go into it."""

    path: str
    tree: int
    place: int  # the root so far
    stock: tuple[tuple[fs.MountFilesystem, int], ...]  # a step that was run, and what it mounted with all that is on it

    def describe(self) -> str:
        return f"take {self.path} as root filesystem"

    def run(self, context: fs.Context) -> None:
        mounts.move_mount(self.tree, self.place)
        context.root = self.tree
        for step, made in self.stock:
            with owned(mounts.bind_tree("", recursive=True, directory=made)) as copy, owned(step.target(context)) as target:
                mounts.move_mount(copy, target)


# -- the waiting process


class _Waiting:
    """What the child knows when its orders come."""

    def __init__(self, stock: Tree, steps: Sequence[fs.Step]) -> None:
        self._tops = [step for step in steps if isinstance(step, fs.MountFilesystem) and step.destination.count("/") == 1]
        self._host = plan.Host(bundle="/", highest_capability=capabilities.last(), kcore=os.path.exists("/proc/kcore"))
        self._sample = json.dumps({**stock, "mounts": _SAMPLE_MOUNTS, "process": _SAMPLE_PROCESS})

    def __call__(self, channel: socket.socket, context: fs.Context) -> init.Orders:
        from_root = [(step, paths.open_in(context.root, step.destination)) for step in self._tops]
        self._steps(json.loads(self._sample), self._host)  # once, so that the memory that this takes is its own already
        channel.sendall(b'{"stage":"ready","warnings":[]}')
        data, descriptors, _, _ = socket.recv_fds(channel, 1, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise init.Gone
        text, tree, *others = descriptors
        message = json.loads(os.pread(text, os.fstat(text).st_size, 0))
        stdio = [others.pop(0) if given else None for given in message["stdio"]]
        furnish = Furnish(message["root"], tree, context.root, tuple(from_root))
        host = self._host.but(
            bundle=message["bundle"],
            filter=seccomp.read_program(message["filter"]) if message["filter"] else b"",
            filter_flags=message["flags"],
            tty=message["tty"],
            security=tuple((file, text) for file, text in message["security"]),
            trees=dict(enumerate(others)),
            furnish=furnish,
        )
        before, after = self._steps(message["spec"], host, message["container"])
        first, second, third = stdio
        return init.Orders(
            before=before,
            after=after,
            stdio=(first, second, third),
            container=message["container"],
        )

    @staticmethod
    def _steps(spec: Tree, host: plan.Host, name: str = "") -> tuple[tuple[fs.Step, ...], tuple[fs.Step, ...]]:
        state = {"id": name}
        return plan.setup_steps(spec, host, state), plan.start_steps(spec, host, state)


_SAMPLE_PROCESS = {"args": ["/"], "cwd": "/", "env": [], "user": {"uid": 0, "gid": 0}, "capabilities": {"bounding": ["CAP_KILL"]}}
_SAMPLE_MOUNTS = [{"destination": "/x", "type": "bind", "source": "/x", "options": ["rbind", "rprivate", "rw"]}]


# -- its parent


def prepare(stock: Stock, place: str, cgroup: cgroups.Cgroup) -> Spare:
    """Fork one; `place` is an empty directory, and may be the same for several. Its cgroup, new, has the stock's device rules."""
    spec = stock.document(place)
    host = plan.Host(bundle="/", cgroup_directories=_shown(cgroup), kcore=os.path.exists("/proc/kcore"), new_keyring=False)
    steps = plan.setup_steps(spec, host, {"id": "spare"})
    until = next(index for index, step in enumerate(steps) if isinstance(step, fs.EnterRoot))
    with ExitStack() as undo:
        undo.callback(cgroup.remove)
        cgroup.create()
        cgroup.apply({"devices": stock.devices})
        with ExitStack() as held:
            gates = cgroup.gates()
            for _directory, gate in gates:
                held.callback(os.close, gate)
            orders = init.Orders(
                before=steps[:until],
                after=(),
                stdio=(None, None, None),
                container="spare",
                later=_Waiting(spec, steps[:until]),
            )
            launcher = Launcher(orders, Birth(flags=Clone.NEWNS | Clone.NEWPID), gates=gates, listener=None)
        undo.callback(launcher.abandon)
        launcher.wait()
        undo.pop_all()
    return Spare(stock, launcher, cgroup)


def _shown(cgroup: cgroups.Cgroup) -> tuple[tuple[str, str], ...]:
    only_v2 = cgroup.layout.mode == "v2"
    return tuple(("" if only_v2 else os.path.basename(one.mount), path) for one, path in cgroup.directories())


class Spare:
    """One that waits; after `create`, the container. Its process is a child of the caller, who reaps it."""

    def __init__(self, stock: Stock, launcher: Launcher, cgroup: cgroups.Cgroup) -> None:
        self.stock, self.cgroup, self.pid = stock, cgroup, launcher.pid
        self._launcher = launcher
        found = process.status(launcher.pid)
        self._start_time = found[2] if found else 0
        with open(f"/proc/{launcher.pid}/oom_score_adj", encoding="ascii") as file:
            self._oom_score = int(file.read())
        self._record: Record | None = None

    def discard(self) -> None:
        """It is not wanted any more."""
        self._launcher.abandon()
        self.cgroup.remove()

    def create(
        self, root: str, identifier: str, bundle: str, rest: Tree, *, stdio: container.Stdio, tty: bool = False
    ) -> container.Launch:
        """`runc.create` with what `Stock.rest` left of the document. Raises a Failure; the spare is gone then, all else as it was."""
        oci_spec.check_id(identifier)
        spec = oci_spec.check(rest)
        with ExitStack() as undo:
            undo.callback(self.discard)
            os.close(store.reserve(root, identifier))
            undo.callback(remove_directory, root, identifier)
            record = self._new_record(root, identifier, bundle, spec)
            self.cgroup.apply(spec["linux"]["resources"])
            wanted = spec["process"].get("oomScoreAdj")
            warnings = [] if wanted == self._oom_score else container.adjust_oom_score(self.pid, spec["process"])
            self._instruct(spec, record, stdio, tty=tty or spec["process"].get("terminal", False))
            child = self._launcher.wait()
            if child.console is not None:
                undo.callback(os.close, child.console)
            unknown, _ = plan.capability_masks(spec["process"])
            warnings += [f"unknown capabilities left out: {', '.join(unknown)}"] if unknown else []
            store.save(record)
            self._record = record
            undo.pop_all()
        return container.Launch(pid=self.pid, console=child.console, warnings=(*warnings, *child.warnings))

    def _new_record(self, root: str, identifier: str, bundle: str, spec: Tree) -> Record:
        """Written once, when all is well: what the creator cannot see to its end, it takes back."""
        process_ = spec["process"]
        record = Record(
            id=identifier,
            root=root,
            bundle=bundle,
            status=Status.CREATED,
            pid=self.pid,
            start_time=self._start_time,
            creator=os.getpid(),
            cgroup=self.cgroup.path,
            rootfs=os.path.join(bundle, spec["root"]["path"]),
            oci_version=spec["ociVersion"],
            created_ns=time.time_ns(),
            annotations=spec.get("annotations", {}),
            apparmor=process_.get("apparmorProfile", ""),
            selinux=process_.get("selinuxLabel", ""),
        )
        return container.with_filter(record, spec, "")

    def _instruct(self, spec: Tree, record: Record, stdio: container.Stdio, *, tty: bool) -> None:
        """The rest of the document, and with it what the child cannot see from where it is: root, sources of mounts, stdio."""
        given = [None, None, None] if tty else list(stdio)
        with ExitStack() as held:
            trees = []
            for source, recursive in [(record.rootfs, True), *map(_source, spec.get("mounts", ()))]:
                trees.append(mounts.bind_tree(os.path.join(record.bundle, source), recursive=recursive))
                held.callback(os.close, trees[-1])
                mounts.mount_setattr(trees[-1], propagation=MountFlag.SLAVE, recursive=True)  # as a bind from within would be
            message = {
                "spec": spec,
                "container": record.id,
                "bundle": record.bundle,
                "root": record.rootfs,
                "stdio": [fd is not None for fd in given],
                "tty": tty,
                "filter": record.seccomp,
                "flags": record.seccomp_flags,
                "security": plan.security_labels(record.apparmor, record.selinux),
            }
            text = held.enter_context(owned(os.memfd_create("orders", os.MFD_CLOEXEC)))
            os.write(text, json.dumps(message).encode())
            self._launcher.instruct([text, trees[0], *(fd for fd in given if fd is not None), *trees[1:]])

    def start(self) -> list[str]:
        """`runc.start` of the container; answers warnings. Raises why its program could not be executed."""
        assert self._record is not None
        child = Child(self.pid)
        self._launcher.go(child, self._record)
        check_executed(self._record)
        return child.warnings

    def forget(self) -> None:
        """Its process has ended, and was reaped."""
        self._launcher.close()
        if self._record is None:
            self.cgroup.remove()


def _source(mount: Tree) -> tuple[str, bool]:
    options = parse_options(mount.get("options", ()))
    return mount.get("source", ""), options.recursive or (not options.bind and mount.get("type") == "rbind")
