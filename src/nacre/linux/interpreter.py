"""The interpreter's own binary, out of a container's reach (CVE-2019-5736).

A process that enters a container can be made to execute /proc/self/exe there; who holds that open may write to it once the process has
ended, and that binary is the host's python3. So the process that becomes a container runs from a mount of the binary that is
read-only, or where mounts cannot be made from a sealed copy in memory. Both are seen through /proc/self/exe.

The first command leaves its mount at HELD, where the next ones start from it and need not execute themselves again. What counts is
what /proc/self/exe says, not that HELD is there.

The module is imported before anything else of nacre: what it costs is paid once more by whoever executes itself again.
"""

from __future__ import annotations

import os
import sys

from nacre.linux.numbers import number

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Sequence


HELD = "/run/nacre-interpreter"  # bin/python, and beside it the way to its library; of the host, not of a node
_PLACE, _LIBRARY = f"{HELD}/bin/python", f"{HELD}/{sys.platlibdir}"


def out_of_reach() -> bool:
    """Whether /proc/self/exe cannot be written, whoever holds it."""
    return bool(os.statvfs("/proc/self/exe").f_flag & os.ST_RDONLY) or os.readlink("/proc/self/exe").startswith("/memfd:")


def open_executable() -> int:
    """The running interpreter as a descriptor to execute by; the caller owns it."""
    try:
        tree = _readonly_clone()
    except OSError:  # no right to make mounts, or a kernel before 5.12: the copy costs 3 ms and 7 MB instead
        from nacre.linux.memfd import sealed

        source = os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return sealed("nacre-interpreter", source)
        finally:
            os.close(source)
    if os.geteuid() == 0:
        try:
            _hold(tree)
        except OSError:
            pass  # a /run that is not ours to write: each command makes a clone of its own
    return tree


def _readonly_clone() -> int:
    """As `mounts.bind_tree` and `mounts.mount_setattr` would make it."""
    clone, readonly = 1, 1
    tree = _call("open_tree", _HERE, b"/proc/self/exe", clone | os.O_CLOEXEC)
    attributes = readonly.to_bytes(8, sys.byteorder) + bytes(24)  # to set; to clear, propagation, user namespace
    try:
        _call("mount_setattr", tree, b"", _EMPTY_PATH, attributes, len(attributes))
    except OSError:
        os.close(tree)
        raise
    return tree


_HERE, _EMPTY_PATH, _DETACH = -100, 0x1000, 2


def _call(name: str, *arguments: int | bytes) -> int:
    """syscall(2) by the C half of ctypes alone: the Python half takes 3 ms to load, and this process does nothing else. The C half
    takes integers as they are and bytes as pointers; why a call was refused is not of interest here."""
    import _ctypes

    itself = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # dlopen(3)'s null; the stub wants a name
    result: int = _ctypes.call_function(_ctypes.dlsym(itself, "syscall"), (number(name), *arguments))
    if result < 0:
        raise OSError(f"{name}(2) was refused")
    return result


def _hold(tree: int) -> None:
    """Attach the clone `tree` at HELD, unless an interpreter is there or is just being put there. Raises OSError where the host forbids it."""
    os.makedirs(f"{HELD}/bin", 0o755, exist_ok=True)
    directory = _lock(wait=False)
    try:
        os.close(os.open(_PLACE, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o755))
        there = os.stat(_PLACE)
        if there.st_nlink == 0:  # an upgrade has taken that interpreter's name away
            _call("umount2", _PLACE.encode(), _DETACH)
        elif there.st_size:
            return  # this one by now, or another installation's: the place is taken
        _remove(_LIBRARY)
        os.symlink(f"{sys.base_prefix}/{sys.platlibdir}", _LIBRARY)
        _call("move_mount", tree, b"", _HERE, _PLACE.encode(), 4)  # MOVE_MOUNT_F_EMPTY_PATH
    finally:
        os.close(directory)


def let_go() -> None:
    """Take HELD away; the next command makes it anew. Who runs from it goes on. Raises OSError when something else lies there."""
    if not os.path.isdir(HELD):
        return
    directory = _lock(wait=True)
    try:
        while os.path.exists(_PLACE) and os.stat(_PLACE).st_size:
            _call("umount2", _PLACE.encode(), _DETACH)
        _remove(_PLACE)
        _remove(_LIBRARY)
        if os.path.isdir(f"{HELD}/bin"):
            os.rmdir(f"{HELD}/bin")
        os.rmdir(HELD)
    finally:
        os.close(directory)


def _lock(*, wait: bool) -> int:
    """HELD, locked while the descriptor is open."""
    import fcntl

    directory = os.open(HELD, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(directory)
        raise
    return directory


def _remove(path: str) -> None:
    if os.path.lexists(path):
        os.unlink(path)


def command(statement: str) -> list[str]:
    """The words that execute `statement` in another interpreter like this one, with nothing of the user's and no site."""
    options = ["-I", "-S", *(["-B"] if sys.dont_write_bytecode else [])]
    if sys.pycache_prefix:
        options += ["-X", f"pycache_prefix={sys.pycache_prefix}"]
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return [sys.executable, *options, "-c", f"import sys; sys.path.insert(0, {package!r}); {statement}"]


def execute_out_of_reach(statement: str, arguments: Sequence[str]) -> None:
    """Go on as `statement` with `arguments` in an interpreter that is out of reach; returns at once when this one is."""
    if not out_of_reach():
        os.execve(f"/proc/self/fd/{open_executable()}", [*command(statement), *arguments], os.environ)
