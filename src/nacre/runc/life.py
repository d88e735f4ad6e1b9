"""What is done to a container that is there: start, look, limit, freeze, signal, delete (runtime.md "Lifecycle" 6 to 13).

These are the short commands that an engine runs most, so this module loads little: what only some containers need (cgroups, hooks, the
mounts of a borrowed namespace) is imported where it is needed. `container`, which makes containers, loads all of it in advance;
a process that is forked often (a shim, the guest agent) has imported that.
"""

from __future__ import annotations

import errno
import os
import select
import time

from nacre.linux import pids
from nacre.linux.pids import owned, signals
from nacre.oci import state as store
from nacre.oci.errors import Failure, NotFound, WrongStatus, decode
from nacre.oci.jsontext import loads
from nacre.oci.state import Record, Status, advance
from nacre.runc.failures import HookFailed, InitDied

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Callable, Mapping
    from typing import Any

    from nacre.linux import cgroups

    Warn = Callable[[str], None]

INIT_NAME = "nacre:init"  # until execve gives another: tells a container that was never started from one that runs
_DIE_WAIT_MS = 10_000


# -- starting


def start(root: str, identifier: str, warn: Warn | None = None) -> None:
    """Let the container's process execute its program; returns when it has, or raises why it could not (CommandNotFound …)."""
    from _socket import AF_UNIX, SOCK_SEQPACKET, socket  # `socket` makes enumerations of it first, which costs 8 ms

    with store.locked(root, identifier) as directory:
        record = store.read(root, identifier)
        status = current_status(record)
        if status != Status.CREATED:
            raise WrongStatus(what=f"start container {identifier}", cause=f"it is {status}")
        warnings: list[str] = []
        scope = _counted_scope(record)
        gate = socket(AF_UNIX, SOCK_SEQPACKET)
        try:
            gate.connect(f"/proc/self/fd/{directory}/start.sock")
            gate.sendall(b".")
            hear_execution(gate, warnings, record, record.pid)
        except OSError as error:
            raise InitDied(
                what=f"start container {identifier}", cause=f"its init (pid {record.pid}) does not answer: {error.strerror}"
            ) from error
        finally:
            gate.close()
        check_executed(record, scope)
        os.unlink("start.sock", dir_fd=directory)
        record = advance(record, Status.RUNNING)
    document = oci_state(record, Status.RUNNING)
    if warn:
        for words in warnings:
            warn(words)
    try:
        _run_hooks(record, "poststart", document, warn)
    except HookFailed:
        _end(record)
        raise


def hear_execution(channel: Socket, warnings: list[str], record: Record, pid: int) -> None:
    """Read what process `pid` says up to its execve(2), which closes the channel. Raises the Failure it reports."""
    while data := channel.recv(65536):
        message = loads(data)
        if "failure" in message:
            raise decode(message["failure"])
        if message.get("stage") == "listener":
            from nacre.runc import listener

            listener.serve(channel, pid, message["memory"], record.listener, oci_state(record, record.status))
        warnings += message.get("warnings", ())


def _run_hooks(record: Record, point: str, document: Mapping[str, Any], warn: Warn | None) -> None:
    """Up to 1.2 a failing poststart hook was to warn; since 1.3 it fails the start and ends the container ("Lifecycle" 9)."""
    if record.hooks.get(point):
        from nacre.runc import hooks

        if point == "poststart" and int(record.oci_version.split(".")[1]) >= 3:
            hooks.run_all(record.hooks, point, document)
        else:
            hooks.run_leniently(record.hooks, point, document, warn or (lambda words: None))


def _counted_scope(record: Record) -> cgroups.Cgroup | None:
    """The container's scope, which knows its own OOM kills from its slice's also when it goes with its last process."""
    if not record.unit:
        return None
    from nacre.linux import cgroups

    scope = cgroups.Cgroup(cgroups.discover(), record.cgroup)
    scope.oom_kills()
    return scope


def check_executed(record: Record, scope: cgroups.Cgroup | None = None) -> None:
    """The gate closed without a word: either execve did it, or the process is dead and still has its old name."""
    found = pids.status(record.pid)
    if found is None or found[2] != record.start_time or found[0] != INIT_NAME:
        return
    failure = InitDied(
        what=f"start container {record.id}",
        cause=f"its init (pid {record.pid}) was killed before it could execute the program",
        remedy="its seccomp profile may forbid execve, or somebody killed it",
    )
    raise explain_death(failure, scope or cgroup_of(record))


# -- looking


def current_status(record: Record) -> str:
    """What the container is now: the record, corrected by what its process has done since."""
    if record.status == Status.CREATING:
        return Status.CREATING if pids.status(record.creator) else Status.STOPPED
    found = pids.status(record.pid)
    if found is None or found[2] != record.start_time or found[1] in "ZX":
        return Status.STOPPED
    if record.status == Status.CREATED and found[0] != INIT_NAME:
        return Status.RUNNING  # the starter was killed between the release and the record
    return record.status


def oci_state(record: Record, status: str) -> dict[str, Any]:
    """runtime.md "State"."""
    return {
        "ociVersion": record.oci_version or _own_version(),
        "id": record.id,
        "status": status,
        "pid": 0 if status == Status.STOPPED else record.pid,
        "bundle": record.bundle,
        "annotations": record.annotations,
    }


def _own_version() -> str:
    """Where create had read no version yet."""
    from nacre.oci import spec

    return spec.VERSION


def state(root: str, identifier: str) -> dict[str, Any]:
    """The container's OCI state, and `rootfs` and `created` (RFC 3339) as runc adds them. Cheap: two small files."""
    return describe(store.read(root, identifier))


def describe(record: Record) -> dict[str, Any]:
    whole, rest = divmod(record.created_ns, 1_000_000_000)
    created = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{rest:09d}Z"
    state = oci_state(record, current_status(record)) | {"rootfs": record.rootfs, "created": created, "owner": "root"}
    # in the order that runc writes: there are readers that know it
    return {
        key: state[key] for key in ("ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "annotations", "owner")
    }


def list_states(root: str, damaged: Callable[[Failure], None] | None = None) -> list[dict[str, Any]]:
    """The state of every container below `root`; one that vanishes meanwhile, or has no record yet, is left out.

    A damaged record is told to `damaged` and left out too; without that it is raised.
    """
    states = []
    for identifier in store.identifiers(root):
        try:
            states.append(state(root, identifier))
        except NotFound:
            continue
        except Failure as failure:
            if damaged is None:
                raise
            damaged(failure)
    return states


def processes(root: str, identifier: str) -> list[int]:
    """Every process of the container, host pids."""
    record = store.read(root, identifier)
    cgroup = cgroup_of(record)
    found = [] if cgroup is None else cgroup.pids()
    alive = current_status(record) != Status.STOPPED
    return sorted({*found, record.pid}) if alive else found


def stats(root: str, identifier: str) -> dict[str, int]:
    """`linux.cgroups.Cgroup.stats` of the container; empty on a host without cgroups."""
    cgroup = cgroup_of(store.read(root, identifier))
    return {} if cgroup is None else cgroup.stats()


def oom_kills(root: str, identifier: str) -> int:
    cgroup = cgroup_of(store.read(root, identifier))
    return 0 if cgroup is None else cgroup.oom_kills()


# -- acting on it


def update(root: str, identifier: str, resources: Mapping[str, Any]) -> list[str]:
    """Change limits (OCI linux.resources); what is not named stays. Answers warnings of what has no place on this host."""
    from nacre.oci.spec import check_resources

    with store.locked(root, identifier):
        record = _living(root, identifier, "update")
        checked = check_resources(resources, record.oci_version)
        cgroup = cgroup_of(record)
        if cgroup is None:
            raise _no_cgroup("any", f"update container {identifier}")
        return cgroup.apply(checked)


def pause(root: str, identifier: str) -> None:
    """Freeze every process."""
    with store.locked(root, identifier):
        record = _living(root, identifier, "pause")
        if record.status != Status.RUNNING:
            raise WrongStatus(what=f"pause container {identifier}", cause=f"it is {record.status}")
        cgroup = cgroup_of(record)
        if cgroup is None:
            raise _no_cgroup("freezer", f"pause container {identifier}")
        cgroup.freeze()
        advance(record, Status.PAUSED)


def resume(root: str, identifier: str) -> None:
    with store.locked(root, identifier):
        record = _living(root, identifier, "resume")
        if record.status != Status.PAUSED:
            raise WrongStatus(what=f"resume container {identifier}", cause=f"it is {record.status}")
        cgroup = cgroup_of(record)
        if cgroup is not None:
            cgroup.thaw()
        advance(record, Status.RUNNING)


def _no_cgroup(controller: str, what: str) -> Failure:
    from nacre.linux import cgroup_layout

    return cgroup_layout.missing(controller, what, cgroup_layout.discover().looked)


def _living(root: str, identifier: str, act: str) -> Record:
    record = store.read(root, identifier)
    status = current_status(record)
    if status in (Status.CREATING, Status.STOPPED):
        raise WrongStatus(what=f"{act} container {identifier}", cause=f"it is {status}")
    if status != record.status:
        record = advance(record, status)
    return record


def kill(root: str, identifier: str, number: int, *, everyone: bool = False) -> None:
    """Send signal `number` to the container's init, or to every process of it. Raises WrongStatus when it has ended (runtime.md "Kill").

    SIGKILL is for all of them where they would outlive init.
    """
    record = store.read(root, identifier)
    status = current_status(record)
    cgroup, reached = None, everyone  # somebody, or nobody is fine
    if everyone or (number == signals.SIGKILL and record.shares_pids):
        cgroup = cgroup_of(record)
        if cgroup is not None and (status != Status.STOPPED or cgroup.pids()):
            cgroup.kill(number)
            reached = True
    if status in (Status.CREATING, Status.STOPPED):
        if reached:
            return
        raise WrongStatus(what=f"signal container {identifier}", cause=f"container not running: it is {status}")
    if cgroup is not None and number == signals.SIGKILL and status != Status.CREATED:
        return
    _signal(record, number)
    if status == Status.PAUSED and number == signals.SIGKILL:
        cgroup = cgroup_of(record)
        if cgroup is not None:
            cgroup.thaw()  # a frozen process dies only once it runs


def _signal(record: Record, number: int) -> bool:
    """By pidfd, after making sure that it is still the same process; False when it is not there any more."""
    try:
        with owned(pids.pidfd_open(record.pid)) as pidfd:
            found = pids.status(record.pid)
            if found is None or found[2] != record.start_time:
                return False
            pids.pidfd_send_signal(pidfd, number)
            return True
    except OSError as error:
        if error.errno == errno.ESRCH:
            return False
        raise Failure(what=f"signal container {record.id}", cause=f"{error.strerror} (errno {error.errno})") from error


def delete(
    root: str, identifier: str, *, force: bool = False, warn: Warn | None = None, layout: cgroups.Layout | None = None
) -> None:
    """Remove what is left of an ended container, or one that was never started; with `force` end it first, and a missing one is fine.

    runtime.md "Delete" wants an error for a created one. runc and crun end it, and buildah counts on that when its network fails.
    """
    try:
        with store.locked(root, identifier):
            try:
                record = store.read(root, identifier)
            except Failure:
                if not force:
                    raise
                remove_directory(root, identifier)  # a create that was killed before its first record
                return
            status = current_status(record)
            if status != Status.STOPPED:
                if not force and status != Status.CREATED:
                    raise WrongStatus(
                        what=f"delete container {identifier}",
                        cause=f"it is {status}",
                        remedy=f"kill it first, or delete --force {identifier}",
                    )
                _end(record)
            cgroup = cgroup_of(record, layout=layout)
            if cgroup is not None and cgroup.exists():
                if cgroup.pids():
                    cgroup.kill()
                cgroup.remove()
            if record.mounts_beneath >= 0:
                from nacre.runc import borrowed

                borrowed.clear(record)
            if record.resctrl:
                from nacre.runc import resctrl

                resctrl.remove(record.resctrl)
            _run_hooks(record, "poststop", oci_state(record, Status.STOPPED), warn)
            remove_directory(root, identifier)
    except NotFound:
        if not force:
            raise


def _end(record: Record) -> None:
    """Kill init and wait until it is dead (reaping is the parent's)."""
    if not record.pid:
        return
    try:
        pidfd = pids.pidfd_open(record.pid)
    except OSError:
        return
    with owned(pidfd):
        if not _signal(record, signals.SIGKILL):
            return
        cgroup = cgroup_of(record)
        if cgroup is not None and record.status == Status.PAUSED:
            cgroup.kill()
            cgroup.thaw()
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(_DIE_WAIT_MS):
            raise Failure(
                what=f"kill container {record.id}",
                cause=f"its init (pid {record.pid}) did not die within {_DIE_WAIT_MS // 1000} s: it hangs in the kernel",
                remedy=f"look at /proc/{record.pid}/stack",
            )


# -- what belongs to it


def cgroup_of(record: Record, below: str = "", layout: cgroups.Layout | None = None) -> cgroups.Cgroup | None:
    """The container's cgroup, or the one `below` it; None on a host without cgroups."""
    if not record.cgroup:
        return None
    from nacre.linux import cgroups

    if record.unit and not below:
        from nacre.linux import cgroup_systemd  # only where systemd's driver is used: 2 ms of a command
        from nacre.linux.cgroup_names import Place

        place = Place(path=record.cgroup, unit=record.unit, slice=record.slice)
        return cgroup_systemd.ScopeCgroup(layout or cgroups.discover(), place, record.annotations)
    return cgroups.Cgroup(layout or cgroups.discover(), os.path.join(record.cgroup, os.path.normpath("/" + below).lstrip("/")))


def explain_death(failure: InitDied, cgroup: cgroups.Cgroup | None) -> InitDied:
    if cgroup is None or not cgroup.oom_kills():
        return failure
    limit = cgroup.stats()["memory_limit_bytes"]
    known = f", whose limit is {limit} bytes" if limit else ""  # gone with its cgroup, or a parent's
    return InitDied(
        what=failure.what,
        cause=f"{failure.cause}: out of memory in cgroup {cgroup.path}{known}",
        remedy="raise the memory limit; nacre's set-up itself needs about 1 MiB",
    )


def remove_directory(root: str, identifier: str) -> None:
    store.forget(root, identifier)
    directory = os.path.join(root, identifier)
    for name in ("state.json", "state.json.new", "process.json", "start.sock"):
        try:
            os.unlink(f"{directory}/{name}")
        except FileNotFoundError:
            continue
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        pass
