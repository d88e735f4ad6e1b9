"""How a container comes to be on this host (runtime.md "Lifecycle" 1 to 5). What comes after is `life`'s; `joining` has a further process.

The state directory is `oci.state`'s; cgroups are `linux.cgroups`'. Beside them a container is nothing but processes and what the
kernel keeps for them. The creating process may end at once: its child, the container's init, then belongs to the nearest subreaper.
"""

from __future__ import annotations

import os
import time

from nacre.linux import capabilities, cgroup_names, cgroups, process, seccomp
from nacre.linux import sockets as socket
from nacre.linux.contexts import ExitStack
from nacre.linux.libc import owned
from nacre.oci import spec as oci_spec
from nacre.oci import state as store
from nacre.oci.errors import Failure, Invalid
from nacre.oci.state import Record, Status, advance
from nacre.oci.values import Value
from nacre.runc import borrowed, hooks, id_maps, init, plan, rootless
from nacre.runc.failures import HookFailed, InitDied
from nacre.runc.launch import Birth, Launcher, namespace_flags
from nacre.runc.life import cgroup_of, explain_death, oci_state, remove_directory

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    Stdio = Sequence[int | None]
    Meanwhile = Callable[[int, int], int | None]

_LATE_BELOW = 8 << 20  # a memory limit smaller than what the set-up itself may touch once it is inside


class Launch(Value):
    """A process that was brought to life. `pid` is the host's; `console` the terminal's master, owned by the caller."""

    pid: int
    console: int | None = None
    warnings: tuple[str, ...] = ()


def create(
    root: str,
    identifier: str,
    bundle: str,
    *,
    stdio: Stdio = (0, 1, 2),
    tty: bool = False,
    bare_newlines: bool = False,
    preserve_fds: int = 0,
    systemd_cgroup: bool = False,
    console_socket: str = "",
    no_pivot: bool = False,
    no_new_keyring: bool = False,
    seccomp_bpf: str = "",
    layout: cgroups.Layout | None = None,
    use_cgroups: bool = True,
    extra_environment: Sequence[str] = (),
    config: str = "",
    seek_program: bool = False,
    meanwhile: Meanwhile | None = None,
) -> Launch:
    """Create the container from BUNDLE/config.json: all is set up, its process waits to be started.

    `stdio` are descriptors (None: /dev/null), which stay the caller's; with `tty` (or process.terminal) a terminal replaces them: its
    master is in the answer, or sent to `console_socket`; with `bare_newlines` it does not turn \\n into \\r\\n.
    `seccomp_bpf` names a compiled filter to use instead of linux.seccomp.
    `config` names the document where it is not the bundle's config.json. `seek_program`: a program that is nowhere fails here already.
    `meanwhile` is called with the child's pid and a descriptor, waits for that in its own way, and answers the wait status if it has reaped it.
    Raises a Failure, having undone everything.
    """
    oci_spec.check_id(identifier)
    bundle = os.path.abspath(bundle)
    spec = _document(bundle, config, extra_environment)
    layout = layout or (
        rootless.usable(cgroups.discover(), spec, systemd=systemd_cgroup) if use_cgroups else cgroups.Layout(hierarchies=())
    )
    record = first_record(root, identifier, bundle, spec, layout, systemd_cgroup)
    facts = {"tty": tty or spec["process"].get("terminal", False), "preserve": preserve_fds, "seek_program": seek_program}
    facts |= {"pivot": not no_pivot, "new_keyring": not no_new_keyring, "bare_newlines": bare_newlines}
    try:
        return _made(record, spec, layout, facts, stdio, seccomp_bpf, console_socket, meanwhile)
    except HookFailed as failure:
        after_failed_hook(failure, record)
        raise


def _made(
    record: Record,
    spec: Mapping[str, Any],
    layout: cgroups.Layout,
    facts: Mapping[str, Any],
    stdio: Stdio,
    seccomp_bpf: str,
    console_socket: str,
    meanwhile: Meanwhile | None,
) -> Launch:
    """`facts` are of `plan.Host`."""
    classes = _classes_of_service(spec)
    with ExitStack() as undo:
        lock = store.reserve(record.root, record.id)
        undo.callback(remove_directory, record.root, record.id)
        with owned(lock):
            store.save(record)
            store.keep_process(record, spec["process"])
            undo.callback(borrowed.clear, record)
            record = with_filter(record, spec, seccomp_bpf)
            cgroup = cgroup_of(record, layout=layout)
            mapped = undo.enter_context(ExitStack())
            orders = _orders(record, spec, _host(record, spec, cgroup).but(**facts), stdio, mapped)
            if cgroup is not None and cgroup.by_request:
                orders = orders.but(outside=True)
            left_out = make_cgroup(cgroup, spec, undo)
            if classes:
                from nacre.runc import resctrl

                record = record.but(resctrl=resctrl.prepare(spec["linux"]["intelRdt"], record.id, classes, undo))
            child = _launch(record, spec, orders, cgroup, lock, undo, meanwhile)
            child = child.but(warnings=(*left_out, *child.warnings))
            mapped.close()
            if cgroup is not None:
                cgroup.settle()
            if child.console is not None and console_socket:
                send_console(console_socket, child.console)
                os.close(child.console)
                child = child.but(console=None)
        undo.pop_all()
    return child


def _classes_of_service(spec: Mapping[str, Any]) -> str:
    """Where they are mounted; "" for a container that asks for none. Raises Unsupported."""
    wanted = spec.get("linux", {}).get("intelRdt")
    if wanted is None:
        return ""
    from nacre.runc import resctrl

    return resctrl.check(wanted)


def after_failed_hook(failure: HookFailed, record: Record) -> None:
    """A hook that ends the creation ends a container ("Lifecycle" 4 to 6 go on at 12): all is undone, and poststop is due."""
    told: list[str] = []
    hooks.run_leniently(record.hooks, "poststop", oci_state(record, Status.STOPPED), told.append)
    failure.evidence += tuple(told)


def make_cgroup(cgroup: cgroups.Cgroup | None, spec: Mapping[str, Any], undo: ExitStack) -> list[str]:
    """Answers warnings."""
    if cgroup is None:
        return []
    if holders := cgroup.pids():  # `delete` would kill them with the container's own
        raise cgroups.CgroupBusy(
            what=f"make cgroup {cgroup.path}",
            cause=f"it is there already and holds processes {', '.join(map(str, holders[:5]))}",
            remedy="give the container a group of its own in linux.cgroupsPath",
        )
    if cgroup.is_frozen():  # the container's process would stop as soon as it enters, and its creator wait for it
        raise cgroups.CgroupBusy(
            what=f"make cgroup {cgroup.path}",
            cause="it, or a group above it, is frozen",
            remedy="thaw it, or give the container a group of its own in linux.cgroupsPath",
        )
    undo.callback(cgroup.undo)
    undo.callback(cgroup.remove)
    cgroup.create()
    left_out = cgroup.apply(spec.get("linux", {}).get("resources", {}))
    owner = plan.cgroup_owner(spec)
    if owner and os.geteuid() == 0:
        cgroup.give(owner)
    return left_out


def _launch(
    record: Record,
    spec: Mapping[str, Any],
    orders: init.Orders,
    cgroup: cgroups.Cgroup | None,
    directory: int,
    undo: ExitStack,
    meanwhile: Meanwhile | None,
) -> Launch:
    with ExitStack() as held:
        cradle, gates = _ways_in(record, cgroup, held)
        listener = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(f"/proc/self/fd/{directory}/start.sock")  # by descriptor: a path may be longer than sun_path
        listener.listen(1)
        launcher = Launcher(orders, _birth(spec, held).but(cgroup=cradle), gates=gates, listener=listener)
    undo.callback(launcher.abandon)
    enter_class(record, launcher.pid)
    warnings = adjust_oom_score(launcher.pid, spec["process"])

    def act_from_outside() -> None:
        if cgroup is not None:
            cgroup.adopt(launcher.pid)
        if devices := spec.get("linux", {}).get("netDevices"):
            from nacre.runc import net_devices

            net_devices.move_in(devices, launcher.pid, undo)
        document = oci_state(record, Status.CREATED) | {"pid": launcher.pid}  # "Lifecycle" 3: step 2, the environment, is done
        for point in ("prestart", "createRuntime"):
            hooks.run_all(spec.get("hooks", {}), point, document)

    if meanwhile is not None:
        launcher.ended = meanwhile(launcher.pid, launcher.fileno())
    try:
        child = launcher.wait(act_from_outside)
    except InitDied as failure:
        raise explain_death(failure, cgroup) from failure
    if child.console is not None:
        undo.callback(os.close, child.console)
    found = process.status(launcher.pid)
    unknown, _ = plan.capability_masks(spec["process"])
    warnings += [f"unknown capabilities left out: {', '.join(unknown)}"] if unknown else []
    advance(record, Status.CREATED, pid=launcher.pid, start_time=found[2] if found else 0, created_ns=time.time_ns())
    launcher.release()
    return Launch(pid=launcher.pid, console=child.console, warnings=(*warnings, *child.warnings))


def _ways_in(record: Record, cgroup: cgroups.Cgroup | None, held: ExitStack) -> tuple[int, list[tuple[str, int]]]:
    """(the v2 directory to be born in or -1, gates of the others), which `held` closes."""
    if cgroup is None:
        return -1, []
    cradle = -1 if record.unit else cgroup.cradle()  # a scope is systemd's to hold until it is entered
    if cradle >= 0:
        held.callback(os.close, cradle)
    gates = cgroup.gates(born=cradle >= 0)
    for _, fd in gates:
        held.callback(os.close, fd)
    return cradle, gates


def _document(bundle: str, config: str, extra_environment: Sequence[str]) -> dict[str, Any]:
    spec = oci_spec.load(bundle, config)
    if "process" not in spec:
        raise Invalid(what=f"read {bundle}/config.json", cause="process is missing: a container needs one to run")
    plan.refuse_unsupported(spec)
    spec["process"]["env"] = [*spec["process"].get("env", ()), *extra_environment]
    return spec


def first_record(
    root: str, identifier: str, bundle: str, spec: Mapping[str, Any], layout: cgroups.Layout, systemd_cgroup: bool
) -> Record:
    joined, new = plan.namespaces_of(spec)
    rootfs = os.path.realpath(os.path.join(bundle, spec.get("root", {}).get("path", "rootfs")))
    place = cgroup_names.Place(path="")
    if layout.mode != "none":
        wanted = spec.get("linux", {}).get("cgroupsPath", "")
        if systemd_cgroup:
            from nacre.linux import cgroup_systemd

            place = cgroup_systemd.place(wanted, identifier)
        else:
            place = cgroup_names.resolve(wanted, identifier, systemd=False)
    return Record(
        id=identifier,
        root=root,
        bundle=bundle,
        creator=os.getpid(),
        cgroup=place.path,
        unit=place.unit,
        slice=place.slice,
        rootfs=rootfs,
        **borrowed.facts(spec, rootfs),
        joined=joined,
        cgroup_namespace="cgroup" in new,
        shares_pids="pid" not in new,
        user_namespace="user" in new or "user" in joined,
        oci_version=spec["ociVersion"],
        created_ns=time.time_ns(),
        annotations=spec.get("annotations", {}),
        hooks={point: spec.get("hooks", {}).get(point, []) for point in ("poststart", "poststop")},
        apparmor=spec["process"].get("apparmorProfile", ""),
        selinux=spec["process"].get("selinuxLabel", ""),
        personality=spec.get("linux", {}).get("personality", {}).get("domain", ""),
        memory_policy=spec.get("linux", {}).get("memoryPolicy", {}),
    )


def with_filter(record: Record, spec: Mapping[str, Any], seccomp_bpf: str) -> Record:
    profile = spec.get("linux", {}).get("seccomp") or {}
    if not (profile or seccomp_bpf):
        return record
    flags = seccomp.flags_of(profile)
    agent = (
        {"path": profile["listenerPath"], "metadata": profile.get("listenerMetadata", "")} if flags & seccomp.NEW_LISTENER else {}
    )
    path = seccomp_bpf or seccomp.compiled(profile, os.path.join(record.root, ".seccomp"))
    return record.but(seccomp=path, seccomp_flags=flags, listener=agent)


def _host(record: Record, spec: Mapping[str, Any], cgroup: cgroups.Cgroup | None) -> plan.Host:
    directories = [] if cgroup is None else cgroup.directories()
    only_v2 = cgroup is not None and cgroup.layout.mode == "v2"
    return plan.Host(
        bundle=record.bundle,
        cgroup_directories=tuple(("" if only_v2 else os.path.basename(one.mount), path) for one, path in directories),
        highest_capability=capabilities.last(),
        kcore=os.path.exists("/proc/kcore"),
        filter=seccomp.read_program(record.seccomp) if record.seccomp else b"",
        filter_flags=record.seccomp_flags,
        nodes=not rootless.in_user_namespace(),
        personality=record.personality,
        memory_policy=record.memory_policy,
        borrowed=record.mounts_beneath >= 0,
        # systemd takes a scope away that nobody enters
        late_cgroups=is_tight(spec.get("linux", {}).get("resources", {})) and not record.unit,
        security=plan.security_labels(record.apparmor, record.selinux),
        mount_label=plan.mount_label(spec.get("linux", {})),
        alone=os.geteuid() != 0 and "user" in plan.namespaces_of(spec)[1],
    )


def _orders(record: Record, spec: Mapping[str, Any], host: plan.Host, stdio: Stdio, mapped: ExitStack) -> init.Orders:
    """`mapped` holds descriptors that the child needs."""
    state = oci_state(record, Status.CREATED)
    host = host.but(trees=id_maps.open_trees(spec, record.bundle, mapped))
    if record.mount_namespace:
        host = host.but(mount_namespace=borrowed.open_joined(record.mount_namespace))
        mapped.callback(os.close, host.mount_namespace)
    _, new = plan.namespaces_of(spec)
    due = spec.get("hooks", {})
    first, second, third = (None, None, None) if host.tty else stdio
    return init.Orders(
        maps="user" in new,
        outside=bool(due.get("prestart") or due.get("createRuntime") or spec.get("linux", {}).get("netDevices")),
        before=plan.setup_steps(spec, host, state),
        after=plan.start_steps(spec, host, state),
        stdio=(first, second, third),
        keep=host.preserve,
        container=state["id"],
    )


def _birth(spec: Mapping[str, Any], held: ExitStack) -> Birth:
    """Opens the namespaces to join; `held` closes them once the child is born."""
    joined, new = plan.namespaces_of(spec)
    opened: dict[str, int] = {}
    for kind in plan.join_order(joined):
        try:
            opened[kind] = os.open(joined[kind], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Invalid(
                what=f"join the {kind} namespace {joined[kind]}", cause=f"open(2): {error.strerror} (errno {error.errno})"
            ) from error
        held.callback(os.close, opened[kind])
    linux = spec.get("linux", {})
    offsets = linux.get("timeOffsets", {})
    return Birth(
        flags=namespace_flags(dict.fromkeys(new - ({"time"} if offsets else set()))),
        time_offsets="".join(f"{clock} {one.get('secs', 0)} {one.get('nanosecs', 0)}\n" for clock, one in offsets.items()),
        visit={kind: fd for kind, fd in opened.items() if kind not in ("user", "mount")},
        user=opened.get("user", -1),
        uid_map=id_maps.lines(linux.get("uidMappings", ())),
        gid_map=id_maps.lines(linux.get("gidMappings", ())),
    )


def is_tight(resources: Mapping[str, Any]) -> bool:
    """Whether the set-up itself could hit the memory limit."""
    limit: int = (resources.get("memory") or {}).get("limit") or 0
    return 0 < limit < _LATE_BELOW


def enter_class(record: Record, pid: int) -> None:
    """linux.intelRdt: what `pid` forks is in the container's class too."""
    if record.resctrl:
        from nacre.runc import resctrl

        resctrl.enter(record.resctrl, pid)


def adjust_oom_score(pid: int, tree: Mapping[str, Any]) -> list[str]:
    """process.oomScoreAdj, from outside: in a user namespace the process could not. Lowering needs CAP_SYS_RESOURCE."""
    wanted = tree.get("oomScoreAdj")
    if wanted is None:
        return []
    try:
        with owned(os.open(f"/proc/{pid}/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)) as fd:
            if int(os.read(fd, 16)) != wanted:
                os.pwrite(fd, str(wanted).encode(), 0)
    except PermissionError:
        return [f"oom_score_adj {wanted} is lower than this host allows without CAP_SYS_RESOURCE: left as it is"]
    except (FileNotFoundError, ProcessLookupError):
        pass  # it is gone; waiting for it will say why
    return []


def send_console(path: str, console: int) -> None:
    """The master to who listens at `path` (runc's --console-socket)."""
    send_descriptor(path, "the terminal", "/dev/ptmx", console)


def send_descriptor(path: str, name: str, word: str, descriptor: int) -> None:
    """One message, `word` with the descriptor beside it, to who listens at `path`. `name` is for who reads of a failure."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sender:
            sender.connect(path)
            socket.send_fds(sender, [word.encode()], [descriptor])
    except OSError as error:
        raise Failure(what=f"hand {name} to {path}", cause=f"{error.strerror or error} (errno {error.errno})") from error
