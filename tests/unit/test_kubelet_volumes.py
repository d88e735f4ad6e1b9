"""Volumes on disk: atomic contents, types, teardown."""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nacre.kubelet.expand import ConfigError, Sources
from nacre.kubelet.volumes import MountFailed, PodVolumes, write_atomically
from nacre.oci.errors import Unsupported

OBJECTS: dict[tuple[str, str], dict[str, Any] | None] = {
    ("ConfigMap", "map"): {"metadata": {}, "data": {"a": "1", "b": "2"}},
    ("Secret", "key"): {"metadata": {}, "data": {"word": base64.b64encode(b"swordfish").decode()}},
}


def prepared(base: Path, *volumes: dict[str, Any], objects: Any = None, **spec: Any) -> PodVolumes:
    metadata = {"name": "p", "namespace": "n", "uid": "u1", "labels": {"app": "web"}}
    pod = {"metadata": metadata, "spec": {"containers": [], "volumes": list(volumes)} | spec}
    made = PodVolumes(str(base), "u1")
    made.prepare(pod, Sources(pod, OBJECTS if objects is None else objects, {}))
    return made


def contents(directory: str) -> dict[str, bytes]:
    found = {}
    for place, names, files in os.walk(directory):
        names[:] = [name for name in names if not name.startswith("..")]
        found |= {os.path.relpath(f"{place}/{name}", directory): Path(place, name).read_bytes() for name in files}
    return found


def test_copied_volumes_show_keys_items_and_fields(tmp_path: Path) -> None:
    volumes = [
        {"name": "all", "configMap": {"name": "map"}},
        {"name": "one", "secret": {"secretName": "key", "items": [{"key": "word", "path": "deep/word", "mode": 0o400}]}},
        {"name": "down", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        {"name": "both", "projected": {"sources": [{"configMap": {"name": "map"}}, {"secret": {"name": "key"}}]}},
    ]
    made = prepared(tmp_path, *volumes)
    every, one, down, both = (made.path(volume) for volume in volumes)
    assert contents(every) == {"a": b"1", "b": b"2"}
    assert Path(one, "deep/word").read_bytes() == b"swordfish" and stat.S_IMODE(os.stat(f"{one}/deep/word").st_mode) == 0o400
    assert contents(down) == {"labels": b'app="web"'}
    assert contents(both) == {"a": b"1", "b": b"2", "word": b"swordfish"}


def test_a_new_version_replaces_all_files_at_once_and_the_same_one_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "v")
    assert write_atomically(path, {"a": (b"1", 0o644), "b": (b"1", 0o644)}, None)
    before = os.readlink(f"{path}/..data")
    assert not write_atomically(path, {"a": (b"1", 0o644), "b": (b"1", 0o644)}, None)
    assert os.readlink(f"{path}/..data") == before
    assert write_atomically(path, {"a": (b"2", 0o644), "c": (b"2", 0o644)}, None)
    assert {name: Path(path, name).read_bytes() for name in ("a", "c")} == {"a": b"2", "c": b"2"}
    assert sorted(os.listdir(path)) == sorted(["..data", os.readlink(f"{path}/..data"), "a", "c"])


names = st.text(alphabet="abc.", min_size=1, max_size=4).filter(lambda name: not name.startswith(".."))
versions = st.lists(
    st.dictionaries(names.filter(lambda name: name != "."), st.binary(max_size=8), max_size=4), min_size=1, max_size=4
)


@settings(deadline=None, max_examples=50)
@given(versions)
def test_after_any_number_of_versions_exactly_the_last_one_is_shown(
    tmp_path_factory: pytest.TempPathFactory, found: list[dict[str, bytes]]
) -> None:
    path = str(tmp_path_factory.mktemp("v"))
    for version in found:
        write_atomically(path, {name: (data, 0o644) for name, data in version.items()}, None)
    shown = {name: Path(path, name).read_bytes() for name in os.listdir(path) if not name.startswith("..")}
    assert shown == found[-1]


def test_with_a_group_too_the_same_files_are_written_once(tmp_path: Path) -> None:
    path, files = str(tmp_path / "v"), {"a": (b"1", 0o400)}
    assert write_atomically(path, files, os.getgid())
    assert not write_atomically(path, files, os.getgid())
    assert stat.S_IMODE(os.stat(f"{path}/a").st_mode) == 0o440


def test_what_a_kill_left_half_done_is_finished_by_the_next_look(tmp_path: Path) -> None:
    path, files = str(tmp_path / "v"), {"a": (b"1", 0o644)}
    write_atomically(path, files, None)
    os.unlink(f"{path}/a")  # killed after the rename, before the links
    assert not write_atomically(path, files, None)
    assert contents(path) == {"a": b"1"}
    os.symlink("..1", f"{path}/..data_tmp")  # killed before the rename
    assert write_atomically(path, {"b": (b"2", 0o644)}, None)
    assert contents(path) == {"b": b"2"}


def test_a_missing_object_or_key_is_named_unless_it_is_optional(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='configmap "none" not found'):
        prepared(tmp_path, {"name": "v", "configMap": {"name": "none"}})
    with pytest.raises(ConfigError, match="non-existent config key: z"):
        prepared(tmp_path, {"name": "v", "configMap": {"name": "map", "items": [{"key": "z", "path": "z"}]}})
    volume = {"name": "w", "configMap": {"name": "none", "optional": True}}
    assert contents(prepared(tmp_path, volume).path(volume)) == {}


def test_a_path_that_leads_out_of_the_volume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leads out"):
        prepared(tmp_path, {"name": "v", "configMap": {"name": "map", "items": [{"key": "a", "path": "../a"}]}})


def test_host_paths_are_checked_by_their_type(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MountFailed, match="is not a Directory"):
        prepared(tmp_path / "k", {"name": "v", "hostPath": {"path": str(tmp_path / "file"), "type": "Directory"}})
    prepared(tmp_path / "k", {"name": "v", "hostPath": {"path": str(tmp_path / "new/deep"), "type": "DirectoryOrCreate"}})
    assert (tmp_path / "new/deep").is_dir()


def test_another_type_of_volume_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="volumes of type nfs are not offered"):
        prepared(tmp_path, {"name": "v", "nfs": {"server": "x", "path": "/"}})


@pytest.mark.skipif(os.geteuid() != 0, reason=f"geteuid() is {os.geteuid()}: mounts need root")
def test_teardown_unmounts_what_lies_in_memory_and_leaves_host_paths_alone(tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host/kept").write_text("kept")
    scratch = {"name": "s", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}
    made = prepared(tmp_path / "k", scratch, {"name": "h", "hostPath": {"path": str(tmp_path / "host")}})
    assert os.path.ismount(made.path(scratch))
    made.teardown()
    assert not os.path.exists(made.directory) and (tmp_path / "host/kept").read_text() == "kept"
    made.teardown()
