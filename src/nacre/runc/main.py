"""`nacre-runc`: the OCI runtimes' common command line, for engines that drive a runtime binary (podman, containerd, conmon).

Exit status: 0; 1 for a failure; 255 for one of `exec` before its program runs; else the program's own (128+N for signal N).
A failure is told on stderr and in `--log`, as text or JSON lines of the shape that engines read (level, msg, time).
"""

from __future__ import annotations

import os
import sys
import time

from nacre import __version__, runc
from nacre.oci import state as store
from nacre.oci.errors import Failure, Invalid, from_exception
from nacre.oci.jsontext import dumps
from nacre.runc import options as words_of

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    Options = Mapping[str, Any]

DEFAULT_ROOT = "/run/nacre/runc"
_USAGE = (
    "usage: nacre-runc [--root DIR] [--log FILE] [--log-format text|json] [--systemd-cgroup] COMMAND [OPTIONS] ID …\ncommands: "
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The whole command; the console script's entry point. Never raises."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    shared: dict[str, Any] = {}
    command = ""
    try:
        shared, plain = words_of.parse(line, words_of.GLOBAL)
        if shared.get("version"):
            from nacre.oci.spec import VERSION

            print(f"nacre-runc version {__version__}\nspec: {VERSION}")
            return 0
        if shared.get("help") or not plain or plain[0] == "help":
            print(_USAGE + " ".join(sorted(words_of.COMMANDS)))
            return 0 if plain or shared else 1
        command = plain[0]
        _check_log(shared)
        if command not in words_of.COMMANDS:
            raise Invalid(what=f"run nacre-runc {command}", cause="there is no such command", remedy="nacre-runc help")
        if command in ("create", "run", "exec"):
            from nacre.linux.interpreter import execute_out_of_reach

            execute_out_of_reach("from nacre.runc.main import main; sys.exit(main())", line)
        chosen, rest = words_of.parse(plain[1:], {**words_of.COMMANDS[command], **words_of.HELP}, command)
        if chosen.get("help"):
            print(words_of.usage(command))
            return 0
        _debug(shared, f"nacre-runc {__version__} is asked to {' '.join(plain)}")
        status = _HANDLERS[command](_Call(shared, chosen, rest))
        _debug(shared, f"{command} ends with {status}")
        return status
    except BrokenPipeError:
        return 1
    except (Failure, OSError) as error:
        failure = from_exception(f"nacre-runc {command}".strip(), error)
        _log(shared, "error", failure.sentence(), failure.evidence)
        print(f"nacre-runc: {failure.sentence()}", *failure.evidence, sep="\n  ", file=sys.stderr)
        return 255 if command == "exec" else 1


def _check_log(shared: dict[str, Any]) -> None:
    """An engine must not find out that nothing is told when something goes wrong."""
    if (written := shared.get("log-format", "text")) not in ("text", "json"):
        raise Invalid(what="read the options", cause=f"--log-format is {written!r}, neither text nor json")
    if path := shared.get("log"):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644))
        except OSError as error:
            del shared["log"]
            raise Invalid(what="open the log", cause=f"{path}: {error.strerror}", remedy="name a file for --log") from error


def _log(shared: Options, level: str, message: str, evidence: Sequence[str] = ()) -> None:
    """One line to --log; a log that cannot be written must not hide the failure itself."""
    if not shared.get("log"):
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = "\n".join([message, *evidence])
    if shared.get("log-format") == "json":
        line = dumps({"level": level, "msg": text, "time": now})
    else:
        line = f'time="{now}" level={level} msg={dumps(text)}'
    try:
        with open(shared["log"], "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        print(f"nacre-runc: {shared['log']}: {error.strerror}", file=sys.stderr)


def _debug(shared: Options, message: str) -> None:
    """--debug: what the runtime does, to the log or to stderr."""
    if shared.get("debug"):
        if shared.get("log"):
            _log(shared, "debug", message)
        else:
            print(f"nacre-runc: debug: {message}", file=sys.stderr)


class _Call:
    """One invocation: the shared options, the command's own, the plain words."""

    def __init__(self, shared: Options, chosen: Options, plain: Sequence[str]) -> None:
        self.shared, self.options, self.plain = shared, chosen, list(plain)
        self.root = os.path.abspath(shared.get("root") or DEFAULT_ROOT)

    @property
    def id(self) -> str:
        if not self.plain:
            raise Invalid(what="read the command line", cause="the container's id is missing")
        return self.plain[0]

    def warn(self, words: str) -> None:
        """To the log, or where there is none to stderr: nothing is lost."""
        if self.shared.get("log"):
            _log(self.shared, "warning", words)
        else:
            print(f"nacre-runc: warning: {words}", file=sys.stderr)

    def warn_all(self, launch: runc.Launch) -> None:
        """And which process it became, for who debugs."""
        _debug(self.shared, f"process {launch.pid} is set up")
        for words in launch.warnings:
            self.warn(words)

    def ids(self) -> list[str]:
        """The ids meant: one, or with --regex all that match."""
        if not self.options.get("regex"):
            return [self.id]
        import re

        try:
            pattern = re.compile(self.id)
        except re.error as error:
            raise Invalid(what="read the command line", cause=f"{self.id!r} is no regular expression: {error}") from error
        return [identifier for identifier in store.identifiers(self.root) if pattern.search(identifier)]


def _send_pidfd(call: _Call, pid: int, kind: str) -> None:
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


def _creation(call: _Call) -> dict[str, Any]:
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


def _create(call: _Call) -> int:
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


def _run(call: _Call) -> int:
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


def _exec(call: _Call) -> int:
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


def _start(call: _Call) -> int:
    runc.start(call.root, call.id, call.warn)
    return 0


def _state(call: _Call) -> int:
    print(dumps(runc.state(call.root, call.id), indent=2))
    return 0


def _kill(call: _Call) -> int:
    number = words_of.signal_number(call.plain[1] if len(call.plain) > 1 else "TERM")
    for identifier in call.ids():
        runc.kill(call.root, identifier, number, everyone=call.options.get("all", False))
    return 0


def _delete(call: _Call) -> int:
    for identifier in call.ids():
        runc.delete(call.root, identifier, force=call.options.get("force", False), warn=call.warn)
    return 0


def _pause(call: _Call) -> int:
    runc.pause(call.root, call.id)
    return 0


def _resume(call: _Call) -> int:
    runc.resume(call.root, call.id)
    return 0


def _list(call: _Call) -> int:
    states = runc.list_states(call.root, lambda failure: print(f"nacre-runc: {failure.sentence()}", file=sys.stderr))
    if call.options.get("quiet"):
        print(*(one["id"] for one in states), sep="\n", end="\n" if states else "")
    elif call.options.get("format") == "json":
        print(dumps(states))
    else:
        rows = [("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")]
        rows += [(one["id"], str(one["pid"]), one["status"], one["bundle"], one["created"], one["owner"]) for one in states]
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        for row in rows:
            print("   ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _ps(call: _Call) -> int:
    pids = runc.processes(call.root, call.id)
    if call.options.get("format") == "json":
        print(dumps(pids))
        return 0
    import subprocess

    listing = subprocess.run(["ps", *(call.plain[1:] or ["-ef"])], capture_output=True, text=True, check=False)
    lines = listing.stdout.splitlines()
    column = lines[0].split().index("PID") if lines and "PID" in lines[0].split() else -1
    if column < 0:
        raise Failure(what=f"list the processes of {call.id}", cause=f"ps(1) shows no PID column: {listing.stderr.strip()}")
    wanted = {str(pid) for pid in pids}
    print(lines[0], *(line for line in lines[1:] if line.split()[column] in wanted), sep="\n")
    return 0


def _events(call: _Call) -> int:
    from nacre.linux.pids import signals
    from nacre.runc import events

    signals.signal(signals.SIGINT, signals.SIG_DFL)  # how a user ends it

    def tell(event: Mapping[str, Any]) -> None:
        print(dumps(event), flush=True)

    if call.options.get("stats"):
        tell(events.once(call.root, call.id))
    else:
        events.follow(call.root, call.id, words_of.seconds(call.options.get("interval", "5s")), tell)
    return 0


def _update(call: _Call) -> int:
    from nacre.oci.spec import parse

    chosen = call.options
    if "resources" in chosen:
        source = chosen["resources"]
        if source == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(source, "rb") as file:
                data = file.read()
        for words in runc.update(call.root, call.id, parse(data, f"read {source}")):
            call.warn(words)
        return 0
    names = {
        "memory": ("memory", "limit"),
        "memory-reservation": ("memory", "reservation"),
        "memory-swap": ("memory", "swap"),
        "kernel-memory": ("memory", "kernel"),
        "kernel-memory-tcp": ("memory", "kernelTCP"),
        "cpu-share": ("cpu", "shares"),
        "cpu-quota": ("cpu", "quota"),
        "cpu-burst": ("cpu", "burst"),
        "cpu-period": ("cpu", "period"),
        "cpu-rt-period": ("cpu", "realtimePeriod"),
        "cpu-rt-runtime": ("cpu", "realtimeRuntime"),
        "cpu-idle": ("cpu", "idle"),
        "cpuset-cpus": ("cpu", "cpus"),
        "cpuset-mems": ("cpu", "mems"),
        "pids-limit": ("pids", "limit"),
        "blkio-weight": ("blockIO", "weight"),
    }
    resources: dict[str, Any] = {}
    for option, (group, key) in names.items():
        if option in chosen:
            value = chosen[option]
            resources.setdefault(group, {})[key] = words_of.size(value) if group == "memory" else value
    options = {"l3-cache-schema": "l3CacheSchema", "mem-bw-schema": "memBwSchema"}
    schemata = {key: chosen[option] for option, key in options.items() if option in chosen}
    if schemata:
        from nacre.runc import resctrl

        resctrl.check(schemata)
        resctrl.update(store.read(call.root, call.id).resctrl, schemata)
    for words in runc.update(call.root, call.id, resources):
        call.warn(words)
    return 0


def _checkpoint(call: _Call) -> int:
    from nacre.runc import checkpoint

    checkpoint.checkpoint(call.root, call.id, {"criu": call.shared.get("criu", ""), **call.options})
    return 0


def _restore(call: _Call) -> int:
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


def _features(call: _Call) -> int:
    from nacre.runc import templates

    print(dumps(templates.features(), indent=2))
    return 0


def _spec(call: _Call) -> int:
    from nacre.runc import templates

    path = os.path.join(call.options.get("bundle", "."), "config.json")
    document = templates.spec(rootless=call.options.get("rootless", False))
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(dumps(document, indent=2) + "\n")
    except FileExistsError:
        raise Invalid(what=f"write {path}", cause="it exists", remedy="remove it first") from None
    return 0


_HANDLERS: dict[str, Callable[[_Call], int]] = {
    "create": _create,
    "run": _run,
    "exec": _exec,
    "start": _start,
    "state": _state,
    "kill": _kill,
    "delete": _delete,
    "pause": _pause,
    "resume": _resume,
    "list": _list,
    "ps": _ps,
    "events": _events,
    "update": _update,
    "checkpoint": _checkpoint,
    "restore": _restore,
    "features": _features,
    "spec": _spec,
}

if __name__ == "__main__":
    sys.exit(main())
