"""`nacre image`: pull, ls, import, export, rm, build-demo.

Each command opens the store itself, whether the daemon runs or not: stores of several processes keep out of each other's way (see
nacre.images.places), and the daemon sees what was committed at its next question.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import click

from nacre.cli import output
from nacre.cli.privilege import require_root
from nacre.config import Config

if TYPE_CHECKING:
    from nacre.images import Image, Store
    from nacre.images.model import Progress

T = TypeVar("T")


def with_store(config: Config, act: Callable[[Store], Awaitable[T]]) -> T:
    """Run `act` with the node's store open, in a loop of its own."""
    from nacre.images import Store

    async def body() -> T:
        store = Store(config)
        await store.open()
        try:
            return await act(store)
        finally:
            await store.close()

    return asyncio.run(body())


def has(config: Config, name: str) -> bool:
    """Whether the node has the image."""

    async def act(store: Store) -> bool:
        return store.get(name) is not None

    return with_store(config, act)


def import_archive(config: Config, path: str, name: str = "") -> list[str]:
    """Import an archive; answers the names of what was in it."""

    async def act(store: Store) -> list[str]:
        return [image.name for image in await store.import_archive(path, name=name)]

    return with_store(config, act)


def ensure_demo(config: Config, names: Sequence[str] = (), software: str = "") -> list[Image]:
    """The demo's images (all, or those of `names`), made where the node lacks them; says what it does."""
    from nacre.images import build_demo

    directory = software or build_demo.software_directory(config)

    async def act(store: Store) -> list[Image]:
        return await build_demo.build(store, directory, names, lambda text: output.say(f"  {text}", "dim"))

    return with_store(config, act)


@click.group(help="Images of this node: pulled from registries, imported from files, or made here.")
def image() -> None:
    pass


@image.command(help="Pull images. Credentials: --user, else what docker or podman logged in with.")
@click.argument("references", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--user", metavar="USER[:PASSWORD]", help="Credentials for the registry; without a password it is asked for.")
@click.option("--for-vm", is_flag=True, help="Make the block device for virtual machines at once.")
@click.pass_obj
def pull(config: Config, references: tuple[str, ...], user: str | None, for_vm: bool) -> None:
    require_root("pull an image")
    from nacre.images import auth, reference
    from nacre.images.model import Auth

    given: Auth | None = None
    if user:
        name, colon, password = user.partition(":")
        given = Auth(username=name, password=password if colon else click.prompt("Password", hide_input=True))

    async def act(store: Store) -> None:
        for text in references:
            credentials = given or auth.user_auth(reference.parse(text))
            started = time.monotonic()
            with _bars(text) as progress:
                pulled = await store.pull(text, credentials, for_vm=for_vm, progress=progress)
            took = output.seconds(time.monotonic() - started)
            output.say(f"{pulled.name} {pulled.id[7:19]} ({output.size(pulled.size)}, {took})")

    with_store(config, act)


@image.command("ls", help="List images.")
@click.option("-q", "--quiet", is_flag=True, help="Ids only.")
@click.option("-o", "--output", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.pass_obj
def ls(config: Config, quiet: bool, form: str) -> None:
    require_root("list images")

    async def act(store: Store) -> None:
        images = store.list()
        if quiet:
            for one in images:
                output.say(one.id)
        elif form == "json":
            output.say(json.dumps([_document(store, one) for one in images], indent=2))
        else:
            _table(store, images)

    with_store(config, act)


def _document(store: Store, one: Image) -> dict[str, object]:
    return {
        "id": one.id,
        "references": list(one.references),
        "digests": list(one.digests),
        "size": one.size,
        "pinned": one.pinned,
        "erofs": store.erofs_state(one),
        "layers": [layer.diff_id for layer in one.layers],
    }


def _table(store: Store, images: Sequence[Image]) -> None:
    rows = []
    for one in images:
        for name in one.references or [f"{digest[: digest.index('@')]} (untagged)" for digest in one.digests]:
            rows.append((name, one.id[7:19], str(len(one.layers)), output.size(one.size), store.erofs_state(one)))
    output.table(("image", "id", "layers", "size", "for VMs"), rows)
    size, inodes = store.usage()
    output.say(f"{len(images)} images take {output.size(size)} and {inodes} inodes on the disk", "dim")


@image.command("import", help="Import an OCI layout (directory or tar) or a docker-archive (docker save).")
@click.argument("file", type=click.Path(exists=True))
@click.option("--name", default="", metavar="IMAGE", help="Call the only image of the archive so.")
@click.pass_obj
def import_(config: Config, file: str, name: str) -> None:
    require_root("import images")
    for imported in import_archive(config, file, name):
        output.say(imported)


@image.command(help="Write images to a file that docker, podman and skopeo read.")
@click.argument("references", nargs=-1, required=True, metavar="IMAGE...")
@click.option("-o", "--output", "path", required=True, type=click.Path(), metavar="FILE")
@click.option("--format", "form", type=click.Choice(["oci", "oci-dir", "docker"]), default="oci", show_default=True)
@click.pass_obj
def export(config: Config, references: tuple[str, ...], path: str, form: str) -> None:
    require_root("export images")
    with_store(config, lambda store: store.export_archive(references, path, form))


@image.command(help="Remove names; an image goes with its last one, its layers when no other image and no container needs them.")
@click.argument("references", nargs=-1, required=True, metavar="IMAGE...")
@click.option("-f", "--force", is_flag=True, help="Missing images are fine.")
@click.pass_obj
def rm(config: Config, references: tuple[str, ...], force: bool) -> None:
    require_root("remove images")
    from nacre.images.errors import ImageNotFound

    async def act(store: Store) -> None:
        for name in references:
            if await store.remove(name, untag=True):
                output.say(name)
            elif not force:
                raise ImageNotFound(what=f"remove {name}", cause="there is no such image on this node", remedy="nacre image ls")

    with_store(config, act)


@image.command(
    "build-demo", help="Make the demo's images (nginx, openssh, busybox) from Debian packages. A later run needs no network."
)
@click.option(
    "--software", default="", metavar="DIR", help="Where packages are kept (else NACRE_SOFTWARE, else a cache directory)."
)
@click.pass_obj
def build_demo(config: Config, software: str) -> None:
    require_root("make the demo's images")
    for one in ensure_demo(config, software=software):
        output.say(f"{one.name} {one.id[7:19]} ({output.size(one.size)})")


@contextmanager
def _bars(title: str) -> Iterator[Progress]:
    """A progress bar a blob on a terminal; elsewhere only what is said in words."""
    console = output.console()
    if not console.is_terminal:
        yield lambda what, _done, total: None if total else output.say(f"  {what}")
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}
        console.print(f"pulling {title}")

        def show(what: str, done: int, total: int) -> None:
            if not total:
                console.print(f"  {what}", highlight=False)
            elif what == "unpack":
                console.print(f"unpacked {done} of {total} layers") if done == total else None
            else:
                if what not in tasks:
                    tasks[what] = bars.add_task(what.removeprefix("sha256:")[:12], total=total)
                bars.update(tasks[what], completed=done, total=total)

        yield show
