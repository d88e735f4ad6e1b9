"""Where a pod fits, and the words when it does not."""

from __future__ import annotations

from typing import Any

import pytest

from nacre.controllers import fit


def node(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "metadata": {"name": "n", "labels": {"zone": "a"}},
        "spec": {},
        "status": {
            "allocatable": {"cpu": "2", "memory": "1Gi", "pods": "3"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }
    for part, value in changes.items():
        found[part] = found[part] | value
    return found


def pod(cpu: str = "", memory: str = "", **spec: Any) -> dict[str, Any]:
    asked = {key: value for key, value in (("cpu", cpu), ("memory", memory)) if value}
    return {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "resources": {"requests": asked}}], **spec}}


@pytest.mark.parametrize(
    ("thing", "place", "others", "wanted"),
    [
        (pod("2", "1Gi"), node(), [], []),
        (pod("2001m"), node(), [], ["Insufficient cpu"]),
        (pod("1", "2Gi"), node(), [pod("1500m")], ["Insufficient cpu", "Insufficient memory"]),
        (pod(memory="1Gi", overhead={"memory": "1Mi"}), node(), [], ["Insufficient memory"]),
        (pod(), node(), [pod(), pod(), pod()], ["Too many pods"]),
        (pod(nodeSelector={"zone": "b"}), node(), [], ["node(s) didn't match Pod's node affinity/selector"]),
        (pod(), node(spec={"unschedulable": True}), [], ["node(s) were unschedulable"]),
        (pod(), node(status={"conditions": []}), [], ["node(s) had untolerated taint {node.kubernetes.io/not-ready: }"]),
        (
            pod(),
            node(spec={"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]}),
            [],
            ["node(s) had untolerated taint {k: v}"],
        ),
        (
            pod(tolerations=[{"key": "k", "operator": "Exists"}]),
            node(spec={"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]}),
            [],
            [],
        ),
        (pod(tolerations=[{"operator": "Exists"}]), node(status={"conditions": []}), [], []),
        (pod(), node(spec={"taints": [{"key": "k", "effect": "PreferNoSchedule"}]}), [], []),
        (
            pod(gpu="1") | {"spec": {"containers": [{"resources": {"requests": {"x.io/gpu": "1"}}}]}},
            node(),
            [],
            ["Insufficient x.io/gpu"],
        ),
    ],
)
def test_the_reasons_why_not(thing: dict[str, Any], place: dict[str, Any], others: list[Any], wanted: list[str]) -> None:
    assert fit.reasons(thing, place, others) == wanted


def test_init_containers_count_by_the_greatest() -> None:
    thing = pod("1") | {}
    thing["spec"]["initContainers"] = [{"resources": {"requests": {"cpu": "3"}}}, {"resources": {"requests": {"memory": "1Gi"}}}]
    assert fit.requests(thing) == {"cpu": 3000, "memory": 1024**3 * 1000, "pods": 1000}


def test_a_host_port_is_free_once() -> None:
    def claiming(port: int, address: str = "") -> dict[str, Any]:
        ports = [{"containerPort": 80, "hostPort": port, "hostIP": address}]
        return {"metadata": {}, "spec": {"containers": [{"ports": ports}]}}

    words = ["node(s) didn't have free ports for the requested pod ports"]
    assert fit.reasons(claiming(80), node(), [claiming(80, "127.0.0.1")]) == words
    assert fit.reasons(claiming(80, "10.0.0.1"), node(), [claiming(80, "127.0.0.1")]) == []
    assert fit.reasons(claiming(81), node(), [claiming(80)]) == []


def test_the_sentence_counts_nodes_by_reason() -> None:
    assert fit.sentence({}) == "no nodes available to schedule pods"
    verdicts = {"a": ["Insufficient cpu", "Insufficient memory"], "b": ["Insufficient cpu"]}
    assert fit.sentence(verdicts) == "0/2 nodes are available: 1 Insufficient memory, 2 Insufficient cpu."
