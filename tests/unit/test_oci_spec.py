"""config.json at the edge: whatever it holds, the answer is a checked tree or an Invalid that names the element."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nacre.oci import spec
from nacre.oci.errors import Failure, Invalid
from nacre.runc import plan
from nacre.runc.templates import spec as template


def good() -> dict[str, Any]:
    return template(rootless=False)


def test_the_template_is_valid() -> None:
    assert spec.check(good())["process"]["args"] == ["sh"]


def test_unknown_properties_and_nulls_are_dropped() -> None:
    document = good() | {"solaris": {"x": 1}, "hooks": None}
    document["process"]["later"] = [1]
    tree = spec.check(document)
    assert "solaris" not in tree and "hooks" not in tree and "later" not in tree["process"]


@pytest.mark.parametrize("version", ["1.0.0", "1.0.2-dev", "1.9.0", "1.2.1+build"])
def test_any_version_one_is_taken(version: str) -> None:
    assert spec.check(good() | {"ociVersion": version})


@pytest.mark.parametrize("version", ["", "1", "1.0", "2.0.0", "one", None, 1.0, "1.0.0 "])
def test_a_malformed_or_foreign_version_is_refused(version: Any) -> None:
    with pytest.raises(Invalid, match="ociVersion"):
        spec.check(good() | {"ociVersion": version})


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["process", "args"], [], "process.args"),
        (["process", "args", 0], 7, "process.args[0]"),
        (["process", "args", 0], "a\0b", "NUL"),
        (["process", "args", 0], "\ud800", "surrogate"),
        (["process", "cwd"], "tmp", "process.cwd"),
        (["process", "user", "uid"], -1, "process.user.uid"),
        (["process", "user", "uid"], True, "process.user.uid"),
        (["process", "rlimits", 0, "soft"], 1 << 64, "process.rlimits[0].soft"),
        (["process", "oomScoreAdj"], 2000, "process.oomScoreAdj"),
        (["linux", "namespaces", 0, "type"], "galaxy", "linux.namespaces[0].type"),
        (["linux", "namespaces", 1], {"type": "pid"}, "a second time"),
        (["linux", "resources", "devices", 0, "access"], "rwx", "linux.resources.devices[0].access"),
        (["mounts", 0, "destination"], None, "mounts[0].destination"),
        (["root", "path"], 3, "root.path"),
        (["hooks"], {"prestart": [{"path": "relative"}]}, "hooks.prestart[0].path"),
        (["hooks"], {"poststop": [{"path": "/x", "timeout": 0}]}, "hooks.poststop[0].timeout"),
        (["annotations"], {"a": 1}, 'annotations["a"]'),
        (["annotations"], {"": "a"}, "annotations has an empty key"),
        (["linux", "maskedPaths", 1], "proc/keys", "linux.maskedPaths[1]"),
        (["linux", "readonlyPaths"], ["/proc/bus", ""], "linux.readonlyPaths[1]"),
        (
            ["linux", "seccomp"],
            {"defaultAction": "x", "syscalls": [{"names": [], "action": "x"}]},
            "linux.seccomp.syscalls[0].names",
        ),
        (["linux", "resources", "rdma"], {"mlx5_1": {}}, 'linux.resources.rdma["mlx5_1"]'),
        (
            ["linux", "resources", "blockIO"],
            {"weightDevice": [{"major": 8, "minor": 0}]},
            "linux.resources.blockIO.weightDevice[0]",
        ),
        *(
            (["linux", "resources", "hugepageLimits"], [{"pageSize": size, "limit": 1}], "hugepageLimits[0].pageSize")
            for size in ("2mb", "64kB", "02MB", "MB", "2097152", "2MB/../x")
        ),
    ],
)
def test_a_wrong_element_is_named_by_its_path(path: list[str | int], value: Any, named: str) -> None:
    document: Any = good()
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(Invalid) as caught:
        spec.check(document)
    assert named in caught.value.cause


def test_a_hostname_without_a_uts_namespace_would_rename_the_host() -> None:
    document = good()
    document["linux"]["namespaces"] = [{"type": "mount"}]
    with pytest.raises(Invalid, match="rename the host"):
        spec.check(document)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(Invalid, match=r"config\.json"):
        spec.load(str(tmp_path))


def test_a_directory_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="No such file"):
        spec.load(str(tmp_path / "nothing"))


@pytest.mark.parametrize("identifier", ["a", "A-1_b.c+d", "9" * 64])
def test_ids_that_runtimes_take(identifier: str) -> None:
    assert spec.check_id(identifier) == identifier


@pytest.mark.parametrize("identifier", ["", ".", "..", ".seccomp", "a/b", "../x", "a b", "-a", "ä", "a\n", "x" * 2000])
def test_ids_that_are_paths_or_worse_are_refused(identifier: str) -> None:
    with pytest.raises(Invalid):
        spec.check_id(identifier)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


FULL = good() | {
    "hooks": {"prestart": [{"path": "/bin/true", "args": ["true"], "env": ["A=b"], "timeout": 1}]},
    "annotations": {"a": "b"},
}
FULL["linux"]["resources"] |= {
    "memory": {"limit": 1, "swap": 2},
    "cpu": {"shares": 2, "cpus": "0"},
    "unified": {"memory.max": "1"},
}
FULL["linux"]["seccomp"] = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["x"], "action": "SCMP_ACT_ERRNO", "args": []}],
}
FULL["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1"}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(places(FULL)), TREES, st.booleans())
def test_one_element_replaced_by_anything_ends_in_a_plan_or_a_failure(
    path: tuple[Any, ...], value: Any, through_json: bool
) -> None:
    document: Any = json.loads(json.dumps(FULL))
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    data: Any = json.dumps(document) if through_json else document
    try:
        tree = spec.check(spec.parse(data, "x") if through_json else data)
        plan.refuse_unsupported(tree)
        if "process" in tree:
            host = plan.Host(bundle="/nowhere")
            plan.setup_steps(tree, host, {"id": "x"})
            plan.start_steps(tree, host, {"id": "x"})
    except Failure as failure:
        assert failure.what and failure.cause


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_any_document_ends_in_a_tree_or_a_failure(document: Any) -> None:
    try:
        spec.check(document)
    except Failure as failure:
        assert failure.cause
