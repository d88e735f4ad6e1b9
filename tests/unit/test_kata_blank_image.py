"""The rehearsal's image, as the tools of the format and the kernel read it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from nacre.kata import blank_image, drives


def test_it_is_one_block_that_the_formats_own_checker_takes(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(blank_image.image())
    assert path.stat().st_size == 4096
    checked = subprocess.run(["fsck.erofs", "-d9", str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    with path.open("rb") as file:
        assert drives.identity(file.fileno(), str(path), "test") == blank_image.UUID


def test_it_has_the_directories_that_images_have(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(blank_image.image())
    unpacked = tmp_path / "tree"
    subprocess.run(["fsck.erofs", f"--extract={unpacked}", str(path)], capture_output=True, check=True)
    assert sorted(str(one.relative_to(unpacked)) for one in unpacked.rglob("*")) == ["dev", "etc", "etc/passwd", "proc", "sys"]
    assert (unpacked / "etc/passwd").read_text().startswith("root:")
