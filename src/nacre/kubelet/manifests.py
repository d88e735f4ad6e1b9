"""Static pods: manifests in ETC/manifests, run without the API server, each shown there by a mirror pod.

A file is a pod; its uid is the hash of node, file name and content, so that a changed file is another pod: the former one ends, the new
one begins. The directory is watched (inotify); a file that cannot be read as a pod is named in the log and in an event of the node.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
import os
import uuid
from collections.abc import Callable
from typing import Any

from nacre.kubelet.host import Host
from nacre.kubelet.watching import DIRECTORY, Watching
from nacre.oci.errors import Failure, Invalid
from nacre.wire.kube import ApiError

log = logging.getLogger("nacre.kubelet")
SOURCE, HASH, MIRROR = "kubernetes.io/config.source", "kubernetes.io/config.hash", "kubernetes.io/config.mirror"
RETRY_S = 5.0
SUFFIXES = (".yaml", ".yml", ".json")


class Manifests:
    """The directory; `add` is told of each pod, `remove` of the uid of each that is gone."""

    def __init__(
        self, host: Host, watching: Watching, add: Callable[[dict[str, Any]], None], remove: Callable[[str], None]
    ) -> None:
        self._host, self._watching, self._add, self._remove = host, watching, add, remove
        self._directory = f"{host.config.etc}/manifests"
        self._known: set[str] = set()
        self._refused: dict[str, str] = {}
        self.read_once = False

    async def run(self) -> None:
        os.makedirs(self._directory, mode=0o755, exist_ok=True)
        with self._watching.changes(self._directory, DIRECTORY) as event:
            while True:
                event.clear()
                self._look()
                self.read_once = True
                await event.wait()

    def _look(self) -> None:
        pods = {}
        for name in sorted(os.listdir(self._directory)):
            if not name.endswith(SUFFIXES) or name.startswith("."):
                continue
            path = f"{self._directory}/{name}"
            try:
                pod = static_pod(path, self._host.config.node_name)
                pods[pod["metadata"]["uid"]] = pod
                self._refused.pop(path, None)
            except FileNotFoundError:
                continue  # gone since the listing: an event follows
            except (Failure, OSError) as error:
                self._refuse(path, error)
        for uid in self._known - pods.keys():
            self._remove(uid)
        for uid in pods.keys() - self._known:
            self._add(pods[uid])
        self._known = set(pods)

    def _refuse(self, path: str, error: Exception) -> None:
        words = error.sentence() if isinstance(error, Failure) else str(error)
        if self._refused.get(path) != words:
            self._refused[path] = words
            log.warning("static manifest %s: %s", path, words)
            self._host.events.node("FailedValidation", f"static manifest {path}: {words}", warning=True)

    async def mirror(self, pod: dict[str, Any]) -> None:
        """Make the mirror pod unless it is there; tries again while the API server says no."""
        uid = pod["metadata"]["uid"]
        while uid in self._known:
            try:
                await self._host.kube.create(f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods", mirror_of(pod))
                return
            except ApiError as error:
                if error.code == 409:
                    await self._settle(pod)
                    return
                log.warning("mirror pod of %s: %s", pod["metadata"]["name"], error)
            except Failure as failure:
                log.warning("mirror pod of %s: %s", pod["metadata"]["name"], failure)
            await asyncio.sleep(RETRY_S)

    async def _settle(self, pod: dict[str, Any]) -> None:
        """Something has the name: an older mirror makes way, and its deletion brings ours; anything else stays."""
        metadata = pod["metadata"]
        found = await self._host.kube.get(f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}")
        of = (found["metadata"].get("annotations") or {}).get(MIRROR)
        if of is None:
            log.warning("static pod %s has no mirror: a pod of its name exists", metadata["name"])
        elif of != metadata["uid"]:
            await self.unmirror(found)
            await self.mirror(pod)

    async def unmirror(self, mirror: dict[str, Any]) -> None:
        metadata = mirror["metadata"]
        try:
            await self._host.kube.delete(
                f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}",
                {"gracePeriodSeconds": 0, "preconditions": {"uid": metadata["uid"]}},
            )
        except ApiError as error:
            if error.code not in (404, 409):
                raise


def static_pod(path: str, node: str) -> dict[str, Any]:
    """The pod of a manifest file, named, placed and marked as static. Raises Invalid, OSError."""
    import yaml

    with open(path, "rb") as file:
        content = file.read()
    what = f"read {path}"
    try:
        pod = yaml.load(content, _loader())
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:  # the middle two: `!!int x`, `!!bool x`
        raise Invalid(what=what, cause=f"it is no YAML: {error}", remedy=f"mend {path}") from error
    if not isinstance(pod, dict) or pod.get("kind") != "Pod" or pod.get("apiVersion") != "v1":
        raise Invalid(what=what, cause="it is no Pod of v1", remedy="one manifest a file: apiVersion: v1, kind: Pod")
    metadata = pod.get("metadata")
    if not isinstance(metadata, dict) or not metadata.get("name"):
        raise Invalid(what=what, cause="metadata.name is missing")
    spec = pod.get("spec")
    if not isinstance(spec, dict) or not spec.get("containers"):
        raise Invalid(what=what, cause="spec.containers is missing")
    for group in ("initContainers", "containers"):
        for index, one in enumerate(spec.get(group) or []):
            if not isinstance(one, dict) or not one.get("name") or not one.get("image"):
                raise Invalid(what=what, cause=f"spec.{group}[{index}] has no name or no image")
    _check_sources(spec, what)
    digest = hashlib.sha256(b"\0".join((node.encode(), os.path.basename(path).encode(), content))).digest()
    uid = str(uuid.UUID(bytes=digest[:16]))
    metadata |= {"name": f"{metadata['name']}-{node}", "namespace": metadata.get("namespace", "default"), "uid": uid}
    metadata["annotations"] = (metadata.get("annotations") or {}) | {SOURCE: "file", HASH: uid}
    spec["nodeName"] = node
    pod.pop("status", None)
    return pod


def _loader() -> Any:
    """YAML as Kubernetes reads it: a date is the text that it is."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # one of two, found at run time
        pass

    Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _loader, node: node.value)
    return Loader


def _check_sources(spec: dict[str, Any], what: str) -> None:
    """A static pod may not lean on API objects: it must start without the API server."""
    from nacre.kubelet.host import references

    named = [f"{kind} {name}" for kind, name in references(spec)]
    if named or spec.get("serviceAccountName"):
        cause = f"static pods may not refer to {', '.join(named) or 'a service account'}"
        raise Invalid(what=what, cause=cause, remedy="use hostPath, emptyDir and literal values")


def mirror_of(pod: dict[str, Any]) -> dict[str, Any]:
    """What the API server is shown."""
    mirror = copy.deepcopy(pod)
    metadata = mirror["metadata"]
    metadata["annotations"][MIRROR] = metadata.pop("uid")
    return mirror
