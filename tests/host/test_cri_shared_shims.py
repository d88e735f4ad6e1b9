"""Pods of the handler runc share a shim's process: what that must not make them share."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread

import grpc
import pytest
from cri_support import FOREVER, Cri, Pod, killed, log_lines, refused, stream, until

from nacre.linux import mounts
from nacre.oci.errors import Failure
from nacre.wire import cri_pb2 as cri

SOON_S = 5.0


@contextmanager
def neighbours(service: Cri, count: int, **fields: object) -> Iterator[list[Pod]]:
    """Pods of one shim."""
    with ExitStack() as held:
        pods = [held.enter_context(service.pod(**fields)) for _ in range(count)]
        assert len({service.shim(pod.id) for pod in pods}) == 1
        yield pods


def test_pods_share_shims_up_to_the_limit_and_a_shim_ends_with_its_last_one(own_cri: Callable[..., Cri]) -> None:
    service = own_cri(settings="pods_per_shim = 2\n")
    first, second, third = (service.run_pod() for _ in range(3))
    shim, other = service.shim(first.id), service.shim(third.id)
    assert service.shim(second.id) == shim != other
    made = second.start(*FOREVER)
    first.remove()
    log = os.readlink(f"/proc/{shim}/fd/2")
    assert log == str(service.state / "pods" / second.id / "shim.log")  # not one that was deleted
    assert service.exec(made, "true").exit_code == 0
    fourth = service.run_pod()
    assert service.shim(fourth.id) == shim
    second.remove()
    assert Path(f"/proc/{shim}").exists()
    fourth.remove()
    until(lambda: not Path(f"/proc/{shim}").exists())
    third.remove()
    until(lambda: not Path(f"/proc/{other}").exists())


def test_pods_made_at_once_are_made_by_several_shims(service: Cri) -> None:
    with ExitStack() as undo:
        asked = []
        for _ in range(3):
            config = service.pod_config()
            asked.append((config, service.runtime.RunPodSandbox.future(cri.RunPodSandboxRequest(config=config))))
        pods = [Pod(service, config, future.result().pod_sandbox_id) for config, future in asked]
        for pod in pods:
            undo.callback(pod.remove)
        assert len({service.shim(pod.id) for pod in pods}) > 1


def test_a_process_holds_no_descriptor_of_another_pod(service: Cri) -> None:
    with neighbours(service, 3) as (first, second, third):
        fed = first.start(*FOREVER, stdin=True)
        terminal = second.start(*FOREVER, stdin=True, tty=True)
        third.create(*FOREVER)
        running = third.start(*FOREVER, stdin=True)
        asked = service.runtime.ExecSync.future(cri.ExecSyncRequest(container_id=running, cmd=["sleep", "100"], timeout=100))
        shim = service.shim(first.id)
        until(lambda: b"sleep 100 " in {_says(pid) for pid in _children(shim)})
        assert len(_children(shim)) == 5
        owners: dict[str, set[int]] = {}
        for pid in _descendants(shim):
            for held in _pipes(pid):
                owners.setdefault(held, set()).add(_pod_of(pid, (first, second, third)))
        assert owners and {len(pods) for pods in owners.values()} == {1}, owners
        asked.cancel()
        assert service.status(fed).state == service.status(terminal).state == cri.CONTAINER_RUNNING


def test_an_input_ends_while_another_pods_container_waits_to_be_started(service: Cri) -> None:
    with neighbours(service, 2) as (pod, other):
        made = pod.start("sh", "-c", "cat; exit 3", stdin=True, stdin_once=True, name="main")
        other.create(*FOREVER)
        began = time.monotonic()
        url = service.runtime.Attach(cri.AttachRequest(container_id=made, stdin=True, stdout=True, stderr=True)).url
        assert stream(url, stdin=b"words").out == b"words"
        assert service.ended(made).exit_code == 3
        assert time.monotonic() - began < SOON_S


def test_a_command_ends_while_another_pods_container_waits_to_be_started(service: Cri) -> None:
    with neighbours(service, 2) as (pod, other):
        made = pod.start(*FOREVER)
        script = "while test ! -e /tmp/go; do sleep 0.01; done; echo gone; exit 6"
        asked = service.runtime.ExecSync.future(cri.ExecSyncRequest(container_id=made, cmd=["sh", "-c", script]))
        until(lambda: b"/tmp/go" in service.exec(made, "ps", "-o", "args").stdout)
        other.create(*FOREVER)
        service.sh(made, "touch /tmp/go")
        answer = asked.result(timeout=SOON_S)
        assert (answer.exit_code, answer.stdout) == (6, b"gone\n")


def test_a_pod_with_shared_processes_ends_while_another_pods_container_waits_to_be_started(service: Cri) -> None:
    with neighbours(service, 2, namespaces=cri.NamespaceOption(pid=cri.POD)) as (pod, other):
        pod.start(*FOREVER)
        other.create(*FOREVER)
        began = time.monotonic()
        pod.stop()
        assert time.monotonic() - began < SOON_S
        assert service.exec(other.start(*FOREVER), "true").exit_code == 0


def test_exit_codes_of_pods_that_end_at_once_are_each_their_own(service: Cri) -> None:
    with neighbours(service, 3) as pods:
        made = [
            pod.start("sh", "-c", f"read x; exit {code}", stdin=True, stdin_once=True) for code, pod in enumerate(pods, start=11)
        ]
        for one in made:
            url = service.runtime.Attach(cri.AttachRequest(container_id=one, stdin=True, stdout=True)).url
            stream(url, stdin=b"now\n")
        assert [service.ended(one).exit_code for one in made] == [11, 12, 13]


def test_a_log_that_takes_no_more_holds_up_its_own_pod_alone(service: Cri) -> None:
    logs = service.prefix / "small"
    logs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", logs], check=True)
    try:
        with service.pod("held-up", log_directory=str(logs)) as pod, service.pod("free") as free:
            assert service.shim(pod.id) == service.shim(free.id)
            stuck = pod.start("sh", "-c", "seq 1 20000; sleep 1000", name="log")
            until(lambda: service.status(stuck).reason == "LogBlocked")
            free.start("sh", "-c", "seq 1 20000", name="log")
            until(lambda: free.log_path("log").exists() and len(log_lines(free.log_path("log"))) == 20000, SOON_S)
    finally:
        subprocess.run(["umount", logs], check=True)
        logs.rmdir()


@contextmanager
def dead_file_server(path: Path) -> Iterator[Path]:
    """A file system below which every look-up hangs until it is taken away: FUSE without anybody who answers."""
    path.mkdir()
    with open("/dev/fuse", "r+b", buffering=0) as device:
        options = f"fd={device.fileno()},rootmode=40000,user_id=0,group_id=0,allow_other"
        mounts.mount("dead", str(path), "fuse", 0, options)
        try:
            yield path / "anything"
        finally:
            mounts.umount2(str(path), mounts.UnmountFlag.DETACH)
    path.rmdir()


def test_a_container_whose_making_hangs_holds_up_no_other_pod_and_fails_when_it_is_killed(service: Cri, tmp_path: Path) -> None:
    with neighbours(service, 2) as (hung, other), dead_file_server(tmp_path / "dead") as place:
        untouched = other.start("sh", "-c", "read x; exit 4", stdin=True, stdin_once=True, name="main")
        shim, before = service.shim(hung.id), set(_children(service.shim(hung.id)))
        mount = cri.Mount(container_path="/data", host_path=str(place))
        asked = Thread(target=lambda: failures.append(refused(lambda: hung.create(*FOREVER, mounts=[mount]))[1]))
        failures: list[Failure] = []
        asked.start()
        (init,) = until(lambda: set(_children(shim)) - before)
        assert service.exec(untouched, "true", timeout_s=int(SOON_S)).exit_code == 0
        assert service.sh(other.start(*FOREVER), "echo made meanwhile") == "made meanwhile\n"
        url = service.runtime.Attach(cri.AttachRequest(container_id=untouched, stdin=True, stdout=True)).url
        stream(url, stdin=b"now\n")
        assert service.ended(untouched, SOON_S).exit_code == 4
        assert asked.is_alive()
        os.kill(init, 9)
        asked.join(SOON_S)
        assert "killed by SIGKILL" in failures[0].cause
        assert service.exec(hung.start(*FOREVER), "true").exit_code == 0


def test_a_killed_shim_takes_all_of_its_pods_and_no_other(own_cri: Callable[..., Cri]) -> None:
    service = own_cri(settings="pods_per_shim = 3\n")
    pods = [service.run_pod() for _ in range(3)]
    other = service.run_pod()
    shim = service.shim(pods[0].id)
    assert {service.shim(pod.id) for pod in pods} == {shim} != {service.shim(other.id)}
    running = [pod.start(*FOREVER) for pod in pods]
    untouched = other.start(*FOREVER)
    inits = _children(shim)
    killed(shim)
    for pod, container in zip(pods, running, strict=True):
        status = service.ended(container, SOON_S)
        assert (status.exit_code, status.reason) == (137, "ContainerStatusUnknown") and "its shim died" in status.message
        until(lambda pod=pod: pod.status().state == cri.SANDBOX_NOTREADY)  # type: ignore[misc]  # binds this round's pod
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inits))
    assert service.exec(untouched, "true").exit_code == 0
    fresh = service.run_pod()
    assert service.exec(fresh.start(*FOREVER), "true").exit_code == 0
    for pod in (*pods, other, fresh):
        pod.remove()


def test_the_next_daemon_takes_up_all_pods_of_a_shim_and_gives_it_no_more(own_cri: Callable[..., Cri]) -> None:
    service = own_cri()
    pods = [service.run_pod() for _ in range(3)]
    made = [pod.start(*FOREVER) for pod in pods]
    (shim,) = {service.shim(pod.id) for pod in pods}
    service.kill()
    service.start()
    assert [service.exec(one, "true").exit_code for one in made] == [0, 0, 0]
    fresh = service.run_pod()
    assert service.shim(fresh.id) != shim  # it may be of an older nacre
    for pod in pods:
        pod.remove()
    until(lambda: not Path(f"/proc/{shim}").exists())
    fresh.remove()


def test_a_shim_that_dies_as_it_is_given_a_pod_is_replaced(own_cri: Callable[..., Cri]) -> None:
    service = own_cri()
    first = service.run_pod()
    os.kill(service.shim(first.id), 19)  # it holds still, so that the request lies before it when it is killed
    asked = service.runtime.RunPodSandbox.future(cri.RunPodSandboxRequest(config=(config := service.pod_config())))
    with pytest.raises(grpc.FutureTimeoutError):
        asked.result(timeout=0.5)
    killed(service.shim(first.id))
    second = Pod(service, config, asked.result(timeout=SOON_S).pod_sandbox_id)
    assert service.exec(second.start(*FOREVER), "true").exit_code == 0
    for pod in (first, second):
        pod.remove()


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _descendants(pid: int) -> Iterator[int]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)


def _says(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")


def _pipes(pid: int) -> set[str]:
    names = (os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())
    return {name for name in names if name.startswith(("pipe:", "socket:"))}


def _pod_of(pid: int, pods: tuple[Pod, ...]) -> int:
    """Which pod a process works for, by its cgroup."""
    groups = Path(f"/proc/{pid}/cgroup").read_text()
    for number, pod in enumerate(pods):
        if pod.id in groups:
            return number
    raise AssertionError(f"process {pid} is nobody's: {_says(pid)!r}")
