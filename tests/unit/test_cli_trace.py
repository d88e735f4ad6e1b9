"""The chain as it is drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nacre import config
from nacre.cli import trace
from nacre.oci import trace as recorder
from nacre.oci.errors import NotFound


def chain(directory: Path) -> list[trace.Crossing]:
    recorder.record(str(directory), "u1", "api", "Pod default/web", {"metadata": {"name": "web", "namespace": "default"}})
    recorder.record(str(directory), "u1", "cri", "RunPodSandbox", {"config": {"hostname": "web"}}, took_ns=12_500_000)
    recorder.record(str(directory), "u1", "oci", "config.json", {"ociVersion": "1.0.2", "process": {"args": ["nginx"] * 40}})
    return list(trace.crossings(list(recorder.records(str(directory), "u1"))))


def test_each_joint_has_its_heading_and_its_document(tmp_path: Path) -> None:
    text = "\n".join(trace.render(chain(tmp_path), limit=None))
    assert re.search(r"kubelet ──▶ cri\s+Container Runtime Interface v1", text)
    assert "RunPodSandbox, 12.5 ms" in text
    assert text.index("hostname: web") < text.index("ociVersion")


def test_long_documents_are_cut_and_say_by_how_much(tmp_path: Path) -> None:
    lines = list(trace.render(chain(tmp_path), limit=5))
    assert any(re.search(r"… \d+ more lines \(--full\)", line) for line in lines)


def test_a_deleted_pod_is_found_by_name_in_the_records(prefix: Path) -> None:
    settings = config.load(str(prefix))
    Path(settings.trace_dir).mkdir(parents=True)
    chain(Path(settings.trace_dir))
    assert trace.find_uid(settings, "default/web", "other") == "u1"
    with pytest.raises(NotFound):
        trace.find_uid(settings, "default/gone", "other")
