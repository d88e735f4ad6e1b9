"""Pod status from the runtime's words."""

from __future__ import annotations

from typing import Any

from nacre.kubelet.status import Facts, pod_status
from nacre.wire import cri_pb2 as cri

NOW = 1_767_225_600.0  # 2026-01-01
POD: dict[str, Any] = {
    "metadata": {"name": "p"},
    "spec": {"containers": [{"name": "main", "image": "i"}], "restartPolicy": "Never"},
}


def told(state: Any, name: str = "main", code: int = 0, attempt: int = 0, reason: str = "") -> Any:
    moment = int(NOW * 1e9)
    return cri.ContainerStatus(
        id="c" + str(attempt), metadata=cri.ContainerMetadata(name=name, attempt=attempt), state=state, exit_code=code,
        started_at=moment, finished_at=moment if state == cri.CONTAINER_EXITED else 0, reason=reason, image_ref="sha256:1",
    )  # fmt: skip


def facts(**more: Any) -> Facts:
    return Facts(node_address="192.0.2.1", start_time=NOW, sandbox_made=True, addresses=["10.1.0.2"], **more)


def conditions(status: dict[str, Any]) -> dict[str, str]:
    return {one["type"]: one["status"] for one in status["conditions"]}


def test_a_running_container_makes_a_ready_pod() -> None:
    status = pod_status(POD, facts(statuses={"main": told(cri.CONTAINER_RUNNING)}), NOW)
    assert (status["phase"], status["podIP"], status["hostIP"]) == ("Running", "10.1.0.2", "192.0.2.1")
    assert set(conditions(status).values()) == {"True"}
    (main,) = status["containerStatuses"]
    assert main["ready"] and main["started"] and main["state"] == {"running": {"startedAt": "2026-01-01T00:00:00Z"}}


def test_the_image_is_told_as_the_runtime_names_it_and_by_its_registrys_digest() -> None:
    seen = told(cri.CONTAINER_RUNNING)
    seen.image.image, seen.image_ref, seen.image_id = "docker.io/library/i:latest", "docker.io/library/i@sha256:2", "sha256:1"
    (main,) = pod_status(POD, facts(statuses={"main": seen}), NOW)["containerStatuses"]
    assert (main["image"], main["imageID"]) == ("docker.io/library/i:latest", "docker.io/library/i@sha256:2")


def test_nothing_made_yet_is_pending_and_says_what_is_waited_for() -> None:
    status = pod_status(POD, Facts(node_address="192.0.2.1", start_time=NOW), NOW)
    assert status["phase"] == "Pending" and "podIP" not in status
    assert status["containerStatuses"][0]["state"] == {"waiting": {"reason": "ContainerCreating"}}


def test_a_sandbox_that_cannot_be_made_is_named_in_the_conditions() -> None:
    status = pod_status(POD, Facts(node_address="192.0.2.1", start_time=NOW, sandbox_failure="no bridge"), NOW)
    (condition,) = [one for one in status["conditions"] if one["type"] == "PodReadyToStartContainers"]
    assert (condition["status"], condition["reason"], condition["message"]) == ("False", "FailedCreatePodSandBox", "no bridge")


def test_the_phase_of_an_ended_pod_follows_its_exit_codes() -> None:
    assert pod_status(POD, facts(statuses={"main": told(cri.CONTAINER_EXITED)}), NOW)["phase"] == "Succeeded"
    status = pod_status(POD, facts(statuses={"main": told(cri.CONTAINER_EXITED, code=7)}), NOW)
    assert status["phase"] == "Failed"
    assert status["containerStatuses"][0]["state"]["terminated"] | {"containerID": ""} == {
        "exitCode": 7, "reason": "Error", "startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:00:00Z", "containerID": "",
    }  # fmt: skip


def test_a_pod_that_is_always_restarted_never_ends() -> None:
    pod = POD | {"spec": POD["spec"] | {"restartPolicy": "Always"}}
    waiting = {"main": ("CrashLoopBackOff", "back-off 10s")}
    status = pod_status(pod, facts(statuses={"main": told(cri.CONTAINER_EXITED, code=1, attempt=2)}, waiting=waiting), NOW)
    (main,) = status["containerStatuses"]
    assert status["phase"] == "Running" and main["restartCount"] == 2
    assert main["state"]["waiting"]["reason"] == "CrashLoopBackOff" and main["lastState"]["terminated"]["exitCode"] == 1


def test_a_readiness_probe_keeps_a_running_container_unready() -> None:
    status = pod_status(POD, facts(statuses={"main": told(cri.CONTAINER_RUNNING)}, ready={"main": False}), NOW)
    assert conditions(status)["Ready"] == "False"
    (ready,) = [one for one in status["conditions"] if one["type"] == "Ready"]
    assert ready["message"] == "containers with unready status: [main]"


def test_transition_times_stay_where_nothing_changed() -> None:
    running = facts(statuses={"main": told(cri.CONTAINER_RUNNING)})
    before = pod_status(POD, running, NOW)
    after = pod_status(POD | {"status": before}, running, NOW + 60)
    assert after == before


def test_an_ended_pod_keeps_its_phase_and_its_containers_when_the_runtime_has_forgotten_them() -> None:
    before = pod_status(POD, facts(statuses={"main": told(cri.CONTAINER_EXITED, code=7)}), NOW)
    after = pod_status(POD | {"status": before}, Facts(node_address="192.0.2.1", start_time=NOW), NOW + 60)
    assert after["phase"] == "Failed" and after["containerStatuses"] == before["containerStatuses"]


def test_init_containers_hold_the_pod_pending_until_they_are_done() -> None:
    pod = POD | {"spec": POD["spec"] | {"initContainers": [{"name": "first", "image": "i"}]}}
    status = pod_status(pod, facts(statuses={"first": told(cri.CONTAINER_RUNNING, "first")}), NOW)
    assert status["phase"] == "Pending" and conditions(status)["Initialized"] == "False"
    assert status["containerStatuses"][0]["state"] == {"waiting": {"reason": "PodInitializing"}}
    status = pod_status(pod, facts(statuses={"first": told(cri.CONTAINER_EXITED, "first", code=2)}), NOW)
    assert status["phase"] == "Failed"


def test_a_sidecar_that_has_started_lets_the_pod_run_and_counts_for_its_readiness() -> None:
    pod = POD | {"spec": POD["spec"] | {"initContainers": [{"name": "side", "image": "i", "restartPolicy": "Always"}]}}
    both = {"side": told(cri.CONTAINER_RUNNING, "side"), "main": told(cri.CONTAINER_RUNNING)}
    assert pod_status(pod, facts(statuses=both), NOW)["phase"] == "Running"
    status = pod_status(pod, facts(statuses=both, ready={"side": False}), NOW)
    assert conditions(status)["Ready"] == "False" and conditions(status)["Initialized"] == "True"


def test_a_pod_that_the_kubelet_ended_says_why() -> None:
    status = pod_status(POD, facts(ended=("DeadlineExceeded", "too long")), NOW)
    assert (status["phase"], status["reason"], status["message"]) == ("Failed", "DeadlineExceeded", "too long")
