"""A pod's status from what the runtime tells. Pure: the same input gives the same status, so an unchanged one is not written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nacre.kubelet.resources import qos_class
from nacre.kubelet.times import stamp
from nacre.wire import cri_pb2 as cri


@dataclass(slots=True, kw_only=True)
class Facts:
    """What a worker knows beside the runtime's words."""

    node_address: str
    start_time: float
    addresses: list[str] = field(default_factory=list)  # the sandbox's
    sandbox_made: bool = False
    sandbox_failure: str = ""
    waiting: dict[str, tuple[str, str]] = field(default_factory=dict)  # container → (reason, message)
    statuses: dict[str, Any] = field(default_factory=dict)  # container → newest CRI ContainerStatus
    former: dict[str, dict[str, Any]] = field(default_factory=dict)  # container → state of the attempt before
    messages: dict[str, str] = field(default_factory=dict)  # container id → termination message
    ready: dict[str, bool] = field(default_factory=dict)  # by readiness probe; absent: no probe
    started: dict[str, bool] = field(default_factory=dict)  # by startup probe; absent: no probe
    ended: tuple[str, str] | None = None  # (reason, message) when the kubelet ended the pod


def pod_status(pod: Mapping[str, Any], facts: Facts, now: float) -> dict[str, Any]:
    """The whole `.status` of `pod`; condition times are kept where nothing changed."""
    spec, before = pod["spec"], pod.get("status") or {}
    first = [container_status(one, facts, pod) for one in spec.get("initContainers") or []]
    main = [container_status(one, facts, pod) for one in spec["containers"]]
    phase = _phase(spec, first, main, facts)
    if before.get("phase") in ("Succeeded", "Failed"):
        phase = before["phase"]  # an ended pod does not come back
    status: dict[str, Any] = {
        "phase": phase,
        "conditions": _conditions(pod, facts, first, main, phase, now),
        "hostIP": facts.node_address,
        "hostIPs": [{"ip": facts.node_address}],
        "startTime": stamp(facts.start_time),
        "containerStatuses": main,
        "qosClass": before.get("qosClass") or qos_class(spec),
    }
    if first:
        status["initContainerStatuses"] = first
    addresses = [facts.node_address] if spec.get("hostNetwork") else facts.addresses
    if addresses:
        status |= {"podIP": addresses[0], "podIPs": [{"ip": address} for address in addresses]}
    if facts.ended:
        status |= {"reason": facts.ended[0], "message": facts.ended[1]}
    return status


def container_status(container: Mapping[str, Any], facts: Facts, pod: Mapping[str, Any]) -> dict[str, Any]:
    name = container["name"]
    seen = facts.statuses.get(name)
    status: dict[str, Any] = {
        "name": name,
        "image": container["image"],
        "imageID": "",
        "ready": False,
        "started": False,
        "restartCount": 0,
        "state": {},
        "lastState": facts.former.get(name, {}),
    }
    if seen is None:
        told = _told(pod, name)
        if told is not None:
            return told  # the pod ended, and the runtime has forgotten it
        reason, message = facts.waiting.get(name) or (not_yet(pod, name), "")
        status["state"] = {"waiting": {"reason": reason} | ({"message": message} if message else {})}
        return status
    status |= {
        "containerID": f"nacre://{seen.id}",
        "image": seen.image.image or container["image"],
        "imageID": seen.image_ref or seen.image_id,
        "restartCount": seen.metadata.attempt,
    }
    current = state_of(seen, facts.messages.get(seen.id, ""))
    if seen.state == cri.CONTAINER_RUNNING:
        status["started"] = facts.started.get(name, True)
        status["ready"] = status["started"] and facts.ready.get(name, True)
    init = any(one["name"] == name for one in pod["spec"].get("initContainers") or [])
    if seen.state == cri.CONTAINER_EXITED and init and not is_sidecar(container):
        status["ready"] = seen.exit_code == 0
    if name in facts.waiting and seen.state != cri.CONTAINER_RUNNING:
        reason, message = facts.waiting[name]
        status["lastState"] = current if seen.state == cri.CONTAINER_EXITED else status["lastState"]
        current = {"waiting": {"reason": reason, "message": message}}
    status["state"] = current
    return status


def _told(pod: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    before = pod.get("status") or {}
    listed = [*(before.get("initContainerStatuses") or []), *(before.get("containerStatuses") or [])]
    found = next((one for one in listed if one["name"] == name), None)
    return found if before.get("phase") in ("Succeeded", "Failed") else None


def is_sidecar(container: Mapping[str, Any]) -> bool:
    """An init container that keeps running beside the others (KEP-753)."""
    return bool(container.get("restartPolicy") == "Always")


def _done(container: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    """Whether an init container lets the next one begin."""
    return bool(told["started"]) if is_sidecar(container) else (told["state"].get("terminated") or {}).get("exitCode") == 0


def state_of(seen: Any, message: str) -> dict[str, Any]:
    """ContainerState of a CRI status."""
    if seen.state == cri.CONTAINER_RUNNING:
        return {"running": {"startedAt": stamp(seen.started_at / 1e9)}}
    if seen.state == cri.CONTAINER_CREATED:
        return {"waiting": {"reason": "ContainerCreating"}}
    ended: dict[str, Any] = {
        "exitCode": seen.exit_code,
        "reason": seen.reason or ("Completed" if seen.exit_code == 0 else "Error"),
        "startedAt": stamp(seen.started_at / 1e9),
        "finishedAt": stamp(seen.finished_at / 1e9),
        "containerID": f"nacre://{seen.id}",
    }
    if message or seen.message:
        ended["message"] = message or seen.message
    return {"terminated": ended}


def not_yet(pod: Mapping[str, Any], name: str) -> str:
    first = [one["name"] for one in pod["spec"].get("initContainers") or []]
    return "PodInitializing" if first and name not in first else "ContainerCreating"


def _phase(spec: Mapping[str, Any], first: list[dict[str, Any]], main: list[dict[str, Any]], facts: Facts) -> str:
    if facts.ended:
        return "Failed"
    policy = spec.get("restartPolicy", "Always")
    inits = list(zip(spec.get("initContainers") or [], first, strict=True))
    failed_first = any((told["state"].get("terminated") or {}).get("exitCode") for one, told in inits if not is_sidecar(one))
    if failed_first and policy == "Never":
        return "Failed"
    states = [one["state"] for one in main]
    if all("terminated" in state for state in states) and policy != "Always":
        codes = [state["terminated"]["exitCode"] for state in states]
        if all(code == 0 for code in codes):
            return "Succeeded"
        if policy == "Never":
            return "Failed"
    if not all(_done(*pair) for pair in inits) and not any("running" in state for state in states):
        return "Pending"
    never_ran = [one for one in main if "waiting" in one["state"] and not one["lastState"] and not one["restartCount"]]
    return "Pending" if never_ran else "Running"


def _conditions(
    pod: Mapping[str, Any], facts: Facts, first: list[dict[str, Any]], main: list[dict[str, Any]], phase: str, now: float
) -> list[dict[str, Any]]:
    before = {one["type"]: one for one in (pod.get("status") or {}).get("conditions") or []}
    inits = list(zip(pod["spec"].get("initContainers") or [], first, strict=True))
    sidecars = [told for one, told in inits if is_sidecar(one)]
    unready = [told["name"] for told in (*main, *sidecars) if not told["ready"]]
    over = phase in ("Succeeded", "Failed")
    incomplete = [told["name"] for one, told in inits if not (_done(one, told) or (over and is_sidecar(one)))]
    why = (
        ("PodCompleted" if phase == "Succeeded" else "PodFailed", "")
        if over
        else ("ContainersNotReady", f"containers with unready status: [{' '.join(unready)}]")
    )
    fine = not unready and not over
    made = {
        "PodReadyToStartContainers": (
            facts.sandbox_made and not over,
            "" if facts.sandbox_made else "FailedCreatePodSandBox" if facts.sandbox_failure else "",
            facts.sandbox_failure,
        ),
        "Initialized": (
            not incomplete,
            "ContainersNotInitialized" if incomplete else "PodCompleted" if phase == "Succeeded" else "",
            f"containers with incomplete status: [{' '.join(incomplete)}]" if incomplete else "",
        ),
        "Ready": (fine, *(("", "") if fine else why)),
        "ContainersReady": (fine, *(("", "") if fine else why)),
    }
    conditions = [_condition(kind, *row, before.get(kind), now) for kind, row in made.items()]
    return [*conditions, before.get("PodScheduled") or _condition("PodScheduled", True, "", "", None, now)]


def _condition(kind: str, true: bool, reason: str, message: str, before: Mapping[str, Any] | None, now: float) -> dict[str, Any]:
    value = "True" if true else "False"
    changed = before is None or before.get("status") != value
    made: dict[str, Any] = {"type": kind, "status": value, "lastProbeTime": None}
    made["lastTransitionTime"] = stamp(now) if changed else before["lastTransitionTime"]  # type: ignore[index]
    if reason:
        made["reason"] = reason
    if message:
        made["message"] = message
    return made
