"""Where an OCI `linux.cgroupsPath` leads: a path below every hierarchy, and the systemd unit that is to make it, if one is.

Engines write two forms, "/a/b/c" and systemd's "slice:prefix:name"; each is taken under either driver, since kubelet and runtime may
disagree about theirs: the first is made by us also under the systemd driver, the second is made at systemd's path also without it.
"""

from __future__ import annotations

import os

from nacre.oci.errors import Invalid, Unsupported
from nacre.oci.values import Value

SYSTEMD = "/run/systemd/system"  # a directory exactly where systemd is the init (sd_booted(3))


class Place(Value):
    """`path` is absolute. `unit` and `slice` name the scope that systemd makes for it; both empty where we make directories."""

    path: str
    unit: str = ""
    slice: str = ""


def booted() -> bool:
    """Whether systemd is this machine's init."""
    return os.path.isdir(SYSTEMD)


def require_systemd(what: str) -> None:
    """Raises Unsupported where systemd is not this machine's init; `what` is the act that needs it."""
    if not booted():
        raise Unsupported(
            what=what,
            cause=f"systemd is not this machine's init: there is no {SYSTEMD}",
            remedy='use the cgroupfs driver: no --systemd-cgroup, cgroup_driver = "cgroupfs"',
        )


def resolve(wanted: str, identifier: str, *, systemd: bool, home: str = "system.slice") -> Place:
    """The place of container `identifier` whose document says `wanted`; `home` is the slice where it names none.

    Raises Unsupported where systemd is asked for and is not there.
    """
    if systemd:
        require_systemd(f"make the cgroup of container {identifier} through systemd")
    if wanted.startswith("/") or (wanted and ":" not in wanted):
        path = os.path.normpath("/" + wanted.lstrip("/"))
        if path == "/" or ".." in wanted.split("/"):
            raise Invalid(
                what="read linux.cgroupsPath",
                cause=f"{wanted!r} leads to {path}, out of any group of the container's own",
                remedy="write a path of the container's own, such as /containers/NAME",
            )
        return Place(path=path)
    if not wanted:
        wanted = f"{home}:nacre-runc:{identifier}" if systemd else ""
    if not wanted:
        return Place(path=f"/nacre-runc-{identifier}")
    slice_name, unit = _unit(wanted, home)
    path = f"{slice_path(slice_name)}/{unit}"
    return Place(path=path, unit=unit, slice=slice_name) if systemd else Place(path=path)


def _unit(wanted: str, home: str) -> tuple[str, str]:
    """slice and scope of "slice:prefix:name"."""
    words = wanted.split(":")
    if len(words) != 3 or not words[2] or any("/" in word for word in words):
        raise Invalid(
            what="read linux.cgroupsPath",
            cause=f"{wanted!r} is neither a path nor slice:prefix:name",
            remedy="write an absolute path, or three words such as system.slice:engine:container",
        )
    slice_name, prefix, name = words
    if not slice_name.removesuffix(".slice"):
        slice_name = home
    elif not slice_name.endswith(".slice"):
        slice_name += ".slice"
    stem = f"{prefix}-{name}" if prefix else name
    return slice_name, stem if stem.endswith((".scope", ".slice")) else stem + ".scope"


def slice_path(name: str) -> str:
    """a-b.slice lies in a.slice (systemd.slice(5)); "-.slice" is the root. Raises Invalid for a name systemd refuses."""
    if name == "-.slice":
        return ""
    words = name.removesuffix(".slice").split("-")
    if not all(words) or "/" in name:
        raise Invalid(what="read linux.cgroupsPath", cause=f"{name!r} is no name of a slice: a part between dashes is empty")
    return "".join("/" + "-".join(words[: count + 1]) + ".slice" for count in range(len(words)))


# Below a slice everything is systemd's: groups of groups are slices, whose names repeat their parents', containers are scopes.


def child(parent: str, name: str) -> str:
    """The path of the group `name` below `parent`: a slice below a slice, else a directory of that name."""
    if not parent.endswith(".slice"):
        return f"{parent.rstrip('/')}/{name}"
    stem = os.path.basename(parent).removesuffix(".slice")
    return f"{parent}/{stem}-{name.replace('-', '_')}.slice"  # a dash would be one more level


def name_in(parent: str, entry: str) -> str:
    """`child` undone: the name behind the directory `entry` of `parent`. Names with an underscore of their own do not come back."""
    if not parent.endswith(".slice"):
        return entry
    stem = os.path.basename(parent).removesuffix(".slice")
    return entry.removeprefix(f"{stem}-").removesuffix(".slice").replace("_", "-")


def container(parent: str, identifier: str) -> str:
    """The path of a container's group below its pod's."""
    return f"{parent}/nacre-{identifier}.scope" if parent.endswith(".slice") else f"{parent.rstrip('/')}/{identifier}"


def as_cgroups_path(path: str) -> str:
    """What linux.cgroupsPath has to say for the container's group to be `path`."""
    directory, name = os.path.split(path)
    if not name.endswith(".scope"):
        return path
    prefix, _, identifier = name.removesuffix(".scope").partition("-")
    return f"{os.path.basename(directory)}:{prefix}:{identifier}"
