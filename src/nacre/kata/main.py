"""`nacre-kata`: runc's command line, each container in a virtual machine of its own. What it cannot do is refused in words.

A container's pid is that of its monitor (see `monitor`), which ends with the container's code. The root directory of the bundle becomes
an erofs drive at `create`. The guest and the template are those of the node under NACRE_PREFIX: `nacre enable kata` makes them.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from nacre.kata import documents, monitor, plan, template
from nacre.linux import mounts
from nacre.linux.cgroups import Cgroup, discover
from nacre.linux.mounts import UnmountFlag
from nacre.oci.errors import AlreadyExists, Failure, Invalid, NotFound, Unsupported, WrongStatus, decode, encode, from_exception
from nacre.oci.handler import Sandbox, Stdio
from nacre.runc import options as words_of

DEFAULT_ROOT = "/run/nacre/kata"
SPEC = "1.2.0"
_USAGE = "usage: nacre-kata [--root DIR] [--log FILE] [--log-format text|json] COMMAND [OPTIONS] ID …\ncommands: "


class _Call:
    """One invocation."""

    def __init__(self, shared: dict[str, Any], chosen: dict[str, Any], plain: Sequence[str]) -> None:
        self.options, self.plain = chosen, list(plain)
        self.root = os.path.abspath(shared.get("root") or DEFAULT_ROOT)
        self.data = f"{os.environ.get('NACRE_PREFIX', '')}/var/lib/nacre"

    @property
    def id(self) -> str:
        if not self.plain or "/" in self.plain[0] or self.plain[0].startswith("."):
            raise Invalid(what="read the command line", cause="the container's id is missing, or no name")
        return self.plain[0]

    @property
    def directory(self) -> str:
        return f"{self.root}/{self.id}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The whole command; the console script's entry point. Never raises."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    shared: dict[str, Any] = {}
    command = ""
    try:
        shared, plain = words_of.parse(line, words_of.GLOBAL)
        if shared.get("version"):
            print(f"nacre-kata\nspec: {SPEC}")
            return 0
        if shared.get("help") or not plain:
            print(_USAGE + " ".join(sorted(_COMMANDS)))
            return 0 if shared.get("help") else 1
        command = plain[0]
        if command not in _COMMANDS:
            what = f"run nacre-kata {command}"
            if command in words_of.COMMANDS:
                raise Unsupported(what=what, cause="a container in a virtual machine cannot be asked for that from here")
            raise Invalid(what=what, cause="there is no such command", remedy="nacre-kata --help")
        chosen, rest = words_of.parse(plain[1:], words_of.COMMANDS[command], command)
        return _COMMANDS[command](_Call(shared, chosen, rest))
    except (Failure, OSError) as error:
        failure = from_exception(f"nacre-kata {command}".strip(), error)
        _log(shared, failure)
        print(f"nacre-kata: {failure.sentence()}", *failure.evidence, sep="\n  ", file=sys.stderr)
        return 255 if command == "exec" else 1


def _log(shared: dict[str, Any], failure: Failure) -> None:
    if not shared.get("log"):
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = "\n".join([failure.sentence(), *failure.evidence])
    as_json = json.dumps({"level": "error", "msg": text, "time": now})
    line = as_json if shared.get("log-format") == "json" else f'time="{now}" level=error msg={json.dumps(text)}'
    try:
        with open(shared["log"], "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        print(f"nacre-kata: {shared['log']}: {error.strerror}", file=sys.stderr)


def _launch(call: _Call) -> int:
    """Create the container; the pid of its monitor, our child."""
    what = f"create container {call.id}"
    bundle = os.path.abspath(call.options.get("bundle", "."))
    config = documents.load(f"{bundle}/config.json", what)
    if (config.get("process") or {}).get("terminal"):
        raise Unsupported(
            what=what, cause="nacre-kata gives no terminals on its command line", remedy="set process.terminal to false"
        )
    plan.load(call.data)  # refused before the host is touched
    os.makedirs(call.root, mode=0o711, exist_ok=True)
    try:
        os.mkdir(call.directory, 0o700)
    except FileExistsError:
        raise AlreadyExists(what=what, cause=f"{call.directory} is there", remedy=f"nacre-kata delete {call.id}") from None
    try:
        _make_root(os.path.join(bundle, (config.get("root") or {}).get("path", "rootfs")), f"{call.directory}/root.erofs", what)
        return _fork_monitor(call, bundle, config)
    except BaseException:
        _clear(call)
        raise


def _make_root(source: str, target: str, what: str) -> None:
    tool = shutil.which("mkfs.erofs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if tool is None:
        raise NotFound(
            what=what, cause="mkfs.erofs is not installed", remedy="apt-get install --no-install-recommends erofs-utils"
        )
    done = subprocess.run([tool, "--quiet", target, source], capture_output=True, text=True, check=False)
    if done.returncode:
        said = tuple((done.stdout + done.stderr).splitlines())
        raise Failure(what=what, cause=f"mkfs.erofs of {source} ended with code {done.returncode}", evidence=said)


def _fork_monitor(call: _Call, bundle: str, config: dict[str, Any]) -> int:
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _become_monitor(call, bundle, config, write)
    os.close(write)
    with open(read, "rb") as file:
        said = json.loads(file.read() or b'{"died": true}')
    if "failure" in said or "died" in said:
        os.waitpid(pid, 0)
        raise (
            decode(said["failure"])
            if "failure" in said
            else Failure(what=f"create container {call.id}", cause="its monitor died")
        )
    return pid


def _become_monitor(call: _Call, bundle: str, config: dict[str, Any], report: int) -> None:
    """Never returns; ends with the container's code."""
    try:
        os.setsid()
        made = monitor.Monitor(call.directory, call.id, bundle, _sealed(call.data))
        stdin, stdout, stderr = _standard()
        made.create(_sandbox(call, config), Stdio(stdin=stdin, stdout=stdout, stderr=stderr))
        os.write(report, json.dumps({"pid": os.getpid()}).encode())
        os.close(report)
        os._exit(made.serve())
    except BaseException as error:
        os.write(report, json.dumps({"failure": encode(from_exception(f"create container {call.id}", error))}).encode())
        os._exit(1)


def _sealed(data: str) -> int | None:
    """The template's sealed copy; None where there is no template, and the VM boots cold."""
    home = template.directory(data)
    names = [name for name in os.listdir(home) if not name.endswith(".new")] if os.path.isdir(home) else []
    return template.open_sealed(f"{home}/{names[0]}") if names else None


def _standard() -> tuple[int, int, int]:
    """Our own streams under open file descriptions of their own: they are made non-blocking, which our caller must not notice.

    Not a regular file's, which never blocks and whose position is shared with whoever else writes to it.
    """

    def again(number: int, flags: int) -> int:
        if stat.S_ISREG(os.fstat(number).st_mode):
            return os.dup(number)
        try:
            return os.open(f"/proc/self/fd/{number}", flags | os.O_CLOEXEC)
        except OSError:  # ENXIO: a socket cannot be opened again
            return os.dup(number)

    return again(0, os.O_RDONLY), again(1, os.O_WRONLY), again(2, os.O_WRONLY)


def _sandbox(call: _Call, config: dict[str, Any]) -> Sandbox:
    linux = config.get("linux") or {}
    network = next((one.get("path", "") for one in linux.get("namespaces") or [] if one.get("type") == "network"), "")
    return Sandbox(
        id=call.id,
        pod_uid="",
        directory=call.directory,
        hostname=config.get("hostname") or call.id,
        cgroups_path=_group(call, config),
        namespaces={"network": network, "ipc": "", "uts": ""},
        sysctls=dict(linux.get("sysctl") or {}),
        resources={key: value for key, value in (linux.get("resources") or {}).items() if key in ("cpu", "memory")},
        settings={"data": call.data, "kata": {"template": True}},
    )


def _group(call: _Call, config: dict[str, Any]) -> str:
    asked = (config.get("linux") or {}).get("cgroupsPath") or f"/nacre-kata-{call.id}"
    if ":" in asked:
        raise Unsupported(
            what=f"create container {call.id}", cause=f"cgroupsPath {asked} is meant for systemd", remedy="use cgroupfs"
        )
    return str(asked if asked.startswith("/") else f"/{asked}")


def _write_pid(path: str | None, pid: int) -> None:
    if path:
        fresh = f"{path}.{os.getpid()}"
        with open(fresh, "w", encoding="ascii") as file:
            file.write(str(pid))
        os.rename(fresh, path)


def _create(call: _Call) -> int:
    _write_pid(call.options.get("pid-file"), _launch(call))
    return 0


def _run(call: _Call) -> int:
    from nacre.runc import foreground

    with foreground.signals() as pending:
        pid = _launch(call)
        _write_pid(call.options.get("pid-file"), pid)
        try:
            monitor.ask(call.directory, {"op": "start"})
        except Failure:
            _end(call)
            raise
        if call.options.get("detach"):
            return 0
        code = foreground.attend(pid, None, pending)
        if not call.options.get("keep"):
            _clear(call)
        return code


def _start(call: _Call) -> int:
    _must_be(call, "created")
    monitor.ask(call.directory, {"op": "start"})
    return 0


def _must_be(call: _Call, *statuses: str) -> None:
    status = _status(call)
    if status not in statuses:
        raise WrongStatus(what=f"use container {call.id}", cause=f"it is {status}")


def _status(call: _Call) -> str:
    document = monitor.remembered(call.directory)
    return str(document["status"]) if monitor.lives(document) else "stopped"


def _state(call: _Call) -> int:
    document = monitor.remembered(call.directory)
    status = _status(call)
    shown = {"ociVersion": SPEC, "id": call.id, "status": status, "bundle": document["bundle"]}
    print(json.dumps(shown | {"pid": 0 if status == "stopped" else document["pid"]}, indent=2))
    return 0


def _kill(call: _Call) -> int:
    number = words_of.signal_number(call.plain[1] if len(call.plain) > 1 else "TERM")
    _must_be(call, "created", "running")
    monitor.ask(call.directory, {"op": "kill", "signal": number, "all": bool(call.options.get("all"))})
    return 0


def _exec(call: _Call) -> int:
    """Waits for the command; the monitor's answer is its code."""
    chosen = call.options
    if chosen.get("tty") or chosen.get("detach"):
        raise Unsupported(
            what=f"execute in container {call.id}", cause="nacre-kata executes in the foreground, without a terminal"
        )
    _must_be(call, "running")
    if "process" in chosen:
        with open(chosen["process"], "rb") as file:
            process = json.load(file)
    else:
        with open(f"{monitor.remembered(call.directory)['bundle']}/config.json", "rb") as file:
            process = json.load(file)["process"]
        process |= {"args": call.plain[1:], "env": [*process.get("env", ()), *chosen.get("env", ())]}
        process |= {"cwd": chosen["cwd"]} if "cwd" in chosen else {}
    request = {"op": "exec", "id": secrets.token_hex(8), "process": process | {"terminal": False}}
    return int(monitor.ask(call.directory, request, _standard())["code"])


def _delete(call: _Call) -> int:
    try:
        status = _status(call)
    except NotFound:
        if call.options.get("force"):
            _clear(call)
            return 0
        raise
    if status != "stopped":
        if not call.options.get("force"):
            raise WrongStatus(what=f"delete container {call.id}", cause=f"it is {status}", remedy="nacre-kata delete --force")
        _end(call)
    else:
        _clear(call)
    return 0


def _end(call: _Call) -> None:
    """The VM away, its monitor with it."""
    with _ended(int(monitor.remembered(call.directory)["pid"])):
        monitor.ask(call.directory, {"op": "end"})
    _clear(call)


class _ended:
    """Leaving the block waits until process `pid` has ended."""

    def __init__(self, pid: int) -> None:
        self._fd = os.pidfd_open(pid)

    def __enter__(self) -> None: ...

    def __exit__(self, *_exception: object) -> None:
        import select

        select.select([self._fd], [], [], 30.0)
        os.close(self._fd)


def _clear(call: _Call) -> None:
    """What a container has left: its directory, the pinned namespace, and after a kill its cgroup."""
    pin = f"{call.directory}/ns/net"
    if os.path.exists(pin):
        mounts.umount2(pin, UnmountFlag.DETACH) if os.path.ismount(pin) or _pinned(pin) else None
    try:
        with open(f"{monitor.remembered(call.directory)['bundle']}/config.json", "rb") as file:
            path = _group(call, json.load(file))
        for one in (f"{path}/{call.id}", path):
            group = Cgroup(discover(), one)
            if group.exists():
                group.kill()
                group.remove()
    except (NotFound, OSError):
        pass  # it never came to have one, or its bundle is gone
    shutil.rmtree(call.directory, ignore_errors=True)


def _pinned(path: str) -> bool:
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        return any(line.split()[4] == path for line in file)


def _features(_call: _Call) -> int:
    from nacre.runc import templates

    print(json.dumps(templates.features() | {"hooks": []}, indent=2))
    return 0


_COMMANDS: dict[str, Callable[[_Call], int]] = {
    "create": _create, "run": _run, "start": _start, "state": _state, "kill": _kill, "exec": _exec, "delete": _delete,
    "features": _features,
}  # fmt: skip
