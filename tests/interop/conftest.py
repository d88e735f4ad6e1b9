"""One node for all chain tests of a run: what it costs is paid once, and tests with pods of their own do not disturb one another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from node_support import Node


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node with the demo's images; at the end `nacre down` must leave nothing of it on the host."""
    node = Node(tmp_path_factory.mktemp("node"))
    before = node.traces()
    try:
        node.nacre("up")
        node.nacre("image", "build-demo", timeout_s=300)
        yield node
        node.nacre("down")
        after = node.traces()
        for kind in ("mounts", "cgroups", "links", "rules", "processes"):
            assert getattr(after, kind) == getattr(before, kind)
    finally:
        node.nacre("reset", "--yes", check=False)


@pytest.fixture(scope="session")
def kata(node: Node) -> str:
    """The name of the RuntimeClass whose pods are virtual machines."""
    node.nacre("enable", "kata", timeout_s=300)
    node.kubectl(
        "wait", "--for=delete", "pods", "--all", "-A", "--timeout=60s", check=False
    )  # the pod that proved it may still be ending
    return "kata"


@pytest.fixture(params=["", "kata"], ids=["runc", "kata"])
def handler(request: pytest.FixtureRequest) -> str:
    """Each test that takes it runs once with containers and once with a virtual machine."""
    return str(request.getfixturevalue("kata")) if request.param else ""
