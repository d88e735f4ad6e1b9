"""The steps of a container's set-up: frozen values that say what they will do and do it in the child. `plan` makes them.

Values and neither dataclasses nor named tuples: making forty such classes at each start of the command took 10 ms and more.

Each has `describe()`, used when it fails, and `run(context)`. They run in order in the process that becomes the container's init;
before `EnterRoot` the host's root is still there, beyond it nothing is imported, looked up or resolved outside the container.
This module: the tree that the container sees, one thing, as each step leaves it for the next and the last makes it the root.
`process_steps`: what concerns the process itself.
"""

from __future__ import annotations

import errno
import os
import stat

from nacre.linux import cgroup_layout, mounts, paths
from nacre.linux.libc import SyscallError, owned
from nacre.linux.mounts import MountAttr, MountFlag, UnmountFlag
from nacre.linux.paths import Resolve
from nacre.oci.errors import Invalid
from nacre.oci.values import Value
from nacre.runc.mount_options import Options, with_context

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    class Step(Protocol):
        """One thing to do; raises OSError or Failure."""

        def describe(self) -> str: ...

        def run(self, context: Context) -> None: ...


_NO_LINKS = frozenset({"proc", "sysfs"})
_LABELLED_LATER = frozenset({"mqueue"})  # one file system for the whole IPC namespace: a mount's options cannot label it
PLAIN = Resolve.BENEATH | Resolve.NO_SYMLINKS


class Context:
    """What the steps share in one child: descriptors, and what has to be told."""

    def __init__(self, channel: int = -1, gates: Sequence[tuple[str, int]] = ()) -> None:
        self.channel = channel  # to the parent
        self.gates = list(gates)  # (directory, descriptor) of the cgroups to enter
        self.root = -1  # the container's root, O_PATH; from BindRoot on
        self.console = -1  # the pseudo-terminal's master, handed to the parent
        self.terminal = -1  # its slave
        self.empty = -1  # the directory that stands for all masked ones
        self.home = ""  # the user's, from the container's passwd
        self.warnings: list[str] = []


class SetPropagation(Value, kw_only=False):
    """What this mount namespace exchanges with the host's."""

    kind: MountFlag
    recursive: bool

    def describe(self) -> str:
        return f"make the mounts of the new namespace {self.kind.name or self.kind}"

    def run(self, context: Context) -> None:
        mounts.mount(None, "/", None, self.kind | (MountFlag.REC if self.recursive else 0))


class BindRoot(Value, kw_only=False):
    """The root filesystem becomes a mount of its own, as pivot_root(2) wants it."""

    path: str
    shared: bool  # the namespace's mounts still give to the host
    borrowed: bool  # the namespace is not the container's own, and stays as it is

    def describe(self) -> str:
        return f"take {self.path} as root filesystem"

    def run(self, context: Context) -> None:
        if self.shared:
            mounts.mount(None, self._mount_point(), None, MountFlag.PRIVATE)
        if self.borrowed:
            self._bind_apart()
        else:
            mounts.mount(self.path, self.path, None, MountFlag.BIND | MountFlag.REC)
        if self.shared or self.borrowed:
            mounts.mount(None, self.path, None, MountFlag.PRIVATE | (MountFlag.REC if self.borrowed else 0))
        context.root = paths.open_root(self.path)

    def _bind_apart(self) -> None:
        """No peer of what it covers, which may be a shared mount of the engine's: the unmount of one peer would take the other along."""
        with owned(mounts.bind_tree(self.path, recursive=True)) as tree:
            mounts.mount_setattr(tree, propagation=MountFlag.PRIVATE, recursive=True)
            with owned(os.open(self.path, os.O_PATH | os.O_CLOEXEC)) as place:
                mounts.move_mount(tree, place)

    def _mount_point(self) -> str:
        """The mount that the root filesystem lies in: what a pivot leaves or enters may not be shared (pivot_root(2))."""
        with open("/proc/self/mountinfo", "rb") as file:
            places = [cgroup_layout.unescape(os.fsdecode(line.split(b" ")[4])) for line in file]
        return max((place for place in places if f"{self.path}/".startswith(place.rstrip("/") + "/")), key=len, default="/")


class MountFilesystem(Value, kw_only=False):
    """A file system of its own: proc, tmpfs, sysfs, devpts, mqueue …"""

    destination: str
    fstype: str
    source: str
    options: Options
    label: str = ""  # SELinux's; not for proc and sysfs, whose files have labels of their own by the policy

    def describe(self) -> str:
        return f"mount {self.fstype} on {self.destination}"

    def data(self) -> str | None:
        """What the file system itself is told."""
        own = self.fstype in _NO_LINKS or self.fstype in _LABELLED_LATER
        return (self.options.data if own else with_context(self.options.data, self.label)) or None

    def _as_below(self, context: Context) -> MountFilesystem:
        """A tmpfs for which no mode is asked has that of the directory it hides, where that was there before."""
        if self.fstype != "tmpfs" or any(word.startswith("mode=") for word in self.options.data.split(",")):
            return self
        try:
            with owned(paths.open_in(context.root, self.destination)) as hidden:
                mode = f"mode={stat.S_IMODE(os.fstat(hidden).st_mode):o}"
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return self
        return self.but(options=self.options.but(data=",".join(filter(None, (self.options.data, mode)))))

    def run(self, context: Context) -> None:
        self._as_below(context)._mount(context)

    def _mount(self, context: Context) -> None:
        options = self.options
        with owned(self.target(context)) as target:
            if options.copy_up:
                self._copy_up(context, target)
                return
            mounts.mount(self.source, paths.magic(target), self.fstype, options.flags, self.data())
        if self.label and self.fstype in _LABELLED_LATER:
            with owned(paths.open_in(context.root, self.destination)) as top:
                os.setxattr(paths.magic(top), "security.selinux", self.label.encode())
        if options.propagation or options.tree_set or options.tree_clear:
            with owned(paths.open_in(context.root, self.destination)) as top:
                set_attributes(top, options.but(attr_set=MountAttr(0), attr_clear=MountAttr(0)))  # its own went with mount(2)
                _propagate(top, options)

    def target(self, context: Context) -> int:
        """The directory, made if need be; the caller owns the descriptor."""
        target = paths.make_directories_in(context.root, self.destination)
        try:
            if self.fstype in _NO_LINKS:
                self._refuse_links(context)
        except BaseException:
            os.close(target)
            raise
        return target

    def _refuse_links(self, context: Context) -> None:
        """What is written to /proc/self/attr or /proc/sys must reach the kernel, not a file the image chose (CVE-2019-19921)."""
        try:
            os.close(paths.openat2(context.root, self.destination.lstrip("/"), os.O_PATH, resolve=PLAIN))
        except SyscallError as error:
            if error.errno not in (errno.ELOOP, errno.EXDEV):
                raise
            raise Invalid(
                what=self.describe(),
                cause=f"the image has a link on the way to {self.destination}",
                remedy="use an image with plain directories there",
            ) from error

    def _copy_up(self, context: Context, target: int) -> None:
        """tmpcopyup: the new file system starts with what it hides."""
        mounts.mount(self.source, paths.magic(target), self.fstype, self.options.flags & ~MountFlag.RDONLY, self.data())
        with owned(paths.open_in(context.root, self.destination)) as top:
            copy_tree(target, top)
            if self.options.flags & MountFlag.RDONLY:
                mounts.mount_setattr(top, attr_set=MountAttr.RDONLY)


class BindMount(Value, kw_only=False):
    """A host path shown inside."""

    destination: str
    source: str
    options: Options
    tree: int = -1  # the mount itself, detached, where it could not be made from within (id-mapped)

    def describe(self) -> str:
        return f"mount {self.source} on {self.destination}"

    def run(self, context: Context) -> None:
        options = self.options
        with owned(self.tree if self.tree >= 0 else mounts.bind_tree(self.source, recursive=options.recursive)) as tree:
            directory = stat.S_ISDIR(os.fstat(tree).st_mode)
            make = paths.make_directories_in if directory else paths.make_file_in
            with owned(make(context.root, self.destination)) as target:
                set_attributes(tree, options)
                mounts.move_mount(tree, target)
            _propagate(tree, options)


def set_attributes(tree: int, options: Options) -> None:
    """The flags of a bind, set before anybody can see it (mount_setattr(2), Linux 5.12)."""
    if options.attr_set or options.attr_clear:
        mounts.mount_setattr(tree, attr_set=options.attr_set, attr_clear=options.attr_clear)
    if options.tree_set or options.tree_clear:
        mounts.mount_setattr(tree, attr_set=options.tree_set, attr_clear=options.tree_clear, recursive=True)


def _propagate(mount: int, options: Options) -> None:
    for kind, recursive in options.propagation:
        mounts.mount_setattr(mount, propagation=kind, recursive=recursive)


class MountCgroups(Value, kw_only=False):
    """The container's own cgroups at /sys/fs/cgroup: one directory (v2), or one per hierarchy on a tmpfs (v1, hybrid)."""

    destination: str
    directories: tuple[tuple[str, str], ...]  # (name below the destination, or "" for v2 alone; host directory)
    options: Options
    label: str = ""  # SELinux's, of the tmpfs

    def describe(self) -> str:
        return f"mount the cgroups on {self.destination}"

    def run(self, context: Context) -> None:
        plain = Options(attr_set=self.options.attr_set, recursive=True, propagation=self.options.propagation)
        if not self.directories:
            return  # a host without cgroups has nothing to show
        if self.directories[0][0] == "":
            BindMount(self.destination, self.directories[0][1], plain).run(context)
            return
        with owned(paths.make_directories_in(context.root, self.destination)) as target:
            flags = self.options.flags & ~MountFlag.RDONLY
            mounts.mount("tmpfs", paths.magic(target), "tmpfs", flags, with_context("mode=755", self.label))
        with owned(paths.open_in(context.root, self.destination)) as top:
            made: set[str] = set()
            for name, directory in self.directories:
                self._show(directory, name, top, plain)
                for alias in name.split(","):
                    if alias != name and alias not in made:
                        os.symlink(name, alias, dir_fd=top)
                made.add(name)
            if self.options.flags & MountFlag.RDONLY:
                mounts.mount_setattr(top, attr_set=MountAttr.RDONLY)

    @staticmethod
    def _show(directory: str, name: str, top: int, options: Options) -> None:
        """As `BindMount`, without its walks from the root: what is on our own tmpfs nobody else has made."""
        os.mkdir(name, 0o755, dir_fd=top)
        with (
            owned(mounts.bind_tree(directory, recursive=True)) as tree,
            owned(os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)) as target,
        ):
            set_attributes(tree, options)
            mounts.move_mount(tree, target)
            _propagate(tree, options)


class MakeDevice(Value, kw_only=False):
    """A device node of the container's own. One that is there already with the same numbers is left as it is."""

    path: str
    mode: int  # type and permissions
    major: int
    minor: int
    uid: int
    gid: int

    def describe(self) -> str:
        return f"make device {self.path}"

    def run(self, context: Context) -> None:
        head, name = os.path.split(self.path)
        with owned(paths.make_directories_in(context.root, head)) as directory:
            try:
                os.mknod(name, self.mode, os.makedev(self.major, self.minor), dir_fd=directory)
            except FileExistsError:
                found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                same = stat.S_IFMT(found.st_mode) == stat.S_IFMT(self.mode)
                if same and (stat.S_ISFIFO(self.mode) or found.st_rdev == os.makedev(self.major, self.minor)):
                    return
                raise
            if self.uid or self.gid:
                os.chown(name, self.uid, self.gid, dir_fd=directory, follow_symlinks=False)


class BindDevice(Value, kw_only=False):
    """In a user namespace nodes cannot be made: the host's is shown, if it is the device that is meant."""

    path: str
    mode: int
    major: int
    minor: int

    def describe(self) -> str:
        return f"show the host's device {self.path}"

    def run(self, context: Context) -> None:
        found = os.stat(self.path)
        if stat.S_IFMT(found.st_mode) != stat.S_IFMT(self.mode) or found.st_rdev != os.makedev(self.major, self.minor):
            raise Invalid(
                what=self.describe(),
                cause=f"it is not device {self.major}:{self.minor} there, and in a user namespace no node can be made",
                remedy="make that node on the host, or give the container no user namespace",
            )
        with (
            owned(mounts.bind_tree(self.path, recursive=False)) as tree,
            owned(paths.make_file_in(context.root, self.path)) as target,
        ):
            mounts.move_mount(tree, target)


_DEV_LINKS = (("/proc/self/fd", "fd"), ("/proc/self/fd/0", "stdin"), ("/proc/self/fd/1", "stdout"), ("/proc/self/fd/2", "stderr"))


class LinkDevices(Value, kw_only=False):
    """The links that every /dev has (config-linux.md "Default Devices", runtime-linux.md)."""

    core: bool  # the host has /proc/kcore

    def describe(self) -> str:
        return "make the links of /dev"

    def run(self, context: Context) -> None:
        with owned(paths.make_directories_in(context.root, "/dev")) as directory:
            for target, name in (*_DEV_LINKS, *((("/proc/kcore", "core"),) if self.core else ())):
                try:
                    os.symlink(target, name, dir_fd=directory)
                except FileExistsError:
                    continue
            try:
                os.symlink("pts/ptmx", "ptmx", dir_fd=directory)
            except FileExistsError:
                if not stat.S_ISLNK(os.stat("ptmx", dir_fd=directory, follow_symlinks=False).st_mode):
                    os.unlink("ptmx", dir_fd=directory)  # the image's own would open the host's terminals
                    os.symlink("pts/ptmx", "ptmx", dir_fd=directory)


class MakeReadonly(Value, kw_only=False):
    """A mount of the container turned read-only once all is in place: the root, or /dev."""

    path: str

    def describe(self) -> str:
        return f"make {self.path} read-only"

    def run(self, context: Context) -> None:
        if self.path == "/":
            mounts.mount_setattr(context.root, attr_set=MountAttr.RDONLY)
            return
        with owned(paths.open_in(context.root, self.path)) as top:
            mounts.mount_setattr(top, attr_set=MountAttr.RDONLY)


class MaskPath(Value, kw_only=False):
    """linux.maskedPaths: a file reads as /dev/null, a directory as an empty one. What is not there needs no mask."""

    path: str
    label: str = ""  # SELinux's, of that directory

    def describe(self) -> str:
        return f"mask {self.path}"

    def run(self, context: Context) -> None:
        try:
            target = paths.open_in(context.root, self.path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return
            raise
        with owned(target):
            if not stat.S_ISDIR(os.fstat(target).st_mode):
                mask = mounts.bind_tree("/dev/null", recursive=False)
            elif context.empty >= 0:
                mask = mounts.bind_tree("", recursive=False, directory=context.empty)
            else:
                data = with_context("size=0k,mode=755", self.label)
                mounts.mount("tmpfs", paths.magic(target), "tmpfs", MountFlag.RDONLY, data)
                context.empty = paths.open_in(context.root, self.path)
                return
            with owned(mask):
                mounts.move_mount(mask, target)


class ReadonlyPath(Value, kw_only=False):
    """linux.readonlyPaths: the same tree, read-only."""

    path: str

    def describe(self) -> str:
        return f"make {self.path} read-only"

    def run(self, context: Context) -> None:
        try:
            target = paths.open_in(context.root, self.path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return
            raise
        with owned(target), owned(mounts.bind_tree("", recursive=True, directory=target)) as tree:
            mounts.mount_setattr(tree, attr_set=MountAttr.RDONLY)
            mounts.move_mount(tree, target)


class MakeDirectory(Value, kw_only=False):
    """The working directory, made if the image lacks it."""

    path: str

    def describe(self) -> str:
        return f"make directory {self.path}"

    def run(self, context: Context) -> None:
        try:
            os.close(paths.make_directories_in(context.root, self.path))
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.ENOENT, errno.EPERM):
                raise
            # changing to it will say why, in the words of the process's own user


class EnterRoot(Value, kw_only=False):
    """The container's root becomes "/", and the host's is gone. On an initramfs, which cannot be pivoted, it is covered instead."""

    path: str
    pivot: bool
    propagation: tuple[MountFlag, bool] | None
    borrowed: bool  # others use the mount namespace: its root stays

    def describe(self) -> str:
        return f"make {self.path} the root"

    def run(self, context: Context) -> None:
        if context.empty >= 0:
            os.close(context.empty)  # nothing is masked from here on
            context.empty = -1
        os.fchdir(context.root)
        if self.borrowed:
            os.chroot(".")
        elif not self.pivot or not self._pivoted():
            self._cover()
        os.chdir("/")
        if self.propagation is not None:
            kind, recursive = self.propagation
            mounts.mount(None, "/", None, kind | (MountFlag.REC if recursive else 0))

    @staticmethod
    def _pivoted() -> bool:
        with owned(os.open("/", os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)) as old:
            try:
                mounts.pivot_root(".", ".")
            except SyscallError as error:
                if error.errno == errno.EINVAL and _root_is_initramfs():
                    return False
                raise
            os.fchdir(old)
            mounts.mount(None, ".", None, MountFlag.SLAVE | MountFlag.REC)  # the unmount below must not reach the host
            mounts.umount2(".", UnmountFlag.DETACH)
        return True

    def _cover(self) -> None:
        """Move the root over "/"; the host's proc and sys go first, since a way to them would lead out (runc's --no-pivot)."""
        with open("/proc/self/mountinfo", "rb") as file:
            places = [
                os.fsdecode(line.split(b" ")[4]) for line in file if line.split(b" - ")[1].split(b" ")[0] in (b"proc", b"sysfs")
            ]
        for place in places:
            if place != self.path and not place.startswith(self.path.rstrip("/") + "/"):
                try:
                    mounts.mount(None, place, None, MountFlag.SLAVE | MountFlag.REC)
                    mounts.umount2(place, UnmountFlag.DETACH)
                except SyscallError as error:
                    if error.errno not in (errno.EINVAL, errno.ENOENT, errno.EPERM):
                        raise
                    if error.errno == errno.EPERM:  # locked by a user namespace: hide it
                        mounts.mount("tmpfs", place, "tmpfs", MountFlag.RDONLY)
        mounts.mount(self.path, "/", None, MountFlag.MOVE)
        os.chroot(".")


def _root_is_initramfs() -> bool:
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields = line.split(b" ")
            if fields[4] == b"/" and line.split(b" - ")[1].startswith((b"rootfs", b"ramfs", b"tmpfs")):
                return True
    return False


def copy_tree(source: int, target: int) -> None:
    """Files, directories and links below directory descriptor `source` into `target`, with mode and owner; other kinds are left out."""
    with owned(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=source)) as listed:
        names = os.listdir(listed)
    for name in names:
        found = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif stat.S_ISDIR(found.st_mode):
            os.mkdir(name, stat.S_IMODE(found.st_mode), dir_fd=target)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            with owned(os.open(name, flags, dir_fd=source)) as inner, owned(os.open(name, flags, dir_fd=target)) as made:
                copy_tree(inner, made)
        elif stat.S_ISREG(found.st_mode):
            reading = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with owned(reading), owned(os.open(name, flags, stat.S_IMODE(found.st_mode), dir_fd=target)) as writing:
                while os.sendfile(writing, reading, None, 1 << 20):
                    pass
        else:
            continue
        os.chown(name, found.st_uid, found.st_gid, dir_fd=target, follow_symlinks=False)
        if not stat.S_ISLNK(found.st_mode):
            os.chmod(name, stat.S_IMODE(found.st_mode), dir_fd=target)  # again: chown(2) takes set-id bits away
