"""`nacre explain POD`: why a pod is not running. The first cause from the recorder, what the API shows of it, the remedy."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import click

from nacre.cli import cluster, output
from nacre.config import Config
from nacre.oci import errors, trace
from nacre.wire.kube import Object

STATES = ("waiting", "terminated")
# what Kubernetes' own words mean, for pods that failed outside nacre's code: reason → (cause, remedy)
REASONS = {
    "CrashLoopBackOff": ("the container ends again and again", "nacre kubectl logs {pod} --previous"),
    "OOMKilled": ("the container used more memory than its limit", "raise resources.limits.memory"),
    "Error": ("the container's process ended with an error", "nacre kubectl logs {pod} --previous"),
    "ErrImageNeverPull": ("the image is not on this machine and imagePullPolicy is Never", "nacre image pull {image}"),
    "Unschedulable": ("no node takes the pod", "see the message above"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer: `failure` is the first cause, `times` how often the same one was recorded."""

    running: bool
    headline: str
    failure: errors.Failure | None = None
    times: int = 0
    at_ns: int = 0


@click.command()
@click.option("-n", "--namespace", default="default", show_default=True)
@click.option("-o", "form", type=click.Choice(["text", "json"]), default="text")
@click.argument("pod")
@click.pass_obj
def explain(config: Config, namespace: str, form: str, pod: str) -> None:
    """Why POD (or NAMESPACE/POD) is not running: first cause, evidence, remedy."""
    thing = cluster.find_pod(config, pod, namespace)
    if form == "text":
        show(config, thing)
        return
    verdict = examine(config, thing, cluster.events_of(config, thing))
    cause = errors.encode(verdict.failure) if verdict.failure else None
    print(json.dumps({"running": verdict.running, "headline": verdict.headline, "cause": cause, "times": verdict.times}))


def examine(config: Config, pod: Object, events: list[Object]) -> Verdict:
    """`judge` with what the recorder has of the pod."""
    return judge(pod, events, list(trace.records(config.trace_dir, trace_uid(pod))))


def show(config: Config, pod: Object) -> None:
    """The answer for people."""
    events = cluster.events_of(config, pod)
    _show(pod, events, examine(config, pod, events))


def trace_uid(pod: Object) -> str:
    """The recorder's key: a static pod's mirror object carries the kubelet's own uid in an annotation."""
    annotations = pod["metadata"].get("annotations") or {}
    return str(annotations.get("kubernetes.io/config.mirror") or pod["metadata"]["uid"])


def judge(pod: Object, events: list[Object], records: list[dict[str, Any]]) -> Verdict:
    """First cause of `pod`'s trouble: a recorded failure, else its scheduling, container states, then warnings among its events."""
    running = cluster.is_ready(pod) or pod.get("status", {}).get("phase") == "Succeeded"
    headline = _headline(pod)
    if running:
        return Verdict(running=True, headline=headline)
    failures = [record for record in records if record.get("joint") == "failure" and isinstance(record.get("document"), dict)]
    if failures:
        first = _first_of_current(failures)
        found = errors.decode(first["document"])
        same = sum(1 for record in failures if record["document"].get("cause") == found.cause)
        return Verdict(running=False, headline=headline, failure=found, times=same, at_ns=int(first["at_ns"]))
    for guess in (_from_scheduling(pod), _from_states(pod), _from_events(events)):
        if guess:
            return Verdict(running=False, headline=headline, failure=guess, times=1)
    return Verdict(running=False, headline=headline)


def _first_of_current(failures: list[dict[str, Any]]) -> dict[str, Any]:
    """The oldest failure of the kind that is still being met: what follows a first cause is often its echo, so the last one
    decides which cause is current, and its first appearance carries the full evidence."""
    last = failures[-1]["document"]
    for record in failures:
        if record["document"].get("code") == last.get("code") and record["document"].get("cause") == last.get("cause"):
            return record
    return failures[-1]


def _headline(pod: Object) -> str:
    status = pod.get("status", {})
    metadata = pod["metadata"]
    word = status.get("reason") or status.get("phase", "Pending")
    for container in _states(status):
        state = container.get("state") or {}
        for kind in STATES:
            if (state.get(kind) or {}).get("reason") not in (None, "Completed"):
                word = state[kind]["reason"]
    ending = " (being deleted)" if metadata.get("deletionTimestamp") else ""
    return f"{metadata['namespace']}/{metadata['name']}: {word}{ending}"


def _states(status: Object) -> list[Object]:
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _from_scheduling(pod: Object) -> errors.Failure | None:
    scheduled = cluster.condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        cause = str(scheduled.get("message") or scheduled.get("reason"))
        return errors.Failure(what=f"schedule pod {pod['metadata']['name']}", cause=cause, remedy="nacre kubectl describe nodes")
    return None


def _from_states(pod: Object) -> errors.Failure | None:
    for container in _states(pod.get("status", {})):
        for state in (container.get("state") or {}, container.get("lastState") or {}):
            found = state.get("terminated") or state.get("waiting")
            reason = str((found or {}).get("reason", ""))
            if not found or reason in ("", "Completed", "ContainerCreating", "PodInitializing"):
                continue
            said, remedy = REASONS.get(reason, (reason, ""))
            code = f", exit code {found['exitCode']}" if "exitCode" in found else ""
            names = {"pod": pod["metadata"]["name"], "image": container.get("image", "")}
            return errors.Failure(
                what=f"run container {container['name']}",
                cause=f"{said}{code}" + (f": {found['message']}" if found.get("message") else ""),
                remedy=remedy.format(**names),
            )
    return None


def _from_events(events: list[Object]) -> errors.Failure | None:
    for event in events:
        if event.get("type") == "Warning":
            return errors.Failure(what=str(event.get("reason")), cause=str(event.get("message")))
    return None


def _show(pod: Object, events: list[Object], verdict: Verdict) -> None:
    output.say(verdict.headline, "ok" if verdict.running else "bad")
    if verdict.failure:
        output.say()
        _show_cause(verdict)
    elif not verdict.running:
        output.say("  nothing has failed so far; it is being worked on")
    output.say()
    rows = [
        (c["type"], c["status"], c.get("reason") or "", c.get("message") or "")
        for c in pod.get("status", {}).get("conditions") or []
    ]
    output.table(("condition", "status", "reason", "message"), rows)
    output.say()
    rows = [
        (e.get("lastTimestamp") or e.get("eventTime") or "", e.get("type", ""), e.get("reason", ""), _counted(e))
        for e in events[-12:]
    ]
    output.table(("when", "type", "event", "message"), rows)
    output.say(f"\nnacre trace {pod['metadata']['namespace']}/{pod['metadata']['name']} shows what crossed each joint.", "dim")


def _counted(event: Object) -> str:
    count = int(event.get("count") or 1)
    return str(event.get("message", "")) + (f" (x{count})" if count > 1 else "")


def _show_cause(verdict: Verdict) -> None:
    found = verdict.failure
    assert found is not None
    output.say(f"  first cause  {found.what}: {found.cause}", "bold")
    if verdict.at_ns:
        at = time.strftime("%H:%M:%S", time.localtime(verdict.at_ns / 1e9))
        again = f", {verdict.times} times since" if verdict.times > 1 else ""
        output.say(f"  when         {at}{again} ({found.code})", "dim")
    for index, line in enumerate(found.evidence):
        output.say(("  evidence     " if index == 0 else "               ") + line)
    if found.remedy:
        output.say(f"  remedy       {found.remedy}", "ok")
