"""Labels as SELinux itself shows them: on a host that has it, such as the machine of tests/vm/test_selinux.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from runc_support import Bundle, made

pytestmark = pytest.mark.skipif(
    not os.path.exists("/sys/fs/selinux/enforce"), reason="open /sys/fs/selinux/enforce: ENOENT, this host has no SELinux"
)
FILES = "system_u:object_r:tmp_t:s0:c1,c2"
PROCESS = "system_u:system_r:initrc_t:s0:c1,c2"
CONFINED = "system_u:system_r:nacre_test_t:s0:c1,c2"  # of tests/vm/selinux.cil


def enforces(label: str) -> bool:
    """Whether SELinux is not merely permissive, and its policy knows `label`."""
    try:
        with open("/sys/fs/selinux/enforce") as told, open("/sys/fs/selinux/context", "wb", buffering=0) as context:
            return told.read() == "1" and context.write(label.encode()) > 0
    except OSError:
        return False


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as one:
        one.linux["mountLabel"] = FILES
        yield one


def label_of(bundle: Bundle, place: str) -> str:
    found = os.getxattr(f"/proc/{bundle.state()['pid']}/root{place}", "security.selinux")
    return found.rstrip(b"\0").decode()


def test_every_file_system_that_is_made_has_the_label_and_the_kernels_own_have_theirs(bundle: Bundle) -> None:
    bundle.mount("/mnt", "tmpfs", "tmpfs", "tmpcopyup").mount("/tmp", "tmpfs", "tmpfs", "ro", "size=1m")
    (bundle.rootfs / "mask").mkdir()
    bundle.linux["maskedPaths"].append("/mask")
    bundle.up()
    labelled = ("/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/mnt", "/tmp", "/mask", "/dev/null")
    assert {place: label_of(bundle, place) for place in labelled} == dict.fromkeys(labelled, FILES)
    assert FILES not in {label_of(bundle, "/proc"), label_of(bundle, "/sys")}


def test_a_process_and_its_keyring_have_the_label_that_is_asked_for(bundle: Bundle) -> None:
    bundle.process["selinuxLabel"] = PROCESS
    bundle.up()
    assert bundle.inside("cat /proc/self/attr/current").rstrip("\0\n") == PROCESS
    assert bundle.inside("cat /proc/1/attr/current").rstrip("\0\n") == PROCESS
    assert bundle.inside("cat /proc/1/attr/keycreate").rstrip("\0\n") == "", "execve(2) has taken it back"


def test_a_label_that_the_policy_does_not_know_is_told(bundle: Bundle) -> None:
    bundle.linux["mountLabel"] = "nobody:knows:this_t:s0"
    told = bundle.refuses("true")
    assert "mount tmpfs on /dev" in told and "errno 22" in told
    bundle.linux["mountLabel"], bundle.process["selinuxLabel"] = FILES, "nobody:knows:this_t:s0"
    assert "set the security label" in bundle.refuses("true") or "session keyring" in bundle.refuses("true")


@pytest.mark.skipif(not enforces(CONFINED), reason="SELinux is not enforcing, or does not know nacre_test_t")
def test_a_process_is_confined_to_what_its_label_may_touch(bundle: Bundle) -> None:
    """The type may read what is unlabelled, as the bundle is, and nothing that /etc/shadow's label is on."""
    for name in ("open", "closed"):
        (bundle.rootfs / name).write_text(f"{name}\n")
    os.setxattr(bundle.rootfs / "closed", "security.selinux", b"system_u:object_r:shadow_t:s0")
    del bundle.linux["mountLabel"]
    bundle.process["selinuxLabel"] = CONFINED
    assert bundle.run("cat /open").stdout == "open\n"
    assert "Permission denied" in bundle.run("cat /closed").stderr
