"""The directory a layer is unpacked into, reached so that no archive can lead elsewhere.

Every path is first made real: links on the way, of this layer or of those below, are resolved as text within the image, and one
that climbs above its root is refused. Only then is the real path opened, by openat2 with RESOLVE_BENEATH and NO_SYMLINKS.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from nacre.images.merged import LINKS, OPAQUE, Found, View, is_whiteout, open_real
from nacre.linux.paths import Resolve, openat2

DEEP = 64


class Refused(ValueError):
    """An entry that must not be put on the disk; `entry` is its name."""

    def __init__(self, entry: str, reason: str) -> None:
        super().__init__(f"{entry!r}: {reason}")
        self.entry = entry
        self.reason = reason


class Tree:
    """Directory `root` (descriptor, the caller's) above the layers of `below`."""

    def __init__(self, root: int, below: View) -> None:
        self._root = root
        self._below = below
        self._real = {""}  # paths known to be directories of this layer
        self.times: dict[str, int] = {}  # directories' mtimes, ns; set when all is in them
        self.made_parents = 0

    @contextmanager
    def directory(self, path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        """A descriptor of the real directory `path` of this layer, for the block."""
        fd = open_real(self._root, path, flags | os.O_DIRECTORY)
        try:
            yield fd
        finally:
            os.close(fd)

    def status(self, path: str) -> os.stat_result | None:
        """What this layer has at `path`, whose parent is real."""
        try:
            return os.stat(path, dir_fd=self._root, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def parent(self, entry: str, parts: list[str], mtime_ns: int) -> str:
        """The real path of the directory named by `parts`, made in this layer as far as it is missing."""
        joined = "/".join(parts)
        if joined in self._real:
            return joined
        return self._walk(entry, parts, mtime_ns, make=True)

    def existing(self, entry: str, parts: list[str]) -> str:
        """As `parent`, for reading: what this layer lacks but those below have is not made."""
        joined = "/".join(parts)
        return joined if joined in self._real else self._walk(entry, parts, 0, make=False)

    def _walk(self, entry: str, parts: list[str], mtime_ns: int, *, make: bool) -> str:
        done: list[str] = []
        pending = list(reversed(parts))
        links = 0
        while pending:
            part = pending.pop()
            if part == "..":  # of a link's target: names with .. were refused before
                if not done:
                    raise Refused(entry, "a symbolic link on its way climbs above the image's root")
                done.pop()
                continue
            path = "/".join([*done, part])
            target = self._step(entry, path, mtime_ns, make=make)
            if target is None:
                done.append(part)
                continue
            links += 1
            if links > LINKS:
                raise Refused(entry, "too many symbolic links on its way")
            done = [] if target.startswith("/") else done
            pending += [word for word in reversed(target.split("/")) if word not in ("", ".")]
        return "/".join(done)

    def _step(self, entry: str, path: str, mtime_ns: int, *, make: bool) -> str | None:
        """Make sure of one component. Answers a link's target, or None when `path` is a directory (or made one)."""
        if path in self._real:
            return None
        present = self.status(path)
        if present is not None and not is_whiteout(present):
            if stat.S_ISLNK(present.st_mode):
                return os.readlink(path, dir_fd=self._root)
            if not stat.S_ISDIR(present.st_mode):
                raise Refused(entry, f"/{path} on its way is no directory")
            self._real.add(path)
            return None
        found = self._below.lookup(path) if present is None and not self._is_covered(path) else None
        if found is not None and found.is_link:
            return self._below.link_target(found)
        if found is not None and not found.is_directory:
            raise Refused(entry, f"/{path} on its way is no directory")
        if make:
            self._make(path, found, mtime_ns, opaque=present is not None)
        elif found is None:
            raise Refused(entry, f"/{path} is not there")
        return None

    def _is_covered(self, path: str) -> bool:
        """Whether an opaque directory of this layer lies above `path`, so that nothing from below shows through."""
        head = os.path.dirname(path)
        while head:
            if head in self._real and self._is_opaque(head):
                return True
            head = os.path.dirname(head)
        return False

    def _is_opaque(self, path: str) -> bool:
        with self.directory(path) as fd:
            return OPAQUE in os.listxattr(fd)

    def _make(self, path: str, like: Found | None, mtime_ns: int, *, opaque: bool) -> None:
        """A directory that the archive took for granted: as it is below, else 0755 of root."""
        head, name = os.path.split(path)
        with self.directory(head) as parent:
            if opaque:
                os.unlink(name, dir_fd=parent)
            os.mkdir(name, 0o700, dir_fd=parent)
        with self.directory(path) as fd:
            if like is None:
                os.fchmod(fd, 0o755)
            else:
                self._copy_attributes(like, fd)
        self.times[path] = mtime_ns if like is None else like.status.st_mtime_ns
        if opaque:
            self.make_opaque(path)
        self._real.add(path)
        self.made_parents += 1

    def _copy_attributes(self, like: Found, fd: int) -> None:
        source = open_real(self._below.root(like.layer), like.path, os.O_RDONLY)
        try:
            os.fchown(fd, like.status.st_uid, like.status.st_gid)
            os.fchmod(fd, stat.S_IMODE(like.status.st_mode))
            for key in os.listxattr(source):
                if key.startswith("user.") or key == "security.capability":
                    os.setxattr(fd, key, os.getxattr(source, key))
            os.utime(fd, ns=(like.status.st_mtime_ns, like.status.st_mtime_ns))
        finally:
            os.close(source)

    def copy_up(self, entry: str, path: str, said: str) -> None:
        """Bring the regular file `path` from the layers below into this one, so that a hard link can share it."""
        found = self._below.lookup(path) if not self._is_covered(path) else None
        if found is None or not stat.S_ISREG(found.status.st_mode):
            raise Refused(entry, f"hard link to {said!r}, which is not there or is no file")
        head, name = os.path.split(path)
        head = self.parent(entry, head.split("/") if head else [], found.status.st_mtime_ns)
        source = open_real(self._below.root(found.layer), found.path, os.O_RDONLY)
        try:
            with self.directory(head) as parent:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(name, flags, 0o600, dir_fd=parent)
            try:
                while os.copy_file_range(source, fd, 1 << 30):
                    pass
                self._copy_attributes(found, fd)
            finally:
                os.close(fd)
        finally:
            os.close(source)

    def make_opaque(self, path: str) -> None:
        with self.directory(path) as fd:
            os.setxattr(fd, OPAQUE, b"y")

    def clear(self, parent: str, name: str) -> None:
        """Take away what this very layer has put at `name` before: the later entry of an archive wins."""
        path = f"{parent}/{name}" if parent else name
        present = self.status(path)
        if present is None:
            return
        if not stat.S_ISDIR(present.st_mode):
            with self.directory(parent) as fd:
                os.unlink(name, dir_fd=fd)
            return
        with self.directory(parent) as fd:
            remove_tree(fd, name)
        self._real = {known for known in self._real if known != path and not known.startswith(path + "/")}
        self.times = {known: mtime for known, mtime in self.times.items() if known != path and not known.startswith(path + "/")}


def remove_tree(parent: int, name: str) -> None:
    """Remove `name` (in directory `parent`) and all below it, without ever leaving its mount; what is gone already is fine.

    A container may have made directories deeper than descriptors or frames last: what lies DEEP below is first moved up beside
    `name`. Raises OSError EXDEV or EBUSY where something is still mounted.
    """
    waiting = [name]
    while waiting:
        _remove(parent, waiting.pop(), parent, waiting, 0)


def _remove(directory: int, name: str, top: int, waiting: list[str], depth: int) -> None:
    try:
        os.unlink(name, dir_fd=directory)
        return
    except FileNotFoundError:
        return
    except IsADirectoryError:
        pass
    if depth >= DEEP:
        aside = f".deep-{os.urandom(8).hex()}"
        os.rename(name, aside, src_dir_fd=directory, dst_dir_fd=top)
        waiting.append(aside)
        return
    resolve = Resolve.BENEATH | Resolve.NO_SYMLINKS | Resolve.NO_XDEV
    fd = openat2(directory, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, 0, resolve)
    try:
        for child in os.listdir(fd):
            _remove(fd, child, top, waiting, depth + 1)
    finally:
        os.close(fd)
    try:
        os.rmdir(name, dir_fd=directory)
    except FileNotFoundError:
        pass
