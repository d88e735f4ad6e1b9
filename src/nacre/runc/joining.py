"""A further process in a running container: its namespaces and cgroups are joined, then the same last steps as for its init."""

from __future__ import annotations

import os

from nacre.linux import capabilities, cgroups, namespaces, process, seccomp
from nacre.linux.contexts import ExitStack
from nacre.linux.namespaces import KINDS
from nacre.oci import spec as oci_spec
from nacre.oci import state as store
from nacre.oci.errors import Invalid, WrongStatus
from nacre.oci.state import Record, Status
from nacre.runc import init, plan
from nacre.runc import process_steps as ps
from nacre.runc import steps as fs
from nacre.runc.container import Launch, adjust_oom_score, enter_class, send_console
from nacre.runc.launch import Birth, Launcher
from nacre.runc.life import cgroup_of, current_status

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from nacre.runc.container import Stdio


def execute(
    root: str,
    identifier: str,
    tree: Mapping[str, Any],
    *,
    stdio: Stdio = (0, 1, 2),
    tty: bool = False,
    bare_newlines: bool = False,
    preserve_fds: int = 0,
    console_socket: str = "",
    ignore_paused: bool = False,
    sub_cgroups: Sequence[str] = (),
    layout: cgroups.Layout | None = None,
) -> Launch:
    """Run the OCI `process` given as `tree` inside; returns once its program is executing. The caller reaps the pid.

    `stdio` and `tty` as in `create`. `sub_cgroups` are paths below the container's cgroup: one for
    all hierarchies, made where it is missing, or CONTROLLER[,…]:PATH for some. Raises CommandNotFound and the like,
    WrongStatus for a container that does not run. `layout` spares who knows it a look at the mount table.
    """
    checked = oci_spec.check_process(tree)
    record = store.read(root, identifier)
    status = current_status(record)
    if status not in (Status.RUNNING, Status.CREATED) and not (status == Status.PAUSED and ignore_paused):
        raise WrongStatus(what=f"execute in container {identifier}", cause=f"it is {status}")
    terminal = tty or checked.get("terminal", False)
    host = plan.Host(
        bundle=record.bundle,
        highest_capability=capabilities.last(),
        filter=seccomp.read_program(record.seccomp) if record.seccomp else b"",
        filter_flags=record.seccomp_flags,
        tty=terminal,
        bare_newlines=bare_newlines,
        personality=record.personality,
        memory_policy=record.memory_policy,
        preserve=preserve_fds,
        security=plan.security_labels(
            checked.get("apparmorProfile", record.apparmor), checked.get("selinuxLabel", record.selinux)
        ),
    )
    with ExitStack() as held:
        launcher = _launch(record, checked, host, stdio, sub_cgroups, layout)
        held.callback(launcher.abandon)
        enter_class(record, launcher.pid)
        warnings = adjust_oom_score(launcher.pid, checked)
        child = launcher.wait(lambda: _bring_in(record, launcher.pid, layout))
        if child.console is not None:
            held.callback(os.close, child.console)
        if child.console is not None and console_socket:
            send_console(console_socket, child.console)
        launcher.await_execution(child, record)
        if not (child.console is not None and console_socket):
            held.pop_all()
            return Launch(pid=child.pid, console=child.console, warnings=(*warnings, *child.warnings))
        os.close(child.console)
        held.pop_all()
    return Launch(pid=child.pid, warnings=(*warnings, *child.warnings))


def _launch(
    record: Record,
    tree: Mapping[str, Any],
    host: plan.Host,
    stdio: Stdio,
    sub_cgroups: Sequence[str],
    layout: cgroups.Layout | None,
) -> Launcher:
    below = _below(sub_cgroups)
    all_below = below.pop("", "")
    pidfd = process.pidfd_open(record.pid)
    with ExitStack() as opened:
        opened.callback(os.close, pidfd)
        if current_status(record) == Status.STOPPED:  # the number may have become another's before the pidfd was taken
            raise WrongStatus(what=f"execute in container {record.id}", cause="it has just ended")
        cgroup = cgroup_of(record, all_below, layout)
        if cgroup is not None and all_below:
            _refuse_missing(cgroup)
        cradle, gates = _ways_in(cgroup, record, below, opened)
        ours = {kind for kind in KINDS if _same(kind, record.pid)}
        visit: dict[str, int] = {}
        if "pid" not in ours:  # children alone are born there, so it is the parent that has to go
            visit["pid"] = namespaces.open_namespace("pid", record.pid)
            opened.callback(os.close, visit["pid"])
        user = -1
        if visit and record.user_namespace and os.geteuid() != 0:  # that namespace's root may go where its starter may not
            user = namespaces.open_namespace("user", record.pid)
            opened.callback(os.close, user)
            ours.add("user")
        flags = 0
        for kind in KINDS:
            if kind not in ours and kind != "pid":
                flags |= KINDS[kind][0]
        size = tree.get("consoleSize", {})
        # The cgroups first: entering them by gates needs nothing of the host, and the cgroup namespace is joined from inside.
        before: list[fs.Step] = [ps.JoinProcess(pidfd, namespaces.Clone(flags), f"the namespaces of process {record.pid}")]
        if record.mounts_beneath >= 0:
            root = os.open(f"/proc/{record.pid}/root", os.O_PATH | os.O_CLOEXEC)
            opened.callback(os.close, root)
            before.append(ps.EnterProcessRoot(root))
        if record.user_namespace:
            before.append(ps.BecomeNamespaceRoot())
        before.append(ps.OpenRootDirectory())
        if host.tty:
            before.append(
                ps.OpenConsole(size.get("width", 0), size.get("height", 0), show=False, bare_newlines=host.bare_newlines)
            )
        affinity = tree.get("execCPUAffinity", {})
        enter = ps.EnterCgroups(namespace=False, keep_cpus=bool(affinity))
        before += [ps.NewSession(), *_on_cpus(affinity, "initial"), enter, *_on_cpus(affinity, "final")]
        first, second, third = (None, None, None) if host.tty else stdio
        orders = init.Orders(
            maps=False,
            outside=cgroup is not None and cgroup.by_request,
            before=tuple(before),
            after=plan.process_steps(tree, host),
            stdio=(first, second, third),
            keep=host.preserve,
            container=record.id,
        )
        return Launcher(orders, Birth(visit=visit, user=user, cgroup=cradle), gates=gates, listener=None)


def _bring_in(record: Record, pid: int, layout: cgroups.Layout | None) -> None:
    cgroup = cgroup_of(record, layout=layout)
    if cgroup is not None:
        cgroup.adopt(pid)


def _on_cpus(affinity: Mapping[str, str], moment: str) -> list[fs.Step]:
    words = affinity.get(moment)
    return [ps.SetAffinity(plan.cpus(words, f"read process.execCPUAffinity.{moment}"))] if words else []


def _same(kind: str, pid: int) -> bool:
    try:
        return namespaces.identity(kind, pid) == namespaces.identity(kind)
    except FileNotFoundError:
        return True  # a kind that this kernel lacks, or a process that is gone: joining will say


def _below(words: Sequence[str]) -> dict[str, str]:
    """What `sub_cgroups` say, controller to path; "" stands for all of them. Raises Invalid."""
    found: dict[str, str] = {}
    for word in words:
        controllers, colon, path = word.rpartition(":")
        for controller in controllers.split(","):
            if ".." in path.split("/") or (colon and not controller) or controller in found or "" in found:
                raise Invalid(
                    what=f"enter the cgroup {word!r} below the container's",
                    cause="it leads out of it, or names a controller twice or not at all",
                    remedy="write --cgroup PATH, or --cgroup CONTROLLER:PATH for each",
                )
            found[controller] = path
    return found


def _refuse_missing(cgroup: cgroups.Cgroup) -> None:
    """A group below is the container's to make: one that is misspelt would be there until the container is gone, with no limit."""
    for _, directory in cgroup.directories():
        if not os.path.isdir(directory):
            raise cgroups.CgroupMissing(
                what=f"enter cgroup {cgroup.path}", cause=f"there is no {directory}", remedy=f"make it: mkdir {directory}"
            )


def _ways_in(
    cgroup: cgroups.Cgroup | None, record: Record, below: Mapping[str, str], opened: ExitStack
) -> tuple[int, list[tuple[str, int]]]:
    """(the v2 directory to be born in or -1, gates of the others), which `opened` closes."""
    if cgroup is None:
        return -1, []
    if cgroup.by_request and not below:
        return -1, []
    cradle = -1 if record.status == Status.PAUSED else cgroup.cradle()  # it would be born frozen and never get to its set-up
    if cradle >= 0:
        opened.callback(os.close, cradle)
    gates = cgroup.gates(born=cradle >= 0, below=below) if cradle >= 0 or below else _gates(cgroup, record)
    for _, fd in gates:
        opened.callback(os.close, fd)
    return cradle, gates


def _gates(cgroup: cgroups.Cgroup, record: Record) -> list[tuple[str, int]]:
    """v2: when the container's init has moved its own processes below, the group itself takes none any more: go where init is."""
    unified = cgroup.layout.unified
    gates = cgroup.gates()
    if cgroup.layout.mode != "v2" or unified is None:
        return gates
    with open(f"/proc/{record.pid}/cgroup", encoding="utf-8") as file:
        path = next((line.rstrip("\n")[3:] for line in file if line.startswith("0::")), "")
    directory = f"{unified.mount}{path}"
    if path.startswith(record.cgroup + "/") and os.path.isdir(directory):
        for _, fd in gates:
            os.close(fd)
        return [(directory, os.open(f"{directory}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))]
    return gates
