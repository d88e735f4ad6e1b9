"""kill -9 of the daemon, of shims, of the zygote: at named points, under load, with nothing lost and nothing left."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from cri_support import FOREVER, Cri, Pod, killed, log_lines, refused, until
from leftovers import assert_settled, look, settled

from nacre.wire import cri_pb2 as cri

COUNT = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.002; done"
POINTS = {
    "cri.run.spawned": "RunPodSandbox",
    "cri.run.attached": "RunPodSandbox",
    "cri.run.made": "RunPodSandbox",
    "cri.run.kept": "RunPodSandbox",
    "cri.create.made": "CreateContainer",
    "cri.create.kept": "CreateContainer",
    "cri.start.running": "StartContainer",
    "cri.stop.before_destroy": "StopPodSandbox",
}


def test_pods_log_and_end_truly_while_the_daemon_is_dead(own_cri: Callable[..., Cri]) -> None:
    service = own_cri()
    pod = service.run_pod("survivor")
    pod.start("sh", "-c", COUNT, name="count")
    ends = pod.start("sh", "-c", "read x; echo last words; exit 9", name="ends", stdin=True)
    shim = service.shim(pod.id)
    (waiting,) = [pid for pid in children(shim) if b"read x" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    size = until(lambda: pod.log_path("count").exists() and pod.log_path("count").stat().st_size)
    service.kill()
    until(lambda: pod.log_path("count").stat().st_size > size + 1000)
    os.kill(waiting, 9)
    until(lambda: not Path(f"/proc/{waiting}").exists())
    service.start()
    assert service.shim(pod.id) == shim
    assert pod.status().state == cri.SANDBOX_READY
    assert (service.status(ends).exit_code, service.status(ends).reason) == (137, "Error")
    code = service.ended(pod.start("sh", "-c", "exit 7"))
    assert code.exit_code == 7
    service.stop_container(next(one.id for one in listed(service) if one.metadata.name == "count"), 0)
    numbers = [int(line.text) for line in log_lines(pod.log_path("count"))]
    assert numbers == list(range(len(numbers)))
    pod.remove()


@pytest.mark.parametrize("point", POINTS)
def test_a_daemon_killed_at_any_point_leaves_nothing_that_the_next_one_cannot_end(
    own_cri: Callable[..., Cri], point: str
) -> None:
    service = own_cri()
    with service.pod("warm") as pod:
        pod.start("true")
    before = settled(service.prefix, look(service.prefix))
    service.kill()
    service.environment["NACRE_CRASH_AT"] = point
    service.start()
    with pytest.raises(grpc.RpcError):
        pod = service.run_pod("crash")
        pod.start(*FOREVER)
        pod.stop()
    assert service.process is not None and service.process.wait(10) == -9, f"{POINTS[point]} never came to {point}"
    del service.environment["NACRE_CRASH_AT"]
    service.channel.close()
    service.start()
    for held in service.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items:
        service.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=held.id))
    assert listed(service) == []
    service.run_pod("crash").remove()  # the name is free again
    assert_settled(service.prefix, before)


def test_a_kill_in_the_middle_of_load_loses_no_pod_that_was_told_and_leaves_nothing(own_cri: Callable[..., Cri]) -> None:
    service = own_cri()
    with service.pod("warm") as pod:
        pod.start("true")
    before = settled(service.prefix, look(service.prefix))
    told: list[tuple[Pod, str]] = []

    def load(number: int) -> None:
        try:
            for turn in range(50):
                pod = service.run_pod(f"load-{number}-{turn}")
                told.append((pod, pod.start(*FOREVER)))
        except (grpc.RpcError, ValueError):  # the daemon is gone, its channel closed
            return

    workers = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    until(lambda: len(told) >= 8, 30)
    service.kill()
    for worker in workers:
        worker.join()
    service.start()
    for pod, container in told:
        assert service.status(container).state == cri.CONTAINER_RUNNING
        assert service.exec(container, "true").exit_code == 0
        assert pod.status().state == cri.SANDBOX_READY
    for held in service.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items:
        service.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=held.id))
    assert_settled(service.prefix, before)


def test_a_killed_shim_takes_its_pod_at_once_and_it_is_said(own_cri: Callable[..., Cri]) -> None:
    service = own_cri(settings="pods_per_shim = 1\n")
    with service.pod("orphaned") as pod, service.pod("other") as other:
        ended = pod.start("sh", "-c", "exit 4")
        service.ended(ended)
        running = pod.start("sh", "-c", COUNT, name="count")
        created = pod.create(*FOREVER)
        untouched = other.start(*FOREVER)
        inits = children(service.shim(pod.id))
        until(lambda: log_lines(pod.log_path("count")))
        killed(service.shim(pod.id))
        status = service.ended(running, 3)
        assert (status.exit_code, status.reason) == (137, "ContainerStatusUnknown") and "its shim died" in status.message
        assert service.ended(created).reason == "ContainerStatusUnknown"
        assert (service.status(ended).exit_code, service.status(ended).reason) == (4, "Error")
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inits))
        until(lambda: pod.status().state == cri.SANDBOX_NOTREADY)
        assert service.exec(untouched, "true").exit_code == 0
        code, _failure = refused(lambda: service.exec(running, "true"))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        numbers = [int(line.text) for line in log_lines(pod.log_path("count"))]
        assert numbers == list(range(len(numbers)))


def test_a_shim_killed_while_the_daemon_is_dead_is_found_out_by_the_next(own_cri: Callable[..., Cri]) -> None:
    service = own_cri()
    pod = service.run_pod()
    running = pod.start(*FOREVER)
    inits, shim = children(service.shim(pod.id)), service.shim(pod.id)
    service.kill()
    killed(shim)
    service.start()
    status = service.status(running)
    assert (status.exit_code, status.reason) == (137, "ContainerStatusUnknown")
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inits))
    pod.remove()


def test_a_command_whose_shim_is_killed_is_answered_at_once(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start(*FOREVER)
        asked = service.runtime.ExecSync.future(cri.ExecSyncRequest(container_id=made, cmd=["sleep", "100"]))
        until(lambda: len(children(service.shim(pod.id))) == 2)
        killed(service.shim(pod.id))
        assert isinstance(asked.exception(timeout=5), grpc.RpcError)


def test_a_killed_zygote_touches_no_pod_and_is_replaced(own_cri: Callable[..., Cri]) -> None:
    service = own_cri(settings="pods_per_shim = 1\n")
    assert service.process is not None
    pod = service.run_pod()
    made = pod.start(*FOREVER)
    (zygote,) = children(service.process.pid)
    killed(zygote)
    other = service.run_pod()
    assert service.ended(other.start("sh", "-c", "exit 5")).exit_code == 5
    assert service.exec(made, "true").exit_code == 0 and service.status(made).state == cri.CONTAINER_RUNNING
    (fresh,) = children(service.process.pid)
    assert fresh != zygote
    pod.remove()
    other.remove()


def test_shims_and_containers_cannot_reach_the_hosts_interpreter(service: Cri) -> None:
    with service.pod(namespaces=cri.NamespaceOption(pid=cri.NODE)) as pod:
        made = pod.start(*FOREVER, namespaces=cri.NamespaceOption(pid=cri.NODE), security={"privileged": True})
        shim = service.shim(pod.id)
        assert os.readlink(f"/proc/{shim}/exe") == "/memfd:python3 (deleted)"
        answer = service.exec(made, "sh", "-c", f"echo overwritten > /proc/{shim}/exe")
        assert answer.exit_code != 0


def test_a_graceful_end_leaves_pods_running_and_the_next_daemon_takes_them_up(own_cri: Callable[..., Cri]) -> None:
    service = own_cri()
    pod = service.run_pod()
    made = pod.start(*FOREVER)
    service.end()
    service.start()
    assert service.exec(made, "true").exit_code == 0
    pod.remove()


def children(pid: int) -> list[int]:
    return [
        int(word)
        for task in os.listdir(f"/proc/{pid}/task")
        for word in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    ]


def listed(service: Cri) -> list[object]:
    return list(service.runtime.ListContainers(cri.ListContainersRequest()).containers)
