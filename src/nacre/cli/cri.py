"""`nacre cri`: the CRI service alone, in the foreground, for a real kubelet or crictl."""

from __future__ import annotations

import os
import sys

import click

from nacre.cli import node
from nacre.cli.privilege import require_root
from nacre.config import Config
from nacre.oci.errors import AlreadyExists


@click.command()
@click.pass_obj
def cri(config: Config) -> None:
    """The CRI service alone, in the foreground, on unix://STATE/cri.sock. SIGTERM ends it; pods live on."""
    require_root("serve the CRI")
    if pid := node.alive(config):
        raise AlreadyExists(what="serve the CRI", cause=f"the node's daemon (pid {pid}) serves it already", remedy="nacre status")
    click.echo(f"unix://{config.cri_socket}", err=True)
    os.environ["NACRE_NODE"] = config.instance
    os.execv(sys.executable, [sys.executable, "-m", "nacre.cli.node", "--prefix", config.prefix, "--only", "cri"])
