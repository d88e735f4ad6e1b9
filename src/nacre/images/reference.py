"""Image references, read as Docker, containerd and the kubelet read them: `nginx` is `docker.io/library/nginx:latest`.

    reference = [domain "/"] path [":" tag] ["@" digest]

The first component is a domain if it has a dot, a colon or a capital letter, or is `localhost`. Nothing here touches a network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nacre.images.errors import InvalidImageName

DEFAULT_DOMAIN = "docker.io"
LOCAL_DOMAIN = "nacre.local"  # names that no registry has: images made on this node
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-f]{64}")
_LONGEST = 255  # of domain and path together


@dataclass(frozen=True, slots=True)
class Reference:
    """A canonical reference: at least one of `tag` and `digest` is set; a digest makes the tag a mere remark."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def repository(self) -> str:
        """`docker.io/library/nginx`."""
        return f"{self.domain}/{self.path}"

    @property
    def wanted(self) -> str:
        """What a registry is asked for: the digest, else the tag."""
        return self.digest or self.tag

    def __str__(self) -> str:
        """`docker.io/library/nginx:latest`, or with `@sha256:…` (then without the tag, which is not what was pulled)."""
        return f"{self.repository}@{self.digest}" if self.digest else f"{self.repository}:{self.tag}"

    def pinned(self, digest: str) -> str:
        """`docker.io/library/nginx@sha256:…`, the form of CRI's repo_digests."""
        return f"{self.repository}@{digest}"


def parse(text: str) -> Reference:
    """The canonical form of `text`. Raises InvalidImageName in the words that the kubelet's event has."""
    if _HEX.fullmatch(text):
        raise _invalid(text, "a bare image id is no reference: write sha256: before it, or give the name")
    rest, _, digest = text.partition("@")
    if "@" in text and not _DIGEST.fullmatch(digest):
        raise _invalid(text, f"invalid reference format: {digest!r} is no sha256 digest of 64 hexadecimal digits")
    head, slash, tail = rest.partition("/")
    if slash and (re.search(r"[.:A-Z]", head) or head == "localhost" or head.startswith("[")):
        domain = head
    else:
        domain, tail = DEFAULT_DOMAIN, rest
    path, colon, tag = tail.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise _invalid(text, f"invalid reference format: {tag!r} is no tag")
    if domain in ("index.docker.io", "registry-1.docker.io"):
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = f"library/{path}"
    _check(text, domain, path)
    return Reference(domain, path, tag or ("" if digest else "latest"), digest)


def _check(text: str, domain: str, path: str) -> None:
    if not _DOMAIN.fullmatch(domain):
        raise _invalid(text, f"invalid reference format: {domain!r} is no registry name")
    for component in path.split("/"):
        if _COMPONENT.fullmatch(component):
            continue
        if _COMPONENT.fullmatch(component.lower()):
            raise _invalid(text, "invalid reference format: repository name must be lowercase")
        raise _invalid(text, "invalid reference format" + (f": {component!r} is no repository name" if component else ""))
    if len(domain) + 1 + len(path) > _LONGEST:
        raise _invalid(text, f"repository name must not be more than {_LONGEST} characters")


def _invalid(text: str, reason: str) -> InvalidImageName:
    return InvalidImageName(
        what=f'apply default image tag "{text}"',
        cause=f'couldn\'t parse image reference "{text}": {reason}',
        remedy="write it as [REGISTRY[:PORT]/]NAME[:TAG][@sha256:…], in lower case",
    )
