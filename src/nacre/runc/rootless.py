"""A runtime that is not the host's root: an ordinary user, or root of a user namespace only (which is what podman without root starts)."""

from __future__ import annotations

import os

from nacre.linux.cgroup_layout import Layout

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_EVERYBODY = ["0", "0", "4294967295"]  # the map of the first user namespace: user_namespaces(7)


def in_user_namespace() -> bool:
    """Whether this process is in another user namespace than the host's: it cannot make device nodes, whoever it is."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return file.readline().split() != _EVERYBODY


def usable(layout: Layout, spec: Mapping[str, Any], *, systemd: bool) -> Layout:
    """The layout, or an empty one: where groups cannot be made, none is named and nothing is limited, a container does without."""
    linux = spec.get("linux", {})
    if systemd or linux.get("cgroupsPath") or _limits(linux.get("resources", {})):
        return layout
    if all(os.access(layout.directory(hierarchy, "/"), os.W_OK) for hierarchy in layout.hierarchies):
        return layout
    if os.geteuid() == 0 and not in_user_namespace():
        return layout  # read-only cgroups are told of
    return Layout(hierarchies=(), looked=layout.looked)


def _limits(resources: Mapping[str, Any]) -> bool:
    """Rules for devices are none: without the right to make nodes the container meets those that it is given."""
    return any(value for key, value in resources.items() if key != "devices")
