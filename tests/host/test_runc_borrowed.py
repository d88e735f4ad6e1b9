"""Containers without a mount namespace of their own: what they mount is seen by others, and is gone with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runc_support import Bundle, leftovers, made

from nacre.linux import mounts, namespaces
from nacre.linux.mounts import MountFlag, UnmountFlag


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as bundle:
        yield bundle


def mounted(pid: int | str, bundle: Bundle) -> list[str]:
    """Mount points below the bundle in that process's mount namespace."""
    with open(f"/proc/{pid}/mountinfo") as file:
        return [line.split()[4] for line in file if f"{bundle.path}/" in line]


def without(bundle: Bundle, kind: str, path: str = "") -> None:
    kept = [one for one in bundle.linux["namespaces"] if one["type"] != kind]
    bundle.linux["namespaces"] = kept + ([{"type": kind, "path": path}] if path else [])


@contextmanager
def somebody() -> Iterator[int]:
    """A process with a mount namespace of its own, whose mounts are shared, as on most hosts."""
    ready, told = os.pipe()
    hold, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(held)
            namespaces.unshare(namespaces.Clone.NEWNS)
            mounts.mount(None, "/", None, MountFlag.REC | MountFlag.PRIVATE)
            mounts.mount(None, "/", None, MountFlag.REC | MountFlag.SHARED)
            os.write(told, b".")
            os.read(hold, 1)
        finally:
            os._exit(0)
    os.close(hold)
    try:
        assert os.read(ready, 1) == b"."
        yield pid
    finally:
        for fd in (ready, told, held):
            os.close(fd)
        os.waitpid(pid, 0)


def test_a_container_in_the_hosts_mount_namespace_has_its_root_and_leaves_no_mount(bundle: Bundle) -> None:
    without(bundle, "mount")
    pid = bundle.up("ls / > /seen; sleep 100")
    assert namespaces.identity("mount", pid) == namespaces.identity("mount")
    assert any(place.endswith("/rootfs/proc") for place in mounted("self", bundle))
    assert "bin" in bundle.inside("ls /").split() and "boot" not in bundle.inside("ls /").split()
    assert bundle.inside("readlink /proc/1/exe").strip() == "/bin/busybox"
    bundle.ok("delete", "--force", bundle.name)
    assert mounted("self", bundle) == [] and leftovers(bundle) == []


@pytest.mark.parametrize("propagation", [MountFlag.PRIVATE, MountFlag.SHARED], ids=["private", "shared"])
def test_a_mount_of_the_engines_on_the_root_stays(bundle: Bundle, propagation: MountFlag) -> None:
    """Where the mounts around are shared, as under systemd, each mount on the root has a copy that goes with it."""
    without(bundle, "mount")
    path, rootfs = str(bundle.path), str(bundle.rootfs)
    mounts.mount(path, path, None, MountFlag.BIND)
    try:
        mounts.mount(None, path, None, MountFlag.PRIVATE)  # no peer of the host's
        mounts.mount(None, path, None, propagation)
        mounts.mount(rootfs, rootfs, None, MountFlag.BIND)
        assert bundle.says("echo in").strip() == "in"
        assert mounted("self", bundle) == [rootfs]
    finally:
        mounts.umount2(path, UnmountFlag.DETACH)


def test_a_create_that_fails_takes_its_mounts_away(bundle: Bundle) -> None:
    without(bundle, "mount")
    bundle.mount("/mnt", "no-such-filesystem", "none")
    assert "mount no-such-filesystem on /mnt" in bundle.refuses("true")
    assert mounted("self", bundle) == []


def test_a_joined_mount_namespace_is_given_back_as_it_was(bundle: Bundle) -> None:
    with somebody() as holder:
        without(bundle, "mount", f"/proc/{holder}/ns/mnt")
        pid = bundle.up("sleep 100")
        assert namespaces.identity("mount", pid) == namespaces.identity("mount", holder)
        assert mounted("self", bundle) == [] and mounted(holder, bundle) != []
        assert "boot" not in bundle.inside("ls /").split()
        assert os.readlink(f"/proc/{holder}/root") == "/"
        bundle.ok("delete", "--force", bundle.name)
        assert mounted(holder, bundle) == []


def test_a_joined_mount_namespace_that_is_gone_took_its_mounts_along(bundle: Bundle) -> None:
    with somebody() as holder:
        without(bundle, "mount", f"/proc/{holder}/ns/mnt")
        bundle.up("sleep 100")
    bundle.ok("delete", "--force", bundle.name)


@pytest.mark.parametrize("path", ["/proc/1/ns/nothing", "/etc/passwd"])
def test_a_path_that_names_no_mount_namespace_is_refused_with_its_name(bundle: Bundle, path: str) -> None:
    without(bundle, "mount", path)
    assert path in bundle.refuses("true") and leftovers(bundle) == []
