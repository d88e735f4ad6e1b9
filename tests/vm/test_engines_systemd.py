"""Debian's podman, containerd and docker as on most hosts: cgroup v2, systemd for their cgroups, all else as their packages have it."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine_support import REPOSITORY, run
from test_runc_matrix import passed
from test_systemd_user import MANAGER

PACKAGES = (
    *("podman", "conmon", "catatonit", "netavark", "uidmap", "golang-github-containers-common", "dbus-user-session"),
    *("containerd", "containernetworking-plugins", "docker.io", "apparmor"),
)
ELSEWHERE = "export TMPDIR=/machine\n"  # a container that has the root for its own must not find podman's storage in it


def suite(name: str, *, prepare: str = "") -> str:
    options = "-v --color=no -p no:cacheprovider -p no:xdist --tb=short"
    settings = "export NACRE_TEST_CGROUPS=systemd NACRE_TEST_CALL_S=600"
    return f"{prepare}{settings}\ncd {REPOSITORY}\npython -m pytest {options} tests/interop/test_engines_{name}.py\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prepare", "count"),
    [("podman", ELSEWHERE, 15), ("rootless", MANAGER, 5), ("containerd", "", 4), ("docker", ELSEWHERE, 7)],
)
def test_all_of_an_engines_tests_pass_where_systemd_makes_its_cgroups(
    name: str, prepare: str, count: int, tmp_path: Path
) -> None:
    job = suite(name, prepare=prepare)
    passed(run(job, "systemd", [], tmp_path, timeout_s=3600, memory_mib=2048, packages=PACKAGES, processors=1), count)
