"""`nacre reset`: everything of a node off the host, its data included."""

from __future__ import annotations

import os
import shutil

import click

from nacre.cli import host, lifecycle, output
from nacre.cli.privilege import require_root
from nacre.config import Config
from nacre.linux import interpreter
from nacre.oci.errors import Failure


class MountedBelow(Failure):
    """A directory that should be removed has a mount of someone else in it."""


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--keep-images",
    is_flag=True,
    help="Leave what takes longest to make again: DATA/images, the VM appliance, packages that images are made from.",
)
@click.pass_obj
def reset(config: Config, yes: bool, keep_images: bool) -> None:
    """Remove everything of this node from the host, data included. Works after a kill -9 as well."""
    require_root("reset the node")
    doomed = paths(config, keep_images=keep_images)
    if not yes:
        for path in doomed:
            output.say(f"  {path}  {output.size(tree_size(path))}")
        click.confirm("Stop all pods and remove these?", abort=True)
    try:
        lifecycle.stop(config, grace_s=0)
    except Failure as failure:  # a daemon that cannot end by itself is what reset is for
        output.say(f"  {failure}; killing what is left", "warn")
        lifecycle.stop(config, force=True)
    remove(config, doomed)
    if not config.prefix:
        interpreter.let_go()
    output.say("Nothing of the node is left." if not keep_images else f"Images stay in {config.data}.")


def paths(config: Config, *, keep_images: bool = False) -> list[str]:
    """What is removed, those that exist."""
    inside = [f"{config.data}/{name}" for name in _entries(config.data) if not (keep_images and name in ("images", "kata"))]
    data = inside if keep_images else [config.data]
    made = [] if keep_images else [f"{config.prefix}/var/cache/nacre"]  # packages that images were made from
    candidates = [*data, *made, config.state, os.path.dirname(config.log_dir), f"{config.etc}/admin.conf"]
    return [path for path in candidates if os.path.lexists(path)]


def remove(config: Config, doomed: list[str]) -> None:
    """Remove these trees. Raises MountedBelow first: a tree with a mount in it would take that mount's files with it."""
    below = host.mounts(config)
    if below:
        raise MountedBelow(what="remove the node's data", cause=f"{below[0]} is mounted", remedy=f"umount {below[0]}")
    for path in doomed:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    for directory in (f"{config.etc}/manifests", config.etc, *_parents(config)):
        try:
            os.rmdir(directory)
        except OSError:  # never made, or something of the user's own is in it
            continue


def _parents(config: Config) -> list[str]:
    """Directories that only a prefix made: PREFIX/etc, PREFIX/var/lib, …; none of the host's own."""
    return (
        [f"{config.prefix}/{name}" for name in ("etc", "run", "var/lib", "var/log", "var/cache", "var")] if config.prefix else []
    )


def _entries(directory: str) -> list[str]:
    return os.listdir(directory) if os.path.isdir(directory) else []


def tree_size(path: str) -> int:
    """Bytes on disk below `path`, each inode once; other file systems are not entered."""
    try:
        top = os.lstat(path)
    except FileNotFoundError:
        return 0
    total, seen = top.st_blocks * 512, set()
    for directory, names, files in os.walk(path):
        for name in (*names, *files):
            try:
                found = os.lstat(f"{directory}/{name}")
            except FileNotFoundError:
                continue
            if found.st_dev == top.st_dev and found.st_ino not in seen:
                seen.add(found.st_ino)
                total += found.st_blocks * 512
    return total
