"""What can go wrong in a container's life, beyond what `oci.errors`, `linux.cgroups` and `linux.seccomp` name."""

from __future__ import annotations

import errno

from nacre.oci.errors import Failure


class CommandNotFound(Failure):
    """The executable is nowhere; the cause has the name and the PATH that was searched."""


class CommandNotExecutable(Failure):
    """The executable is there and the kernel or its mode refuses it."""


class StepFailed(Failure):
    """One step of setting a container up; `what` is the step, the cause its system call, object and errno."""


class InitDied(Failure):
    """The process that sets the container up ended without a word (killed: out of memory, by hand)."""


class HookFailed(Failure):
    """A hook ended badly or too late; its output is the evidence."""


_HINTS = {
    ("mount", errno.EPERM): "the host lacks CAP_SYS_ADMIN here, or the mount is locked by a user namespace",
    ("mount", errno.ENODEV): "the kernel knows no such file system: load its module, or check the mount's type",
    ("mount", errno.EINVAL): "an option the file system does not know, or the wrong kind of source",
    ("open_tree", errno.ENOENT): "the source of the mount does not exist on the host",
    ("move_mount", errno.ENOTDIR): "a directory is mounted on a file: check which of source and destination is the directory",
    ("move_mount", errno.EINVAL): "a file is mounted on a directory: check which of source and destination is the file",
    ("open_tree", errno.EINVAL): "the source's mount is locked or unbindable: use rbind",
    ("chdir", errno.ENOTDIR): "process.cwd is to be a directory of the image",
    ("chdir", errno.ENOENT): "process.cwd is to be a directory of the image, or one that can be made in it",
    ("chdir", errno.EACCES): "give the directory to the container's user, or take another process.cwd",
    ("clone3", errno.ENOSPC): "too many namespaces: raise /proc/sys/user/max_*_namespaces",
    ("clone3", errno.EINVAL): "this kernel lacks one of the namespaces, or a user namespace is not allowed here",
    ("clone3", errno.EPERM): "making namespaces needs root (CAP_SYS_ADMIN)",
}


def step_failed(what: str, error: OSError) -> Failure:
    """The failure of step `what` for a refused call, with a hint where the errno has a usual reason."""
    call = getattr(error, "call", "")
    place = f" {error.filename}" if error.filename else ""
    words = f"{call}(2){place}: " if call else f"{error.filename}: " if error.filename else ""
    hint = _HINTS.get((call, error.errno or 0), "")
    return StepFailed(what=what, cause=f"{words}{error.strerror or error} (errno {error.errno})", remedy=hint)
