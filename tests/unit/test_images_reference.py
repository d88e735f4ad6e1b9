from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.images.errors import InvalidImageName
from nacre.images.reference import parse

HEX = "a" * 64


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("nginx", "docker.io/library/nginx:latest"),
        ("nginx:1.27", "docker.io/library/nginx:1.27"),
        ("library/nginx", "docker.io/library/nginx:latest"),
        ("docker.io/nginx", "docker.io/library/nginx:latest"),
        ("index.docker.io/nginx", "docker.io/library/nginx:latest"),
        ("bitnami/redis", "docker.io/bitnami/redis:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x:y", "localhost:5000/x:y"),
        ("127.0.0.1:5000/a/b/c:T_1.x-", "127.0.0.1:5000/a/b/c:T_1.x-"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        ("Registry/x", "Registry/x:latest"),
        ("reg.example.org/a__b/c-d.e:v", "reg.example.org/a__b/c-d.e:v"),
        (f"nginx@sha256:{HEX}", f"docker.io/library/nginx@sha256:{HEX}"),
        (f"nginx:1.27@sha256:{HEX}", f"docker.io/library/nginx@sha256:{HEX}"),
        ("nacre.local/nginx:demo", "nacre.local/nginx:demo"),
    ],
)
def test_a_name_gets_the_canonical_form_that_docker_and_containerd_give_it(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert str(parse(canonical)) == canonical


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Nginx", "must be lowercase"),
        ("", "invalid reference format"),
        ("nginx:", "no tag"),
        ("nginx:a b", "no tag"),
        ("nginx:" + "a" * 129, "no tag"),
        ("a//b", "invalid reference format"),
        ("-a", "no repository name"),
        ("nginx@sha256:abc", "no sha256 digest"),
        ("nginx@md5:abc", "no sha256 digest"),
        (HEX, "bare image id"),
        ("../etc/passwd", "no registry name"),
        ("reg.example.org/../x", "no repository name"),
        ("a/" + "b" * 260, "not be more than 255"),
    ],
)
def test_what_is_no_reference_is_refused_in_the_kubelets_words(text: str, word: str) -> None:
    with pytest.raises(InvalidImageName) as refused:
        parse(text)
    assert word in refused.value.cause
    assert "couldn't parse image reference" in refused.value.cause
    assert refused.value.what.startswith("apply default image tag")


@given(st.text(max_size=80))
def test_any_text_is_either_canonical_or_refused_and_never_climbs(text: str) -> None:
    try:
        reference = parse(text)
    except InvalidImageName:
        return
    assert ".." not in reference.path.split("/")
    assert parse(str(reference)).repository == reference.repository
