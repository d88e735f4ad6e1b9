"""RuntimeService and ImageService as a kubelet and crictl use them: answers, lists, names, ids."""

from __future__ import annotations

import json
import threading

import grpc
import pytest
from cri_support import FOREVER, IMAGE, Cri, refused, until

from nacre.wire import cri as wire
from nacre.wire import cri_pb2 as cri


@pytest.mark.parametrize("package", wire.PACKAGES)
def test_version_and_status_answer_under_both_packages(service: Cri, package: str) -> None:
    runtime = wire.Stub(service.channel, "RuntimeService", package)
    version = runtime.Version(cri.VersionRequest())
    assert (version.runtime_name, version.runtime_api_version) == ("nacre", "v1")
    status = runtime.Status(cri.StatusRequest())
    assert {one.type: one.status for one in status.status.conditions} == {"RuntimeReady": True, "NetworkReady": True}
    assert {"", "runc"} <= {one.name for one in status.runtime_handlers}
    images = wire.Stub(service.channel, "ImageService", package)
    assert [one.repo_tags for one in images.ListImages(cri.ListImagesRequest()).images] == [[IMAGE]]


def test_the_cgroup_driver_is_told(service: Cri) -> None:
    assert service.runtime.RuntimeConfig(cri.RuntimeConfigRequest()).linux.cgroup_driver == cri.CGROUPFS


def test_a_pod_goes_from_ready_to_not_ready_to_gone(service: Cri) -> None:
    pod = service.run_pod("life", labels={"app": "life"}, annotations={"note": "kept"})
    status = pod.status()
    assert (status.state, status.metadata.name, status.labels["app"]) == (cri.SANDBOX_READY, "life", "life")
    assert status.annotations["note"] == "kept" and status.network.ip.startswith("10.")
    pod.stop()
    assert pod.status().state == cri.SANDBOX_NOTREADY
    pod.stop()
    pod.remove()
    pod.remove()
    assert refused(pod.status)[0] == grpc.StatusCode.NOT_FOUND


def test_a_container_goes_from_created_to_running_to_exited_to_gone(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.create(*FOREVER, name="main")
        assert service.status(made).state == cri.CONTAINER_CREATED
        service.runtime.StartContainer(cri.StartContainerRequest(container_id=made))
        running = service.status(made)
        assert running.state == cri.CONTAINER_RUNNING and running.created_at < running.started_at
        service.stop_container(made, 0)
        ended = service.status(made)
        assert (ended.state, ended.exit_code, ended.reason) == (cri.CONTAINER_EXITED, 137, "Error")
        assert ended.finished_at > ended.started_at
        service.stop_container(made, 0)
        service.remove_container(made)
        service.remove_container(made)
        assert refused(lambda: service.status(made))[0] == grpc.StatusCode.NOT_FOUND


def test_removing_a_running_container_and_a_ready_pod_stops_them_first(service: Cri) -> None:
    pod = service.run_pod()
    service.remove_container(pod.start(*FOREVER))
    pod.start(*FOREVER)
    pod.remove()
    assert refused(pod.status)[0] == grpc.StatusCode.NOT_FOUND


def test_stop_and_remove_of_unknown_ids_succeed_and_looking_at_them_does_not(service: Cri) -> None:
    runtime = service.runtime
    runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id="nosuch"))
    runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id="nosuch"))
    service.stop_container("nosuch", 1)
    service.remove_container("nosuch")
    code, failure = refused(lambda: service.exec("nosuch", "true"))
    assert code == grpc.StatusCode.NOT_FOUND and "container nosuch" in failure.what


def test_a_taken_pod_name_names_its_holder_and_another_attempt_is_another_name(service: Cri) -> None:
    with service.pod("twin") as pod:
        code, failure = refused(lambda: service.run_pod("twin"))
        assert code == grpc.StatusCode.ALREADY_EXISTS and pod.id in failure.cause
        with service.pod("twin", attempt=1):
            pass


def test_a_taken_container_name_names_its_holder(service: Cri) -> None:
    with service.pod() as pod:
        first = pod.create(*FOREVER, name="main")
        code, failure = refused(lambda: pod.create(*FOREVER, name="main"))
        assert code == grpc.StatusCode.ALREADY_EXISTS and first in failure.cause
        pod.create(*FOREVER, name="main", attempt=1)


def test_ids_may_be_shortened_unless_that_is_ambiguous(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start(*FOREVER)
        assert service.status(made[:12]).id == made
        assert service.exec(made[:12], "true").exit_code == 0
        others = [pod.create(*FOREVER) for _ in range(17)]  # two of 18 ids share a first digit
        shared = next(one[0] for one in others if sum(other[0] == one[0] for other in [made, *others]) > 1)
        assert refused(lambda: service.status(shared))[0] == grpc.StatusCode.INVALID_ARGUMENT
        service.remove_container(made[:12])


def test_lists_are_filtered_by_id_state_pod_and_label(service: Cri) -> None:
    with service.pod("red", labels={"colour": "red"}) as red, service.pod("blue", labels={"colour": "blue"}) as blue:
        running = red.start(*FOREVER, labels={"role": "web"})
        created = blue.create(*FOREVER, labels={"role": "db"})
        blue.stop()

        def pods(**wanted: object) -> set[str]:
            request = cri.ListPodSandboxRequest(filter=cri.PodSandboxFilter(**wanted))
            return {one.id for one in service.runtime.ListPodSandbox(request).items}

        def containers(**wanted: object) -> set[str]:
            request = cri.ListContainersRequest(filter=cri.ContainerFilter(**wanted))
            return {one.id for one in service.runtime.ListContainers(request).containers}

        assert pods(label_selector={"colour": "red"}) == {red.id} == pods(id=red.id[:10])
        assert pods(state=cri.PodSandboxStateValue(state=cri.SANDBOX_NOTREADY)) == {blue.id}
        assert containers() == {running, created}
        assert containers(pod_sandbox_id=blue.id) == {created} == containers(label_selector={"role": "db"})
        assert containers(state=cri.ContainerStateValue(state=cri.CONTAINER_RUNNING)) == {running} == containers(id=running[:9])
        streamed = service.runtime.StreamContainers(cri.StreamContainersRequest())
        assert {one.id for answer in streamed for one in answer.containers} == {running, created}


def test_a_verbose_status_has_pid_configuration_and_oci_document(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start(*FOREVER, name="looked-at")
        answer = service.runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=made, verbose=True))
        info = json.loads(answer.info["info"])
        with open(f"/proc/{info['pid']}/cmdline", "rb") as file:
            assert file.read().split(b"\0")[0] == b"sleep"
        assert info["config"]["metadata"]["name"] == "looked-at"
        assert info["runtimeSpec"]["annotations"]["io.kubernetes.cri.sandbox-id"] == pod.id
        answer = service.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True))
        assert json.loads(answer.info["info"])["config"]["hostname"] == pod.config.hostname


def test_events_tell_a_containers_life(service: Cri) -> None:
    seen: list[int] = []
    events = service.runtime.GetContainerEvents(cri.GetEventsRequest())

    def listen() -> None:
        try:
            for event in events:
                seen.append(event.container_event_type)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.CANCELLED  # type: ignore[attr-defined]  # a call is an error too

    listener = threading.Thread(target=listen)
    listener.start()
    with service.pod() as pod:
        until(lambda: seen or service.remove_container(pod.start("true")))  # the first events prove that the stream stands
        seen.clear()
        made = pod.start("true")
        service.ended(made)
        service.remove_container(made)
        wanted = [
            cri.CONTAINER_CREATED_EVENT,
            cri.CONTAINER_STARTED_EVENT,
            cri.CONTAINER_STOPPED_EVENT,
            cri.CONTAINER_DELETED_EVENT,
        ]
        until(lambda: seen[-4:] == wanted)
    events.cancel()
    listener.join()


def test_stats_count_cpu_memory_and_processes(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start("sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 1000")
        ask = cri.ContainerStatsRequest(container_id=made)
        stats = until(
            lambda: (s := service.runtime.ContainerStats(ask).stats).cpu.usage_core_nano_seconds.value > 1_000_000 and s
        )
        assert stats.memory.working_set_bytes.value > 0 and stats.attributes.id == made
        whole = service.runtime.PodSandboxStats(cri.PodSandboxStatsRequest(pod_sandbox_id=pod.id)).stats.linux
        assert whole.process.process_count.value >= 1 and [one.attributes.id for one in whole.containers] == [made]
        listed = service.runtime.ListContainerStats(cri.ListContainerStatsRequest()).stats
        assert [one.attributes.id for one in listed] == [made]


def test_limits_can_be_changed_while_the_container_runs(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start(*FOREVER, resources={"memory_limit_in_bytes": 64 << 20})
        limits = cri.LinuxContainerResources(memory_limit_in_bytes=96 << 20, cpu_shares=512)
        service.runtime.UpdateContainerResources(cri.UpdateContainerResourcesRequest(container_id=made, linux=limits))
        stats = service.runtime.ContainerStats(cri.ContainerStatsRequest(container_id=made)).stats
        assert (96 << 20) - stats.memory.available_bytes.value == stats.memory.working_set_bytes.value
        assert service.status(made).resources.linux.memory_limit_in_bytes == 96 << 20


def test_a_container_tells_the_name_of_its_image_whatever_it_was_asked_by(service: Cri) -> None:
    (listed,) = service.images.ListImages(cri.ListImagesRequest()).images
    with service.pod() as pod:
        status = service.status(pod.start(*FOREVER, name="by-id", image=listed.id))
        assert status.image.image == IMAGE
        assert (status.image_ref, status.image_id) == (listed.id, listed.id), "no registry knows an imported image by a digest"


def test_streamed_lists_say_what_the_lists_say(service: Cri) -> None:
    runtime, images = service.runtime, service.images
    with service.pod() as pod:
        made = pod.start(*FOREVER)
        stats = [
            one for answer in runtime.StreamContainerStats(cri.StreamContainerStatsRequest()) for one in answer.container_stats
        ]
        assert [one.attributes.id for one in stats] == [made] and stats[0].memory.usage_bytes.value > 0
        pods = [
            one
            for answer in runtime.StreamPodSandboxStats(cri.StreamPodSandboxStatsRequest())
            for one in answer.pod_sandbox_stats
        ]
        assert [one.attributes.id for one in pods] == [pod.id]
    streamed = [one for answer in images.StreamImages(cri.StreamImagesRequest()) for one in answer.images]
    assert streamed == list(images.ListImages(cri.ListImagesRequest()).images) and streamed


@pytest.mark.parametrize("package", wire.PACKAGES)
@pytest.mark.parametrize("service_name", ["RuntimeService", "ImageService"])
def test_every_method_answers_an_empty_request_or_refuses_it_in_a_sentence(service: Cri, service_name: str, package: str) -> None:
    stub, not_offered = wire.Stub(service.channel, service_name, package), set()
    for method in cri.DESCRIPTOR.services_by_name[service_name].methods:
        if method.name == "GetContainerEvents":
            continue  # it has no end
        try:
            answer = getattr(stub, method.name)(getattr(cri, method.input_type.name)(), timeout=20)
            list(answer) if method.server_streaming else answer  # read to its end
        except grpc.RpcError as error:
            code, said = error.code(), error.details()  # type: ignore[attr-defined]  # a call is an error too
            assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED) and ": " in said, (method.name, said)
            if code == grpc.StatusCode.UNIMPLEMENTED:
                assert said.startswith(f"answer {method.name}: ")
                not_offered.add(method.name)
    if service_name == "RuntimeService":
        metrics = {"ListMetricDescriptors", "ListPodSandboxMetrics", "StreamPodSandboxMetrics"}
        assert not_offered == {"PortForward", "CheckpointContainer", "UpdatePodSandboxResources", *metrics}
    else:
        assert not not_offered


def test_images_are_listed_found_and_missing_ones_are_an_empty_answer(service: Cri) -> None:
    (listed,) = service.images.ListImages(cri.ListImagesRequest()).images
    found = service.images.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image=IMAGE))).image
    assert listed.id == found.id and found.id.startswith("sha256:") and found.size > 0
    missing = service.images.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image="nacre.local/none:1")))
    assert not missing.HasField("image")
    (filesystem,) = service.images.ImageFsInfo(cri.ImageFsInfoRequest()).image_filesystems
    assert filesystem.used_bytes.value > 0 and filesystem.fs_id.mountpoint.startswith(str(service.prefix))


def test_a_caller_that_leaves_while_a_pod_is_made_leaves_no_pod(service: Cri) -> None:
    wanted = cri.RunPodSandboxRequest(config=service.pod_config("abandoned"))
    for _ in range(3):
        service.runtime.RunPodSandbox.future(wanted, timeout=0.005).exception()
        until(lambda: not service.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items and not _reserved(service))


def _reserved(service: Cri) -> bool:
    """Whether the name is still held; taking it for a moment is the only way to know."""
    try:
        service.run_pod("abandoned").remove()
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.ALREADY_EXISTS  # type: ignore[attr-defined]  # a call is an error too
        return True
    return False
