"""What one pod needs next, decided without touching anything: the pod as the API has it and the runtime's state in, an Action out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nacre.kubelet.times import parse

FIRST_BACKOFF_S, LAST_BACKOFF_S, BACKOFF_RESET_S = 10.0, 300.0, 600.0
SANDBOX = ""  # key of the sandbox itself among `not_before`
OVER = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The latest attempt of one container, as the runtime tells."""

    state: str  # created, running, exited
    exit_code: int = 0
    image: str = ""  # as the pod named it
    current: bool = True  # whether it belongs to the current sandbox
    started_ok: bool = True  # its startup probe has passed, or it has none


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that is known of a pod's runtime side."""

    sandbox_ready: bool = False
    containers: Mapping[str, Seen] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What to do now; `wake_s` is when to look again if nothing happens (None: only then)."""

    make_sandbox: bool = False
    start: tuple[str, ...] = ()
    replace: tuple[str, ...] = ()  # running, but of another image than the pod now wants
    waiting: tuple[str, ...] = ()  # wanted, but not yet
    stop_all: str = ""  # why the whole pod ends
    finished: bool = False  # nothing will ever run again
    wake_s: float | None = None


def plan(pod: Mapping[str, Any], view: View, not_before: Mapping[str, float], now: float) -> Action:
    """The next step of `pod`. `not_before` holds Unix times of back-off by container, that of the sandbox under SANDBOX."""
    if pod["metadata"].get("deletionTimestamp"):
        return Action(stop_all="deleted")
    if (pod.get("status") or {}).get("phase") in OVER:
        return Action(finished=True)
    left = deadline_left(pod, now)
    if left is not None and left <= 0:
        return Action(stop_all="DeadlineExceeded")
    wanted, finished = _wanted(pod["spec"], view)
    if finished:
        return Action(finished=True)
    holds = () if view.sandbox_ready else (SANDBOX,)
    blocked = [not_before[name] - now for name in holds if not_before.get(name, 0.0) > now]
    due = [name for name in wanted if not_before.get(name, 0.0) <= now]
    waiting = [name for name in wanted if name not in due]
    waits = [*blocked, *(not_before[name] - now for name in waiting), *([left] if left is not None else [])]
    wake_s = min(waits, default=None)
    if not view.sandbox_ready:
        return Action(make_sandbox=bool(due) and not blocked, waiting=tuple(waiting), wake_s=wake_s)
    return Action(start=tuple(due), replace=_replaced(pod["spec"], view), waiting=tuple(waiting), wake_s=wake_s)


def _wanted(spec: Mapping[str, Any], view: View) -> tuple[list[str], bool]:
    """(containers that should be running and are not, whether the pod has ended)."""
    policy = spec.get("restartPolicy", "Always")
    mains = [one["name"] for one in spec["containers"]]
    wanted = [name for name in mains if _again(view.containers.get(name), policy, sandbox_ready=view.sandbox_ready)]
    alive = [name for name in mains if _lives(view, name)]
    if not wanted and not alive:
        return [], True
    helpers: list[str] = []
    for container in spec.get("initContainers") or []:
        name, seen = container["name"], view.containers.get(container["name"])
        if container.get("restartPolicy") == "Always":
            if not _lives(view, name):
                helpers.append(name)
            if alive or (_lives(view, name) and seen is not None and seen.started_ok):
                continue
            return helpers, False
        if alive:
            continue  # the pod is past its initialization
        if seen is not None and seen.state == "exited" and seen.exit_code and policy == "Never":
            return [], True
        if seen is None or not seen.current or not view.sandbox_ready:
            return [*helpers, name], False
        if seen.state == "exited" and seen.exit_code == 0:
            continue
        return ([*helpers] if seen.state == "running" else [*helpers, name]), False
    return helpers + wanted, False


def _lives(view: View, name: str) -> bool:
    seen = view.containers.get(name)
    return seen is not None and seen.state == "running" and seen.current and view.sandbox_ready


def _again(seen: Seen | None, policy: str, *, sandbox_ready: bool) -> bool:
    """Whether a main container should be (re)started."""
    if seen is None or seen.state == "created" or (seen.state == "running" and not (sandbox_ready and seen.current)):
        return True
    return seen.state == "exited" and (policy == "Always" or (policy == "OnFailure" and seen.exit_code != 0))


def _replaced(spec: Mapping[str, Any], view: View) -> tuple[str, ...]:
    named = {one["name"]: one["image"] for one in spec["containers"]}
    return tuple(name for name, image in named.items() if _lives(view, name) and view.containers[name].image not in ("", image))


def next_backoff(last_s: float, ran_s: float) -> float:
    """Seconds to wait after an end: none at first, then 10 doubling to 300; a run of ten minutes starts over."""
    if ran_s >= BACKOFF_RESET_S:
        return 0.0
    return FIRST_BACKOFF_S if last_s == 0 else min(LAST_BACKOFF_S, last_s * 2)


def deadline_left(pod: Mapping[str, Any], now: float) -> float | None:
    """Seconds until activeDeadlineSeconds is over; None without one."""
    seconds, started = pod["spec"].get("activeDeadlineSeconds"), (pod.get("status") or {}).get("startTime")
    return None if seconds is None or not started else parse(started) + float(seconds) - now
