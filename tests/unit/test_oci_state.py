"""state.json: written whole, changed in one way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nacre.oci import state as store
from nacre.oci.errors import AlreadyExists, Failure, NotFound, WrongStatus
from nacre.oci.state import Record, Status
from nacre.runc.life import remove_directory


def record(root: Path, **facts: object) -> Record:
    os.close(store.reserve(str(root), "web"))
    made = Record(id="web", root=str(root), bundle="/bundle", **facts)  # type: ignore[arg-type]
    store.save(made)
    return made


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    made = record(tmp_path, pid=7, annotations={"a": "b"}, hooks={"poststop": [{"path": "/x"}]})
    assert store.read(str(tmp_path), "web") == made


def test_a_status_moves_only_as_the_lifecycle_allows(tmp_path: Path) -> None:
    created = store.advance(record(tmp_path), Status.CREATED, pid=9)
    assert store.read(str(tmp_path), "web").pid == 9
    with pytest.raises(WrongStatus, match="it is created"):
        store.advance(created, Status.PAUSED)
    stopped = store.advance(created, Status.STOPPED)
    for status in ("creating", "created", "running", "paused", "stopped"):
        with pytest.raises(WrongStatus):
            store.advance(stopped, status)


def test_a_taken_id_names_its_holder(tmp_path: Path) -> None:
    record(tmp_path, pid=42)
    with pytest.raises(AlreadyExists, match="pid 42, bundle /bundle"):
        store.reserve(str(tmp_path), "web")


def test_a_damaged_record_says_how_to_get_rid_of_it(tmp_path: Path) -> None:
    record(tmp_path)
    (tmp_path / "web" / "state.json").write_text("{")
    with pytest.raises(Failure) as caught:
        store.read(str(tmp_path), "web")
    assert "delete --force web" in caught.value.remedy


def test_a_newer_format_is_not_guessed_at(tmp_path: Path) -> None:
    record(tmp_path)
    (tmp_path / "web" / "state.json").write_text('{"format": 99}')
    with pytest.raises(Failure, match="format 99"):
        store.read(str(tmp_path), "web")


def test_an_unknown_container_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        store.read(str(tmp_path), "web")
    with pytest.raises(NotFound), store.locked(str(tmp_path), "web"):
        pass


def test_nacres_own_directories_are_no_containers(tmp_path: Path) -> None:
    record(tmp_path)
    (tmp_path / ".seccomp").mkdir()
    assert store.identifiers(str(tmp_path)) == ["web"]
    assert store.identifiers(str(tmp_path / "missing")) == []


def test_records_kept_in_memory_leave_no_file_and_go_with_their_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_held", None)
    store.keep_in_memory()
    made = record(tmp_path, pid=42)
    store.keep_process(made, {"args": ["/bin/true"]})
    assert store.read(str(tmp_path), "web") == made
    assert store.advance(made, Status.CREATED) == store.read(str(tmp_path), "web")
    assert os.listdir(tmp_path / "web") == []
    with pytest.raises(NotFound):
        store.read(str(tmp_path / "other"), "web")
    remove_directory(str(tmp_path), "web")
    with pytest.raises(NotFound):
        store.read(str(tmp_path), "web")
