"""overlayfs: one mount of a container's root (Documentation/filesystems/overlayfs.rst)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from nacre.linux import mounts
from nacre.linux.libc import AT_FDCWD, owned, syscall

PAGE = 4096  # all that mount(2) takes of options
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6  # fsconfig(2) commands
_CLOEXEC = 1  # FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
_MOVE_EMPTY_PATH = 0x4  # MOVE_MOUNT_F_EMPTY_PATH


def mount_overlay(target: str, lower: Sequence[str], upper: str = "", work: str = "", *, volatile: bool = False) -> None:
    """Mount `lower` (top first) with `upper` over it at the directory `target`; without `upper` it is read-only.

    `volatile`: `upper` ends with this mount, so nothing of it is ever synced (fsync(2) inside is none either), and it can not be mounted
    again; otherwise the unmount writes the whole of it out, which took 50 ms on a busy disk.
    Up to a page of options goes by mount(2), which every kernel has; more layers need `lowerdir+` (Linux 6.5).
    Raises SyscallError.
    """
    options = ["lowerdir=" + ":".join(_escaped(path) for path in lower)]
    if upper:
        options += [f"upperdir={_escaped(upper)}", f"workdir={_escaped(work)}", *(["volatile"] if volatile else [])]
    elif len(lower) == 1:
        mounts.mount(lower[0], target, None, mounts.MountFlag.BIND)  # overlayfs wants two layers at least
        return
    data = ",".join(options)
    if len(os.fsencode(data)) < PAGE:
        mounts.mount("overlay", target, "overlay", 0, data)
        return
    with owned(syscall("fsopen", b"overlay", _CLOEXEC, path="overlay")) as context:
        for path in lower:
            _configure(context, "lowerdir+", path)
        if upper:
            _configure(context, "upperdir", upper)
            _configure(context, "workdir", work)
        if upper and volatile:
            syscall("fsconfig", context, _SET_FLAG, b"volatile", None, 0, path="volatile")
        syscall("fsconfig", context, _CREATE, None, None, 0, path=target)
        with owned(syscall("fsmount", context, _CLOEXEC, 0, path=target)) as tree:
            syscall("move_mount", tree, b"", AT_FDCWD, os.fsencode(target), _MOVE_EMPTY_PATH, path=target)


def _configure(context: int, key: str, value: str) -> None:
    syscall("fsconfig", context, _SET_STRING, key.encode(), os.fsencode(value), 0, path=value)


def _escaped(path: str) -> str:
    """Colons separate directories and commas separate options: both and the backslash take one before them."""
    return "".join("\\" + letter if letter in ":,\\" else letter for letter in path)
