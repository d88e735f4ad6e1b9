"""Figures reduced to rows, and the image both engines are given."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from nacre.cli.bench import engine, report


def test_a_row_has_ratio_and_verdict() -> None:
    results = report.Results()
    for value in (20.0, 40.0, 30.0):
        results.add("pod up, ms", "nacre", value)
    results.add("pod up, ms", "containerd", 200.0)
    assert report.rows(results) == [("pod up, ms", "20.0/30.0", "200", "0.15", "≤ 0.2 met")]


def test_a_missed_target_is_called_missed() -> None:
    results = report.Results()
    results.add("idle node, PSS MiB", "nacre", 130.0)
    assert report.rows(results)[0][-1] == "≤ 120 missed"


def test_the_image_is_a_docker_archive_whose_digests_fit(tmp_path: Path, monkeypatch: object) -> None:
    binary = tmp_path / "busybox"
    binary.write_bytes(b"\x7fELF")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))  # type: ignore[attr-defined]
    with tarfile.open(engine.build_image(str(tmp_path))) as archive:
        manifest = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        settings = json.load(archive.extractfile(manifest[0]["Config"]))  # type: ignore[arg-type]
    assert manifest[0]["RepoTags"] == [engine.IMAGE, engine.PAUSE]
    assert settings["rootfs"]["diff_ids"][0].startswith("sha256:")
