"""Hooks (config.md "POSIX-platform Hooks"): run with the container's state on stdin, in time, their output kept as evidence."""

from __future__ import annotations

import os
import select

from nacre.linux.libc import owned
from nacre.linux.memfd import from_bytes
from nacre.linux.pids import signal_name, signals
from nacre.linux.process import Execution, close_range, pidfd_open, pidfd_send_signal
from nacre.oci.errors import Failure, decode, encode
from nacre.oci.jsontext import dumps, loads
from nacre.oci.values import Value
from nacre.runc.failures import HookFailed
from nacre.runc.programs import complete

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, NoReturn

    from nacre.runc.programs import Confinement
    from nacre.runc.steps import Context

    Become = Callable[[Execution], NoReturn]

_UNTOLD = 250  # exit status of a child that could not say why it did not become the hook


class RunCreateHooks(Value, kw_only=False):
    """createContainer: the host's programs in the container's namespaces. They begin in its root, of which they know no name."""

    hooks: tuple[Mapping[str, Any], ...]
    state: Mapping[str, Any]  # its pid is the one that the container sees: runtime.md "State"

    def describe(self) -> str:
        return "run the createContainer hooks"

    def run(self, context: Context) -> None:
        os.fchdir(context.root)
        for hook in self.hooks:
            run("createContainer", hook, {**self.state, "pid": os.getpid()})


class RunStartHooks(Value, kw_only=False):
    """startContainer: the container's own programs, which may be no more than its process, and run when that is all it is to be.

    Their memory is the container's, and so is the environment of those that name none; a filter is loaded in each of them, so that it
    need not allow what running hooks takes.
    """

    hooks: tuple[Mapping[str, Any], ...]
    state: Mapping[str, Any]
    environment: tuple[str, ...]
    confinement: Confinement

    def describe(self) -> str:
        return "run the startContainer hooks"

    def run(self, context: Context) -> None:
        def become(execution: Execution) -> NoReturn:
            self.confinement.execute(context.channel, execution)

        for hook in self.hooks:
            hook = {"env": complete(self.environment, context.home), **hook}
            run("startContainer", hook, {**self.state, "pid": os.getpid()}, become)


def run(point: str, hook: Mapping[str, Any], state: Mapping[str, Any], become: Become | None = None) -> None:
    """Run one hook to its end. Raises HookFailed for a status that is not 0, a hook that cannot be executed, or one too late.

    One without `env` has the runtime's own environment, as under runc and crun: hooks of engines search its PATH.
    `become`: executes it in a child of ours, after having made that what the hook may be.
    """
    what = f"run the {point} hook {hook['path']}"
    with (
        owned(from_bytes("nacre-state", dumps(state).encode())) as stdin,
        owned(os.memfd_create("nacre-hook-output", os.MFD_CLOEXEC)) as output,
    ):
        pid = _spawn(what, hook, stdin, output) if become is None else _fork(what, hook, stdin, output, become)
        status = _wait(pid, hook.get("timeout"))
        evidence = tuple(
            os.pread(output, 1 << 16, max(0, os.fstat(output).st_size - (1 << 16))).decode("utf-8", "replace").splitlines()
        )
    if status is None:
        raise HookFailed(what=what, cause=f"it did not end within {hook['timeout']} s and was killed", evidence=evidence)
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        ending = f"it ended with status {code}" if code > 0 else f"it was killed by {signal_name(-code)}"
        raise HookFailed(what=what, cause=ending, evidence=evidence)


def _spawn(what: str, hook: Mapping[str, Any], stdin: int, output: int) -> int:
    actions = [(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
    environment = dict(entry.partition("=")[::2] for entry in hook["env"]) if "env" in hook else dict(os.environ)
    arguments = hook.get("args") or [hook["path"]]
    try:
        return os.posix_spawn(
            hook["path"], arguments, environment, file_actions=actions, setsigdef=[signals.SIGPIPE], setsigmask=[]
        )
    except OSError as error:
        raise _not_begun(what, hook["path"], error) from error


def _fork(what: str, hook: Mapping[str, Any], stdin: int, output: int, become: Become) -> int:
    """The same by fork(2), for what only the child itself can do to itself. What it says before its execve(2) is why that failed."""
    execution = Execution(hook["path"], hook.get("args") or [hook["path"]], hook["env"])
    told, telling = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for number, source in enumerate((stdin, output, output)):
                os.dup2(source, number)
            close_range(3, cloexec=True)
            become(execution)
        except Exception as error:
            os.write(telling, dumps(encode(_not_begun(what, hook["path"], error))).encode())
        finally:
            os._exit(_UNTOLD)
    os.close(telling)
    with owned(told):
        words = os.read(told, 1 << 16)
    if words:
        os.waitpid(pid, 0)
        raise decode(loads(words))
    return pid


def _not_begun(what: str, path: str, error: Exception) -> HookFailed:
    if isinstance(error, OSError):
        return HookFailed(what=what, cause=f"execve(2) {path}: {error.strerror} (errno {error.errno})")
    return HookFailed(what=what, cause=str(error), remedy=error.remedy if isinstance(error, Failure) else "")


def _wait(pid: int, timeout_s: int | None) -> int | None:
    """The wait status, or None after killing a hook that passed its time."""
    in_time = True
    if timeout_s is not None:
        with owned(pidfd_open(pid)) as pidfd:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            in_time = bool(poll.poll(min(timeout_s * 1000, (1 << 31) - 1)))
            if not in_time:
                pidfd_send_signal(pidfd, signals.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return status if in_time else None


def run_all(hooks: Mapping[str, Sequence[Mapping[str, Any]]], point: str, state: Mapping[str, Any]) -> None:
    """All hooks of a point in order, up to the first that fails."""
    for hook in hooks.get(point, ()):
        run(point, hook, state)


def run_leniently(
    hooks: Mapping[str, Sequence[Mapping[str, Any]]], point: str, state: Mapping[str, Any], warn: Callable[[str], None]
) -> None:
    """poststart and poststop: a failing hook only warns and the rest still run (runtime.md "Lifecycle" 9, 13)."""
    for hook in hooks.get(point, ()):
        try:
            run(point, hook, state)
        except HookFailed as failure:
            warn(str(failure))
