"""Images for containers: present, pulled by policy, or refused in Kubernetes' words, with back-off between tries."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from nacre.images.auth import keyring
from nacre.images.reference import parse
from nacre.kubelet import waiting
from nacre.kubelet.events import Events
from nacre.kubelet.plan import FIRST_BACKOFF_S, LAST_BACKOFF_S
from nacre.oci.errors import Failure
from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import Stub, failure_of, progress_of

log = logging.getLogger("nacre.kubelet")


class ImageTrouble(Failure):
    """`word` is the waiting reason: ErrImagePull, ImagePullBackOff, ErrImageNeverPull, InvalidImageName."""

    word = "ErrImagePull"


class Puller:
    """All pulls of the node; back-off is by pod and image."""

    def __init__(self, images: Stub, runtime: Stub, events: Events) -> None:
        self._images, self._runtime, self._events = images, runtime, events
        self._tries: dict[tuple[str, str], tuple[float, float, str]] = {}  # → (not before, back-off, last words)

    def forget(self, uid: str) -> None:
        for key in [key for key in self._tries if key[0] == uid]:
            del self._tries[key]

    async def ensure(
        self, pod: Mapping[str, Any], container: Mapping[str, Any], handler: str, secrets: Sequence[Mapping[str, Any]]
    ) -> Any:
        """The image as the runtime has it (CRI Image). Raises ImageTrouble with the waiting reason as `word`."""
        name = container["image"]
        policy = container.get("imagePullPolicy") or ("Always" if name.endswith(":latest") else "IfNotPresent")
        spec = cri.ImageSpec(image=name, runtime_handler=handler, user_specified_image=name)
        try:
            present = (await self._images.ImageStatus(cri.ImageStatusRequest(image=spec))).image
        except grpc.RpcError as error:
            failure = failure_of(error, f"look for image {name}")
            word = "InvalidImageName" if failure.code in ("Invalid", "InvalidImageName") else "ImageInspectError"
            self._events.pod(
                pod,
                "InspectFailed",
                f'Failed to apply default image tag "{name}": {failure.sentence()}',
                container=container["name"],
                warning=True,
            )
            raise _trouble(failure, word) from error
        if present.id and policy != "Always":
            self._events.pod(pod, "Pulled", f'Container image "{name}" already present on machine', container=container["name"])
            return present
        if policy == "Never":
            message = f'Container image "{name}" is not present with pull policy of Never'
            self._events.pod(pod, "ErrImageNeverPull", message, container=container["name"], warning=True)
            raise _trouble(
                Failure(what=f"use image {name}", cause=message, remedy=f"nacre image pull {name}"), "ErrImageNeverPull"
            )
        return await self._pull(pod, container, spec, secrets)

    async def _pull(
        self, pod: Mapping[str, Any], container: Mapping[str, Any], spec: Any, secrets: Sequence[Mapping[str, Any]]
    ) -> Any:
        name, key = spec.image, (pod["metadata"]["uid"], spec.image)
        not_before, backoff, words = self._tries.get(key, (0.0, 0.0, ""))
        if time.time() < not_before:
            self._events.pod(pod, "BackOff", f'Back-off pulling image "{name}"', container=container["name"])
            raise _trouble(Failure(what=f'Back-off pulling image "{name}"', cause=words), "ImagePullBackOff")
        self._events.pod(pod, "Pulling", f'Pulling image "{name}"', container=container["name"])
        began = time.monotonic()
        trying = self._try(spec, [one for secret in secrets for one in _credentials(secret, name)])
        try:
            await waiting.told(
                self._runtime,
                progress_of("image", name),
                trying,
                lambda words: self._events.pod(pod, "Pulling", words, container=container["name"]),
            )
        except grpc.RpcError as error:
            failure = failure_of(error, f"pull image {name}")
            backoff = min(LAST_BACKOFF_S, backoff * 2) or FIRST_BACKOFF_S
            self._tries[key] = (time.time() + backoff, backoff, failure.sentence())
            self._events.pod(
                pod, "Failed", f'Failed to pull image "{name}": {failure.sentence()}', container=container["name"], warning=True
            )
            self._events.pod(pod, "Failed", "Error: ErrImagePull", container=container["name"], warning=True)
            raise _trouble(failure, "ErrImagePull") from error
        self._tries.pop(key, None)
        took = time.monotonic() - began
        image = (await self._images.ImageStatus(cri.ImageStatusRequest(image=spec))).image
        message = (
            f'Successfully pulled image "{name}" in {took:.3f}s ({took:.3f}s including waiting). Image size: {image.size} bytes.'
        )
        self._events.pod(pod, "Pulled", message, container=container["name"])
        return image

    async def _try(self, spec: Any, fitting: list[Any]) -> None:
        """With each credential that fits, or without; the last refusal is the one that counts."""
        for auth in fitting[:-1]:
            try:
                await self._images.PullImage(cri.PullImageRequest(image=spec, auth=auth))
                return
            except grpc.RpcError:
                continue  # the next secret may fit; the last try below speaks for all
        request = cri.PullImageRequest(image=spec, auth=fitting[-1]) if fitting else cri.PullImageRequest(image=spec)
        await self._images.PullImage(request)

    def wait_left(self, uid: str, image: str) -> float:
        return max(0.0, self._tries.get((uid, image), (0.0,))[0] - time.time())


def _trouble(failure: Failure, word: str) -> ImageTrouble:
    made = ImageTrouble(what=failure.what, cause=failure.cause, evidence=failure.evidence, remedy=failure.remedy)
    made.word = word
    made.code = failure.code  # type: ignore[misc]  # what went wrong keeps its name; ours is the waiting reason
    return made


def _credentials(secret: Mapping[str, Any], image: str) -> list[Any]:
    """An AuthConfig for each entry of an image pull Secret that is for the registry of `image`; a Secret that holds none is no obstacle."""
    data = secret.get("data") or {}
    encoded = data.get(".dockerconfigjson") or data.get(".dockercfg")
    if not encoded:
        return []
    try:
        document = json.loads(base64.b64decode(encoded))
        found = keyring(document if isinstance(document, dict) else {}, parse(image))
    except (ValueError, Failure) as error:  # the pull goes on without it and says what the registry says
        log.warning("secret %s holds no registry credentials: %s", secret["metadata"]["name"], error)
        return []
    return [
        cri.AuthConfig(
            username=one.username,
            password=one.password,
            auth=one.auth,
            identity_token=one.identity_token,
            registry_token=one.registry_token,
        )
        for one in found
    ]
