"""The ways in which getting an image fails, each a Failure with a stable code (docs/errors.md lists them)."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from nacre.oci.errors import Failure

_FULL = (errno.ENOSPC, errno.EDQUOT)


class InvalidImageName(Failure):
    """The text is no image reference; the reason that kubectl shows has the same name."""


class ImageNotFound(Failure):
    """The registry, or this node, has no such image."""


class RegistryUnreachable(Failure):
    """No conversation with the registry: name, route, port, TLS, or the wrong protocol."""


class RegistryUnavailable(Failure):
    """The registry answers, but with an error of its own (5xx, 429) or something that is no registry's answer."""


class AuthenticationRequired(Failure):
    """The registry wants credentials, or others than those given."""


class PullStalled(Failure):
    """No byte came for too long, or the connection broke too often; `cause` has blob, bytes so far and host."""


class DigestMismatch(Failure):
    """Bytes are not what their digest says."""


class NoMatchingPlatform(Failure):
    """The image exists, for other platforms; `cause` lists them."""


class ImageRefused(Failure):
    """Manifest, configuration or archive breaks its specification, or is no container image."""


class LayerRefused(Failure):
    """A layer's archive is broken or hostile; `cause` names the entry."""


class DiskFull(Failure):
    """No room below DATA; what was half written is gone again."""


class SnapshotRefused(Failure):
    """The file system below DATA cannot carry a container's root."""


class UserNotFound(Failure):
    """The image's passwd or group file lacks the name."""


class ImageToolMissing(Failure):
    """A program that this needs is not installed."""


def disk_full(what: str, path: str, *, shown: str = "") -> DiskFull:
    """The failure for ENOSPC or EDQUOT met while doing `what` at `path` (`shown` to the user); says how full the file system is."""
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    found = os.statvfs(path)
    free, total = (blocks * found.f_frsize >> 20 for blocks in (found.f_bavail, found.f_blocks))
    cause = f"no space left on device: {shown or path} has {free} of {total} MiB free, {found.f_favail} of {found.f_files} inodes"
    return DiskFull(
        what=what, cause=cause, remedy=f"free space below {shown or path}: `nacre image ls`, then `nacre image rm IMAGE`"
    )


@contextmanager
def full_disk_is_a_failure(what: str, path: str) -> Iterator[None]:
    """Turns ENOSPC and EDQUOT raised in the block into DiskFull; every other error passes."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise disk_full(what, path) from error
