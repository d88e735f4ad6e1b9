"""Other people's OCI runtimes as handlers of a RuntimeClass: Debian's runc and crun."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator

import grpc
import pytest
from cri_support import FOREVER, Cri, Pod, attach_terminal, killed, refused, stream, until
from leftovers import assert_settled, look, settled

from nacre.wire import cri_pb2 as cri

RUNTIMES = ("runc", "crun")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, cri_image: object) -> Iterator[Cri]:
    """A service that has each of RUNTIMES as handler debian-NAME, and one whose binary is missing."""
    binaries = {f"debian-{name}": shutil.which(name) for name in RUNTIMES} | {"broken": "/nonexistent/runtime"}
    settings = "".join(f'[handlers.{name}]\nbinary = "{binary}"\n' for name, binary in binaries.items() if binary)
    service = Cri(tmp_path_factory.mktemp("foreign"), settings)
    try:
        service.start().load(cri_image)  # type: ignore[arg-type]  # a Path
        yield service
        assert "Traceback" not in service.log()
    finally:
        service.reset()


@pytest.fixture(params=RUNTIMES)
def pod(foreign: Cri, request: pytest.FixtureRequest) -> Iterator[Pod]:
    """A pod of that handler, which a container was started in; a host that the runtime refuses skips with its words."""
    handler = f"debian-{request.param}"
    if not shutil.which(request.param):
        pytest.skip(f"which({request.param!r}) is None: ./run test unpacks it")
    with foreign.pod(handler=handler) as made:
        try:
            foreign.remove_container(made.start(*FOREVER, name="probe"))
        except grpc.RpcError as error:
            code, failure = refused(lambda: made.create(*FOREVER, name="probe", attempt=1))
            assert code == grpc.StatusCode.UNKNOWN and failure.cause.startswith(f"{request.param}: "), failure
            assert any(" create --bundle " in line for line in failure.evidence), "the command, ready to paste"
            pytest.skip(f"{request.param} create: {error.details()}")  # type: ignore[attr-defined]  # a call is an error too
        before = settled(foreign.prefix, look(foreign.prefix))
        made.made = 0
        yield made
        for held in foreign.runtime.ListContainers(cri.ListContainersRequest()).containers:
            foreign.remove_container(held.id)
        assert_settled(foreign.prefix, before)


def test_a_containers_life_goes_through_the_binary(foreign: Cri, pod: Pod) -> None:
    made = pod.start("sh", "-c", "echo hello; exit 6", name="main")
    status = foreign.ended(made)
    assert (status.exit_code, status.reason, pod.text("main")) == (6, "Error", "hello\n")
    name = json.loads(foreign.runtime.PodSandboxStatus(
        cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)).info["info"])["runtimeHandler"]  # fmt: skip
    assert name.startswith("debian-") and (foreign.state / name / made).is_dir()
    running = pod.start(*FOREVER)
    foreign.stop_container(running, 0)
    assert foreign.status(running).exit_code == 137


def test_exec_streams_and_terminals_work(foreign: Cri, pod: Pod) -> None:
    made = pod.start(*FOREVER)
    answer = foreign.exec(made, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out\n", b"err\n", 3)
    url = foreign.runtime.Exec(
        cri.ExecRequest(container_id=made, cmd=["sh", "-c", "test -t 0 && echo tty"], tty=True, stdin=True, stdout=True)
    ).url
    assert stream(url).out == b"tty\r\n"
    loud = pod.start("sh", "-c", "test -t 1 && echo tty; read x; echo got $x", name="terminal", stdin=True, tty=True)
    assert b"got word" in attach_terminal(foreign, loud, b"word\n")
    _code, failure = refused(lambda: foreign.exec(made, "nosuch"))
    assert "nosuch" in failure.cause


def test_limits_stats_oom_and_shared_processes_are_as_with_our_own(foreign: Cri, pod: Pod) -> None:
    limit = {"memory_limit_in_bytes": 24 << 20}
    made = pod.start(*FOREVER, resources=limit)
    stats = foreign.runtime.ContainerStats(cri.ContainerStatsRequest(container_id=made)).stats
    assert stats.memory.usage_bytes.value > 0 and stats.memory.available_bytes.value <= 24 << 20
    bigger = cri.LinuxContainerResources(memory_limit_in_bytes=48 << 20)
    foreign.runtime.UpdateContainerResources(cri.UpdateContainerResourcesRequest(container_id=made, linux=bigger))
    stats = foreign.runtime.ContainerStats(cri.ContainerStatsRequest(container_id=made)).stats
    assert stats.memory.available_bytes.value > 24 << 20
    hog = pod.start("dd", "if=/dev/zero", "of=/dev/shm/hog", "bs=1M", "count=64", resources=limit)
    assert (foreign.ended(hog).exit_code, foreign.status(hog).reason) == (137, "OOMKilled")
    foreign.sh(made, "rm /dev/shm/hog")


def test_a_runtimes_refusal_is_told_in_its_own_words(foreign: Cri, pod: Pod) -> None:
    _code, failure = refused(lambda: pod.start("/bin/nosuch"))
    assert "nosuch" in failure.cause and failure.code in ("ForeignRuntimeFailed",)


def test_a_handler_whose_binary_is_missing_says_where_to_set_it(foreign: Cri) -> None:
    before = settled(foreign.prefix, look(foreign.prefix))
    _code, failure = refused(lambda: foreign.run_pod(handler="broken"))
    assert "/nonexistent/runtime" in failure.cause and "config.toml" in failure.remedy
    assert_settled(foreign.prefix, before)


def test_a_daemon_killed_over_a_foreign_runtime_finds_its_pods(own_cri: Callable[..., Cri]) -> None:
    binary = shutil.which("runc")
    if not binary:
        pytest.skip("which('runc') is None: ./run test unpacks it")
    service = own_cri(settings=f'[handlers.debian-runc]\nbinary = "{binary}"\n')
    pod = service.run_pod(handler="debian-runc")
    made = pod.start("sh", "-c", "echo up; sleep 1000", name="main")
    until(lambda: pod.text("main"))
    service.kill()
    service.start()
    assert service.exec(made, "echo", "alive").stdout == b"alive\n"
    service.kill()
    shim = service.shim(pod.id)
    killed(shim)
    service.start()
    assert (service.status(made).exit_code, service.status(made).reason) == (137, "ContainerStatusUnknown")
    pod.remove()
