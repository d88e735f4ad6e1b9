"""The interpreter's own binary, out of a container's reach (CVE-2019-5736).

A process that enters a container can be made to execute /proc/self/exe there; who holds that open may write to it once the process has
ended, and that binary is the host's python3. So the process that becomes a container runs from a mount of the binary that is
read-only and attached nowhere, or where mounts cannot be made from a sealed copy in memory. Both are seen through /proc/self/exe.

The module is imported before anything else of nacre: what it costs every `run` pays twice.
"""

from __future__ import annotations

import os
import sys

from nacre.linux.numbers import number

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Sequence


def out_of_reach() -> bool:
    """Whether /proc/self/exe cannot be written, whoever holds it."""
    return bool(os.statvfs("/proc/self/exe").f_flag & os.ST_RDONLY) or os.readlink("/proc/self/exe").startswith("/memfd:")


def open_executable() -> int:
    """The running interpreter as a descriptor to execute by; the caller owns it."""
    try:
        return _readonly_clone()
    except OSError:  # no right to make mounts, or a kernel before 5.12: the copy costs 3 ms and 7 MB instead
        from nacre.linux.memfd import sealed

        source = os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return sealed("nacre-interpreter", source)
        finally:
            os.close(source)


def _readonly_clone() -> int:
    """As `mounts.bind_tree` and `mounts.mount_setattr`, by the C half of ctypes alone: the Python half takes 3 ms to load, and this process does
    nothing else. The C half takes integers as they are and bytes as pointers; why a call was refused is not of interest here."""
    import _ctypes

    itself = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # dlopen(3)'s null; the stub wants a name
    function = _ctypes.dlsym(itself, "syscall")

    def call(name: str, *arguments: int | bytes) -> int:
        result: int = _ctypes.call_function(function, (number(name), *arguments))
        if result < 0:
            raise OSError(f"{name}(2) was refused")
        return result

    clone, empty_path, current_directory, readonly = 1, 0x1000, -100, 1
    tree = call("open_tree", current_directory, b"/proc/self/exe", clone | os.O_CLOEXEC)
    attributes = readonly.to_bytes(8, sys.byteorder) + bytes(24)  # to set; to clear, propagation, user namespace
    try:
        call("mount_setattr", tree, b"", empty_path, attributes, len(attributes))
    except OSError:
        os.close(tree)
        raise
    return tree


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
