"""The first cause of a pod's trouble."""

from __future__ import annotations

from typing import Any

from nacre.cli import explain
from nacre.oci.errors import Invalid, encode


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "web", "namespace": "default", "uid": "u1"}, "spec": {}, "status": status}


def failed(at_ns: int, cause: str, *evidence: str) -> dict[str, Any]:
    failure = Invalid(what="start container web", cause=cause, evidence=evidence, remedy="mend it")
    return {"at_ns": at_ns, "joint": "failure", "what": "start", "document": encode(failure)}


def test_the_recorders_first_failure_wins_over_later_echoes_of_it() -> None:
    records = [failed(1, "no such file", "stat said so"), failed(2, "no such file"), failed(3, "no such file")]
    verdict = explain.judge(pod(phase="Pending"), [], records)
    assert verdict.failure is not None
    assert verdict.failure.evidence == ("stat said so",)
    assert verdict.times == 3
    assert verdict.at_ns == 1


def test_a_cause_that_was_overcome_is_not_the_answer() -> None:
    verdict = explain.judge(pod(phase="Pending"), [], [failed(1, "registry down"), failed(2, "no such file")])
    assert verdict.failure is not None
    assert verdict.failure.cause == "no such file"


def test_a_ready_pod_has_no_cause() -> None:
    ready = pod(phase="Running", conditions=[{"type": "Ready", "status": "True"}])
    verdict = explain.judge(ready, [], [failed(1, "registry down")])
    assert verdict.running
    assert verdict.failure is None


def test_an_unscheduled_pod_is_explained_by_its_condition() -> None:
    message = "0/1 nodes are available: 1 Insufficient memory."
    conditions = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]
    verdict = explain.judge(pod(phase="Pending", conditions=conditions), [], [])
    assert verdict.failure is not None
    assert message in verdict.failure.cause


def test_a_container_that_ended_is_explained_with_its_code_and_where_to_look() -> None:
    state = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}
    statuses = [{"name": "web", "image": "i", "state": state, "lastState": {"terminated": {"exitCode": 3, "reason": "Error"}}}]
    verdict = explain.judge(pod(phase="Running", containerStatuses=statuses), [], [])
    assert verdict.headline == "default/web: CrashLoopBackOff"
    assert verdict.failure is not None
    assert "--previous" in verdict.failure.remedy


def test_an_oom_kill_names_the_limit() -> None:
    statuses = [{"name": "web", "state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}]
    verdict = explain.judge(pod(phase="Failed", containerStatuses=statuses), [], [])
    assert verdict.failure is not None
    assert "memory" in verdict.failure.cause
    assert "limits.memory" in verdict.failure.remedy


def test_without_any_trouble_nothing_is_made_up() -> None:
    assert explain.judge(pod(phase="Pending"), [], []).failure is None
