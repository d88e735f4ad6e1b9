"""The demo's images, made on this machine from Debian packages: real software, no registry, nothing installed.

A layer is made by streaming the packages' own archives into one tar: moved to /usr where the distribution merged it, documentation and
locales left out, our own files added. Nothing is unpacked on the host and no maintainer script runs. The result is an OCI layout that
is imported like any other. The same packages make the same digests.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from nacre import config as configuration
from nacre.config import Config
from nacre.images import manifests, software
from nacre.images.model import Image
from nacre.images.recipes import LAYERS, RECIPES, Extra, Layer, Recipe
from nacre.images.store import Store
from nacre.images.tarstream import Entry, Kind, Reader
from nacre.linux.process import set_parent_death_signal
from nacre.oci.errors import Failure, encode, from_exception

LABEL = "nacre.recipe"
_MOVED = ("bin", "sbin", "lib", "lib64", "lib32", "libx32")
_UNWANTED = (
    "usr/share/man/", "usr/share/locale/", "usr/share/info/", "usr/share/lintian/", "usr/share/bash-completion/", "usr/share/bug/",
    "usr/share/doc-base/", "usr/share/initramfs-tools/", "usr/share/perl5/", "usr/share/i18n/", "usr/share/zsh/", "usr/share/apport/",
    "usr/lib/systemd/", "usr/share/menu/", "usr/share/pixmaps/", "etc/init.d/", "etc/systemd/", "etc/cron", "etc/logrotate.d/",
)  # fmt: skip
_TYPES = {
    Kind.SYMLINK: tarfile.SYMTYPE,
    Kind.HARDLINK: tarfile.LNKTYPE,
    Kind.DIRECTORY: tarfile.DIRTYPE,
    Kind.FILE: tarfile.REGTYPE,
}
Say = Callable[[str], None]


def software_directory(config: Config) -> str:
    """Where packages are kept: NACRE_SOFTWARE, else the checkout's .cache, else PREFIX/var/cache/nacre/software."""
    checkout = os.path.dirname(sys.prefix)
    if os.environ.get("NACRE_SOFTWARE"):
        return os.environ["NACRE_SOFTWARE"]
    if os.path.exists(f"{checkout}/run") and os.path.exists(f"{checkout}/pyproject.toml"):
        return f"{checkout}/.cache/software"
    return f"{config.prefix}/var/cache/nacre/software"


async def build(store: Store, directory: str, names: Sequence[str] = (), say: Say = lambda _: None) -> list[Image]:
    """The images of RECIPES (or those of `names`), in the store; those that are there already, from the same packages, are kept."""
    recipes = [recipe for recipe in RECIPES if not names or recipe.name in names]
    with tempfile.TemporaryDirectory(prefix="nacre-demo-") as place:
        todo = await asyncio.to_thread(_prepare, store, directory, recipes, place, say)
        if todo:
            say(f"importing {', '.join(recipe.name for recipe in todo)}")
            former = [image for image in (store.get(recipe.name) for recipe in todo) if image is not None]
            await store.import_archive(place)
            for image in former:
                now = store.get(image.id)
                if now is not None and not now.references:
                    await store.remove(image.id)  # the build before this one, which has lost its name to it
    found = [store.get(recipe.name) for recipe in recipes]
    return [image for image in found if image is not None]


def _prepare(store: Store, directory: str, recipes: Sequence[Recipe], place: str, say: Say) -> list[Recipe]:
    """Write an OCI layout of what the store lacks to `place`; answers those recipes."""
    with software.locked(directory):
        say(f"packages, fetched once into {directory}")
        packages = software.packages(directory, LAYERS)
        keys = {recipe.name: _key(recipe, packages) for recipe in recipes}
        todo = [recipe for recipe in recipes if not _is_current(store, recipe, keys[recipe.name])]
        layout = _Layout(place)
        made: dict[str, tuple[dict[str, Any], str]] = {}
        for recipe in todo:
            for layer in (layer for layer in LAYERS if layer.name in recipe.layers and layer.name not in made):
                say(f"layer {layer.name} from {len(packages[layer.name])} packages")
                made[layer.name] = layout.layer(layer, packages[layer.name])
            layout.image(recipe, [made[name] for name in recipe.layers], keys[recipe.name])
        layout.finish()
    return todo


def _key(recipe: Recipe, packages: dict[str, list[str]]) -> str:
    layers = [
        [asdict(layer), [os.path.basename(path) for path in packages[layer.name]]]
        for layer in LAYERS
        if layer.name in recipe.layers
    ]
    return hashlib.sha256(json.dumps([recipe.config, layers]).encode()).hexdigest()


def _is_current(store: Store, recipe: Recipe, key: str) -> bool:
    image = store.get(recipe.name)
    labels = (image.config.get("config") or {}).get("Labels") if image is not None else None
    return isinstance(labels, dict) and labels.get(LABEL) == key


class _Layout:
    """An OCI layout being written."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._entries: list[dict[str, Any]] = []
        os.makedirs(f"{place}/blobs/sha256")

    def layer(self, layer: Layer, packages: Sequence[str]) -> tuple[dict[str, Any], str]:
        """(descriptor, diff_id) of a layer."""
        path = f"{self._place}/layer"
        plain = _Digest()
        with (
            open(path, "wb") as raw,
            gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed,
            tarfile.open(fileobj=_Tee(packed, plain), mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            _Writer(tar).write(layer, packages)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.path.getsize(path)
        os.rename(path, f"{self._place}/blobs/sha256/{digest}")
        return {"mediaType": manifests.OCI_LAYER + "+gzip", "digest": f"sha256:{digest}", "size": size}, plain.digest

    def image(self, recipe: Recipe, layers: Sequence[tuple[dict[str, Any], str]], key: str) -> None:
        host = manifests.host_platform()
        config = {
            "architecture": host.architecture,
            "os": host.os,
            "config": {**recipe.config, "Labels": {LABEL: key}},
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
            "history": [{"created_by": f"nacre image build-demo ({name})"} for name in recipe.layers],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": manifests.OCI_MANIFEST,
            "config": self._json(config, manifests.OCI_CONFIG),
            "layers": [descriptor for descriptor, _ in layers],
        }
        entry = self._json(manifest, manifests.OCI_MANIFEST)
        self._entries.append(entry | {"annotations": {"io.containerd.image.name": recipe.name}})

    def finish(self) -> None:
        for name, document in (
            ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
            ("index.json", {"schemaVersion": 2, "mediaType": manifests.OCI_INDEX, "manifests": self._entries}),
        ):
            with open(f"{self._place}/{name}", "w", encoding="utf-8") as file:
                json.dump(document, file)

    def _json(self, document: dict[str, Any], media_type: str) -> dict[str, Any]:
        data = json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
        digest = manifests.digest_of(data)
        with open(f"{self._place}/blobs/{digest.replace(':', '/')}", "wb") as file:
            file.write(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}


class _Digest:
    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, data: bytes) -> None:
        self._hash.update(data)

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()


class _Tee(io.RawIOBase):
    """Writes to the gzip file, and the plain bytes to the digest."""

    def __init__(self, file: gzip.GzipFile, digest: _Digest) -> None:
        self._file = file
        self._digest = digest

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)


class _Writer:
    """Puts one layer together. Our own entries come first and win over the packages'."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._seen: set[str] = set()

    def write(self, layer: Layer, packages: Sequence[str]) -> None:
        for extra in layer.extras:
            self._extra(extra)
        for path in packages:
            self._package(path)
        if layer.applets:
            self._applets(layer.applets, packages)

    def _extra(self, extra: Extra) -> None:
        self._parents(extra.path)
        member = tarfile.TarInfo(extra.path)
        member.mode = extra.mode
        data = (extra.text or "").encode()
        if extra.target:
            member.type, member.linkname, member.mode = tarfile.SYMTYPE, extra.target, 0o777
        elif extra.text is None:
            member.type = tarfile.DIRTYPE
        else:
            member.size = len(data)
        self._add(member, io.BytesIO(data))

    def _parents(self, path: str) -> None:
        head = os.path.dirname(path)
        if head and head not in self._seen:
            self._extra(Extra(path=head, mode=0o755))

    def _add(self, member: tarfile.TarInfo, data: Any = None) -> None:
        if member.name not in self._seen:
            self._seen.add(member.name)
            self._tar.addfile(member, data if member.isreg() else None)

    def _package(self, path: str) -> None:
        with software.contents(path) as process:
            assert process.stdout is not None
            reader = Reader(process.stdout)
            for entry in reader:
                self._entry(entry, reader)
            reader.drain()
        if process.returncode:
            cause = f"dpkg-deb ended with exit code {process.returncode}"
            raise Failure(what=f"read package {path}", cause=cause, remedy=f"rm {path}   # it is fetched again")

    def _entry(self, entry: Entry, reader: Reader) -> None:
        name = _merged(os.path.normpath(entry.name).lstrip("/"))
        kind = _TYPES.get(entry.kind)
        if name in (".", "") or name in self._seen or kind is None or _is_unwanted(name):
            return
        self._parents(name)
        member = tarfile.TarInfo(name)
        member.type, member.mode, member.uid, member.gid = kind, entry.mode, entry.uid, entry.gid
        member.mtime = entry.mtime_ns // 10**9
        if entry.kind is Kind.HARDLINK:
            member.linkname = _merged(os.path.normpath(entry.target).lstrip("/"))
        elif entry.kind is Kind.SYMLINK:
            member.linkname = entry.target
        member.size = entry.size if entry.kind is Kind.FILE else 0
        self._add(member, _Pieces(reader) if entry.kind is Kind.FILE else None)

    def _applets(self, busybox: str, packages: Sequence[str]) -> None:
        """A link for each applet that the packaged busybox says it has."""
        with tempfile.TemporaryDirectory(prefix="nacre-busybox-") as place:
            program = f"{place}/busybox"
            for package in packages:
                with software.contents(package) as process:
                    assert process.stdout is not None
                    reader = Reader(process.stdout)
                    for entry in reader:
                        if _merged(os.path.normpath(entry.name)) == busybox:
                            with open(program, "wb") as file:
                                shutil.copyfileobj(_Pieces(reader), file)
            os.chmod(program, 0o755)
            listed = subprocess.run([program, "--list-full"], capture_output=True, text=True, check=True).stdout
        for applet in listed.split():
            path = _merged(applet)
            if os.path.basename(path) != "busybox":
                self._extra(Extra(path=path, target=f"/{busybox}"))


class _Pieces:
    """The current entry's bytes as a file: what tarfile copies from."""

    def __init__(self, reader: Reader) -> None:
        self._pieces = reader.data()
        self._rest = b""

    def read(self, size: int = 1 << 18) -> bytes:
        while len(self._rest) < size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._rest += piece[1]
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


def _merged(name: str) -> str:
    """Where a path of a package lies once /bin, /sbin and /lib are links into /usr."""
    head, slash, tail = name.partition("/")
    return f"usr/{head}{slash}{tail}" if head in _MOVED else name


def _is_unwanted(name: str) -> bool:
    if name.startswith("usr/share/doc/"):
        return not name.endswith("/copyright")  # what may be done with a program stays with it
    return name.startswith(_UNWANTED) or "/gconv/" in name


def main() -> None:
    """PREFIX NAME PARENT: see `child.made`."""
    set_parent_death_signal(signal.SIGKILL)
    prefix, name, parent = sys.argv[1:]
    if os.getppid() != int(parent):
        os._exit(1)

    def say(document: dict[str, object]) -> None:
        print(json.dumps(document), flush=True)

    async def make() -> None:
        config = configuration.load(prefix)
        store = Store(config)
        await store.open()
        try:
            await build(store, software_directory(config), [name], lambda text: say({"progress": text}))
        finally:
            await store.close()

    try:
        asyncio.run(make())
        say({"made": name})
    except (Failure, OSError) as error:
        say({"failure": encode(from_exception(f"make {name}", error))})


if __name__ == "__main__":
    main()
