"""Who owns a container's cgroup (config-linux.md "Cgroup ownership")."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nacre.linux.cgroups import Cgroup, Hierarchy, Layout
from nacre.runc import plan, templates


def document(*options: str, uid: int = 7) -> dict[str, Any]:
    made = templates.spec(rootless=False)
    made["process"]["user"]["uid"] = uid
    made["linux"]["namespaces"] = [{"type": "mount"}, {"type": "cgroup"}]
    (shown,) = (mount for mount in made["mounts"] if mount["type"] == "cgroup")
    shown["options"] = list(options)
    return made


def test_a_cgroup_that_is_shown_writable_belongs_to_the_user_as_the_host_knows_him() -> None:
    wanted = document("nosuid")
    assert plan.cgroup_owner(wanted) == 7
    wanted["linux"]["namespaces"].append({"type": "user"})
    wanted["linux"]["uidMappings"] = [
        {"containerID": 0, "hostID": 1000, "size": 1},
        {"containerID": 1, "hostID": 100000, "size": 50},
    ]
    assert plan.cgroup_owner(wanted) == 100006
    wanted["process"]["user"]["uid"] = 99
    assert plan.cgroup_owner(wanted) is None


def test_one_that_is_read_only_elsewhere_or_without_a_namespace_of_its_own_stays_the_hosts() -> None:
    assert plan.cgroup_owner(document("ro")) is None
    shared = document()
    shared["linux"]["namespaces"] = [one for one in shared["linux"]["namespaces"] if one["type"] != "cgroup"]
    assert plan.cgroup_owner(shared) is None
    nowhere = document()
    nowhere["mounts"] = [mount for mount in nowhere["mounts"] if mount["type"] != "cgroup"]
    assert plan.cgroup_owner(nowhere) is None


@pytest.mark.parametrize("version", [1, 2])
def test_the_directory_and_what_the_kernel_names_are_given_on_v2_alone(tmp_path: Path, version: int) -> None:
    group = tmp_path / "web"
    group.mkdir()
    for name in ("cgroup.procs", "cgroup.threads", "memory.max"):
        (group / name).touch()
    layout = Layout(hierarchies=(Hierarchy(mount=str(tmp_path), version=version, controllers=frozenset({"memory"})),))
    Cgroup(layout, "/web").give(1234)
    given = 1234 if version == 2 else os.getuid()
    owners = {place.name: place.stat().st_uid for place in (group, *group.iterdir())}
    assert owners == {"web": given, "cgroup.procs": given, "cgroup.threads": given, "memory.max": os.getuid()}
