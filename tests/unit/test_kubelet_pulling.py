"""Credentials out of image pull Secrets."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from nacre.kubelet.pulling import _credentials


def secret(document: Any, key: str = ".dockerconfigjson") -> dict[str, Any]:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return {"metadata": {"name": "pull"}, "data": {key: base64.b64encode(data).decode()}}


def users(document: Any, image: str, key: str = ".dockerconfigjson") -> list[str]:
    return [one.username for one in _credentials(secret(document, key), image)]


def test_entries_fit_as_kubernetes_says_the_most_specific_first() -> None:
    auths = {
        "https://index.docker.io/v1/": {"username": "hub"},
        "*.example.org": {"username": "any"},
        "r.example.org/team": {"username": "team"},
        "r.example.org:5000": {"username": "port"},
    }
    for image, wanted in (
        ("nginx", ["hub"]),
        ("r.example.org/team/web:1", ["team", "any"]),
        ("r.example.org/other", ["any"]),
        ("r.example.org:5000/x@sha256:" + "0" * 64, ["port"]),
        ("elsewhere.net/x", []),
    ):
        assert users({"auths": auths}, image) == wanted, image


def test_the_older_form_of_a_secret_is_read_too() -> None:
    assert users({"r.example.org": {"username": "me"}}, "r.example.org/x", ".dockercfg") == ["me"]


@pytest.mark.parametrize("document", [b"\xff", b"{", b"[]", b"5", b'{"auths": 5}', b'{"auths": {"docker.io": 5}}', b""])
def test_a_secret_that_holds_no_credentials_is_no_obstacle(document: bytes) -> None:
    assert users(document, "nginx") == []


def test_a_secret_of_another_kind_is_no_obstacle() -> None:
    assert _credentials({"metadata": {"name": "pull"}}, "nginx") == []
