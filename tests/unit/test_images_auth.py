from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.images import auth
from nacre.images.auth import Challenge
from nacre.images.model import Auth
from nacre.images.proxies import proxy_for
from nacre.images.reference import parse
from nacre.oci.errors import Invalid

SECRET = base64.b64encode(b"me:pass:word").decode()


def test_a_bearer_challenge_is_taken_apart() -> None:
    header = 'Bearer realm="https://auth.example.org/token",service="reg",scope="repository:a/b:pull,push", Basic realm="x\\"y"'
    assert auth.challenges(header) == [
        Challenge("bearer", {"realm": "https://auth.example.org/token", "service": "reg", "scope": "repository:a/b:pull,push"}),
        Challenge("basic", {"realm": 'x"y'}),
    ]


@given(st.text(max_size=100))
def test_any_challenge_header_is_read_to_its_end(header: str) -> None:
    assert len(auth.challenges(header)) <= len(header)


def test_user_and_password_come_from_either_form() -> None:
    assert auth.basic(Auth(username="me", password="x")) == ("me", "x")
    assert auth.basic(Auth(auth=SECRET)) == ("me", "pass:word")
    assert auth.basic(Auth(identity_token="t")) is None
    with pytest.raises(Invalid, match="base64"):
        auth.basic(Auth(auth="!!"))


def test_secrets_never_show_in_a_representation() -> None:
    assert "pass" not in repr(Auth(username="me", password="pass", auth=SECRET, identity_token="pass", registry_token="pass"))


def test_a_cri_message_with_nothing_in_it_is_no_credentials() -> None:
    assert auth.from_cri({}) is None
    assert auth.from_cri({"username": "me"}) == Auth(username="me")


def test_credentials_for_another_registry_are_not_used() -> None:
    assert auth.is_for(Auth(server_address="https://index.docker.io/v1/"), "docker.io")
    assert not auth.is_for(Auth(server_address="other.example.org"), "docker.io")


@pytest.mark.parametrize(
    ("key", "reference", "fits"),
    [
        ("https://index.docker.io/v1/", "nginx", True),
        ("docker.io", "me/app", True),
        ("reg.example.org", "reg.example.org/a/b", True),
        ("reg.example.org/a", "reg.example.org/a/b", True),
        ("reg.example.org/a", "reg.example.org/ab", False),
        ("*.example.org", "reg.example.org/a", True),
        ("*.example.org", "x.reg.example.org/a", False),
        ("reg.example.org:5000", "reg.example.org/a", False),
        ("reg.example.org", "other.example.org/a", False),
    ],
)
def test_keys_of_a_docker_config_match_as_kubernetes_says(key: str, reference: str, fits: bool) -> None:
    found = auth.keyring({"auths": {key: {"auth": SECRET}}}, parse(reference))
    assert bool(found) is fits


def test_the_most_specific_key_comes_first() -> None:
    document = {"auths": {"r.io": {"username": "a"}, "r.io/team": {"username": "b"}}}
    assert [one.username for one in auth.keyring(document, parse("r.io/team/x"))] == ["b", "a"]


@pytest.mark.parametrize(
    ("no_proxy", "host", "direct"),
    [
        ("", "reg.example.org", False),
        ("example.org", "reg.example.org", True),
        (".example.org", "reg.example.org", True),
        ("ample.org", "reg.example.org", False),
        ("10.0.0.0/8", "10.2.3.4", True),
        ("10.0.0.0/8", "11.2.3.4", False),
        ("*", "anything", True),
        ("reg.example.org:444", "reg.example.org", False),
        ("reg.example.org:443", "reg.example.org", True),
        ("other, 10.2.3.4", "10.2.3.4", True),
    ],
)
def test_no_proxy_is_read_as_curl_and_go_read_it(no_proxy: str, host: str, direct: bool) -> None:
    environment = {"HTTPS_PROXY": "proxy.example.org:3128", "no_proxy": no_proxy}
    found = proxy_for("https", host, 443, environment)
    assert found == (None if direct else "http://proxy.example.org:3128")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "x.localhost"])
def test_loopback_is_never_asked_for_through_a_proxy(host: str) -> None:
    assert proxy_for("http", host, 80, {"http_proxy": "http://p"}) is None
