"""The node's API as the command line uses it: a few reads and writes as `admin`, each in a loop of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from nacre.cli import node
from nacre.config import Config
from nacre.oci.errors import Failure, NotFound
from nacre.wire.kube import ApiError, Kube, Object, Unreachable, client_context

T = TypeVar("T")


class Refused(Failure):
    """The API server said no."""


def connect(config: Config) -> Kube:
    """A client of the running node's API as `admin`. Raises NotFound when the node has never been up."""
    identity = node.read_identity(config)
    try:
        context = client_context(f"{config.data}/pki", "admin")
        return Kube(f"https://{identity['listen']}:{identity['api_port']}", context)
    except (FileNotFoundError, KeyError) as error:
        raise NotFound(what="reach the API", cause="the node has not been up yet", remedy="nacre up") from error


def call(config: Config, what: str, work: Callable[[Kube], Awaitable[T]]) -> T:
    """Run `work` with a client; a refusal becomes Refused with the server's words after `what`."""

    async def run() -> T:
        async with connect(config) as kube:
            return await work(kube)

    try:
        return asyncio.run(run())
    except ApiError as error:
        kind = NotFound if error.code == 404 else Refused
        raise kind(what=what, cause=error.message) from error


def get(config: Config, path: str, **params: Any) -> Object:
    return call(config, f"get {path}", lambda kube: kube.get(path, **params))


def condition(thing: Object, kind: str) -> Object:
    """The condition `kind` of a Pod or Node, {} when it is not there."""
    for found in thing.get("status", {}).get("conditions") or []:
        if found.get("type") == kind:
            return dict(found)
    return {}


def node_ready(config: Config, timeout_s: float) -> tuple[bool, str]:
    """(Ready?, the kubelet's words if not) of this machine's Node object; waits for it up to `timeout_s` by watching."""
    name = node.read_identity(config).get("node", config.node_name)

    async def work(kube: Kube) -> tuple[bool, str]:
        answer = (False, f"the API has no Node {name} yet")
        listed = await kube.get("/api/v1/nodes", fieldSelector=f"metadata.name={name}")
        for thing in listed["items"]:
            answer = _verdict(thing)
        if answer[0] or timeout_s <= 0:
            return answer
        try:
            async with asyncio.timeout(timeout_s):
                version = listed["metadata"]["resourceVersion"]
                async with aclosing(kube.watch("/api/v1/nodes", version, fieldSelector=f"metadata.name={name}")) as events:
                    async for event in events:
                        if event["type"] in ("ADDED", "MODIFIED") and (answer := _verdict(event["object"]))[0]:
                            break
        except TimeoutError:
            pass  # the last verdict says why
        return answer

    try:
        return call(config, f"watch node {name}", work)
    except Unreachable as error:
        return False, str(error)


def _verdict(thing: Object) -> tuple[bool, str]:
    ready = condition(thing, "Ready")
    return ready.get("status") == "True", str(ready.get("message") or "no condition Ready yet")


def find_pod(config: Config, name: str, namespace: str) -> Object:
    """The Pod `name` or `namespace/name`. Raises NotFound naming both."""
    space, _, bare = name.rpartition("/")
    space = space or namespace
    try:
        return get(config, f"/api/v1/namespaces/{space}/pods/{bare}")
    except NotFound as error:
        raise NotFound(what=f"find pod {space}/{bare}", cause=error.cause, remedy="nacre kubectl get pods -A") from error


def events_of(config: Config, pod: Object) -> list[Object]:
    """The pod's events, oldest first."""
    metadata = pod["metadata"]
    listed = get(
        config, f"/api/v1/namespaces/{metadata['namespace']}/events", fieldSelector=f"involvedObject.uid={metadata['uid']}"
    )
    return sorted(listed["items"], key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")


def wait_pod(config: Config, namespace: str, name: str, wanted: Callable[[Object], bool], timeout_s: float) -> Object | None:
    """The pod as soon as it is as `wanted`, by list and watch; the last one seen (None: none) when time is up."""
    path, selector = f"/api/v1/namespaces/{namespace}/pods", f"metadata.name={name}"

    async def work(kube: Kube) -> Object | None:
        seen: Object | None = None
        try:
            async with asyncio.timeout(timeout_s):
                listed = await kube.get(path, fieldSelector=selector)
                for seen in listed["items"]:
                    if wanted(seen):
                        return seen
                async with aclosing(kube.watch(path, listed["metadata"]["resourceVersion"], fieldSelector=selector)) as events:
                    async for event in events:
                        if event["type"] in ("ADDED", "MODIFIED"):
                            seen = event["object"]
                            if wanted(seen):
                                return seen
        except TimeoutError:
            pass
        return seen

    return call(config, f"watch pod {namespace}/{name}", work)


def is_ready(pod: Object) -> bool:
    return condition(pod, "Ready").get("status") == "True"


def is_stuck(pod: Object) -> bool:
    """A container waits for a reason that is no progress."""
    waiting = [
        (status.get("state") or {}).get("waiting") or {} for status in pod.get("status", {}).get("containerStatuses") or []
    ]
    return any(found.get("reason") not in (None, "ContainerCreating", "PodInitializing") for found in waiting)


def has_failed(pod: Object) -> bool:
    """A container is stuck, or has ended."""
    states = [status.get("state") or {} for status in pod.get("status", {}).get("containerStatuses") or []]
    return is_stuck(pod) or any(state.get("terminated") for state in states)
