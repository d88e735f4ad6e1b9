"""What no row, snapshot or lease names is taken out; what a row names is looked for. At open, and whenever an image has gone.

Under the exclusive lock things only lose their names (rename, unlink of blobs): directories are deleted after it is given back, so
that nobody waits for a tree.
"""

from __future__ import annotations

import os

from nacre.images.content import Content
from nacre.images.database import Database, Index
from nacre.images.model import Image
from nacre.images.places import GONE, Places, StoreLock, read_layer
from nacre.images.snapshots import Snapshots, delete


def collect(places: Places, database: Database, snapshots: Snapshots, lock: StoreLock) -> bool:
    """Take the rubbish out. Answers False, having done nothing, while anyone adds content: who ends last collects."""
    with lock.exclusive() as alone:
        if not alone:
            return False
        index = database.index()
        used = set(snapshots.used().values())
        unused = [image_id for image_id in index.hidden if image_id not in used]
        if unused:
            database.drop(unused)
            index = database.index()
        _unname(places, index, database.leased())
    for directory in (places.layers, places.snapshots, places.erofs):
        for name in os.listdir(directory):
            if name.startswith(GONE):
                delete(f"{directory}/{name}")
    return True


def _unname(places: Places, index: Index, leased: set[str]) -> None:
    images = [*index.images.values(), *index.hidden.values()]
    blobs = {digest.removeprefix("sha256:") for digest in leased}
    layers = {"empty"}
    for image in images:
        digests = (image.manifest.digest, image.config_blob.digest, *(layer.blob.digest for layer in image.layers))
        blobs.update(digest.removeprefix("sha256:") for digest in digests)
        layers.update(layer.directory for layer in image.layers)
    erofs = {os.path.basename(places.erofs_file(image.id)) for image in images}
    for name in os.listdir(places.blobs):
        if name not in blobs:
            os.unlink(f"{places.blobs}/{name}")
    for name in os.listdir(places.ingest):
        if name not in blobs:
            os.unlink(f"{places.ingest}/{name}")
    for directory, kept in ((places.layers, layers), (places.erofs, erofs)):
        for name in os.listdir(directory):
            if name not in kept and not name.startswith(GONE):
                os.rename(f"{directory}/{name}", f"{directory}/{GONE}{os.urandom(8).hex()}")


def broken_layers(places: Places, image: Image) -> list[str]:
    """Directories of the image's layers that are not what layer.json says, by a check that reads no file of the image.

    A power loss or a hand may have emptied them: "exec: /pause: no such file" is how that reads elsewhere.
    """
    broken: list[str] = []
    for layer in image.layers:
        path = places.layer(layer.directory)
        try:
            document = read_layer(path)
            sound = document["diff_id"] == layer.diff_id and len(os.listdir(f"{path}/fs")) == document["top"]
        except (OSError, ValueError, KeyError):
            sound = False
        if not sound:
            broken.append(layer.directory)
    return broken


def set_aside(places: Places, directory: str) -> None:
    """Take a broken layer's name away, so that it can be unpacked anew."""
    try:
        os.rename(places.layer(directory), f"{places.layers}/{GONE}{os.urandom(8).hex()}")
    except FileNotFoundError:
        pass


def missing_blobs(content: Content, image: Image) -> list[str]:
    """Digests of the image that the blob directory lacks."""
    wanted = (image.manifest, image.config_blob, *(layer.blob for layer in image.layers))
    return [blob.digest for blob in wanted if not content.has(blob)]
