"""The child's side: from the fork to execve(2). Runs the steps, tells the parent, waits at the gate, runs the rest, executes.

Messages on the channel are JSON, one per SOCK_SEQPACKET packet: {"stage": "maps"|"outside"|"listener"}, answered by any byte;
{"stage": "created", "warnings": […]} with the terminal's master beside it; {"warnings": […]}; or {"failure": …}. Closing it without an answer
means that the creator is gone: so is the container. After the gate the connection of `start` takes the channel's place; execve
closes it, and a closed connection without a failure is success.
"""

from __future__ import annotations

import gc
import os
import sys

from nacre.linux import process
from nacre.linux import sockets as socket
from nacre.linux.pids import signals
from nacre.oci.errors import Failure, encode
from nacre.oci.jsontext import dumps
from nacre.oci.values import Value
from nacre.runc.failures import StepFailed, step_failed
from nacre.runc.life import INIT_NAME
from nacre.runc.process_steps import EnterProcessRoot, JoinProcess
from nacre.runc.steps import BindMount, Context

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

    from nacre.runc.steps import Step

_BUSY = 250  # exit status of a child that could not say what happened


class Orders(Value):
    """What the child does, decided before the fork."""

    maps: bool = False  # a user namespace is new: wait for its id maps first
    outside: bool = False  # the parent has something to do once the namespaces are there: runtime hooks, links to move in
    before: tuple[Step, ...]  # up to "created"
    after: tuple[Step, ...]  # from "started" on, the last one executes
    stdio: tuple[int | None, int | None, int | None]  # None is /dev/null
    keep: int = 0  # descriptors 3…3+N-1 that are passed on
    container: str
    later: Callable[[socket.socket, Context], Orders] | None = (
        None  # after `before`, done for whoever comes, waits for more (spare)
    )


class _Refuse:
    """In a container's root an import would run the container's code, as the host's root."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> NoReturn:
        raise ImportError(f"module {fullname} was not loaded before the container was entered")


class Gone(Exception):
    """The creator ended before the container was created."""


def become(orders: Orders, channel: socket.socket, listener: socket.socket | None, gates: Sequence[tuple[str, int]]) -> NoReturn:
    """Never returns. `listener`: where `start` knocks; None executes at once (execute). Descriptors stay where they are."""
    status = _BUSY
    current: Step | str = "begin"
    told = False
    try:
        gc.disable()
        sys.meta_path.insert(0, _Refuse())  # all of the protocol that import calls
        if not orders.maps:
            process.set_dumpable(enabled=False)
        process.set_name(INIT_NAME)
        _reset_signals()
        os.umask(0)
        context = Context(channel=channel.fileno(), gates=gates)
        # What the parent has open (locks, sockets, logs of other containers) must not live on in a process that may wait for days.
        process.close_all_but(
            {channel.fileno(), *_numbers(orders), *(fd for _, fd in gates), *((listener.fileno(),) if listener else ())}
        )
        _place_stdio(orders.stdio)
        if orders.maps:
            _ask(channel, "maps")
            process.set_dumpable(enabled=False)  # not before: the maps of such a process are root's alone to write
        pending: list[Step] = list(orders.before)
        if orders.outside:
            _ask(channel, "outside")
        for step in pending:
            current = step
            step.run(context)
        if orders.later is not None:
            current = "wait for a container"
            orders, told = orders.later(channel, context), True
            _place_stdio(orders.stdio)
            for step in orders.before:
                current = step
                step.run(context)
        current = "wait to be started"
        channel = _created(channel, context, listener, told=told)
        context.channel = channel.fileno()
        for step in orders.after:
            current = step
            if step is orders.after[-1] and context.warnings:
                channel.sendall(dumps({"warnings": context.warnings}).encode())
            step.run(context)
    except Gone:
        pass
    except BaseException as error:
        _tell(channel, _failure(current, error, orders.container))
    finally:
        os._exit(status)


def _numbers(orders: Orders) -> set[int]:
    """The descriptors that the orders name."""
    named = {fd for fd in orders.stdio if fd is not None} | set(range(3, 3 + orders.keep)) | {0, 1, 2}
    named |= {step.tree for step in orders.before if isinstance(step, BindMount)} - {-1}
    return named | {step.descriptor for step in orders.before if isinstance(step, JoinProcess | EnterProcessRoot)}


def _reset_signals() -> None:
    """What the interpreter or the starter ignores or blocks must not be inherited by the program."""
    for number in range(1, signals.NSIG):
        if signals.getsignal(number) not in (signals.SIG_DFL, None):
            try:
                signals.signal(number, signals.SIG_DFL)
            except (OSError, ValueError):
                continue  # SIGKILL, SIGSTOP and those that libc keeps
    signals.pthread_sigmask(signals.SIG_SETMASK, ())


def _place_stdio(stdio: Sequence[int | None]) -> None:
    """The given descriptors as 0, 1, 2. They are copied upwards first: one may stand where another has to go."""
    copies = [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) if fd is None else os.dup(fd) for fd in stdio]
    for number, copy in enumerate(copies):
        if copy == number:
            os.set_inheritable(copy, True)
        else:
            os.dup2(copy, number)
    for copy in copies:
        if copy > 2:
            os.close(copy)


def _ask(channel: socket.socket, stage: str) -> None:
    channel.sendall(dumps({"stage": stage}).encode())
    if not channel.recv(1):
        raise Gone


def _created(channel: socket.socket, context: Context, listener: socket.socket | None, *, told: bool) -> socket.socket:
    """Report; wait until the creator has written it down; wait for `start`. Answers the channel to use from here on.

    `told`: who has given further orders says on the same channel when to start.
    """
    if listener is not None or told:
        _let_itself_be_ended()
    message = dumps({"stage": "created", "warnings": context.warnings}).encode()
    context.warnings.clear()
    if context.console >= 0:
        socket.send_fds(channel, [message], [context.console])
        os.close(context.console)
    else:
        channel.sendall(message)
    if listener is None:
        if told and not channel.recv(1):
            raise Gone
        return channel
    if not channel.recv(1):
        raise Gone
    channel.close()
    connection, _ = listener.accept()
    listener.close()
    if not connection.recv(1):
        os._exit(_BUSY)  # the starter died between connecting and speaking
    return connection


def _let_itself_be_ended() -> None:
    """Process 1 does not hear a signal that it does not handle (pid_namespaces(7)): until execve(2) asks the program, these end it."""

    def end(number: int, _frame: object) -> None:
        os._exit(128 + number)

    for number in (signals.SIGHUP, signals.SIGINT, signals.SIGTERM):
        signals.signal(number, end)


def _failure(current: Step | str, error: BaseException, container: str) -> Failure:
    if isinstance(error, Failure):
        return error
    what = f"{current if isinstance(current, str) else current.describe()} for container {container}"
    if isinstance(error, OSError):
        return step_failed(what, error)
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f" at line {frame.tb_lineno} of {frame.tb_frame.f_code.co_name}" if frame is not None else ""
    return StepFailed(what=what, cause=f"{type(error).__name__}: {error}{place}")


def _tell(channel: socket.socket, failure: Failure) -> None:
    try:
        channel.sendall(dumps({"failure": encode(failure)}).encode()[:65536])
    except OSError:
        pass  # nobody listens any more; the exit status has to do
