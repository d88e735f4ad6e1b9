"""Blobs by digest. A blob has its name only when all of it is on the disk and has been found to be what the name says.

A blob on its way in lies in ingest/ under an exclusive flock, so that of several processes one fetches and the others wait; what
a broken download left there is hashed again and continued. The digest needs no ETag beside it: content that changed on the
server would be another digest, and a wrong continuation fails verification, is thrown away, and is fetched whole once more.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from typing import BinaryIO

from nacre.images.errors import DigestMismatch, ImageRefused, full_disk_is_a_failure
from nacre.images.model import Descriptor
from nacre.images.places import Places, fsync_directory

_PIECE = 1 << 20


class Ingest:
    """A blob being written; close it in any case. Blocking: for a thread, not for the loop."""

    def __init__(self, places: Places, descriptor: Descriptor, fd: int) -> None:
        self._places = places
        self._fd = fd
        self._hash = hashlib.sha256()
        self.descriptor = descriptor
        self.offset = 0
        while piece := os.read(fd, _PIECE):
            self._hash.update(piece)
            self.offset += len(piece)
        if self.offset > descriptor.size:
            self.restart()

    @property
    def path(self) -> str:
        return f"{self._places.ingest}/{self.descriptor.digest.removeprefix('sha256:')}"

    def write(self, data: bytes) -> None:
        """Append. Raises DiskFull (what was there is given back), DigestMismatch when there is more than there should be."""
        what = f"store {self.descriptor.digest}"
        self._hash.update(data)
        self.offset += len(data)
        if self.offset > self.descriptor.size:
            self.discard()
            raise DigestMismatch(what=what, cause=f"more bytes came than the {self.descriptor.size} that its descriptor says")
        try:
            with full_disk_is_a_failure(what, self._places.ingest):
                view = memoryview(data)
                while view:
                    view = view[os.write(self._fd, view) :]
        except Exception:
            self.discard()
            raise

    def restart(self) -> None:
        """Forget what has been written."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._hash = hashlib.sha256()
        self.offset = 0

    def discard(self) -> None:
        """As `restart`, and the file goes."""
        self.restart()
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass

    def commit(self) -> None:
        """Verify, make it last, give it its name. Raises DigestMismatch, having thrown the bytes away."""
        found = "sha256:" + self._hash.hexdigest()
        what = f"verify {self.descriptor.digest}"
        if self.offset != self.descriptor.size or found != self.descriptor.digest:
            offset = self.offset
            self.discard()
            cause = f"the content that came is {found} of {offset} bytes, not {self.descriptor.digest} of {self.descriptor.size}"
            raise DigestMismatch(
                what=what, cause=cause, remedy="the registry or something on the way to it alters content: pull elsewhere"
            )
        with full_disk_is_a_failure(what, self._places.ingest):
            os.fsync(self._fd)
        os.rename(self.path, self._places.blob(self.descriptor.digest))
        fsync_directory(self._places.blobs)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)  # and with it the flock
            self._fd = -1


class Content:
    """The blob directory. Blocking; reading small blobs is quick enough for the loop."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def has(self, descriptor: Descriptor) -> bool:
        """Whether it is here, of the right size. That the bytes are right was proven when it got its name."""
        try:
            return os.stat(self._places.blob(descriptor.digest)).st_size == descriptor.size
        except FileNotFoundError:
            return False

    def ingest(self, descriptor: Descriptor) -> Ingest | None:
        """Begin or continue a blob; None if it is here. Waits while another process is at it."""
        path = f"{self._places.ingest}/{descriptor.digest.removeprefix('sha256:')}"
        while not self.has(descriptor):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if _same_file(fd, path) and not self.has(descriptor):
                    ingest, fd = Ingest(self._places, descriptor, fd), -1
                    return ingest
            finally:
                if fd >= 0:
                    os.close(fd)  # who held it has finished or thrown it away: look again
        return None

    def put(self, data: bytes, media_type: str) -> Descriptor:
        """Store `data`, made or fetched whole, under its digest."""
        descriptor = Descriptor(media_type, "sha256:" + hashlib.sha256(data).hexdigest(), len(data))
        ingest = self.ingest(descriptor)
        if ingest is not None:
            try:
                ingest.restart()
                ingest.write(data)
                ingest.commit()
            finally:
                ingest.close()
        return descriptor

    def read(self, descriptor: Descriptor, limit: int) -> bytes:
        """The whole blob, verified again. Raises ImageRefused when it is larger than `limit` bytes, OSError when it is not here."""
        what = f"read {descriptor.digest}"
        if descriptor.size > limit:
            raise ImageRefused(what=what, cause=f"it is {descriptor.size} bytes long, the limit for its kind is {limit}")
        with open(self._places.blob(descriptor.digest), "rb") as file:
            data = file.read(limit + 1)
        if "sha256:" + hashlib.sha256(data).hexdigest() != descriptor.digest:
            raise DigestMismatch(
                what=what, cause="the file below DATA has changed on the disk", remedy="`nacre image pull` it again"
            )
        return data

    def open(self, descriptor: Descriptor) -> BinaryIO:
        return open(self._places.blob(descriptor.digest), "rb")

    def remove(self, digest: str) -> None:
        try:
            os.unlink(self._places.blob(digest))
        except FileNotFoundError:
            pass


def _same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
