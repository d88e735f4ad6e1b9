"""Where the store keeps what, and the lock that says who is at it.

    DATA/images/
      lock                     flock: shared while content is being added or a root made, exclusive while rubbish is taken out
      images.db                what is known, see `database`
      blobs/sha256/HEX         content by digest, complete and verified, never changed
      ingest/HEX               a blob on its way in; kept for the next try as long as a lease names it
      layers/HEX/{fs,layer.json}   an unpacked layer, by chain id; layers/empty has nothing in it
      layers/.new-…            one on its way; rubbish unless the lock is held
      erofs/HEX.erofs          an image as one file, by image id; erofs/.new-… on its way
    DATA/snapshots/CONTAINER/{upper,work,image -> IMAGE ID}
    DATA/snapshots/.gone-…     released, not yet deleted

A kill at any instant leaves files that no row of the database names: the next `open` takes them out. The kernel drops a killed
process's lock; the unpacker inherits its parent's, so that a parent's death does not let go of what the child still writes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nacre.config import Config

NEW = ".new-"
GONE = ".gone-"


@dataclass(frozen=True, slots=True)
class Places:
    """Paths below DATA."""

    data: str

    @classmethod
    def of(cls, config: Config) -> Places:
        return cls(config.data)

    @property
    def images(self) -> str:
        return f"{self.data}/images"

    @property
    def lock(self) -> str:
        return f"{self.images}/lock"

    @property
    def database(self) -> str:
        return f"{self.images}/images.db"

    @property
    def blobs(self) -> str:
        return f"{self.images}/blobs/sha256"

    @property
    def ingest(self) -> str:
        return f"{self.images}/ingest"

    @property
    def layers(self) -> str:
        return f"{self.images}/layers"

    @property
    def erofs(self) -> str:
        return f"{self.images}/erofs"

    @property
    def snapshots(self) -> str:
        return f"{self.data}/snapshots"

    def blob(self, digest: str) -> str:
        return f"{self.blobs}/{digest.removeprefix('sha256:')}"

    def layer(self, directory: str) -> str:
        return f"{self.layers}/{directory}"

    def erofs_file(self, image_id: str) -> str:
        return f"{self.erofs}/{image_id.removeprefix('sha256:')}.erofs"

    def make(self) -> None:
        """Every directory, root's alone: layers hold set-id programs that no user of the host may reach."""
        for path in (self.images, self.blobs, self.ingest, self.layers, self.erofs, self.snapshots):
            os.makedirs(path, exist_ok=True)
        os.chmod(self.images, 0o700)
        os.chmod(self.snapshots, 0o700)
        os.makedirs(f"{self.layers}/empty/fs", exist_ok=True)


class StoreLock:
    """The lock file, opened once a process. `shared` nests and costs a system call only at the outermost level."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._users = 0

    @property
    def fd(self) -> int:
        """The open file that carries the shared lock, to be inherited by a child that works under it."""
        return self._fd

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Nothing is collected during the block. Waits for another process's `exclusive`, which only renames."""
        if self._users == 0:
            fcntl.flock(self._fd, fcntl.LOCK_SH)
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Whether nobody is adding anything, and nobody will during the block. Never waits."""
        fd = os.open(
            self._path, os.O_RDWR | os.O_CLOEXEC
        )  # another open file: it conflicts with this process's own shared lock too
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(fd)

    def close(self) -> None:
        os.close(self._fd)


def fsync_directory(path: str) -> None:
    """Make the names in directory `path` last."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def filesystem(path: str) -> tuple[str, str]:
    """(type, mount point) of the file system that directory `path` lies on, as /proc/self/mountinfo has it."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    real, best = os.path.realpath(path), ("", "")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            head, _, tail = line.partition(" - ")
            words = head.split(" ")
            point = words[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
            inside = point == "/" or real == point or real.startswith(point + "/")
            if inside and len(point) >= len(best[1]) and (words[2] == number or not best[0]):
                best = (tail.split(" ")[0], point)
    return best


def read_layer(path: str) -> dict[str, Any]:
    """layer.json of the layer at `path`. Raises OSError or ValueError when it is not there or torn."""
    with open(f"{path}/layer.json", encoding="utf-8") as file:
        document: dict[str, Any] = json.load(file)
    if document.get("version") != 1:
        raise ValueError(f"layer.json of version {document.get('version')}")
    return document
