"""Hooks (config.md "POSIX-platform Hooks"): run with the container's state on stdin, in time, their output kept as evidence."""

from __future__ import annotations

import os
import select

from nacre.linux.libc import owned
from nacre.linux.memfd import from_bytes
from nacre.linux.pids import signal_name, signals
from nacre.linux.process import pidfd_open, pidfd_send_signal
from nacre.oci.jsontext import dumps
from nacre.runc.failures import HookFailed

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any


def run(point: str, hook: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Run one hook to its end. Raises HookFailed for a status that is not 0, a hook that cannot be executed, or one too late.

    One without `env` has the runtime's own environment, as under runc and crun: hooks of engines search its PATH.
    """
    what = f"run the {point} hook {hook['path']}"
    with (
        owned(from_bytes("nacre-state", dumps(state).encode())) as stdin,
        owned(os.memfd_create("nacre-hook-output", os.MFD_CLOEXEC)) as output,
    ):
        environment = dict(entry.partition("=")[::2] for entry in hook["env"]) if "env" in hook else dict(os.environ)
        actions = [(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
        try:
            pid = os.posix_spawn(
                hook["path"],
                hook.get("args") or [hook["path"]],
                environment,
                file_actions=actions,
                setsigdef=[signals.SIGPIPE],
                setsigmask=[],
            )
        except OSError as error:
            raise HookFailed(what=what, cause=f"execve(2) {hook['path']}: {error.strerror} (errno {error.errno})") from error
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
