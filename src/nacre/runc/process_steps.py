"""The steps that concern the process itself: namespaces' own settings, terminal, cgroups, limits, user, capabilities.

The last one of all is `programs.Execute`.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import struct
from fcntl import ioctl

from nacre.linux import capabilities, mounts, namespaces, paths, process
from nacre.linux.libc import SyscallError, owned, syscall
from nacre.linux.namespaces import Clone
from nacre.oci.errors import Failure, Invalid
from nacre.oci.values import Value
from nacre.runc.programs import home_of
from nacre.runc.steps import PLAIN, Context

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

_TCGETS, _TCSETS, _TERMIOS, _ONLCR = 0x5401, 0x5402, struct.Struct("=IIII44s"), 4
_TIOCSCTTY, _TIOCSWINSZ, _TIOCSPTLCK, _TIOCGPTPEER = 0x540E, 0x5414, 0x40045431, 0x5441


class JoinProcess(Value, kw_only=False):
    """Every namespace of a running container (execute), or one given by path (create): what `descriptor` names."""

    descriptor: int
    flags: Clone
    words: str

    def describe(self) -> str:
        return f"join {self.words}"

    def run(self, context: Context) -> None:
        namespaces.setns(self.descriptor, self.flags)


class EnterProcessRoot(Value, kw_only=False):
    """The root of a running container that has no mount namespace of its own: joining would lead to the host's."""

    descriptor: int

    def describe(self) -> str:
        return "enter the container's root"

    def run(self, context: Context) -> None:
        os.fchdir(self.descriptor)
        os.chroot(".")


class BecomeNamespaceRoot(Value, kw_only=False):
    """In a new user namespace: be its root, so that what is made belongs to it."""

    def describe(self) -> str:
        return "become root of the user namespace"

    def run(self, context: Context) -> None:
        try:
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        except OSError as error:
            if error.errno != errno.EINVAL:  # id 0 is not mapped: then the process's own user has to do
                raise


class OpenRootDirectory(Value, kw_only=False):
    """The root of the container just joined."""

    def describe(self) -> str:
        return "open the container's root"

    def run(self, context: Context) -> None:
        context.root = paths.open_root("/")


class SetName(Value, kw_only=False):
    """Host or domain name of the UTS namespace."""

    name: str
    domain: bool

    def describe(self) -> str:
        return f"set the {'domain' if self.domain else 'host'} name to {self.name!r}"

    def run(self, context: Context) -> None:
        (namespaces.setdomainname if self.domain else namespaces.sethostname)(self.name)


class SetSysctl(Value, kw_only=False):
    """linux.sysctl: one key, of a namespace of the container's own."""

    key: str
    value: str

    def describe(self) -> str:
        return f"set sysctl {self.key} to {self.value!r}"

    def run(self, context: Context) -> None:
        place = "/proc/sys/" + self.key.replace(".", "/")
        with owned(os.open(place, os.O_WRONLY | os.O_CLOEXEC)) as fd:
            os.write(fd, self.value.encode())


class RaiseLoopback(Value, kw_only=False):
    def describe(self) -> str:
        return "set the interface lo up"

    def run(self, context: Context) -> None:
        process.raise_loopback()


class NewKeyring(Value, kw_only=False):
    name: str
    label: str = ""  # SELinux's, of the process to come: it could not use a keyring with the runtime's

    def describe(self) -> str:
        return "make a session keyring"

    def run(self, context: Context) -> None:
        if self.label:
            with owned(os.open("/proc/self/attr/keycreate", os.O_WRONLY | os.O_CLOEXEC)) as fd:
                os.write(fd, self.label.encode())  # until execve(2)
        process.join_session_keyring(self.name)


class OpenConsole(Value, kw_only=False):
    """A pseudo-terminal in the container's own devpts; its slave is shown as /dev/console too when `show`.

    `bare_newlines`: it leaves them as they are, since the terminal that they end on makes them new lines at the left.
    """

    width: int
    height: int
    show: bool
    bare_newlines: bool

    def describe(self) -> str:
        return "open a terminal in the container's /dev/pts"

    def run(self, context: Context) -> None:
        master = paths.openat2(context.root, "/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
        context.console = master
        if os.fstat(master).st_rdev != os.makedev(5, 2):
            raise Failure(what=self.describe(), cause="/dev/pts/ptmx is no pseudo-terminal", remedy="mount devpts on /dev/pts")
        ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
        context.terminal = ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        if self.width and self.height:
            ioctl(master, _TIOCSWINSZ, struct.pack("HHHH", self.height & 0xFFFF, self.width & 0xFFFF, 0, 0))
        if self.bare_newlines:
            inputs, outputs, *others = _TERMIOS.unpack(ioctl(master, _TCGETS, bytes(_TERMIOS.size)))
            ioctl(master, _TCSETS, _TERMIOS.pack(inputs, outputs & ~_ONLCR, *others))
        if self.show:
            with (
                owned(mounts.bind_tree("", recursive=False, directory=context.terminal)) as tree,
                owned(paths.make_file_in(context.root, "/dev/console")),
                owned(paths.openat2(context.root, "dev/console", os.O_PATH, resolve=PLAIN)) as target,
            ):
                mounts.move_mount(tree, target)  # through a link of the image it would hide what is masked later (CVE-2025-52565)


class NewSession(Value, kw_only=False):
    """A session of its own, with the terminal, if there is one, as its controlling one and as stdio."""

    def describe(self) -> str:
        return "begin a session"

    def run(self, context: Context) -> None:
        os.setsid()
        if context.terminal >= 0:
            ioctl(context.terminal, _TIOCSCTTY, 0)
            for number in range(3):
                os.dup2(context.terminal, number)


class EnterCgroups(Value, kw_only=False):
    """The last thing that costs memory has been done: from here on the container pays. "0" is the writer itself (cgroups(7)).

    Its CPUs are those of its cpuset then, whatever the starter was bound to.
    """

    namespace: bool  # then a cgroup namespace, whose root is where the process is by now
    keep_cpus: bool = False  # unless somebody has chosen them

    def describe(self) -> str:
        return "enter the container's cgroups"

    def run(self, context: Context) -> None:
        for directory, gate in context.gates:
            try:
                os.write(gate, b"0")
            except OSError as error:
                raise SyscallError("write", error.errno or 0, directory) from error
            os.close(gate)
        context.gates.clear()
        if not self.keep_cpus:
            process.run_on_any_cpu()
        if self.namespace:
            namespaces.unshare(Clone.NEWCGROUP)


class SetLimits(Value, kw_only=False):
    """process.rlimits: (name, soft, hard). What the host forbids to raise is set as high as it goes, and told."""

    limits: tuple[tuple[str, int, int], ...]

    def describe(self) -> str:
        return "set the resource limits"

    def run(self, context: Context) -> None:
        for name, soft, hard in self.limits:
            kind = getattr(resource, name)
            wanted = (_limit(soft), _limit(hard))
            try:
                resource.setrlimit(kind, wanted)
            except (ValueError, OSError):
                ceiling = resource.getrlimit(kind)[1]
                granted = (_lower(wanted[0], ceiling), _lower(wanted[1], ceiling))
                resource.setrlimit(kind, granted)
                context.warnings.append(
                    f"{name} {soft}:{hard} is above the host's hard limit {ceiling}: set to {granted[0]}:{granted[1]}"
                )


def _limit(value: int) -> int:
    return resource.RLIM_INFINITY if value >= 1 << 63 else value


def _lower(value: int, ceiling: int) -> int:
    if ceiling == resource.RLIM_INFINITY:
        return value
    return ceiling if value == resource.RLIM_INFINITY else min(value, ceiling)


class SetScheduling(Value, kw_only=False):
    """process.scheduler and process.ioPriority."""

    attributes: tuple[int, int, int, int, tuple[int, int, int]] | None  # of sched_setattr(2)
    io_priority: int | None  # class << 13 | level, as ioprio_set(2) wants it

    def describe(self) -> str:
        return "set scheduling policy and priorities"

    def run(self, context: Context) -> None:
        if self.attributes is not None:
            process.sched_setattr(*self.attributes)
        if self.io_priority is not None:
            syscall("ioprio_set", 1, 0, self.io_priority)


class SetAffinity(Value, kw_only=False):
    """process.execCPUAffinity: the CPUs before and after the cgroup is entered."""

    cpus: tuple[int, ...]

    def describe(self) -> str:
        return f"run on CPU {', '.join(map(str, self.cpus))}"

    def run(self, context: Context) -> None:
        os.sched_setaffinity(0, self.cpus)


class SetPersonality(Value, kw_only=False):
    """linux.personality."""

    domain: str
    number: int

    def describe(self) -> str:
        return f"set the personality {self.domain}"

    def run(self, context: Context) -> None:
        process.set_personality(self.number)


class SetMemoryPolicy(Value, kw_only=False):
    """linux.memoryPolicy: from which NUMA nodes memory is taken."""

    words: str
    mode: int
    nodes: tuple[int, ...]

    def describe(self) -> str:
        return f"set the memory policy {self.words}"

    def run(self, context: Context) -> None:
        process.set_memory_policy(self.mode, self.nodes)


class SetSecurityLabel(Value, kw_only=False):
    """AppArmor profile or SELinux label of the next execve(2). /proc is the container's by now, and looked at closely."""

    file: str  # below /proc/PID
    text: str

    def describe(self) -> str:
        asked, _, profile = self.text.partition(" ")
        return f"confine by the AppArmor profile {profile}" if asked == "exec" else f"set the security label {self.text!r}"

    def run(self, context: Context) -> None:
        with owned(paths.open_own_proc(self.file, os.O_WRONLY)) as fd:
            try:
                os.write(fd, self.text.encode())
            except FileNotFoundError as error:  # AppArmor's answer
                remedy = "load it with apparmor_parser -r FILE"
                raise Invalid(what=self.describe(), cause="it is not loaded (the kernel knows it not)", remedy=remedy) from error


class BoundCapabilities(Value, kw_only=False):
    """The bounding set, while there is still the right to shrink it."""

    keep: int
    highest: int

    def describe(self) -> str:
        return "shrink the capability bounding set"

    def run(self, context: Context) -> None:
        capabilities.bound(self.keep, self.highest)


class ChangeUser(Value, kw_only=False):
    """Working directory, groups, ids, umask. The directory may be one that only root or only the user can enter: both are tried."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    umask: int
    cwd: str

    def describe(self) -> str:
        return f"become user {self.uid}:{self.gid} in {self.cwd}"

    def run(self, context: Context) -> None:
        if context.root >= 0:
            context.home = home_of(context.root, self.uid)
        try:
            _change_directory(self.cwd)
            entered = True
        except SyscallError as error:
            if error.errno != errno.EACCES:
                raise
            entered = False
        self._give_stdio(context)
        process.prctl(process.Prctl.SET_KEEPCAPS, 1)
        try:
            os.setgroups(self.groups)
        except PermissionError:
            if self.groups:
                raise
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)
        os.umask(self.umask)
        if not entered:
            _change_directory(self.cwd)
        try:
            inside = os.getcwd().startswith("/")
        except FileNotFoundError:  # glibc's word for a directory that getcwd(2) calls unreachable
            inside = False
        if not inside:  # it would be a way back to the host (CVE-2024-21626)
            raise Failure(what=self.describe(), cause=f"{self.cwd} leads out of the container, or has been removed")

    def _give_stdio(self, context: Context) -> None:
        """Pipes and the container's own terminal go to its user, who may want to open /dev/stdout again."""
        for number in range(3):
            kind = os.fstat(number).st_mode
            if self.uid and (stat.S_ISFIFO(kind) or context.terminal >= 0):
                try:
                    os.fchown(number, self.uid, -1)
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EPERM, errno.EROFS):
                        raise


def _change_directory(path: str) -> None:
    try:
        os.chdir(path)
    except OSError as error:
        raise SyscallError("chdir", error.errno or 0, path) from error


class SetCapabilities(Value, kw_only=False):
    """The other four sets. `keep_admin`: SYS_ADMIN stays until execve, as loading a filter without no_new_privs needs it.

    What a process holds before execve beyond these sets is lost there: the kernel computes the new sets from the inheritable,
    bounding and ambient ones (capabilities(7)), so nothing of it reaches the container's program.
    """

    effective: int
    permitted: int
    inheritable: int
    ambient: int
    keep_admin: bool

    def describe(self) -> str:
        return "set the capabilities"

    def run(self, context: Context) -> None:
        _, held, _ = capabilities.capget()
        lacking = (self.effective | self.permitted | self.inheritable) & ~held
        if lacking:
            context.warnings.append(f"not held here, so not given: {', '.join(capabilities.names(lacking))}")
        admin = capabilities.SYS_ADMIN & held if self.keep_admin else 0
        permitted = self.permitted & held
        capabilities.capset(self.effective & permitted | admin, permitted | admin, self.inheritable & held)
        # What is not inheritable cannot be ambient, by definition: buildah lists the same in both for each command, and a word about it
        # would stand in the output of all of them.
        refused = capabilities.set_ambient(self.ambient & permitted & self.inheritable)
        if refused:
            context.warnings.append(
                f"ambient capabilities not given: {', '.join(capabilities.names(sum(1 << bit for bit in refused)))}"
            )


def settings(tree: Mapping[str, Any], highest: int) -> tuple[Sequence[str], dict[str, int]]:
    """(unknown capability names, set name to bits) of an OCI process; bits beyond this kernel's highest are dropped."""
    unknown: list[str] = []
    masks: dict[str, int] = {}
    sets = tree.get("capabilities", {})
    for name in ("bounding", "effective", "inheritable", "permitted", "ambient"):
        words = sets.get(name, ())
        unknown += [word for word in capabilities.unknown(words) if word not in unknown]
        masks[name] = capabilities.mask(words) & ((1 << (highest + 1)) - 1)
    return unknown, masks
