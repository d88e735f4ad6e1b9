"""The files of one cgroup directory: reading, writing, removing; the failures that the kernel's refusals become."""

from __future__ import annotations

import errno
import os
import select

from nacre.linux.cgroup_layout import Hierarchy
from nacre.linux.cgroup_values import Write
from nacre.linux.pids import pidfd_open
from nacre.oci.errors import Failure

UNLIMITED = 1 << 60  # no host has it: v1 writes "no limit" as a number beyond


class LimitRefused(Failure):
    """The kernel does not take a limit; the cause has the file, the value and the errno."""


class CgroupBusy(Failure):
    """A cgroup cannot be made, entered or removed as it is."""


def inherit_cpuset(directory: str) -> None:
    """v1: a new cpuset is empty, and an empty one can hold no process. Its parent may be one that somebody has made and not filled."""
    parent = os.path.dirname(directory)
    empty = [
        name
        for name in ("cpuset.cpus", "cpuset.mems")
        if os.path.exists(f"{directory}/{name}") and not read(directory, name).strip()
    ]
    if empty:
        inherit_cpuset(parent)
    for name in empty:
        write(directory, name, read(parent, name).strip())


def set_limit(directory: str, limit: Write) -> bool:
    """Whether there is a file for it, or it could not be done where it need not be. Raises LimitRefused."""
    for name in limit.files:
        try:
            write(directory, name, limit.value)
            return True
        except FileNotFoundError:
            continue
        except OSError as error:
            if limit.optional and error.errno in (errno.EOPNOTSUPP, errno.ENODEV):
                return False
            raise LimitRefused(
                what=f"set {name} to {limit.value!r} in cgroup {directory}",
                cause=f"write(2): {error.strerror} (errno {error.errno})",
                evidence=_usage_evidence(directory, name),
                remedy="raise the limit above what is in use"
                if error.errno == errno.EBUSY and name.startswith("memory.")
                else "",
            ) from error
    return False


def no_file(directory: str, limit: Write) -> LimitRefused:
    return LimitRefused(
        what=f"set {limit.files[0]} to {limit.value!r} in cgroup {directory}",
        cause=f"this kernel has no {' or '.join(limit.files)} there",
        remedy="boot with swapaccount=1" if "memsw" in limit.files[0] or "swap" in limit.files[0] else "",
    )


def _usage_evidence(directory: str, name: str) -> tuple[str, ...]:
    related = {
        "memory": ("memory.current", "memory.usage_in_bytes"),
        "cpuset": ("cpuset.cpus.effective", "cpuset.effective_cpus"),
    }
    lines = [f"{name} is now {read(directory, name).strip()!r}"]
    for other in related.get(name.partition(".")[0], ()):
        if text := read(directory, other).strip():
            lines.append(f"{other} is {text}")
    return tuple(lines)


def granted(directory: str) -> set[str]:
    return set(read(directory, "cgroup.subtree_control").split())


def hand_down(directory: str, controller: str) -> None:
    """v2: give the controller to the groups below. Raises OSError, see `kept`."""
    write(directory, "cgroup.subtree_control", "+" + controller)


def kept(what: str, directory: str, controller: str, error: OSError) -> CgroupBusy:
    """Why the groups below `directory` do not get the controller that it has: whose it is, who is in it, of what type it is."""
    cause = f"cgroup {directory} does not hand the controller {controller} down"
    cause += f": write(2) cgroup.subtree_control: {error.strerror} (errno {error.errno})"
    remedy = ""
    if error.errno in (errno.EACCES, errno.EPERM):
        cause += f"; it belongs to user {os.stat(f'{directory}/cgroup.subtree_control').st_uid}"
        remedy = f"as that user: echo +{controller} > {directory}/cgroup.subtree_control, and so in each group down to the container's;"
        remedy += " systemd does it for a unit with Delegate=yes"
    elif error.errno == errno.EBUSY:
        held = read(directory, "cgroup.procs").split()
        cause += f"; it holds processes itself ({', '.join(held[:5]) or 'none visible'}), which cgroup v2 forbids"
        remedy = (
            f"move them to a leaf: mkdir {directory}/init && for p in $(cat {directory}/cgroup.procs);"
            f" do echo $p > {directory}/init/cgroup.procs; done"
        )
    elif kind := read(directory, "cgroup.type").strip():
        cause += f"; its cgroup.type is {kind}"
        remedy = "use a cgroup of type domain as parent" if "thread" in kind or "invalid" in kind else ""
    return CgroupBusy(what=what, cause=cause, remedy=remedy)


def is_frozen(directory: str, hierarchy: Hierarchy) -> bool:
    if hierarchy.version == 2:
        return table(read(directory, "cgroup.events")).get("frozen") == 1
    return read(directory, "freezer.state").strip() == "FROZEN"


def is_freezing(directory: str, hierarchy: Hierarchy) -> bool:
    """As soon as it is asked for, of the group or of one above it."""
    if hierarchy.version == 2:
        return read(directory, "cgroup.freeze").strip() == "1" or is_frozen(directory, hierarchy)
    return read(directory, "freezer.state").strip() in ("FROZEN", "FREEZING")


def processes(directory: str, *, recursive: bool) -> list[int]:
    found = [int(word) for word in read(directory, "cgroup.procs").split()]
    if recursive:
        for below in _subdirectories(directory):
            found += processes(below, recursive=True)
    return found


def _subdirectories(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def remove_tree(directory: str) -> bool:
    """rmdir(2) from the leaves up; False while processes hold it."""
    try:
        os.rmdir(directory)
        return True
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
    below = _subdirectories(directory)
    if not below:
        return False
    removed = [remove_tree(one) for one in below]  # each of them, not up to the first that is held
    return all(removed) and remove_tree(directory)


def await_end(pids: list[int]) -> None:
    """Until one of `pids` ends, at most a tenth of a second (an ended one may hold its cgroup a moment longer)."""
    poll = select.poll()
    opened: list[int] = []
    try:
        for pid in pids[:64]:
            try:
                opened.append(pidfd_open(pid))
            except OSError:
                continue
            poll.register(opened[-1], select.POLLIN)
        poll.poll(100 if opened else 1)
    finally:
        for fd in opened:
            os.close(fd)


def read(directory: str, name: str) -> str:
    """The file's text, "" where it cannot be read: figures of a cgroup that is going away are no error."""
    try:
        fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, 1 << 20).decode()
    except OSError:
        return ""
    finally:
        os.close(fd)


def write(directory: str, name: str, value: str) -> None:
    """One write(2), unbuffered: the kernel parses each alone and answers by errno."""
    fd = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def table(text: str) -> dict[str, int]:
    """Lines of "key number"."""
    result: dict[str, int] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if value.strip().isdigit():
            result[key] = int(value)
    return result


def number(text: str) -> int:
    word = text.strip()
    return UNLIMITED if word == "max" else int(word) if word.lstrip("-").isdigit() else 0
