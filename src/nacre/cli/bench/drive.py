"""The CRI calls of one pod's life, timed; the same for every engine."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from nacre.cli.bench import account
from nacre.cli.bench.engine import IMAGE, Engine, namespaces
from nacre.cli.bench.report import Results
from nacre.wire import cri_pb2

IDLE_COMMAND = ("/bin/sleep", "2147483647")
REFILL_PAUSE_S = 4.0  # between VM pods: what the pool needs to refill, so that each finds a warm member


@dataclass(slots=True)
class Pod:
    """One pod with one container, and how long each call of its life took, in ms."""

    engine: Engine
    handler: str = ""
    sandbox: str = ""
    container: str = ""
    took: dict[str, float] = field(default_factory=dict)

    def up(self) -> float:
        """RunPodSandbox to StartContainer; answers ms."""
        settings, runtime = self.engine.sandbox(), self.engine.runtime
        began = time.perf_counter()
        with self._timed("RunPodSandbox"):
            request = cri_pb2.RunPodSandboxRequest(config=settings, runtime_handler=self.handler)
            self.sandbox = runtime.RunPodSandbox(request).pod_sandbox_id
        container = cri_pb2.ContainerConfig(
            metadata=cri_pb2.ContainerMetadata(name="main", attempt=0),
            image=cri_pb2.ImageSpec(image=IMAGE),
            command=IDLE_COMMAND,
            log_path="main.log",
            linux=cri_pb2.LinuxContainerConfig(
                security_context=cri_pb2.LinuxContainerSecurityContext(namespace_options=namespaces())
            ),
        )
        with self._timed("CreateContainer"):
            created = cri_pb2.CreateContainerRequest(pod_sandbox_id=self.sandbox, config=container, sandbox_config=settings)
            self.container = runtime.CreateContainer(created).container_id
        with self._timed("StartContainer"):
            runtime.StartContainer(cri_pb2.StartContainerRequest(container_id=self.container))
        return (time.perf_counter() - began) * 1000

    def execute(self) -> float:
        """ExecSync of /bin/true; answers ms."""
        with self._timed("ExecSync"):
            request = cri_pb2.ExecSyncRequest(container_id=self.container, cmd=["/bin/true"], timeout=30)
            answer = self.engine.runtime.ExecSync(request)
        assert answer.exit_code == 0, answer.stderr
        return self.took["ExecSync"]

    def down(self) -> float:
        """StopPodSandbox and RemovePodSandbox; answers ms."""
        runtime = self.engine.runtime
        began = time.perf_counter()
        with self._timed("StopPodSandbox"):
            runtime.StopPodSandbox(cri_pb2.StopPodSandboxRequest(pod_sandbox_id=self.sandbox))
        with self._timed("RemovePodSandbox"):
            runtime.RemovePodSandbox(cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=self.sandbox))
        return (time.perf_counter() - began) * 1000

    def _timed(self, name: str) -> _Timer:
        return _Timer(self.took, name)


@dataclass(slots=True)
class _Timer:
    into: dict[str, float]
    name: str
    began: float = 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.into[self.name] = (time.perf_counter() - self.began) * 1000


def interleaved(engines: list[Engine], handler: str, rounds: int, results: Results) -> None:
    """`rounds` pods of each engine, one after the other, the order turned each round; a first pod of each is not counted."""
    for each in engines:
        _life(Pod(each, handler))
    for number in range(rounds):
        for each in engines if number % 2 == 0 else engines[::-1]:
            pod = Pod(each, handler)
            up, execute, down = _life(pod)
            results.add("pod up, ms", each.name, up)
            results.add("exec, ms", each.name, execute)
            results.add("pod down, ms", each.name, down)
            for call, took in pod.took.items():
                results.add(f"  {call}, ms", each.name, took)


def _life(pod: Pod) -> tuple[float, float, float]:
    return pod.up(), pod.execute(), pod.down()


def throughput(engine: Engine, total: int, parallel: int = 4) -> float:
    """Pods brought up and taken down a second, `parallel` at a time."""
    began = time.perf_counter()
    with ThreadPoolExecutor(parallel) as threads:
        list(threads.map(lambda _number: _life(Pod(engine)), range(total)))
    return total / (time.perf_counter() - began)


def cpu_per_pod(engine: Engine, pods: int) -> float:
    """CPU ms that one pod's life costs, daemon and kernel's work on its behalf included."""
    before = account.cpu_ms(engine)
    for _number in range(pods):
        _life(Pod(engine))
    return (account.cpu_ms(engine) - before) / pods


def syncs_per_pod(engine: Engine, pods: int) -> float | None:
    def work() -> None:
        for _number in range(pods):
            _life(Pod(engine))

    count = account.syncs(engine, work)
    return None if count is None else count / pods


def memory_per_pod(engine: Engine, pods: int) -> float:
    """Private KiB that one further idle pod adds to all of the engine's processes.

    The first is not counted: nacre's zygote has all of its memory to itself until it has forked a shim, and none of it afterwards.
    """
    held = [Pod(engine) for _number in range(pods + 1)]
    try:
        held[0].up()
        pause(2.0)  # what a start leaves in flight has settled
        before = account.private_kib(engine)
        for pod in held[1:]:
            pod.up()
        pause(2.0)
        return (account.private_kib(engine) - before) / pods
    finally:
        for pod in held:
            if pod.sandbox:
                pod.down()


def machines(ours: Engine, peers: list[Engine], title: str, rounds: int, results: Results) -> None:
    """VM pods of ours beside the peers' container pods, spaced so that the pool refills; its CPU is a figure of its own."""
    warm_up = Pod(ours, "kata")
    _life(warm_up)
    for _number in range(rounds):
        pause(REFILL_PAUSE_S)
        before = account.cpu_ms(ours)
        pod = Pod(ours, "kata")
        results.add(f"{title}, ms", ours.name, pod.up())
        results.add(f"{title}: exec, ms", ours.name, pod.execute())
        results.add(f"{title}: down, ms", ours.name, pod.down())
        pause(REFILL_PAUSE_S)
        results.add(f"{title}: CPU ms a pod, refill included", ours.name, account.cpu_ms(ours) - before)
        for each in peers:
            other = Pod(each)
            up, execute, down = _life(other)
            results.add(f"{title}, ms", each.name, up)
            results.add(f"{title}: exec, ms", each.name, execute)
            results.add(f"{title}: down, ms", each.name, down)


def pause(length_s: float) -> None:
    """Let the machine be idle: part of the method, not a wait for something."""
    select.select([], [], [], length_s)


def medians(values: dict[str, list[float]]) -> Iterator[tuple[str, float]]:
    import statistics

    for name, found in values.items():
        yield name, statistics.median(found)
