"""Images: from a name to the directories or the block device that a container's root is made of.

Called by `cri` (in the daemon's loop), by `nacre image`, and by `./run demo`; may import `linux`, `oci`, `config` and
`shim.handler` (for its `Rootfs`), aiohttp, zstandard. Owns everything below DATA/images and DATA/snapshots; `places` draws it.

    reference   names as Docker and containerd read them      manifests  indexes, manifests, configurations, platforms
    content     blobs by digest, verified while written       database   what is known: names, images, leases (SQLite)
    registry    the HTTP side of a pull; auth, token, proxy   pull       one pull, from name to recorded image
    tarstream   tar, decoded and distrusted                   layer      one layer's entries put beneath a directory
    unpacker    the child process that does it                merged     overlay's lookup over layer directories
    snapshots   upper and work directories, release           erofs      one read-only file an image, for VMs
    archives    OCI layouts and docker-archives               build_demo images made from Debian packages
    store       the door: `Store`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nacre.images.model import Auth, Image, Layer, User
    from nacre.images.store import Store

__all__ = ["Auth", "Image", "Layer", "Store", "User"]


def __getattr__(name: str) -> Any:
    """The public names, imported at first use: the unpacker's child must not pay for the store."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(name)
    return getattr(import_module("nacre.images.store" if name == "Store" else "nacre.images.model"), name)
