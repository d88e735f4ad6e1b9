"""Down means down: a whole node in namespaces of its own, compared with what was there before it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Machine, machine

from nacre.cli import archive, proof_image, sweep
from nacre.linux import cgroups

IMAGE = "nacre.local/shell:test"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Machine]:
    place, prefix = tmp_path / "place", tmp_path / "node"
    place.mkdir()
    prefix.mkdir()
    with machine(prefix, place) as made:
        yield made


def pods(*names: str) -> str:
    """Pods with a host port and a volume in memory, so that there is something of every kind to take down."""
    container = {
        "name": "main",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "args": ["-c", "echo here; while :; do read line < /dev/zero; done"],
        "volumeMounts": [{"name": "memory", "mountPath": "/m"}],
    }
    spec = {
        "terminationGracePeriodSeconds": 1,
        "volumes": [{"name": "memory", "emptyDir": {"medium": "Memory"}}],
    }
    items = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": spec | {"containers": [container | {"ports": [{"containerPort": 80, "hostPort": 18080 + number}]}]},
        }
        for number, name in enumerate(names)
    ]
    return "\n---\n".join(map(json.dumps, items))


def up_with_pods(here: Machine, tmp_path: Path, *names: str) -> None:
    path = str(tmp_path / "shell.tar")
    archive.write(path, [IMAGE], proof_image.layer(), entrypoint=[proof_image.SHELL], made_by="a test")
    here.nacre("image", "import", path)
    here.nacre("up")
    here.nacre("kubectl", "apply", "-f", "-", stdin=pods(*names))
    for name in names:
        here.ready(name)


def settled(picture: dict[str, object]) -> dict[str, object]:
    """Without the files that a node keeps for its next start: databases, keys, the lease book's directory."""
    return {key: value for key, value in picture.items() if key != "files"}


def daemon(here: Machine) -> int:
    return int(json.loads((here.prefix / "run/nacre/node.json").read_text())["pid"])


def test_after_down_the_host_is_what_it_was_and_up_brings_the_pods_back(here: Machine, tmp_path: Path) -> None:
    before = here.picture()
    up_with_pods(here, tmp_path, "a", "b")
    during = here.picture()
    for kind in ("mounts", "cgroups", "processes", "all addresses", "all rules", "sysctls"):
        assert during[kind] != before[kind], f"the test would not see {kind}"
    said = here.nacre("down").stdout
    assert "2 pods were stopped" in said
    assert settled(here.picture()) == settled(before)
    assert os.listdir(here.prefix / "run/nacre") == ["trace"]
    here.nacre("up")
    for name in ("a", "b"):
        here.ready(name)


@pytest.mark.parametrize("command", [("down",), ("down", "--force")], ids=["down", "down --force"])
def test_after_a_kill_of_the_daemon_down_takes_off_what_it_left(here: Machine, tmp_path: Path, command: tuple[str, ...]) -> None:
    before = here.picture()
    up_with_pods(here, tmp_path, "a")
    os.kill(daemon(here), signal.SIGKILL)
    assert here.picture()["processes"], "the pod outlives its daemon"
    assert "were left behind and are removed now" in here.nacre(*command).stdout
    assert settled(here.picture()) == settled(before)
    assert "nothing of it was left" in here.nacre("down").stdout


def test_reset_leaves_no_file_either(here: Machine, tmp_path: Path) -> None:
    before = here.picture()
    up_with_pods(here, tmp_path, "a")
    here.nacre("reset", "--yes")
    assert here.picture() == before
    assert list(here.prefix.iterdir()) == []


def test_a_cgroup_that_the_dying_hold_is_waited_for(tmp_path: Path) -> None:
    """A large process has ended to who watches it a while before the kernel lets its cgroups go."""
    group = cgroups.Cgroup(cgroups.discover(), f"/nacre-test-{tmp_path.name}/inner")
    group.create()
    directories = [directory for _, directory in group.directories()]
    with subprocess.Popen(["sleep", "0.3"]) as dying:
        group.join(dying.pid)
        refused: list[str] = []
        sweep.remove_cgroups([*directories, *map(os.path.dirname, directories)], refused)
    assert not refused
    assert not any(os.path.exists(directory) for directory in directories)
