"""`nacre up`, `down`, `status`: the daemon started, asked and ended."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

import click

from nacre.cli import control, node, output, sweep, taken
from nacre.cli.privilege import require_root
from nacre.config import Config
from nacre.network import Network
from nacre.oci.errors import Failure, decode

START_LIMIT_S = 60.0  # our deadline for the daemon; a stage that hangs is named
END_LIMIT_S = 30.0


class StartFailed(Failure):
    """The daemon ended or hung before it was ready."""


class NotReady(Failure):
    """The node did not become ready in time."""


@click.command()
@click.option("--listen", metavar="ADDR", default="", help="Address of API and node API, in place of the configuration's.")
@click.option(
    "--timeout", "timeout_s", default=START_LIMIT_S, show_default=True, metavar="SECONDS", help="More for an emulated machine."
)
@click.pass_obj
def up(config: Config, listen: str, timeout_s: float) -> None:
    """Start the node: API, controllers, kubelet and CRI in one daemon."""
    start(config, listen, timeout_s=timeout_s)


@click.command()
@click.option("--grace", "grace_s", default=5.0, show_default=True, metavar="SECONDS", help="Between SIGTERM and SIGKILL.")
@click.option("--force", is_flag=True, help="Do not wait for the daemon: kill and clean.")
@click.pass_obj
def down(config: Config, grace_s: float, force: bool) -> None:
    """Stop the node and take every pod, mount, link and rule off the host. The pods' API objects stay."""
    stop(config, grace_s=grace_s, force=force)


@click.command()
@click.option("--wait-ready", is_flag=True, help="Wait until the node is Ready.")
@click.option("--timeout", "timeout_s", default=60.0, show_default=True, metavar="SECONDS")
@click.option("-o", "form", type=click.Choice(["text", "json"]), default="text")
@click.pass_obj
def status(config: Config, wait_ready: bool, timeout_s: float, form: str) -> int:
    """What is up, and since when. Exit 1 when the node is down or not Ready."""
    state = control.ask(config, "status", timeout_s=10)
    ready, message = wait_until_ready(config, timeout_s if wait_ready else 0)
    if form == "json":
        print(json.dumps(state | {"ready": ready, "message": message}))
    else:
        describe(config, state)
        output.say(f"  node     {state['node']} is " + ("Ready" if ready else f"not Ready: {message}"), "ok" if ready else "bad")
    return 0 if ready else 1


def start(config: Config, listen: str = "", say: Any = output.say, *, timeout_s: float = START_LIMIT_S) -> dict[str, Any]:
    """Start the daemon unless one runs, wait until its services answer, say what is up. Answers its status.

    Raises NotRoot, Taken with the holder's name, what a service's start raised, or StartFailed with the log's last lines.
    """
    require_root("start the node")
    state = control.running(config)
    if state:
        say(f"The node is up already (pid {state['pid']}).")
        describe(config, state, say)
        return state
    if not node.alive(config):
        before = node.read_identity(config)  # after a kill -9 the pods' bridge and the ports in use are our own
        taken.require_free(config)
        if before:
            say(f"The last daemon (pid {before.get('pid')}) ended without saying so; its pods are taken over.")
    state = _spawn(config, listen, say, timeout_s)
    describe(config, state, say)
    return state


def _spawn(config: Config, listen: str, say: Any, timeout_s: float) -> dict[str, Any]:
    began = time.monotonic()
    read, write = os.pipe()
    directory = os.path.dirname(config.log_dir)
    os.makedirs(directory, exist_ok=True)
    command = [sys.executable, "-m", "nacre.cli.node", "--prefix", config.prefix, "--report-fd", str(write)]
    if listen:
        command += ["--listen", listen]
    with open(f"{directory}/node.log", "ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(write,),
            start_new_session=True,
            cwd="/",
            env=os.environ | {"NACRE_NODE": config.instance},  # by which `reset` knows the daemon's children
        )
    os.close(write)
    with open(read, "rb", buffering=0) as reports:
        state = _await_ready(config, reports, began, timeout_s)
    child.returncode = 0  # it lives on: no warning that a child is left
    say(f"nacre is up after {output.seconds(time.monotonic() - began)}.")
    return state


def _await_ready(config: Config, reports: Any, began: float, timeout_s: float) -> dict[str, Any]:
    """Read the daemon's report lines until `ready`. Raises the failure reported, or StartFailed naming the stage."""
    stage, pending = "its first line", b""
    while True:
        left = began + timeout_s - time.monotonic()
        if left <= 0 or not select.select([reports], [], [], left)[0]:
            cause = f"{stage} has been starting for {timeout_s:.0f} s"
            break
        data = reports.read(65536)
        if not data:
            cause = f"the daemon ended while starting {stage}"
            break
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "failure" in message:
                raise decode(message["failure"])
            if "ready" in message:
                ready: dict[str, Any] = message["ready"]
                return ready
            stage = message.get("starting", stage)
    name = f"{os.path.dirname(config.log_dir)}/node.log"
    raise StartFailed(what="start the node", cause=cause, evidence=tuple(last_lines(name, 12)), remedy="nacre logs node")


def last_lines(path: str, count: int) -> list[str]:
    """The end of a log, [] when there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 64 * 1024))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def describe(config: Config, state: dict[str, Any], say: Any = output.say) -> None:
    """Where everything is, in a few lines."""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state["started_ns"] / 1e9))
    say(f"  daemon   pid {state['pid']}, nacre {state['version']}, since {since}: {', '.join(state['services'])}")
    if "api" in state["services"]:
        say(f"  api      https://{state['listen']}:{state['api_port']}   kubeconfig {config.admin_conf}")
    say(f"  cri      unix://{config.cri_socket}")
    say(f"  logs     {os.path.dirname(config.log_dir)}/*.log   pods {config.log_dir}")


def wait_until_ready(config: Config, timeout_s: float) -> tuple[bool, str]:
    """Whether the Node object is Ready, and if not the kubelet's words; waits up to `timeout_s` by watching."""
    from nacre.cli import cluster

    return cluster.node_ready(config, timeout_s)


def stop(config: Config, *, grace_s: float = 5.0, force: bool = False, say: Any = output.say) -> None:
    """End the node and leave nothing of it on the host but its data. Works as well when the daemon is dead already."""
    require_root("stop the node")
    pid = node.alive(config)
    if pid and not force:
        answer = _ask_down(config, pid, grace_s, say)
        _await_end(pid, say)
        for note in Network(config).stop():
            say(f"  {note}")
        count = answer["pods"]
        pods = (
            f"{count} pods were stopped, their" if count > 1 else "one pod was stopped, its" if count else "no pod was running,"
        )
        say(f"The node is down; {pods} API objects stay in {config.data}/api.db.")
    elif pid:
        os.kill(pid, signal.SIGKILL)
        _await_end(pid, say)
    swept = sweep.sweep(config)
    for line in swept:
        say(f"  {line}")
    if not pid:
        say("No daemon was running; " + ("what it had left is gone." if swept else "nothing of it was left."))


def _ask_down(config: Config, pid: int, grace_s: float, say: Any) -> dict[str, Any]:
    """The daemon's own answer; one that does not listen (it starts, it ends) is told by a signal, and the sweep does the rest."""
    try:
        return control.ask(config, "down", progress=lambda text: say(f"  {text}"), grace_s=grace_s)
    except control.NodeDown as failure:
        say(f"  {failure.cause}; pid {pid} is ended by SIGTERM")
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            pass  # it was about to
        return {"pods": 0}


def _await_end(pid: int, say: Any) -> None:
    """Wait for the daemon by its pidfd; one that does not end is killed, and that is said."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for limit_s, number in ((END_LIMIT_S, signal.SIGKILL), (5.0, None)):
            if select.select([fd], [], [], limit_s)[0]:
                return
            if number is not None:
                say(f"  the daemon (pid {pid}) did not end within {limit_s:.0f} s and is killed")
                signal.pidfd_send_signal(fd, number)
    finally:
        os.close(fd)
