"""Add-ons: what a node can do beyond plain pods, each a manifest plus the checks that prove it works.

`enable NAME` runs the add-on's steps, each said as it is done; the last one runs something real. What is enabled is known by its
objects in the API (label nacre/addon), nowhere else, so that `addons` cannot disagree with the cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import click

from nacre.cli import cluster, output
from nacre.cli.privilege import require_root
from nacre.config import Config
from nacre.oci.errors import NotFound

LABEL = "nacre/addon"


@dataclass(frozen=True, slots=True, kw_only=True)
class Addon:
    """`enable` and `disable` live in `module`; `marker` is the API path of the object that says it is on."""

    name: str
    purpose: str
    module: str
    marker: str


ADDONS = (
    Addon(
        name="kata",
        purpose="pods in virtual machines of their own (runtimeClassName: kata)",
        module="nacre.cli.addons.kata",
        marker="/apis/node.k8s.io/v1/runtimeclasses/kata",
    ),
)


def _find(name: str) -> Addon:
    for addon in ADDONS:
        if addon.name == name:
            return addon
    raise NotFound(
        what=f"find add-on {name}", cause=f"known are {', '.join(addon.name for addon in ADDONS)}", remedy="nacre addons"
    )


def _act(addon: Addon, verb: str) -> Callable[[Config], None]:
    act: Callable[[Config], None] = getattr(import_module(addon.module), verb)
    return act


def is_enabled(config: Config, addon: Addon) -> bool:
    try:
        return bool(cluster.get(config, addon.marker))
    except NotFound:
        return False


@click.command()
@click.argument("name")
@click.pass_obj
def enable(config: Config, name: str) -> None:
    """Switch an add-on on; what it finds is said."""
    addon = _find(name)
    require_root(f"enable {name}")
    _act(addon, "enable")(config)


@click.command()
@click.argument("name")
@click.pass_obj
def disable(config: Config, name: str) -> None:
    """Switch an add-on off; running pods that use it stay."""
    addon = _find(name)
    require_root(f"disable {name}")
    _act(addon, "disable")(config)
    output.say(f"{name} is off.")


@click.command()
@click.pass_obj
def addons(config: Config) -> None:
    """The add-ons and their state."""
    rows = [(addon.name, "on" if is_enabled(config, addon) else "off", addon.purpose) for addon in ADDONS]
    output.table(("add-on", "state", "what for"), rows)
