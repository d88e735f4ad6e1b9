"""Credentials: CRI's AuthConfig, docker's config.json, and what a registry's challenge asks for. No I/O but reading the file.

RFC 7235 "Challenge"; distribution's token specification; Kubernetes "Using a private registry" for the matching of config.json's keys.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import json
import os
import re
from dataclasses import dataclass
from typing import Any

from nacre.images.model import Auth
from nacre.images.reference import DEFAULT_DOMAIN, Reference
from nacre.oci.errors import Invalid

_PARAMETER = re.compile(r'\s*([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))\s*,?')
_SCHEME = re.compile(r"\s*([A-Za-z0-9_-]+)(?=\s|$)(?!\s*=)\s*")
_FIELDS = ("username", "password", "auth", "server_address", "identity_token", "registry_token")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One scheme of a WWW-Authenticate header, lower-cased, with its parameters."""

    scheme: str
    parameters: dict[str, str]


def challenges(header: str) -> list[Challenge]:
    """What the server accepts; malformed rests are left out."""
    found: list[Challenge] = []
    at = 0
    while at < len(header):
        scheme = _SCHEME.match(header, at)
        if scheme is None:
            break
        at = scheme.end()
        parameters: dict[str, str] = {}
        while parameter := _PARAMETER.match(header, at):
            value = parameter[3] if parameter[2] is None else re.sub(r"\\(.)", r"\1", parameter[2])
            parameters[parameter[1].lower()] = value
            at = parameter.end()
        found.append(Challenge(scheme[1].lower(), parameters))
    return found


def from_cri(message: Any) -> Auth | None:
    """A CRI AuthConfig (any object or dict with its fields) as Auth; None when all of it is empty."""
    given = message if isinstance(message, dict) else {name: getattr(message, name, "") for name in _FIELDS}
    fields = {name: str(given.get(name) or "") for name in _FIELDS}
    return Auth(**fields) if any(fields.values()) else None


def basic(auth: Auth) -> tuple[str, str] | None:
    """User name and password, from either form. Raises Invalid when `auth` is not base64 of user:password."""
    if auth.username or auth.password:
        return auth.username, auth.password
    if not auth.auth:
        return None
    try:
        user, colon, password = base64.b64decode(auth.auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        colon = ""
    if not colon:
        raise Invalid(
            what="read registry credentials", cause="auth is not base64 of USER:PASSWORD", remedy="make the secret anew"
        )
    return user, password.rstrip("\0")


def is_for(auth: Auth, domain: str) -> bool:
    """Whether credentials with a server_address are meant for `domain`; those without are for whatever they were given for."""
    return not auth.server_address or _host(auth.server_address) == _host(domain)


def keyring(document: dict[str, Any], reference: Reference) -> list[Auth]:
    """The credentials of a docker config.json that fit the reference, most specific first.

    Keys are hosts with an optional path, `*` matching within one label, as in Kubernetes; a bare map without "auths" (.dockercfg)
    is taken too. Raises Invalid for what is no such document.
    """
    auths = document.get("auths", document)
    if not isinstance(auths, dict):
        raise Invalid(what="read registry credentials", cause="auths is no object")
    found: list[tuple[int, Auth]] = []
    for key, entry in auths.items():
        if isinstance(entry, dict) and _matches(key, reference):
            auth = Auth(
                username=str(entry.get("username") or ""),
                password=str(entry.get("password") or ""),
                auth=str(entry.get("auth") or ""),
                identity_token=str(entry.get("identitytoken") or ""),
                registry_token=str(entry.get("registrytoken") or ""),
            )
            found.append((len(key), auth))
    return [auth for _, auth in sorted(found, key=lambda pair: -pair[0])]


def user_auth(reference: Reference) -> Auth | None:
    """What the calling user has logged in with: REGISTRY_AUTH_FILE, else DOCKER_CONFIG or ~/.docker, config.json."""
    home = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    path = os.environ.get("REGISTRY_AUTH_FILE") or os.path.join(home, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Invalid(what=f"read {path}", cause=str(error), remedy=f"mend {path}, or log in again") from error
    return next(iter(keyring(document, reference)), None) if isinstance(document, dict) else None


def _matches(key: str, reference: Reference) -> bool:
    host, _, path = key.removeprefix("https://").removeprefix("http://").partition("/")
    if _host(host) == DEFAULT_DOMAIN and reference.domain == DEFAULT_DOMAIN:
        return path.strip("/") in ("", "v1", "v2") or f"{reference.path}/".startswith(path.strip("/") + "/")
    want, have = host.split("."), reference.domain.split(".")
    if len(want) != len(have) or not all(fnmatch.fnmatchcase(h, w) for w, h in zip(want, have, strict=True)):
        return False
    path = path.strip("/")
    return path in ("", "v1", "v2") or f"{reference.path}/".startswith(path + "/")


def _host(address: str) -> str:
    host = re.sub(r"^https?://", "", address).split("/")[0].lower()
    return DEFAULT_DOMAIN if host in ("index.docker.io", "registry-1.docker.io") else host
