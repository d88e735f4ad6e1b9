"""The admin kubeconfig merged into a user's."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import yaml

from nacre.cli import kubectl

OURS = {
    "clusters": [{"name": "nacre", "cluster": {"server": "https://127.0.0.1:1"}}],
    "users": [{"name": "nacre-admin", "user": {"client-key-data": "eA=="}}],
    "contexts": [{"name": "nacre", "context": {"cluster": "nacre", "user": "nacre-admin"}}],
}


def test_merging_keeps_what_was_there_and_replaces_its_own_entry(tmp_path: Path) -> None:
    source, target = tmp_path / "admin.conf", tmp_path / "config"
    source.write_text(json.dumps(OURS))
    other = {"clusters": [{"name": "work", "cluster": {}}], "users": [], "contexts": [], "current-context": "work"}
    target.write_text(yaml.safe_dump(other))
    target.chmod(0o640)
    for _again in range(2):
        kubectl.merge_into(str(source), str(target), "nacre")
    merged = yaml.safe_load(target.read_text())
    assert [cluster["name"] for cluster in merged["clusters"]] == ["work", "nacre"]
    assert [user["name"] for user in merged["users"]] == ["nacre"]
    assert merged["current-context"] == "nacre"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_new_kubeconfig_is_for_its_owner_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "admin.conf", tmp_path / "home" / "config"
    source.write_text(json.dumps(OURS))
    kubectl.merge_into(str(source), str(target), "nacre")
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
