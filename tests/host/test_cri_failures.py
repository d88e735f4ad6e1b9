"""Failures in words: what a user is told names the act, the cause and what to do, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from cri_support import FOREVER, Cri, refused
from leftovers import assert_settled, look, settled

from nacre.wire import cri_pb2 as cri


def test_a_missing_image_is_named_and_leaves_nothing(service: Cri) -> None:
    with service.pod() as pod:
        before = look(service.prefix)
        code, failure = refused(lambda: pod.create("true", image="nacre.local/nothing:1"))
        assert code == grpc.StatusCode.NOT_FOUND
        assert "nacre.local/nothing:1" in failure.what and failure.remedy
        assert_settled(service.prefix, before)


@pytest.mark.parametrize(
    ("command", "words"),
    [("nosuch", "nosuch"), ("/bin/nosuch", "/bin/nosuch"), ("/etc/group", "ermission"), ("/tmp", "irectory")],
)
def test_a_command_that_cannot_run_is_a_start_error_with_its_name(service: Cri, command: str, words: str) -> None:
    with service.pod() as pod:
        made = pod.create(command)
        init = json.loads((service.prefix / "run/nacre/runc" / made / "state.json").read_text())["pid"]
        (Path(f"/proc/{init}/root/etc/group")).chmod(0o644)
        _code, failure = refused(lambda: service.runtime.StartContainer(cri.StartContainerRequest(container_id=made)))
        assert words in failure.sentence()
        status = service.status(made)
        assert (status.state, status.exit_code, status.reason) == (cri.CONTAINER_EXITED, 128, "StartError")
        assert status.message == failure.sentence()


def test_an_unknown_handler_lists_the_known_ones(service: Cri) -> None:
    code, failure = refused(lambda: service.run_pod(handler="firecracker"))
    assert code == grpc.StatusCode.UNIMPLEMENTED
    assert "firecracker" in failure.cause and "runc" in failure.cause and "config.toml" in failure.remedy


def test_a_memory_limit_too_small_to_start_says_so(service: Cri) -> None:
    with service.pod() as pod:
        service.remove_container(pod.create("true"))
        before = settled(service.prefix, look(service.prefix))
        said = []
        for limit in (4096, 65536):
            try:
                made = pod.start(*FOREVER, resources={"memory_limit_in_bytes": limit})
                said.append(service.ended(made).reason)
                service.remove_container(made)
            except grpc.RpcError as error:
                said.append(error.details())  # type: ignore[attr-defined]  # a call is an error too
        assert all("memory" in words or words == "OOMKilled" for words in said), said
        for held in service.runtime.ListContainers(cri.ListContainersRequest()).containers:
            service.remove_container(held.id)
        assert_settled(service.prefix, before)


def test_a_namespace_that_cannot_be_offered_is_refused_with_a_way_out(service: Cri) -> None:
    mapping = [cri.IDMapping(container_id=0, host_id=100000, length=65536)]
    users = cri.UserNamespace(mode=cri.POD, uids=mapping, gids=mapping)
    _code, failure = refused(lambda: service.run_pod(namespaces=cri.NamespaceOption(pid=cri.CONTAINER, userns_options=users)))
    assert "hostUsers" in failure.cause and failure.remedy


def test_a_port_of_the_host_that_is_taken_names_who_has_it(service: Cri) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        mapping = cri.PortMapping(protocol=cri.TCP, container_port=80, host_port=port)
        _code, failure = refused(lambda: service.run_pod(port_mappings=[mapping]))
    assert str(port) in failure.what and "process of this host" in failure.cause and "ss -lnp" in failure.remedy


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 192 MiB for a whole node."""
    disk = tmp_path / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192m", "small", disk], check=True)
    yield disk  # type: ignore[misc]  # a generator, as pytest wants
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_said_and_costs_nothing_that_was_told(small_disk: Path, cri_image: Path) -> None:
    service = Cri(small_disk / "node")
    try:
        service.start().load(cri_image)
        pod = service.run_pod("kept")
        made = pod.start(*FOREVER)
        before = settled(service.prefix, look(service.prefix))
        filler = small_disk / "filler"
        _fill(filler)
        _code, failure = refused(lambda: [service.run_pod() for _ in range(200)])
        assert "No space left" in failure.sentence() or "full" in failure.cause
        for held in service.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items:
            if held.id != pod.id:
                service.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=held.id))
        assert service.status(made).state == cri.CONTAINER_RUNNING
        filler.unlink()
        assert_settled(service.prefix, before)
        assert service.ended(pod.start("sh", "-c", "exit 3")).exit_code == 3
        pod.remove()
    finally:
        (small_disk / "filler").unlink(missing_ok=True)
        service.reset()


@pytest.mark.parametrize("controller", ["memory", "pids"])
def test_a_missing_cgroup_controller_is_named_with_where_it_was_looked_for(own_cri: Callable[..., Cri], controller: str) -> None:
    if not os.path.ismount(f"/sys/fs/cgroup/{controller}"):
        pytest.skip(f"ismount(/sys/fs/cgroup/{controller}) is false: no v1 hierarchy of its own to take away here")
    script = f'umount /sys/fs/cgroup/{controller} && exec "$@"'
    service = own_cri(wrapper=("unshare", "--mount", "sh", "-c", script, "sh"))
    limits = {"memory": {"memory_limit_in_bytes": 1 << 25}, "pids": {"unified": {"pids.max": "100"}}}.get(controller, {})
    with service.pod() as pod:
        _code, failure = refused(lambda: pod.start(*FOREVER, resources=limits))
        words = failure.sentence()
        assert controller in words and "/sys/fs/cgroup" in words + " ".join(failure.evidence) and failure.remedy


def test_a_request_too_long_for_a_shim_is_refused_and_the_shim_lives(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start(*FOREVER)
        code, failure = refused(lambda: service.exec(made, "echo", "x" * 200_000))
        assert code == grpc.StatusCode.INVALID_ARGUMENT and "over the limit" in failure.cause
        assert service.exec(made, "true").exit_code == 0


def _fill(path: Path) -> None:
    with path.open("wb") as file:
        try:
            while True:
                file.write(b"x" * 65536)
                file.flush()
        except OSError:
            free = shutil.disk_usage(path.parent).free
            assert free < 65536 * 2
