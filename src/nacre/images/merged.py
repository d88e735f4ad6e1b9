"""What a container would see, without mounting it: overlayfs's lookup over layer directories that nothing changes any more.

Used to put a layer onto those below it, and to read an image's passwd and group. No host path is ever followed: each component is
looked at by descriptor, links are resolved as text, and the top of the image is the top for every `..`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from nacre.linux.paths import Resolve, openat2

OPAQUE = "trusted.overlay.opaque"
LINKS = 40  # as many as the kernel follows
_REAL = Resolve.BENEATH | Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS


class LinkEscape(OSError):
    """A symbolic link on the way climbs above the root, or there are too many of them."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(errno.ELOOP, reason, path)


@dataclass(frozen=True, slots=True)
class Found:
    """The object that a path names: in which layer (0 is the top) its uppermost part lies, and that part's attributes."""

    layer: int
    path: str  # relative, no link in it but perhaps the last component
    status: os.stat_result

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.status.st_mode)


def is_whiteout(status: os.stat_result) -> bool:
    """overlayfs's mark for "not there": a character device 0/0."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(root: int, path: str) -> bool:
    """Whether directory `path` below descriptor `root` hides what lower layers have at its place."""
    fd = open_real(root, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return os.getxattr(fd, OPAQUE) == b"y"
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return False
        raise
    finally:
        os.close(fd)


def open_real(root: int, path: str, flags: int, mode: int = 0) -> int:
    """Open `path` below `root` where no component may be a link; "" is the root itself. The caller owns the result."""
    return openat2(root, path or ".", flags | os.O_NOFOLLOW, mode, _REAL)


class View:
    """Layer roots as one tree. Owns copies of none: the descriptors (readable directories, top first) stay the caller's."""

    def __init__(self, roots: Sequence[int]) -> None:
        self._roots = tuple(roots)

    def __bool__(self) -> bool:
        return bool(self._roots)

    def root(self, layer: int) -> int:
        return self._roots[layer]

    def lookup(self, path: str) -> Found | None:
        """The object at `path` (relative, "" is the root), the last component not followed; None if a link is on the way."""
        active = list(range(len(self._roots)))
        if not path:
            return Found(0, "", os.stat(self._roots[0])) if active else None
        parts = path.split("/")
        prefix = ""
        for index, part in enumerate(parts):
            prefix = f"{prefix}/{part}" if prefix else part
            found, active = self._step(active, prefix)
            if found is None:
                return None
            if index + 1 == len(parts):
                return found
            if not found.is_directory:
                return None
        raise AssertionError("unreachable")

    def _step(self, active: list[int], path: str) -> tuple[Found | None, list[int]]:
        """What `path` is in the layers of `active` (those in which its parent is a directory), and which go on below it."""
        top: Found | None = None
        following: list[int] = []
        for layer in active:
            try:
                status = os.stat(path, dir_fd=self._roots[layer], follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if is_whiteout(status):
                break
            if not stat.S_ISDIR(status.st_mode):
                top = top or Found(layer, path, status)
                break
            top = top or Found(layer, path, status)
            following.append(layer)
            if is_opaque(self._roots[layer], path):
                break
        return top, following

    def link_target(self, found: Found) -> str:
        return os.readlink(found.path, dir_fd=self._roots[found.layer])

    def resolve(self, path: str) -> Found | None:
        """The object at `path` with every link followed inside the image, as a process in the container would."""
        done: list[str] = []
        pending = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        links = 0
        found = self.lookup("")
        while pending:
            part = pending.pop()
            if part == "..":
                done = done[:-1]  # the root's parent is the root
                found = self.lookup("/".join(done))
                continue
            found = self.lookup("/".join([*done, part]))
            if found is None:
                return None
            if not found.is_link:
                done.append(part)
                continue
            links += 1
            if links > LINKS:
                raise LinkEscape(path, "too many symbolic links")
            target = self.link_target(found)
            done = [] if target.startswith("/") else done
            pending += [word for word in reversed(target.split("/")) if word not in ("", ".")]
            found = self.lookup("/".join(done))
        return found

    def read(self, path: str, limit: int = 1 << 20) -> bytes | None:
        """Up to `limit` bytes of the regular file at `path`; None if there is none, OSError if it is something else."""
        found = self.resolve(path)
        if found is None:
            return None
        if not stat.S_ISREG(found.status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        fd = open_real(self._roots[found.layer], found.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        with open(fd, "rb") as file:
            return file.read(limit)
