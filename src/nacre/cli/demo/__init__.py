"""`nacre demo`: the main job shown with real software, then proof that nothing stays.

    stage    one run: the node, kubectl, the clock, what is deleted afterwards
    web      (a) nginx as a container and in a virtual machine      chain   (c) the trace, (d) a pod that cannot start
    login    (b) a privileged login server in a virtual machine     proof   the host before and after, and what stays on disk

A node that is up already is used and left up; otherwise the demo starts one and takes it down.
"""

from __future__ import annotations

import sys

import click

from nacre.cli.demo import chain, login, proof, web
from nacre.cli.demo.stage import Stage
from nacre.cli.privilege import require_root
from nacre.config import Config
from nacre.oci.errors import Failure


class NotClean(Failure):
    """The host after the demo is not the host before it."""


@click.command()
@click.option(
    "--compare-login/--no-compare-login", default=None, help="Show what the login pod sees under runc (asked otherwise)."
)
@click.option("--no-vm", is_flag=True, help="Containers only, for a machine without QEMU or patience.")
@click.option("--skip", multiple=True, type=click.Choice(["web", "login", "chain"]), help="Leave a part out.")
@click.pass_obj
def demo(config: Config, compare_login: bool | None, no_vm: bool, skip: tuple[str, ...]) -> None:
    """nginx and a login server, each as a container and in a virtual machine; the chain; a failure explained."""
    require_root("run the demo")
    before = proof.photograph(config)
    stage = Stage(config, vms=not no_vm)
    failed: Failure | None = None
    try:
        _perform(stage, skip, compare_login)
    except Failure as failure:
        failed = failure  # told last, below the proof that nothing is left
    finally:
        stage.close()
    left, others = proof.differences(before, proof.photograph(config), stage.held) if stage.owns_node else ([], [])
    proof.show(config, left, others, node_left_up=not stage.owns_node)
    if failed:
        raise failed
    if left:
        raise NotClean(what="leave the host as it was", cause=f"{len(left)} things differ", evidence=tuple(left))


def _perform(stage: Stage, skip: tuple[str, ...], compare_login: bool | None) -> None:
    stage.open()
    if "web" not in skip:
        web.show(stage)
    if "login" not in skip and stage.vms:
        login.show(stage, compare=_wanted(compare_login))
    if "chain" not in skip:
        chain.show(stage)


def _wanted(choice: bool | None) -> bool:
    """The look under runc reads the host's disks from inside a pod, so it may be declined; where nobody can be asked it is shown."""
    if choice is not None:
        return choice
    if not sys.stdin.isatty():
        return True
    return click.confirm("Also show (read-only) what the same privileged pod sees of this host without the VM?", default=True)
