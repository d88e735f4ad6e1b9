"""A CRI service with kata enabled: the guest from .cache (built there once, by whichever test comes first), the template its own."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "host"))

import cri_support as support  # the path above comes first
from cri_support import Cri, build_image
from leftovers import assert_settled, look

from nacre import config
from nacre.kata import appliance

CACHE = Path(__file__).resolve().parents[2] / ".cache"
__all__ = ["Cri", "assert_settled", "build_image", "enabled", "guest_into", "look", "qemus", "support"]


def guest_into(prefix: Path) -> None:
    """The built guest under `prefix`, as `nacre enable kata` would leave it."""
    cached = config.Config(prefix=str(CACHE / "guest"))
    made = appliance.build(cached, progress=print)
    home = prefix / "var/lib/nacre/kata/appliance"
    home.mkdir(parents=True)
    shutil.copytree(made.directory, home / made.version)
    os.symlink(made.version, home / "current")


def enabled(prefix: Path, image: Path, settings: str = "[kata]\npool = 0\n") -> Cri:
    """Started, with the test image loaded."""
    guest_into(prefix)
    packages = f"{CACHE}/guest/var/lib/nacre/kata/cache"  # should the sources change meanwhile
    service = Cri(prefix, settings=settings, environment={"NACRE_PACKAGES": packages})
    service.start().load(image)
    return service


def qemus(prefix: Path) -> list[int]:
    """The processes of VMs under `prefix`: those in its cgroups."""
    instance = config.Config(prefix=os.path.realpath(prefix)).instance
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if (
                b"qemu-system" in Path(f"/proc/{entry}/cmdline").read_bytes()
                and f"/{instance}/" in Path(f"/proc/{entry}/cgroup").read_text()
            ):
                found.append(int(entry))
        except OSError:
            continue
    return sorted(found)
