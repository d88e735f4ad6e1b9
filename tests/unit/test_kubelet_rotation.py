"""Logs that have grown."""

from __future__ import annotations

from pathlib import Path

from nacre.kubelet.rotation import KEPT, rotate

NOW = 1_767_225_600.0


def test_a_log_below_its_limit_stays(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(b"x" * 9)
    assert not rotate(str(path), 10, NOW) and path.exists()


def test_a_log_at_its_limit_is_renamed_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    for number in range(KEPT + 3):
        path.write_bytes(b"%d" % number * 10)
        assert rotate(str(path), 10, NOW + number) and not path.exists()
    kept = [one.read_bytes()[:1] for one in sorted(tmp_path.iterdir())]
    assert kept == [b"%d" % number for number in range(3, KEPT + 3)]


def test_a_rotation_that_a_kill_cut_short_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(b"x" * 10)
    rotate(str(path), 10, NOW)
    assert rotate(str(path), 10, NOW + 1), "the runtime still writes to the renamed file"


def test_a_log_that_never_was_is_left_alone(tmp_path: Path) -> None:
    assert not rotate(str(tmp_path / "0.log"), 10, NOW)
