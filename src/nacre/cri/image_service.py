"""ImageService over gRPC: the store of nacre/images in the CRI's words."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from nacre.cri import answers
from nacre.cri.pods import Pods
from nacre.cri.runtime import answered
from nacre.images import Auth
from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import progress_of

log = logging.getLogger("nacre.cri")


class ImageService:
    """runtime.v1.ImageService."""

    def __init__(self, pods: Pods) -> None:
        self._pods, self._images = pods, pods.images

    @answered
    async def ListImages(self, request: Any) -> Any:
        return cri.ListImagesResponse(images=self._listed(request.filter))

    async def StreamImages(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for one in self._listed(request.filter):
            yield cri.StreamImagesResponse(images=[one])

    def _listed(self, wanted: Any) -> list[Any]:
        name = wanted.image.image
        found = [self._images.get(name)] if name else self._images.list()
        return [answers.image(one) for one in found if one is not None]

    @answered
    async def ImageStatus(self, request: Any) -> Any:
        found = self._images.get(request.image.image)
        return cri.ImageStatusResponse(image=answers.image(found) if found else None)

    @answered
    async def PullImage(self, request: Any) -> Any:
        auth = request.auth
        known = None
        if request.HasField("auth"):
            known = Auth(
                username=auth.username,
                password=auth.password,
                auth=auth.auth,
                server_address=auth.server_address,
                identity_token=auth.identity_token,
                registry_token=auth.registry_token,
            )
        name, subject = request.image.image, progress_of("image", request.image.image)

        def tell(step: str, _done: int, whole: int) -> None:
            if not whole:
                log.info("%s: %s", name, step)
                self._pods.doing[subject] = f"{name}: {step}"

        try:
            found = await self._images.pull(name, known, for_vm=request.image.runtime_handler == "kata", progress=tell)
        finally:
            self._pods.doing.pop(subject, None)
        return cri.PullImageResponse(image_ref=found.id)

    @answered
    async def RemoveImage(self, request: Any) -> Any:
        await self._images.remove(request.image.image)
        return cri.RemoveImageResponse()

    @answered
    async def ImageFsInfo(self, request: Any) -> Any:
        used, inodes = self._images.usage()
        filesystem = cri.FilesystemUsage(
            timestamp=time.time_ns(),
            fs_id=cri.FilesystemIdentifier(mountpoint=f"{self._pods.config.data}/images"),
            used_bytes=cri.UInt64Value(value=used),
            inodes_used=cri.UInt64Value(value=inodes),
        )
        return cri.ImageFsInfoResponse(image_filesystems=[filesystem], container_filesystems=[filesystem])
