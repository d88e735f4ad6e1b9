"""SELinux's labels on a container's file systems (config-linux.md "Mount Label"), as the kernel is told of them; AppArmor's profiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nacre.linux import mounts, paths
from nacre.linux.libc import owned
from nacre.oci.errors import Invalid
from nacre.runc import plan, steps, templates
from nacre.runc import process_steps as ps
from nacre.runc.mount_options import with_context

LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """File system to the data that mount(2) is given, filled as steps run."""
    seen: dict[str, str | None] = {}

    def mount(_source: str, _target: str, fstype: str, _flags: int = 0, data: str | None = None) -> None:
        seen[fstype] = data

    monkeypatch.setattr(mounts, "mount", mount)
    return seen


@contextmanager
def rooted(path: Path) -> Iterator[steps.Context]:
    context = steps.Context()
    with owned(paths.open_root(str(path))) as context.root:
        yield context


def planned(label: str, **linux: Any) -> tuple[steps.Step, ...]:
    document = templates.spec(rootless=False)
    document["linux"] |= linux
    host = plan.Host(bundle="/b", mount_label=label, cgroup_directories=(("memory", "/sys/fs/cgroup/memory/x"),))
    return plan.setup_steps(document, host, {"id": "x"})


def test_the_file_systems_of_a_container_are_labelled_and_the_kernels_own_are_not(
    told: dict[str, str | None], tmp_path: Path
) -> None:
    with rooted(tmp_path) as context:
        for step in planned(LABEL):
            if isinstance(step, steps.MountFilesystem) and step.fstype != "mqueue":
                step.run(context)
    assert told["tmpfs"] == f'mode=1777,size=65536k,context="{LABEL}"', "/dev/shm is the last one"
    assert told["devpts"] == f'newinstance,ptmxmode=0666,mode=0620,gid=5,context="{LABEL}"'
    assert told["proc"] is told["sysfs"] is None


def test_what_hides_a_directory_is_labelled_too(told: dict[str, str | None], tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (mask,) = (step for step in planned(LABEL, maskedPaths=["/secret"]) if isinstance(step, steps.MaskPath))
    with rooted(tmp_path) as context:
        mask.run(context)
    assert told == {"tmpfs": f'size=0k,mode=755,context="{LABEL}"'}
    (cgroups,) = (step for step in planned(LABEL) if isinstance(step, steps.MountCgroups))
    assert cgroups.label == LABEL


def test_a_mount_keeps_the_label_that_its_own_options_name() -> None:
    assert with_context("", LABEL) == f'context="{LABEL}"'
    assert with_context("size=1m", "") == "size=1m"
    for own in ("size=1m,context=a:b:c", 'rootcontext="a:b:c"'):
        assert with_context(own, LABEL) == own


def test_a_label_that_would_end_its_option_is_refused_and_without_selinux_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "has_selinux", lambda: True)
    assert plan.mount_label({"mountLabel": LABEL}) == LABEL
    with pytest.raises(Invalid, match="quotation mark"):
        plan.mount_label({"mountLabel": 'a",size=1k'})
    monkeypatch.setattr(plan, "has_selinux", lambda: False)
    assert plan.mount_label({"mountLabel": LABEL}) == ""


def test_the_keyring_has_the_label_of_the_process_that_is_to_use_it() -> None:
    document = templates.spec(rootless=False)
    document["process"]["selinuxLabel"] = "a:b:c:s0"
    for security, expected in (((("attr/exec", "a:b:c:s0"),), "a:b:c:s0"), ((), "")):
        found = plan.setup_steps(document, plan.Host(bundle="/b", security=security), {"id": "x"})
        (keyring,) = (step for step in found if isinstance(step, ps.NewKeyring))
        assert keyring.label == expected


@pytest.fixture
def armor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernel says what it has, as on a host with AppArmor and one profile."""
    monkeypatch.setattr(plan, "_APPARMOR", str(tmp_path / "enabled"))
    monkeypatch.setattr(plan, "_PROFILES", str(tmp_path / "profiles"))
    (tmp_path / "enabled").write_text("Y\n")
    (tmp_path / "profiles").write_text("kept in (enforce)\n")
    return tmp_path


def test_a_profile_is_looked_for_where_the_kernel_lists_them(armor: Path) -> None:
    assert [text for _, text in plan.security_labels("kept in", "")] == ["exec kept in"]
    with pytest.raises(Invalid, match="it is not loaded"):
        plan.security_labels("kept", "")
    assert plan.security_labels("unconfined", "") == ()


def test_a_list_that_the_caller_cannot_see_leaves_the_profile_to_the_kernel(armor: Path) -> None:
    """podman starts a container in a user namespace from mounts without any below /sys/kernel."""
    (armor / "profiles").unlink()
    assert [text for _, text in plan.security_labels("kept", "")] == ["exec kept"]


@pytest.mark.parametrize("said", ["N", None])
def test_a_profile_is_refused_where_apparmor_is_off(armor: Path, said: str | None) -> None:
    (armor / "enabled").write_text(said) if said else (armor / "enabled").unlink()
    with pytest.raises(Invalid, match="AppArmor is off"):
        plan.security_labels("kept", "")
