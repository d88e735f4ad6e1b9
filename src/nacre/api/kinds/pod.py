"""Pods (core/v1): columns, immutability, selectors; defaults and checks are `poddefaults` and `podcheck`."""

from __future__ import annotations

import copy
from datetime import datetime
from typing import Any

from nacre.api.kind import AGE, NAME, STATUS, Column, Kind, Object, Subresource, age, at, created, instant
from nacre.api.kinds import podcheck, poddefaults
from nacre.api.status import Cause, forbidden_field, invalid_value

UPDATE_WORDS = (
    "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
    "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
    "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
)
_STREAM_VERBS = ("create", "get")


def _prepare(pod: Object) -> None:
    """A new pod's status is the server's to write."""
    pod["status"] = {"phase": "Pending"}


def _check(pod: Object) -> list[Cause]:
    return podcheck.check_spec(pod.get("spec", {}))


def _check_update(new: Object, old: Object) -> list[Cause]:
    """Only images, deadlines and further tolerations may change; the message names what did."""
    before, after = old["spec"], new["spec"]
    if before == after:
        return []
    causes: list[Cause] = []
    deadline_before, deadline_after = before.get("activeDeadlineSeconds"), after.get("activeDeadlineSeconds")
    if deadline_before is not None and (deadline_after is None or deadline_after > deadline_before):
        words = (
            f"must be less than or equal to previous value {deadline_before}"
            if deadline_after
            else "must not update from a positive integer to nil value"
        )
        causes.append(invalid_value("spec.activeDeadlineSeconds", deadline_after, words))
    kept = after.get("tolerations", [])
    if any(one not in kept for one in before.get("tolerations", [])):
        causes.append(forbidden_field("spec.tolerations", "existing toleration can not be modified except its tolerationSeconds"))
    names = (
        [one.get("name") for one in before.get(group, [])] == [one.get("name") for one in after.get(group, [])]
        for group in ("containers", "initContainers")
    )
    if not all(names):
        causes.append(forbidden_field("spec.containers", "pod updates may not add or remove containers"))
        return causes
    changed = _differences(_fixed(before, after), after, "spec")
    if changed:
        causes.append(forbidden_field("spec", f"{UPDATE_WORDS}\nchanged here: {', '.join(changed[:10])}"))
    return causes


def _fixed(before: Object, after: Object) -> Object:
    """`before` with the parts that may change taken from `after`."""
    spec = copy.deepcopy(before)
    for key in ("activeDeadlineSeconds", "tolerations"):
        spec.pop(key, None)
        if key in after:
            spec[key] = after[key]
    for group in ("containers", "initContainers"):
        for mine, theirs in zip(spec.get(group, []), after.get(group, []), strict=True):
            mine["image"] = theirs.get("image")
    return spec


def _differences(one: Any, other: Any, path: str) -> list[str]:
    """Paths at which two trees differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys())
        return [found for key in keys for found in _differences(one.get(key), other.get(key), f"{path}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, (left, right) in pairs for found in _differences(left, right, f"{path}[{index}]")]
    return [] if one == other else [path]


# ---- columns


def _row(pod: Object, now: datetime) -> list[Any]:
    spec, status = pod.get("spec", {}), pod.get("status", {})
    total = len(spec.get("containers", []))
    word, ready, restarts, restarted = status.get("reason") or status.get("phase", ""), 0, 0, ""
    if any(one.get("reason") == "SchedulingGated" for one in status.get("conditions", []) if one.get("type") == "PodScheduled"):
        word = "SchedulingGated"
    sidecars = {one["name"] for one in spec.get("initContainers", []) if one.get("restartPolicy") == "Always"}
    total += len(sidecars)
    initializing = ""
    for index, one in enumerate(status.get("initContainerStatuses", [])):
        restarts, restarted = restarts + one.get("restartCount", 0), max(restarted, _last_end(one))
        sidecar = one.get("name") in sidecars
        ready += sidecar and bool(one.get("ready"))
        initializing = initializing or _init_word(one, index, len(spec.get("initContainers", [])), sidecar=sidecar)
    initialized = any(one.get("type") == "Initialized" and one.get("status") == "True" for one in status.get("conditions", []))
    if initializing and not initialized:
        word = initializing
    else:
        restarts = sum(
            one.get("restartCount", 0) for one in status.get("initContainerStatuses", []) if one.get("name") in sidecars
        )
        word, ready, restarts, restarted = _running(status, word, ready, restarts, restarted if sidecars else "")
    if pod["metadata"].get("deletionTimestamp"):
        if status.get("reason") == "NodeLost":
            word = "Unknown"
        elif status.get("phase") not in ("Succeeded", "Failed"):
            word = "Terminating"
    return [
        pod["metadata"]["name"],
        f"{ready}/{total}",
        word,
        f"{restarts} ({age(restarted, now)} ago)" if restarts and restarted else str(restarts),
        created(pod, now),
        (status.get("podIPs") or [{}])[0].get("ip") or status.get("podIP") or "<none>",
        spec.get("nodeName") or "<none>",
        status.get("nominatedNodeName") or "<none>",
        _gates(spec, status),
    ]


def _init_word(one: Object, index: int, count: int, *, sidecar: bool) -> str:
    """What the init container's state makes of the pod's status, "" when it is done."""
    state = one.get("state", {})
    if (ended := state.get("terminated")) is not None:
        if ended.get("exitCode") == 0:
            return ""
        if ended.get("reason"):
            return "Init:" + str(ended["reason"])
        return f"Init:Signal:{ended['signal']}" if ended.get("signal") else f"Init:ExitCode:{ended.get('exitCode')}"
    if sidecar and one.get("started"):
        return ""
    reason = state.get("waiting", {}).get("reason", "")
    return f"Init:{reason}" if reason not in ("", "PodInitializing") else f"Init:{index}/{count}"


def _running(status: Object, word: str, ready: int, restarts: int, restarted: str) -> tuple[str, int, int, str]:
    """Status word, ready containers, restarts and the newest restart's time, by the ordinary containers."""
    running = False
    for one in reversed(status.get("containerStatuses", [])):
        restarts, restarted = restarts + one.get("restartCount", 0), max(restarted, _last_end(one))
        state = one.get("state", {})
        ended = state.get("terminated")
        if state.get("waiting", {}).get("reason"):
            word = state["waiting"]["reason"]
        elif ended is not None and ended.get("reason"):
            word = ended["reason"]
        elif ended is not None:
            word = f"Signal:{ended['signal']}" if ended.get("signal") else f"ExitCode:{ended.get('exitCode')}"
        elif one.get("ready") and "running" in state:
            running, ready = True, ready + 1
    if word == "Completed" and running:
        is_ready = any(one.get("type") == "Ready" and one.get("status") == "True" for one in status.get("conditions", []))
        word = "Running" if is_ready else "NotReady"
    return word, ready, restarts, restarted


def _last_end(one: Object) -> str:
    """When the container's former run ended, RFC 3339, "" if it never ran before."""
    finished = one.get("lastState", {}).get("terminated", {}).get("finishedAt", "")
    return finished if finished and instant(finished).year > 1970 else ""


def _gates(spec: Object, status: Object) -> str:
    gates = [gate.get("conditionType") for gate in spec.get("readinessGates", [])]
    met = sum(1 for one in status.get("conditions", []) if one.get("type") in gates and one.get("status") == "True")
    return f"{met}/{len(gates)}" if gates else "<none>"


KIND = Kind(
    group="",
    version="v1",
    name="Pod",
    plural="pods",
    singular="pod",
    struct_name="io.k8s.api.core.v1.Pod",
    namespaced=True,
    short=("po",),
    categories=("all",),
    counts_generations=True,
    subresources=(
        Subresource(path="attach", verbs=_STREAM_VERBS, name="PodAttachOptions"),
        Subresource(path="binding", verbs=("create",), name="Binding"),
        Subresource(path="exec", verbs=_STREAM_VERBS, name="PodExecOptions"),
        Subresource(path="log", verbs=("get",)),
        Subresource(path="portforward", verbs=_STREAM_VERBS, name="PodPortForwardOptions"),
        STATUS,
    ),
    columns=(
        NAME,
        Column(name="Ready", description="How many of the containers are ready."),
        Column(name="Status", description="The containers' state in one word."),
        Column(name="Restarts", description="How often containers were restarted, and when last."),
        AGE,
        Column(name="IP", priority=1, description="The pod's address."),
        Column(name="Node", priority=1, description="Where it runs."),
        Column(name="Nominated Node", priority=1, description="Where preemption makes room for it."),
        Column(name="Readiness Gates", priority=1, description="How many of its readiness gates are met."),
    ),
    row=_row,
    defaults=poddefaults.apply,
    check=_check,
    check_update=_check_update,
    prepare_create=_prepare,
    returns_deleted=True,
    fields={
        "spec.nodeName": at("spec", "nodeName"),
        "spec.restartPolicy": at("spec", "restartPolicy"),
        "spec.schedulerName": at("spec", "schedulerName"),
        "spec.serviceAccountName": at("spec", "serviceAccountName"),
        "spec.hostNetwork": lambda pod: "true" if pod.get("spec", {}).get("hostNetwork") else "false",
        "status.phase": at("status", "phase"),
        "status.podIP": at("status", "podIP"),
        "status.nominatedNodeName": at("status", "nominatedNodeName"),
    },
)
