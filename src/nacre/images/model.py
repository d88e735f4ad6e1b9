"""What the store speaks of: images, their layers, users, credentials. Values only."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nacre.images import reference
from nacre.images.errors import InvalidImageName

Progress = Callable[[str, int, int], None]  # (digest or stage, done, of all); (words, 0, 0) of what has no measure
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def is_digest(text: object) -> bool:
    """Whether `text` is `sha256:` and 64 hexadecimal digits: the only kind of digest that may become a file's name here."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Descriptor:
    """OCI image spec, descriptor.md, what nacre uses of it."""

    media_type: str
    digest: str
    size: int

    def document(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One unpacked layer. `chain_id` names it together with all below it (OCI image spec, config.md "Layer ChainID")."""

    chain_id: str
    diff_id: str
    blob: Descriptor
    unpacked_bytes: int = 0
    stream_bytes: int = 0  # of the archive, uncompressed
    inodes: int = 0
    covers: bool = False  # its root is opaque: nothing below it is seen

    @property
    def directory(self) -> str:
        """Its directory's name below layers/: no colon, which separates lower directories in mount options."""
        return self.chain_id.removeprefix("sha256:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image of this node. `id` is its configuration's digest, as with every CRI."""

    id: str
    references: tuple[str, ...]  # docker.io/library/nginx:latest
    digests: tuple[str, ...]  # docker.io/library/nginx@sha256:…
    size: int  # configuration and compressed layers, bytes
    config: dict[str, Any]  # OCI image configuration, config.md
    layers: tuple[Layer, ...]  # bottom first
    manifest: Descriptor
    config_blob: Descriptor
    pinned: bool = False  # never collected by the kubelet
    pulled_at: int = 0  # Unix time, s
    pulled_as: str = ""  # docker.io/library/nginx@sha256:…, as its registry has it; "" for what was only imported

    @property
    def name(self) -> str:
        """How to call it in a sentence."""
        return next(iter((*self.references, *self.digests)), self.id)

    def called(self, asked: str) -> str:
        """The name `asked` for in its whole form if it is the image's, else `name`; an id is no name."""
        try:
            whole = str(reference.parse(asked))
        except InvalidImageName:
            whole = ""
        return whole if whole in (*self.references, *self.digests) else self.name

    @property
    def user(self) -> str:
        """`config.User`: "", a name, a number, or either with `:group`."""
        return str((self.config.get("config") or {}).get("User") or "")


@dataclass(frozen=True, slots=True)
class User:
    """Who a process runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()  # supplementary, without gid


@dataclass(frozen=True, slots=True, kw_only=True)
class Auth:
    """Credentials for one registry, the fields of CRI's AuthConfig; `repr` shows none of them."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    auth: str = field(default="", repr=False)  # base64 of username:password
    server_address: str = ""
    identity_token: str = field(default="", repr=False)  # an OAuth2 refresh token
    registry_token: str = field(default="", repr=False)  # a bearer token, sent as it is
