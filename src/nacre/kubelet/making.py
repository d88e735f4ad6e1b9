"""What brings a pod up: cgroup, volumes, sandbox, and each container from its image to running. Failures are told in Kubernetes' words."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from nacre.kubelet import ending, hooks, names, probes, resources, rotation, translate, waiting
from nacre.kubelet.expand import ConfigError, Sources
from nacre.kubelet.life import Life
from nacre.kubelet.plan import SANDBOX, next_backoff
from nacre.kubelet.pulling import ImageTrouble
from nacre.kubelet.waiting import Interrupted
from nacre.oci.errors import Failure
from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import progress_of

NOT_WEIGHED = (
    "The pod's RuntimeClass has no overhead: nobody counts the memory of its virtual machine, and the node may run short of it."
    " `nacre enable kata` weighs one and writes the RuntimeClass anew."
)
T = TypeVar("T")
RETRY_S = 5.0  # after a failure that nothing announces the end of


class SandboxLost(Exception):
    """The runtime says that the sandbox is not what it was: ask it anew."""


async def prepare(life: Life, sources: Sources) -> None:
    """What must be there before the sandbox: cgroup, volumes. Raises Failure."""
    if not life.cgroup_made:
        spec, handler = life.pod["spec"], await life.host.handler_of(life.pod)
        await asyncio.to_thread(life.cgroup.make, resources.pod_totals(spec, handler))
        if resources.is_unweighed_vm(spec, handler):
            life.event("VmNotWeighed", NOT_WEIGHED)
        life.cgroup_made = True
    os.makedirs(life.volumes.directory, exist_ok=True)
    if life.pod["spec"].get("volumes"):
        await asyncio.to_thread(life.volumes.prepare, life.pod, sources)


async def make_sandbox(life: Life, sources: Sources) -> None:
    """A new sandbox in place of the former one, if any. A failure is told, and tried again after its back-off. Raises Interrupted."""
    try:
        await prepare(life, sources)
        await _replace_sandbox(life)
    except Failure as failure:
        if failure.code in ("FailedMount", ConfigError.code):
            words = f"MountVolume.SetUp failed: {failure.sentence()}"
            _blame(life, failure, "FailedMount", words)
        else:
            _blame(life, failure, "FailedCreatePodSandBox", f"Failed to create pod sandbox: {failure.sentence()}")
        life.facts.sandbox_failure = failure.sentence()
        life.not_before[SANDBOX] = time.time() + RETRY_S
        return
    life.facts.sandbox_failure = ""
    life.not_before.pop(SANDBOX, None)


def _blame(life: Life, failure: Failure, reason: str, words: str) -> None:
    life.record_failure(failure)
    life.event(reason, words, warning=True)


async def _replace_sandbox(life: Life) -> None:
    runtime = life.host.runtime
    handler = await life.host.handler_of(life.pod)
    if life.sandbox:
        life.event("SandboxChanged", "Pod sandbox changed, it will be killed and re-created.")
        await life.end_probes()
        await life.call(runtime.StopPodSandbox, cri.StopPodSandboxRequest(pod_sandbox_id=life.sandbox), "stop the former sandbox")
        for _name, one in life.running():
            await life.refresh(one.id)
    config = translate.sandbox_config(life.pod, life.sandbox_attempt + 1, life.frame)
    wanted = cri.RunPodSandboxRequest(config=config, runtime_handler=handler)
    identifier = await _run_sandbox(life, wanted)
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=identifier)
    life.note_sandbox((await life.call(runtime.PodSandboxStatus, request, "ask for the sandbox")).status)
    _write_hosts(life)
    await _forget_older_sandboxes(life)


async def _run_sandbox(life: Life, wanted: Any) -> str:
    """The new sandbox's id. What its handler still has to get ready is shown, and not waited for when the pod is to end."""

    def tell(words: str) -> None:
        life.event("PreparingSandbox", f"Pod sandbox waits: {words}")

    runtime, subject = life.host.runtime, progress_of("handler", wanted.runtime_handler)
    running = life.call(runtime.RunPodSandbox, wanted, "create the sandbox")
    answer = await waiting.told(runtime, subject, running, tell, unwanted=life.hurry.is_set)
    return str(answer.pod_sandbox_id)


async def _forget_older_sandboxes(life: Life) -> None:
    """The one before may hold the last ended containers, whose logs are kept; earlier ones hold nothing of use."""
    if life.sandbox_attempt < 2:
        return
    runtime, wanted = life.host.runtime, cri.PodSandboxFilter(label_selector={translate.UID_LABEL: life.uid})
    listed = await life.call(runtime.ListPodSandbox, cri.ListPodSandboxRequest(filter=wanted), "list the sandboxes")
    for item in listed.items:
        if item.metadata.attempt < life.sandbox_attempt - 1:
            request = cri.RemovePodSandboxRequest(pod_sandbox_id=item.id)
            await life.call(runtime.RemovePodSandbox, request, "remove a former sandbox")


def _write_hosts(life: Life) -> None:
    """/etc/hosts of the pod's containers."""
    with open("/etc/hosts", encoding="utf-8", errors="replace") as file:
        text = names.hosts(life.pod, life.facts.addresses, file.read())
    if text:
        with open(f"{life.volumes.directory}/etc-hosts", "w", encoding="utf-8") as file:
            file.write(text)


async def start(life: Life, name: str, sources: Sources) -> None:
    """One container from image to running; whatever keeps it from that becomes its waiting reason and a time to try again.

    Raises Interrupted, SandboxLost.
    """
    container = life.container(name)
    try:
        one = life.facts.statuses.get(name)
        if one is not None and one.state == cri.CONTAINER_CREATED and life.sandboxes.get(one.id) == life.sandbox:
            identifier = str(one.id)  # a kubelet that was killed had made it
        else:
            image = await _image(life, container)
            translate.check_non_root(life.pod, container, image)
            identifier = await _create(life, container, str(image.id), sources)
        if identifier:
            await _begin(life, container, identifier)
    except ImageTrouble as failure:
        life.facts.waiting[name] = (failure.word, failure.sentence())
        if failure.word != "ImagePullBackOff":  # an echo: the failure itself is recorded
            life.record_failure(failure)
        left = life.host.puller.wait_left(life.uid, container["image"]) if failure.word == "ImagePullBackOff" else 0.0
        life.not_before[name] = time.time() + (left or RETRY_S)
    except ConfigError as failure:
        _held_up(life, name, failure, "CreateContainerConfigError")
        life.not_before[name] = time.time() + RETRY_S


def _held_up(life: Life, name: str, failure: Failure, word: str) -> None:
    life.facts.waiting[name] = (word, failure.sentence())
    life.record_failure(failure)
    life.event("Failed", f"Error: {failure.sentence()}", container=name, warning=True)


async def _image(life: Life, container: dict[str, Any]) -> Any:
    """The CRI's Image; a pull ends at once when the pod is to end. Raises ImageTrouble, Interrupted."""
    secrets = await life.host.pull_secrets(life.pod)
    handler = await life.host.handler_of(life.pod)
    return await _unless_hurried(life, life.host.puller.ensure(life.pod, container, handler, secrets))


async def _unless_hurried(life: Life, work: Coroutine[Any, Any, T]) -> T:
    """What `work` answers; it is dropped when the pod is to end. Raises Interrupted."""
    working = asyncio.ensure_future(work)
    hurried = asyncio.ensure_future(life.hurry.wait())
    try:
        await asyncio.wait((working, hurried), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Interrupted
        return working.result()
    finally:
        hurried.cancel()
        working.cancel()


async def _create(life: Life, container: dict[str, Any], image: str, sources: Sources) -> str:
    """The new container's id, "" when it was refused (told, and held up). Raises ConfigError, SandboxLost."""
    name, attempt = container["name"], life.next_attempt(container["name"])
    await _forget_older(life, name, attempt)
    pod = life.with_addresses()
    config = translate.container_config(pod, container, attempt, image, sources.seen_by(pod), life.frame)
    sandbox = translate.sandbox_config(life.pod, life.sandbox_attempt, life.frame)
    request = cri.CreateContainerRequest(pod_sandbox_id=life.sandbox, config=config, sandbox_config=sandbox)
    try:
        answer = await life.call(life.host.runtime.CreateContainer, request, f"create container {name}")
    except Failure as failure:
        await life.ask_runtime()
        if not life.sandbox_ready:
            raise SandboxLost from failure
        _held_up(life, name, failure, "CreateContainerError")
        life.backoff_s[name] = next_backoff(life.backoff_s.get(name, 0.0), 0.0)
        life.not_before[name] = time.time() + life.backoff_s[name]
        return ""
    life.event("Created", f"Created container: {name}", container=name)
    life.sandboxes[str(answer.container_id)] = life.sandbox
    return str(answer.container_id)


async def _forget_older(life: Life, name: str, attempt: int) -> None:
    """Of ended attempts the last one is kept, for `logs --previous`; earlier ones go, with their logs."""
    runtime = life.host.runtime
    wanted = cri.ContainerFilter(label_selector={translate.UID_LABEL: life.uid, translate.CONTAINER_LABEL: name})
    if attempt < 2:
        return
    listed = await life.call(runtime.ListContainers, cri.ListContainersRequest(filter=wanted), "list the containers")
    for one in listed.containers:
        if one.metadata.attempt < attempt - 1:
            await life.call(runtime.RemoveContainer, cri.RemoveContainerRequest(container_id=one.id), f"remove container {name}")
            life.sandboxes.pop(one.id, None)
    for number in range(attempt - 2, -1, -1):
        written = translate.log_file(life.frame, life.pod, name, number)
        files = (written, *rotation.older_than(written), translate.termination_file(life.volumes, name, number))
        there = [path for path in files if os.path.exists(path)]
        for path in there:
            os.unlink(path)
        if not there:
            return  # those before went when this one did


async def _begin(life: Life, container: dict[str, Any], identifier: str) -> None:
    name = container["name"]
    request = cri.StartContainerRequest(container_id=identifier)
    try:
        await life.call(life.host.runtime.StartContainer, request, f"start container {name}")
    except Failure as failure:
        await life.refresh(identifier)
        _held_up(life, name, failure, "RunContainerError")
        return
    life.facts.waiting.pop(name, None)
    life.facts.started[name] = "startupProbe" not in container
    if "readinessProbe" in container:
        life.facts.ready[name] = False
    life.event("Started", f"Started container {name}", container=name)
    await life.refresh(identifier)
    hook = (container.get("lifecycle") or {}).get("postStart")
    if hook and not await _unless_hurried(life, hooks.run(life, hook, container, identifier, "FailedPostStartHook")):
        await ending.stop_container(life, name, identifier, why="FailedPostStartHook")


async def tell_of_volumes(life: Life) -> None:
    """A runtime that has copied volumes is asked to look again: the CRI has no word for it, so the resources are set as they are."""
    qos = resources.qos_class(life.pod["spec"])
    for name, one in life.running():
        limits = resources.linux_resources(life.container(name), qos, life.host.memory_bytes)
        request = cri.UpdateContainerResourcesRequest(container_id=one.id, linux=limits)
        await life.call(life.host.runtime.UpdateContainerResources, request, f"tell container {name} of changed volumes")


def watch(life: Life, name: str, identifier: str, wake: asyncio.Event) -> None:
    """Begin the probes of a running container; results go to `life`, then `wake` is set."""
    container = life.container(name)
    if identifier in life.probers or not any(kind in container for kind in probes.KINDS):
        return

    def result(kind: str, passed: bool, _words: str) -> None:
        if kind == "readinessProbe":
            life.facts.ready[name] = passed
        elif kind == "startupProbe" and passed:
            life.facts.started[name] = True
        elif not passed:
            life.unhealthy.add(name)
        wake.set()

    def failed(kind: str, _passed: bool, words: str) -> None:
        life.event("Unhealthy", f"{probes.KINDS[kind]} probe failed: {words}", container=name, warning=True)

    told = _told(life, name, identifier)  # a kubelet that was started again believes what it said before
    life.facts.started.setdefault(name, "startupProbe" not in container or bool(told.get("started")))
    if "readinessProbe" in container:
        life.facts.ready.setdefault(name, bool(told.get("ready")))
    life.probers[identifier] = probes.Prober(life.host.runtime, container, identifier, life.address, result, failed)


def _told(life: Life, name: str, identifier: str) -> dict[str, Any]:
    """The container's status in the API server, if it is about this very container."""
    status = life.pod.get("status") or {}
    listed = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    return next((one for one in listed if one["name"] == name and one.get("containerID", "").endswith(identifier)), {})
