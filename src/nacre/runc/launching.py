"""The commands that bring a process to life: create, run, exec, restore."""

from __future__ import annotations

import os

from nacre import runc
from nacre.oci.errors import Failure, Invalid

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from nacre.runc.call import Call


def _send_pidfd(call: Call, pid: int, kind: str) -> None:
    """--pidfd-socket: a descriptor of process `pid`, with a word beside it, to who listens there."""
    if path := call.options.get("pidfd-socket"):
        from nacre.linux.pids import owned, pidfd_open
        from nacre.runc.container import send_descriptor

        with owned(pidfd_open(pid)) as pidfd:
            send_descriptor(path, "a descriptor of the process", kind, pidfd)


def _write_pid(path: str | None, pid: int) -> None:
    """Digits only, whole or not at all: somebody may be waiting for the file to appear."""
    if not path:
        return
    head, name = os.path.split(os.path.abspath(path))
    fresh = os.path.join(head, f".{name}.{os.getpid()}")
    with open(fresh, "w", encoding="ascii") as file:
        file.write(str(pid))
    os.rename(fresh, path)


def _given(wanted: int) -> int:
    """How many of the descriptors 3 … 3+wanted-1 are the caller's, up to the first that is not. A number that is free would become one
    of ours, such as the container's lock, which its process would then hold while it waits to be started; ours are close-on-exec."""
    for count in range(wanted):
        try:
            if not os.get_inheritable(3 + count):
                return count
        except OSError:
            return count
    return wanted


def _preserved(wanted: int) -> int:
    if (found := _given(wanted)) < wanted:
        raise Invalid(
            what=f"pass {wanted} descriptors on",
            cause=f"descriptor {3 + found} is not open",
            remedy="open them before the call, and count from 3 in --preserve-fds",
        )
    return wanted


def _creation(call: Call) -> dict[str, Any]:
    chosen = call.options
    announced, environment = 0, os.environ
    if environment.get("LISTEN_FDS", "").isdecimal() and environment.get("LISTEN_PID", str(os.getpid())) == str(os.getpid()):
        announced = int(environment["LISTEN_FDS"])
    return {
        "preserve_fds": _preserved(_given(announced) + chosen.get("preserve-fds", 0)),
        "extra_environment": (f"LISTEN_FDS={announced}", "LISTEN_PID=1") if announced else (),
        "systemd_cgroup": call.shared.get("systemd-cgroup", False) or call.shared.get("cgroup-manager") == "systemd",
        "no_pivot": chosen.get("no-pivot", False),
        "no_new_keyring": chosen.get("no-new-keyring", False),
        "use_cgroups": call.shared.get("cgroup-manager") != "disabled",
        "config": chosen.get("config", ""),
        "seek_program": True,
    }


def _create(call: Call) -> int:
    launch = runc.create(
        call.root,
        call.id,
        call.options.get("bundle", "."),
        console_socket=call.options.get("console-socket", ""),
        **_creation(call),
    )
    call.warn_all(launch)
    if launch.console is not None:
        runc.delete(call.root, call.id, force=True)
        raise Invalid(what=f"create container {call.id}", cause="process.terminal is true and there is no --console-socket")
    try:
        _send_pidfd(call, launch.pid, "standard")
        _write_pid(call.options.get("pid-file"), launch.pid)
    except (Failure, OSError):
        runc.delete(call.root, call.id, force=True)
        raise
    return 0


def _run(call: Call) -> int:
    from nacre.runc import foreground

    socket_path, detach = call.options.get("console-socket", ""), call.options.get("detach", False)
    ended = created = False
    with foreground.signals() as pending:
        try:
            launch = runc.create(
                call.root,
                call.id,
                call.options.get("bundle", "."),
                console_socket=socket_path,
                bare_newlines=not socket_path,
                **_creation(call),
            )
            created = True
            call.warn_all(launch)
            if launch.console is not None and detach:
                raise Invalid(what=f"run container {call.id}", cause="--detach with process.terminal needs a --console-socket")
            _send_pidfd(call, launch.pid, "standard")
            _write_pid(call.options.get("pid-file"), launch.pid)
            if launch.console is not None:
                foreground.copy_size(launch.console)  # before the program can ask for it
            runc.start(call.root, call.id, call.warn)
            if detach:
                ended = True
                return 0
            return foreground.attend(launch.pid, launch.console, pending)
        finally:
            if created and not ended and not call.options.get("keep"):
                runc.delete(call.root, call.id, force=True, warn=call.warn)


def _exec(call: Call) -> int:
    from nacre.runc import exec_process, foreground

    chosen = call.options
    tree = exec_process.build(call.root, call.id, chosen, call.plain[1:])
    with foreground.signals() as pending:
        launch = runc.execute(
            call.root,
            call.id,
            tree,
            tty=chosen.get("tty", False),
            bare_newlines="console-socket" not in chosen,
            preserve_fds=_preserved(chosen.get("preserve-fds", 0)),
            console_socket=chosen.get("console-socket", ""),
            ignore_paused=chosen.get("ignore-paused", False),
            sub_cgroups=chosen.get("cgroup", ()),
        )
        call.warn_all(launch)
        _send_pidfd(call, launch.pid, "setns")
        _write_pid(chosen.get("pid-file"), launch.pid)
        return 0 if chosen.get("detach") else foreground.attend(launch.pid, launch.console, pending)


def _restore(call: Call) -> int:
    from nacre.linux.process import set_child_subreaper
    from nacre.runc import checkpoint, foreground

    chosen, detach = call.options, call.options.get("detach", False)
    if not detach:
        set_child_subreaper()  # what CRIU leaves behind is ours to wait for
    with foreground.signals() as pending:
        pid = checkpoint.restore(
            call.root,
            call.id,
            chosen.get("bundle", "."),
            {"criu": call.shared.get("criu", ""), **chosen},
            systemd_cgroup=_creation(call)["systemd_cgroup"],
        )
        _write_pid(chosen.get("pid-file"), pid)
        if detach:
            return 0
        try:
            return foreground.attend(pid, None, pending)
        finally:
            runc.delete(call.root, call.id, force=True, warn=call.warn)


HANDLERS: dict[str, Callable[[Call], int]] = {
    "create": _create,
    "run": _run,
    "exec": _exec,
    "restore": _restore,
}
