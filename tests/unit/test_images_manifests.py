from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.images import manifests
from nacre.images.errors import ImageRefused, NoMatchingPlatform
from nacre.images.manifests import DOCKER_LIST, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, Platform
from nacre.oci.errors import Failure, Unsupported

HOST = Platform("linux", "arm64", "v8")
DIGEST = "sha256:" + "b" * 64


def entry(os: str, architecture: str, variant: str = "", digest: str = DIGEST) -> dict[str, Any]:
    platform = {"os": os, "architecture": architecture} | ({"variant": variant} if variant else {})
    return {"mediaType": OCI_MANIFEST, "digest": digest, "size": 5, "platform": platform}


def test_the_entry_for_this_machine_is_chosen_whatever_stands_before_it() -> None:
    mine = "sha256:" + "c" * 64
    index = {"manifests": [entry("linux", "amd64"), entry("linux", "arm64", "v9"), entry("linux", "arm64", "", mine)]}
    assert manifests.choose("pull x", index, HOST).digest == mine


def test_without_a_match_the_message_lists_what_there_is_but_no_attestations() -> None:
    index = {"manifests": [entry("linux", "amd64"), entry("windows", "amd64"), entry("unknown", "unknown")]}
    with pytest.raises(NoMatchingPlatform) as refused:
        manifests.choose("pull x", index, HOST)
    assert refused.value.cause == "no match for platform linux/arm64/v8 in manifest: has linux/amd64, windows/amd64"


def test_an_index_of_one_image_without_platform_is_that_image() -> None:
    plain = {"mediaType": OCI_MANIFEST, "digest": DIGEST, "size": 5}
    assert manifests.choose("pull x", {"manifests": [plain]}, HOST).digest == DIGEST


def test_the_kind_comes_from_the_document_then_the_header_then_the_shape() -> None:
    assert manifests.kind_of("x", {"mediaType": DOCKER_LIST}, OCI_MANIFEST) == DOCKER_LIST
    assert manifests.kind_of("x", {}, OCI_MANIFEST + "; charset=utf-8") == OCI_MANIFEST
    assert manifests.kind_of("x", {"manifests": []}) == OCI_INDEX
    with pytest.raises(ImageRefused):
        manifests.kind_of("x", {}, "text/html")
    with pytest.raises(Unsupported, match="schema 1"):
        manifests.kind_of("x", {"schemaVersion": 1})


@pytest.mark.parametrize(
    "digest", ["sha256:../../etc/passwd", "sha512:" + "a" * 128, "sha256:" + "A" * 64, 7, None, "sha256:" + "a" * 65]
)
def test_a_digest_that_could_be_a_path_is_refused(digest: object) -> None:
    with pytest.raises(ImageRefused, match="no sha256 digest"):
        manifests.descriptor("pull x", {"digest": digest, "size": 1}, "layers[0]")


def test_what_is_no_container_image_is_said_to_be_none() -> None:
    chart = {"digest": DIGEST, "size": 1, "mediaType": "application/vnd.cncf.helm.config.v1+json"}
    with pytest.raises(ImageRefused, match="not a container image"):
        manifests.manifest("pull x", {"config": chart, "layers": []})


def test_a_configuration_of_any_size_is_refused_before_it_is_fetched() -> None:
    config = {"mediaType": OCI_CONFIG, "digest": DIGEST, "size": 1 << 40}
    with pytest.raises(ImageRefused, match="configuration is 1099511627776 bytes long"):
        manifests.manifest("test", {"config": config, "layers": []})


def test_layers_kept_elsewhere_are_unsupported_by_name() -> None:
    config = {"digest": DIGEST, "size": 1, "mediaType": OCI_CONFIG}
    foreign = {"digest": DIGEST, "size": 1, "urls": ["https://example.org/x"]}
    with pytest.raises(Unsupported, match=r"layers\[0\]"):
        manifests.manifest("pull x", {"config": config, "layers": [foreign]})


def test_a_configuration_for_another_machine_is_refused() -> None:
    document = {"os": "linux", "architecture": "s390x", "rootfs": {"diff_ids": []}}
    with pytest.raises(NoMatchingPlatform, match="has linux/s390x"):
        manifests.configuration("pull x", json.dumps(document).encode(), 0, HOST)


def test_layers_and_diff_ids_must_be_as_many() -> None:
    document = {"os": "linux", "architecture": "arm64", "rootfs": {"diff_ids": [DIGEST]}}
    with pytest.raises(ImageRefused, match="1 diff_ids, the manifest 2 layers"):
        manifests.configuration("pull x", json.dumps(document).encode(), 2, HOST)


def test_chain_ids_are_those_of_the_specification() -> None:
    assert manifests.chain_ids([DIGEST]) == [DIGEST]
    assert manifests.chain_ids([DIGEST, DIGEST])[1] == manifests.digest_of(f"{DIGEST} {DIGEST}".encode())


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["config", "layers", "manifests", "digest", "size", "mediaType", "platform", "os", "rootfs", "diff_ids"]), inner, max_size=5
    ),
    max_leaves=20,
)  # fmt: skip


@given(TREES)
def test_any_json_is_understood_or_refused(tree: object) -> None:
    data = json.dumps(tree).encode()
    for act in (
        lambda: manifests.kind_of("x", manifests.decode("x", data)),
        lambda: manifests.manifest("x", manifests.decode("x", data)),
        lambda: manifests.choose("x", manifests.decode("x", data), HOST),
        lambda: manifests.configuration("x", data, 1, HOST),
    ):
        try:
            act()
        except Failure:
            pass
