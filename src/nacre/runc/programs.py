"""The program of a process: where it is found, in what environment it begins, what binds it, and why it cannot be executed.

All of it runs inside the container: paths are the container's, and nothing is loaded on the way (CVE-2019-14271).
"""

from __future__ import annotations

import errno
import os
import stat

from nacre.linux import libc, paths, process, seccomp
from nacre.linux.libc import SyscallError, owned
from nacre.oci.values import Value
from nacre.runc.failures import CommandNotExecutable, CommandNotFound

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from nacre.oci.errors import Failure
    from nacre.runc.listener import Offer
    from nacre.runc.steps import Context

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def complete(entries: Sequence[str], home: str) -> list[str]:
    """Each name once, and HOME. Of entries of one name libc would find the first; an engine adds its own behind."""
    variables = {entry.partition("=")[0]: entry for entry in entries}
    if variables.get("HOME", "HOME=") == "HOME=":
        variables["HOME"] = f"HOME={home or '/'}"
    return list(variables.values())


def search_path(environment: Sequence[str]) -> str:
    """Where programs named without a slash are looked for: the last PATH of `environment`, or what a login would have."""
    return next((entry[5:] for entry in reversed(environment) if entry.startswith("PATH=")), DEFAULT_PATH)


def find_program(what: str, name: str, search: str, *, cwd: str = "", any_user: bool = False) -> str:
    """The path of the program as execvp(3) would find it. Raises CommandNotFound or CommandNotExecutable.

    `any_user`: what some user may execute is found, whoever asks; root asks before it is known what the process's user may see.
    """
    candidates = [name] if "/" in name else [os.path.join(directory or ".", name) for directory in search.split(":")]
    candidates = [os.path.join(cwd, candidate) for candidate in candidates]
    refused: tuple[str, str] | None = None
    for candidate in candidates:
        try:
            kind = os.stat(candidate).st_mode
        except OSError as error:
            if any_user and error.errno == errno.EACCES:
                return candidate
            if error.errno in (errno.EACCES, errno.ELOOP):
                refused = refused or (candidate, error.strerror or "")
            continue
        why = _refusal(candidate, kind, any_user=any_user)
        if not why:
            return candidate
        if refused is None or not stat.S_ISDIR(kind):
            refused = (candidate, f"permission denied {why}")
    if refused is not None:
        raise CommandNotExecutable(
            what=what,
            cause=f'exec: "{refused[0]}": {refused[1]}',
            remedy="make it executable for the container's user, or name another",
        )
    if "/" in name:
        raise CommandNotFound(
            what=what,
            cause=f'exec: "{name}": stat {name}: no such file or directory',
            remedy="check command and args against the image",
        )
    raise CommandNotFound(
        what=what,
        cause=f'exec: "{name}": executable file not found in $PATH (searched {search})',
        remedy="check command and args against the image: a shell line needs sh -c",
    )


def _refusal(path: str, kind: int, *, any_user: bool) -> str:
    """Why a file of this st_mode cannot be executed, by anyone or by us; "" when it can."""
    if stat.S_ISDIR(kind):
        return "(it is a directory)"
    if kind & 0o111 == 0:
        return f"(mode {stat.S_IMODE(kind):o})"
    if os.statvfs(path).f_flag & os.ST_NOEXEC:
        return "(its mount has noexec)"
    if any_user or os.access(path, os.X_OK, effective_ids=True):
        return ""
    return f"for user {os.geteuid()} (mode {stat.S_IMODE(kind):o})"


def first_bytes(program: str) -> bytes:
    """Enough of the file to say what it is."""
    try:
        with owned(os.open(program, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as fd:
            return os.read(fd, 256)
    except OSError:
        return b""  # executable and not readable: then there is less to say should execve fail


_ELF_MACHINES = {
    3: "i386",
    8: "mips",
    21: "ppc64",
    22: "s390x",
    40: "arm",
    62: "x86_64",
    183: "aarch64",
    243: "riscv64",
    258: "loongarch64",
}


def not_executable(what: str, program: str, error: OSError, head: bytes) -> Failure:
    """execve(2) refused `program`, whose first bytes are `head`: say what it needs."""
    cause = f'exec: "{program}": {(error.strerror or "").lower()} (errno {error.errno})'
    remedy = ""
    if head.startswith(b"#!"):
        interpreter = head[2:].split(b"\n")[0].strip(b" \t").decode("utf-8", "replace")
        if error.errno in (errno.ENOENT, errno.EACCES):
            cause += f"; its interpreter {interpreter!r} cannot be executed"
            remedy = f"add {interpreter.split(' ')[0]} to the image, or execute the script with another interpreter"
        if interpreter.endswith("\r"):
            remedy = "the script has DOS line ends: convert them"
    elif head.startswith(b"\x7fELF") and len(head) > 20:
        machine = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
        name, ours = _ELF_MACHINES.get(machine, str(machine)), libc.machine()
        if name != ours:
            cause, remedy = f"{cause}; it is built for {name}, this machine is {ours}", f"use an image for {ours}"
        elif error.errno == errno.ENOENT:
            cause += "; its dynamic loader is not in the image"
            remedy = "add the C library that it was linked with, or link it statically"
    elif error.errno == errno.ENOEXEC:
        cause = f'exec: "{program}": exec format error; ' + (
            "the file is empty" if not head else "it is no ELF file and has no #! line"
        )
        remedy = (
            "begin the script with #!/bin/sh" if head else "the image has been built or copied wrongly: look at that file there"
        )
    return CommandNotExecutable(what=what, cause=cause, remedy=remedy)


def home_of(root: int, uid: int) -> str:
    """The home directory that the container's /etc/passwd gives `uid`; "" when it says nothing. Read by us: no NSS in here."""
    try:
        text = paths.read_in(root, "/etc/passwd")
    except OSError:
        return ""
    for line in text.split(b"\n"):
        fields = line.split(b":")
        if len(fields) >= 6 and fields[2] == str(uid).encode():
            return os.fsdecode(fields[5])
    return ""


class Confinement(Value):
    """What binds whatever is executed in the container: the filter, and no new privileges."""

    no_new_privileges: bool
    filter: bytes = b""
    filter_flags: int = 0
    offer: Callable[[int], Offer] | None = None  # what brings the filter's listener out (runc.listener)

    def execute(self, channel: int, execution: process.Execution) -> NoReturn:
        """After the filter is loaded there is nothing but execve(2). Raises SyscallError for that, Failure for the filter."""
        kept = self.load(channel)
        execution.run()
        raise AssertionError(f"execve(2) came back, {kept}")

    def load(self, channel: int) -> object:
        """Answers what is to be kept until execve(2): letting go of it makes system calls."""
        if self.no_new_privileges:
            process.set_no_new_privileges()
        load = seccomp.loader(self.filter, self.filter_flags) if self.filter else None
        offer = self.offer(channel) if self.offer else None
        try:
            answer = load() if load is not None else 0
        except SyscallError as error:
            raise seccomp.explain(error) from error
        if offer is not None:
            offer.hand_over(answer)
        return offer


class Confine(Value, kw_only=False):
    """A filter with a listener is loaded once, before the startContainer hooks: there is one agent to answer for all under it."""

    confinement: Confinement

    def describe(self) -> str:
        return "load the seccomp filter"

    def run(self, context: Context) -> None:
        self.confinement.load(context.channel)
        process.set_dumpable(enabled=False)  # the hooks are not to look into this process, whatever its parent had to


class Execute(Value, kw_only=False):
    """The program takes over; a word to the parent if it does not."""

    arguments: tuple[str, ...]
    environment: tuple[str, ...]
    keep_descriptors: int  # 3 … 3+N-1 stay open
    confinement: Confinement

    def describe(self) -> str:
        return f"execute {self.arguments[0]!r}"

    def run(self, context: Context) -> None:
        environment = complete(self.environment, context.home)
        program = find_program(self.describe(), self.arguments[0], search_path(environment))
        head = first_bytes(program)
        execution = process.Execution(program, self.arguments, environment)
        process.close_range(3 + self.keep_descriptors, cloexec=True)
        try:
            self.confinement.execute(context.channel, execution)
        except SyscallError as error:
            if error.call != "execve":
                raise
            raise not_executable(self.describe(), program, error, head) from error


class SeekProgram(Value, kw_only=False):
    """A program that is nowhere, or that nobody may execute, is told by create, as runc and crun do: engines look for the words there.
    The rest is execve's to say."""

    name: str
    environment: tuple[str, ...]
    cwd: str  # the process is not there yet

    def describe(self) -> str:
        return f"execute {self.name!r}"

    def run(self, context: Context) -> None:
        find_program(self.describe(), self.name, search_path(self.environment), cwd=self.cwd, any_user=True)
