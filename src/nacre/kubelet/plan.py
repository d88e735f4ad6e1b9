"""What one pod needs next, decided without touching anything: the pod as the API has it and the runtime's state in, an Action out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FIRST_BACKOFF_S, LAST_BACKOFF_S, BACKOFF_RESET_S = 10.0, 300.0, 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The latest attempt of one container, as the runtime tells."""

    id: str
    attempt: int
    state: str  # created, running, exited
    exit_code: int = 0
    finished_at: float = 0.0  # Unix time, s


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that is known of a pod's runtime side."""

    sandbox: str = ""  # id of the current sandbox, "" for none
    sandbox_ready: bool = False
    containers: Mapping[str, Seen] = field(default_factory=dict)
    started_ok: Mapping[str, bool] = field(default_factory=dict)  # startup probe has passed (or there is none)


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What to do now, all of `start` at once; `wake_s` is when to look again if nothing happens (None: only then)."""

    make_sandbox: bool = False
    start: tuple[str, ...] = ()
    waiting: Mapping[str, float] = field(default_factory=dict)  # container → seconds of back-off left
    stop_all: str = ""  # why the whole pod ends
    finished: bool = False  # nothing will ever run again
    wake_s: float | None = None


def plan(pod: Mapping[str, Any], view: View, backoff: Mapping[str, float], now: float) -> Action:
    """The next step of `pod`. `backoff` holds, by container, the seconds to wait after its last end; `now` is Unix time in s."""
    spec = pod["spec"]
    if pod["metadata"].get("deletionTimestamp"):
        return Action(stop_all="deleted")
    if _past_deadline(pod, now):
        return Action(stop_all="DeadlineExceeded")
    policy = spec.get("restartPolicy", "Always")
    first = [one["name"] for one in spec.get("initContainers") or []]
    main = [one["name"] for one in spec["containers"]]
    wanted, finished = _wanted(first, main, view, policy)
    if finished:
        return Action(finished=True)
    due, waiting = _due(wanted, view, backoff, now)
    wake = min(waiting.values(), default=None)
    deadline = _deadline_left(pod, now)
    if deadline is not None:
        wake = deadline if wake is None else min(wake, deadline)
    if not view.sandbox_ready:
        return Action(make_sandbox=bool(due), waiting=waiting, wake_s=wake)
    return Action(start=tuple(due), waiting=waiting, wake_s=wake)


def _wanted(first: list[str], main: list[str], view: View, policy: str) -> tuple[list[str], bool]:
    """(containers that should be running and are not, whether the pod has ended)."""
    for name in first:
        seen = view.containers.get(name)
        if seen is None:
            return [name], False
        if seen.state != "exited":
            return [] if seen.state == "running" else [name], False
        if seen.exit_code != 0:
            return ([], True) if policy == "Never" else ([name], False)
    wanted = []
    for name in main:
        seen = view.containers.get(name)
        if seen is None or (seen.state == "running" and not view.sandbox_ready):
            wanted.append(name)
        elif seen.state == "exited" and (policy == "Always" or (policy == "OnFailure" and seen.exit_code != 0)):
            wanted.append(name)
    running = any(view.containers[name].state != "exited" for name in main if name in view.containers)
    return wanted, not wanted and not running


def _due(wanted: list[str], view: View, backoff: Mapping[str, float], now: float) -> tuple[list[str], dict[str, float]]:
    due, waiting = [], {}
    for name in wanted:
        seen = view.containers.get(name)
        left = 0.0 if seen is None else seen.finished_at + backoff.get(name, 0.0) - now
        if left > 0:
            waiting[name] = left
        else:
            due.append(name)
    return due, waiting


def next_backoff(last_s: float, ran_s: float) -> float:
    """Seconds to wait after an end: none at first, then 10 doubling to 300; a run of ten minutes starts over."""
    if ran_s >= BACKOFF_RESET_S:
        return 0.0
    return FIRST_BACKOFF_S if last_s == 0 else min(LAST_BACKOFF_S, last_s * 2)


def _past_deadline(pod: Mapping[str, Any], now: float) -> bool:
    left = _deadline_left(pod, now)
    return left is not None and left <= 0


def _deadline_left(pod: Mapping[str, Any], now: float) -> float | None:
    seconds, started = pod["spec"].get("activeDeadlineSeconds"), (pod.get("status") or {}).get("startTime")
    if seconds is None or not started:
        return None
    from nacre.kubelet.times import parse

    return parse(started) + float(seconds) - now
