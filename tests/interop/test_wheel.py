"""The wheel is complete in itself: installed away from any checkout, it brings up a node with a container and a virtual machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_support import BIN, REPOSITORY, Node, http_get

LIMIT_S = 400  # its guest is built and boots emulated, and its images are made from packages fetched anew


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment as pipx makes one: the system's Python, the wheel, and what PyPI has for it."""
    place = tmp_path_factory.mktemp("wheel")
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        f"--wheel-dir={place}",
        str(REPOSITORY),
    ]
    subprocess.run(wheel, check=True)
    subprocess.run(["/usr/bin/python3", "-m", "venv", place / "environment"], check=True)
    (found,) = place.glob("nacre-*.whl")
    subprocess.run([place / "environment/bin/pip", "install", "-q", f"{found}[kubectl]"], check=True)
    found.unlink()
    return place / "environment"


@pytest.fixture
def node(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.chdir("/")
    monkeypatch.setenv("PATH", os.pathsep.join(place for place in os.environ["PATH"].split(os.pathsep) if place != str(BIN)))
    monkeypatch.delenv("NACRE_SOFTWARE", raising=False)
    node = Node(tmp_path, bin=installed / "bin")
    try:
        yield node
    finally:
        node.nacre("reset", "--yes", check=False)


@pytest.mark.slow
def test_a_node_from_the_wheel_runs_its_examples_as_container_and_as_virtual_machine(node: Node, installed: Path) -> None:
    (examples,) = installed.glob("lib/python3*/site-packages/nacre/examples")
    assert node.nacre("doctor").returncode == 0
    node.nacre("up")
    for example in ("nginx", "nginx-kata"):
        node.kubectl("apply", "-f", str(examples / f"{example}.yaml"))
    for name in ("nginx", "nginx-kata"):
        node.kubectl("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={LIMIT_S}s", timeout_s=LIMIT_S + 10)
        assert http_get(node.address(name))[0] == 200
    kernels = [node.kubectl("exec", name, "--", "uname", "-r").strip() for name in ("nginx", "nginx-kata")]
    assert kernels[0] == os.uname().release != kernels[1]
    told = node.traces().processes
    assert told and not any(str(REPOSITORY) in line for line in told), told
    node.nacre("down")
    assert node.traces().processes == () == node.traces().mounts == node.traces().links
    node.nacre("reset", "--yes")
    assert [path.name for path in node.prefix.rglob("*") if path.is_file()] == ["config.toml"], "only what a user wrote stays"
