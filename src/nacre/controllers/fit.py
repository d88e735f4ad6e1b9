"""Whether a pod fits a node, and if not why, in the scheduler's words. Plain functions of JSON trees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from nacre.controllers.quantity import milli

Object = dict[str, Any]
PODS = "pods"  # the resource that counts pods
NOT_READY, UNSCHEDULABLE = "node.kubernetes.io/not-ready", "node.kubernetes.io/unschedulable"
_BINDING_EFFECTS = ("NoSchedule", "NoExecute")


def requests(pod: Object) -> Counter[str]:
    """What the pod takes of its node, in thousandths: the greater of the containers' sum and each init container, and overhead."""
    spec = pod["spec"]
    total: Counter[str] = Counter()
    for container in spec.get("containers", []):
        total.update(_requested(container))
    for container in spec.get("initContainers", []):
        for name, value in _requested(container).items():
            total[name] = max(total[name], value)
    total.update({name: milli(text) for name, text in spec.get("overhead", {}).items()})
    total[PODS] = 1000
    return total


def _requested(container: Object) -> Counter[str]:
    table = container.get("resources", {}).get("requests", {})
    return Counter({name: milli(text) for name, text in table.items()})


def host_ports(pod: Object) -> set[tuple[str, str, int]]:
    """(protocol, host address, port) the pod claims on its node."""
    return {
        (port.get("protocol", "TCP"), port.get("hostIP") or "0.0.0.0", port["hostPort"])
        for container in pod["spec"].get("containers", [])
        for port in container.get("ports", [])
        if port.get("hostPort")
    }


def reasons(pod: Object, node: Object, others: Iterable[Object]) -> list[str]:
    """Why `pod` cannot run on `node` beside `others` (the pods it holds already); empty when it can."""
    placing = list(_placing(pod, node))
    if placing:
        return placing  # like Kubernetes, resources are only looked at on a node that is right otherwise
    held = list(others)
    found = []
    taken = set().union(*(host_ports(other) for other in held))
    if any(_clash(wanted, have) for wanted in host_ports(pod) for have in taken):
        found.append("node(s) didn't have free ports for the requested pod ports")
    return found + _short(pod, node, held)


def _placing(pod: Object, node: Object) -> Iterator[str]:
    spec = pod["spec"]
    tolerations = spec.get("tolerations", [])
    if node.get("spec", {}).get("unschedulable") and not _tolerated({"key": UNSCHEDULABLE, "effect": "NoSchedule"}, tolerations):
        yield "node(s) were unschedulable"
        return
    for taint in (*node.get("spec", {}).get("taints", []), *_condition_taints(node)):
        if taint.get("effect") in _BINDING_EFFECTS and not _tolerated(taint, tolerations):
            yield f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"
            return
    labels = node["metadata"].get("labels", {})
    if any(labels.get(key) != value for key, value in spec.get("nodeSelector", {}).items()):
        yield "node(s) didn't match Pod's node affinity/selector"


def _condition_taints(node: Object) -> list[Object]:
    """A node that does not say it is ready takes no new pods; Kubernetes' node controller says so by this taint."""
    conditions = node.get("status", {}).get("conditions", [])
    ready = any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)
    have = any(taint.get("key") == NOT_READY for taint in node.get("spec", {}).get("taints", []))
    return [] if ready or have else [{"key": NOT_READY, "effect": "NoSchedule"}]


def _tolerated(taint: Object, tolerations: Iterable[Object]) -> bool:
    for one in tolerations:
        if one.get("effect") and one["effect"] != taint.get("effect"):
            continue
        if one.get("key") and one["key"] != taint.get("key"):
            continue
        if one.get("operator", "Equal") == "Exists":
            return True
        if one.get("key") and one.get("value", "") == taint.get("value", ""):
            return True
    return False


def _clash(one: tuple[str, str, int], other: tuple[str, str, int]) -> bool:
    if one[0] != other[0] or one[2] != other[2]:
        return False
    return one[1] == other[1] or "0.0.0.0" in (one[1], other[1])


def _short(pod: Object, node: Object, held: list[Object]) -> list[str]:
    used: Counter[str] = Counter()
    for other in held:
        used.update(requests(other))
    allocatable = node.get("status", {}).get("allocatable", {})
    found = []
    for name, value in sorted(requests(pod).items()):
        if value and used[name] + value > milli(allocatable.get(name, "0")):
            found.append("Too many pods" if name == PODS else f"Insufficient {name}")
    return found


def sentence(verdicts: dict[str, list[str]]) -> str:
    """`verdicts` (node -> reasons) as Kubernetes words them: "0/2 nodes are available: 1 Insufficient cpu, 1 …." """
    if not verdicts:
        return "no nodes available to schedule pods"
    counted = Counter(reason for found in verdicts.values() for reason in found)
    parts = sorted(f"{count} {reason}" for reason, count in counted.items())
    return f"0/{len(verdicts)} nodes are available: {', '.join(parts)}."
