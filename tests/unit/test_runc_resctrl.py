"""Classes of service in a plain directory that stands for resctrl's: this project has met no processor with them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nacre.linux.cgroup_files import LimitRefused
from nacre.oci.errors import Invalid, Unsupported
from nacre.runc import resctrl


def made(mount: Path, **wanted: Any) -> dict[str, str]:
    with ExitStack() as undo:
        facts = resctrl.prepare(wanted, "web", str(mount), undo)
        undo.pop_all()
    return facts


def test_a_group_of_its_own_is_named_after_the_container_and_has_its_lines_in_order(tmp_path: Path) -> None:
    facts = made(tmp_path, schemata=["L2:0=f"], memBwSchema="MB:0=20", l3CacheSchema="L3:0=7f0")
    assert (tmp_path / "web/schemata").read_text() == "L3:0=7f0\nMB:0=20\nL2:0=f\n"
    resctrl.enter(facts, 4711)
    assert (tmp_path / "web/tasks").read_text() == "4711\n"
    for file in (tmp_path / "web").iterdir():
        file.unlink()
    resctrl.remove(facts)
    assert not (tmp_path / "web").exists()


def test_other_lines_go_to_the_class_of_a_container_that_has_one(tmp_path: Path) -> None:
    facts = made(tmp_path, l3CacheSchema="L3:0=7f0")
    resctrl.update(facts, {"l3CacheSchema": "L3:0=f", "memBwSchema": "MB:0=50"})
    assert (tmp_path / "web/schemata").read_text() == "L3:0=7f0\nL3:0=f\nMB:0=50\n", "the kernel takes each line as it comes"
    with pytest.raises(Invalid, match="the container has none"):
        resctrl.update({}, {"memBwSchema": "MB:0=50"})


def test_a_class_that_is_named_stays_and_the_group_that_counts_goes(tmp_path: Path) -> None:
    (tmp_path / "gold/mon_groups").mkdir(parents=True)
    facts = made(tmp_path, closID="gold", enableMonitoring=True)
    resctrl.enter(facts, 5)
    assert (tmp_path / "gold/tasks").read_text() == (tmp_path / "gold/mon_groups/web/tasks").read_text() == "5\n"
    (tmp_path / "gold/mon_groups/web/tasks").unlink()
    resctrl.remove(facts)
    assert (tmp_path / "gold").is_dir() and not (tmp_path / "gold/mon_groups/web").exists()
    assert made(tmp_path, closID="/")["tasks"] == f"{tmp_path}/tasks", "the class that everything is in"


def test_a_class_that_exists_must_be_what_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "gold").mkdir()
    (tmp_path / "gold/schemata").write_text("    MB:0= 20;1= 70\n    L3:0=7f0;1=01f\n")
    assert made(tmp_path, closID="gold", schemata=["L3:1=1f", "MB:0=20;1=70"]) == {"tasks": f"{tmp_path}/gold/tasks"}
    for line in ("L3:0=7f1", "L3:2=1", "L2:0=f", "MB:0=30"):
        with pytest.raises(Invalid, match="its schemata are not"):
            made(tmp_path, closID="gold", schemata=[line])


def test_a_class_that_does_not_exist_needs_a_schema(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="has no schema to make it by"):
        made(tmp_path, closID="gold")


def test_what_was_made_is_undone_when_a_later_step_fails(tmp_path: Path) -> None:
    with pytest.raises(LimitRefused, match="mon_groups/web"), ExitStack() as undo:
        resctrl.prepare({"enableMonitoring": True}, "web", str(tmp_path), undo)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"closID": "../x"}, "is no name of a class"),
        ({"closID": "info"}, "is no name of a class"),
        ({"memBwSchema": "L3:0=1"}, "memBwSchema"),
        ({"schemata": ["L3:0=1\nL3:1=1"]}, "no line of a schemata file"),
        ({"schemata": ["all"]}, "no line of a schemata file"),
    ],
)
def test_what_can_be_no_setting_is_refused(wanted: dict[str, Any], named: str) -> None:
    with pytest.raises(Invalid, match=named):
        resctrl.check(wanted)
    with pytest.raises(Unsupported, match="enableMBM"):
        resctrl.check({"enableMBM": True})


def test_the_mount_is_found_where_it_is() -> None:
    table = b"22 1 0:5 / /proc rw - proc proc rw\n30 1 0:9 / /mnt/my\\040rdt rw,noexec shared:4 - resctrl resctrl rw\n"
    assert resctrl.mount_point(table.splitlines(keepends=True)) == "/mnt/my rdt"
    assert resctrl.mount_point([b"22 1 0:5 / /resctrl rw - proc resctrl rw\n"]) == ""
