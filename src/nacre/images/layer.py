"""One layer's archive put beneath a directory, in the form that overlayfs reads (OCI image spec, layer.md "Applying Changesets").

`.wh.NAME` becomes a character device 0/0, `.wh..wh..opq` the attribute trusted.overlay.opaque; both only where something lies
below. A parent that the archive leaves out takes the attributes it has in the layers below, as a copy-up would. Nothing here
follows a link by the kernel's hand: see `tree`. Runs in the unpacker's process, current directory its own to change.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from nacre.images.merged import View, is_whiteout
from nacre.images.tarstream import Entry, Kind, Reader
from nacre.images.tree import Refused, Tree

WHITEOUT = ".wh."
_OPAQUE_MARK = ".wh..wh..opq"
_ID_LIMIT = 1 << 32
_XATTR_LIMIT = 64 << 10
_COPIED = "security.capability"  # the only one of its family that an image may carry


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one layer may take. The free space is what the file system had when the work began, less a reserve."""

    entries: int = 2_000_000
    stored_bytes: int = 64 << 30
    file_bytes: int = 1 << 40  # apparent size, for sparse files
    depth: int = 128
    free_bytes: int = 64 << 30


@dataclass(slots=True, kw_only=True)
class Summary:
    """What a layer has become; goes into its layer.json."""

    entries: int = 0
    inodes: int = 0
    stored_bytes: int = 0
    covers: bool = False


class Applier:
    """Applies one archive to the empty directory `root` (descriptor, caller's) above the layers of `below`."""

    def __init__(self, root: int, below: View, limits: Limits) -> None:
        self._tree = Tree(root, below)
        self._below = below
        self._limits = limits
        self.summary = Summary()

    def run(self, reader: Reader) -> Summary:
        """Raises Refused naming the entry, tarstream.TarError, or OSError from the disk."""
        for entry in reader:
            self.summary.entries += 1
            if self.summary.entries > self._limits.entries:
                raise Refused(entry.name, f"the layer has more than {self._limits.entries} entries")
            try:
                self._apply(entry, reader)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
                    raise
                raise Refused(entry.name, f"the {entry.kind} cannot be made: {error.strerror} (errno {error.errno})") from error
        for path, mtime in sorted(self._tree.times.items(), reverse=True):
            with self._tree.directory(path) as fd:
                os.utime(fd, ns=(mtime, mtime))
        self.summary.inodes = self.summary.entries + self._tree.made_parents
        return self.summary

    def _apply(self, entry: Entry, reader: Reader) -> None:
        parts = self._parts(entry)
        if not parts:
            if entry.kind is not Kind.DIRECTORY:
                raise Refused(entry.name, f"the root of an image is no {entry.kind}")
            self._finish_directory(entry, "")
            return
        name = parts.pop()
        parent = self._tree.parent(entry.name, parts, entry.mtime_ns)
        if name.startswith(WHITEOUT):
            self._whiteout(entry, parent, name)
            return
        path = f"{parent}/{name}" if parent else name
        if entry.kind is Kind.DIRECTORY:
            self._directory(entry, parent, name, path)
            return
        if entry.kind is Kind.HARDLINK:
            self._hardlink(entry, parent, name)
            return
        self._tree.clear(parent, name)
        if entry.kind is Kind.FILE:
            self._file(entry, reader, parent, name)
        else:
            self._special(entry, parent, name)

    def _parts(self, entry: Entry) -> list[str]:
        """The entry's name as components. One leading "/" is the image's root, as some builders write it."""
        if not entry.name:
            raise Refused(entry.name, "the entry has no name")
        parts = [part for part in entry.name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise Refused(entry.name, "the name has .. in it")
        if len(parts) > self._limits.depth:
            raise Refused(entry.name[:100], f"the name is deeper than {self._limits.depth} directories")
        if any(part.startswith(WHITEOUT) for part in parts[:-1]):
            raise Refused(entry.name, "a directory on its way is named as a whiteout")
        if entry.uid >= _ID_LIMIT - 1 or entry.gid >= _ID_LIMIT - 1:
            raise Refused(entry.name, f"owner {entry.uid}:{entry.gid} is no user id")
        return parts

    def _whiteout(self, entry: Entry, parent: str, name: str) -> None:
        if name == _OPAQUE_MARK:
            if not parent:
                self.summary.covers = True  # overlayfs reads no mark on a layer's root: the list of layers ends here instead
            elif self._below.lookup(parent):
                self._tree.make_opaque(parent)
            return
        if name.startswith(".wh..wh."):
            return  # AUFS's own book-keeping (plink, orph): nothing of the image
        hidden = name.removeprefix(WHITEOUT)
        if hidden in ("", ".", "..") or entry.kind not in (Kind.FILE, Kind.HARDLINK) or entry.stored:
            raise Refused(entry.name, "this whiteout hides nothing that could be there")
        path = f"{parent}/{hidden}" if parent else hidden
        present = self._tree.status(path)
        if present is None:
            if self._below.lookup(path):
                with self._tree.directory(parent) as fd:
                    os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0), dir_fd=fd)
        elif stat.S_ISDIR(present.st_mode) and self._below.lookup(path):
            self._tree.make_opaque(path)  # the layer's own directory stays, what lay below goes

    def _directory(self, entry: Entry, parent: str, name: str, path: str) -> None:
        present = self._tree.status(path)
        if present is None or not stat.S_ISDIR(present.st_mode):
            hidden = present is not None and is_whiteout(present)
            self._tree.clear(parent, name)
            with self._tree.directory(parent) as fd:
                os.mkdir(name, 0o700, dir_fd=fd)
            if hidden:
                self._tree.make_opaque(path)
        self._finish_directory(entry, path)

    def _finish_directory(self, entry: Entry, path: str) -> None:
        with self._tree.directory(path) as fd:
            os.fchown(fd, entry.uid, entry.gid)
            os.fchmod(fd, entry.mode)
            _set_xattrs(entry, fd)
        self._tree.times[path] = entry.mtime_ns

    def _file(self, entry: Entry, reader: Reader, parent: str, name: str) -> None:
        if entry.size > self._limits.file_bytes:
            raise Refused(
                entry.name, f"the file would be {entry.size >> 30} GiB long, the limit is {self._limits.file_bytes >> 30}"
            )
        self.summary.stored_bytes += entry.stored
        if self.summary.stored_bytes > self._limits.stored_bytes:
            raise Refused(entry.name, f"the layer unpacks to more than {self._limits.stored_bytes >> 20} MiB")
        if self.summary.stored_bytes > self._limits.free_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), entry.name)
        with self._tree.directory(parent) as directory:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            position = 0
            for offset, piece in reader.data():
                if offset != position:
                    os.lseek(fd, offset, os.SEEK_SET)
                _write(fd, piece)
                position = offset + len(piece)
            if position != entry.size:
                os.ftruncate(fd, entry.size)
            os.fchown(
                fd, entry.uid, entry.gid
            )  # before mode and attributes: a change of owner takes set-id bits and capabilities away
            os.fchmod(fd, entry.mode)
            _set_xattrs(entry, fd)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _special(self, entry: Entry, parent: str, name: str) -> None:
        """Symbolic links, devices and fifos: never opened, so their attributes are set by name in the current directory."""
        with self._tree.directory(parent, os.O_RDONLY) as fd:
            os.fchdir(fd)
            if entry.kind is Kind.SYMLINK:
                if not entry.target:
                    raise Refused(entry.name, "the link has no target")
                os.symlink(entry.target, name)
                os.chown(name, entry.uid, entry.gid, follow_symlinks=False)
            else:
                os.mknod(name, _format(entry) | 0o600, os.makedev(*entry.device))
                os.chown(name, entry.uid, entry.gid, follow_symlinks=False)
                os.chmod(name, entry.mode)  # no link: it was made one line above, in a tree nobody else is in
            _set_xattrs(entry, name)
            os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)

    def _hardlink(self, entry: Entry, parent: str, name: str) -> None:
        parts = [part for part in entry.target.split("/") if part not in ("", ".")]
        if not parts or ".." in parts:
            raise Refused(entry.name, f"hard link to {entry.target!r}, which is no name inside the layer")
        last = parts.pop()
        source = self._tree.existing(entry.name, parts)
        here = f"{parent}/{name}" if parent else name
        there = f"{source}/{last}" if source else last
        if here == there:
            return
        present = self._tree.status(there)
        if present is None:
            self._tree.copy_up(entry.name, there, entry.target)
            present = self._tree.status(there)
        if present is None or stat.S_ISDIR(present.st_mode) or is_whiteout(present):
            raise Refused(entry.name, f"hard link to {entry.target!r}, which is not there or is no file")
        self._tree.clear(parent, name)
        with self._tree.directory(source) as old, self._tree.directory(parent) as new:
            os.link(last, name, src_dir_fd=old, dst_dir_fd=new, follow_symlinks=False)


def _format(entry: Entry) -> int:
    if entry.kind is Kind.FIFO:
        return stat.S_IFIFO
    major, minor = entry.device
    if major >= 1 << 12 or minor >= 1 << 20:
        raise Refused(entry.name, f"device number {major}:{minor} is out of range")
    if entry.kind is Kind.CHARACTER and (major, minor) == (0, 0):
        raise Refused(entry.name, "a character device 0/0 is overlayfs's own mark, not a device")
    return stat.S_IFCHR if entry.kind is Kind.CHARACTER else stat.S_IFBLK


def _set_xattrs(entry: Entry, target: int | str) -> None:
    """The entry's extended attributes that belong to an image: user.* and file capabilities. overlayfs's own are refused."""
    if sum(len(key) + len(value) for key, value in entry.xattrs.items()) > _XATTR_LIMIT:
        raise Refused(entry.name, f"more than {_XATTR_LIMIT >> 10} KiB of extended attributes")
    for key, value in entry.xattrs.items():
        if key.startswith(("trusted.overlay.", "user.overlay.")):
            raise Refused(entry.name, f"attribute {key} is overlayfs's own mark")
        if not key.startswith("user.") and key != _COPIED:
            continue  # labels and access lists of the machine it was made on
        try:
            if isinstance(target, int):
                os.setxattr(target, key, value)
            else:
                os.setxattr(target, key, value, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EPERM) or key == _COPIED:
                raise  # user.* on links, devices, and file systems without them: nothing a program could have read


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
