"""The guest's kernel and first root as files: built whole or not at all, the same every time, without network once the package is there."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from guest_support import CACHE, appliance_for_tests

import nacre
from nacre import config
from nacre.kata import appliance, appliance_kernel

# where the build for these tests, or before it a node of this machine, put the kernel's package
CACHES = (CACHE / "guest/var/lib/nacre/kata/cache", Path(appliance.SHARED_CACHE))
BUILD = (
    "from nacre import config; from nacre.kata import appliance; print(appliance.build(config.Config(prefix={!r}), {}).version)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nacre as a wheel leaves it: a package in a directory of others."""
    target = tmp_path_factory.mktemp("site-packages")
    shutil.copytree(Path(nacre.__file__).parent, target / "nacre", ignore=shutil.ignore_patterns("__pycache__"))
    return target


def build_from(site: Path, prefix: str, progress: str = "print") -> subprocess.CompletedProcess[str]:
    """By the system's Python, with nothing but `site`; the last line is the version."""
    command = ["/usr/bin/python3", "-c", BUILD.format(prefix, progress)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(site)}, cwd="/"
    )


@pytest.fixture(scope="module")
def package() -> Path:
    """The kernel's, as apt-get brought it."""
    appliance_for_tests()
    return next(path for directory in CACHES for path in directory.glob("*.deb"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: Path) -> config.Config:
    """A node of its own whose apt-get and apt-cache reach nothing; the kernel's package is found in another directory."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("apt-get", "apt-cache"):
        (tools / name).write_text("#!/bin/sh\necho 'E: no network here' >&2\nexit 100\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("NACRE_PACKAGES", str(package.parent))
    monkeypatch.setattr(appliance, "SHARED_CACHE", str(tmp_path / "none"))
    return config.Config(prefix=str(tmp_path / "node"))


def digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def names(where: config.Config, part: str) -> list[str]:
    return sorted(os.listdir(f"{where.data}/kata/{part}"))


def test_two_installations_build_the_same_bytes_without_network(site: Path, offline: config.Config, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "elsewhere")
    other = config.Config(prefix=str(tmp_path / "other"))
    assert appliance.current(offline) is None
    said = [build_from(site, offline.prefix), build_from(tmp_path / "elsewhere", other.prefix)]
    assert [one.returncode for one in said] == [0, 0], said
    first, second = appliance.current(offline), appliance.current(other)
    assert first is not None and second is not None
    assert first.version == second.version == said[0].stdout.splitlines()[-1]
    assert (digest(first.initrd), digest(first.kernel)) == (digest(second.initrd), digest(second.kernel))
    assert names(offline, "appliance") == sorted([first.version, "current"])
    assert os.path.getsize(first.initrd) < 17 << 20

    again = build_from(site, offline.prefix)
    assert again.stdout.splitlines() == ["looking what the agent loads", first.version]


def test_a_killed_build_leaves_nothing_that_the_next_one_does_not_take_away(site: Path, offline: config.Config) -> None:
    kill = "lambda said: __import__('os').kill(__import__('os').getpid(), 9) if said.startswith('packing') else None"
    assert build_from(site, offline.prefix, kill).returncode == -signal.SIGKILL
    assert appliance.current(offline) is None
    assert not os.path.exists(f"{offline.data}/kata/appliance")
    assert any(name.startswith("building-") for name in names(offline, ""))
    assert build_from(site, offline.prefix).returncode == 0
    assert names(offline, "") == ["appliance"]


def test_without_package_and_network_the_failure_says_what_apt_said(
    offline: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NACRE_PACKAGES")
    with pytest.raises(appliance_kernel.KernelUnavailable) as caught:
        appliance.build(offline, print)
    assert caught.value.evidence == ("E: no network here",)
    assert caught.value.remedy
    assert appliance.current(offline) is None


def test_a_damaged_package_is_named_with_the_way_out(
    offline: config.Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: Path
) -> None:
    broken = tmp_path / "broken" / package.name
    broken.parent.mkdir()
    broken.write_bytes(package.read_bytes()[:1_000_000])
    monkeypatch.setenv("NACRE_PACKAGES", str(broken.parent))
    with pytest.raises(appliance_kernel.KernelUnavailable) as caught:
        appliance.build(offline, print)
    assert caught.value.remedy == f"rm {broken}"
    assert appliance.current(offline) is None


def test_a_guest_of_another_nacre_is_noticed_and_built_anew_once(site: Path, offline: config.Config, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(site, other)
    with (other / "nacre/agent/loop.py").open("a") as file:
        file.write("OTHER = 1\n")
    done = build_from(other, offline.prefix)
    assert done.returncode == 0, done.stderr
    stale = appliance.current(offline)
    said: list[str] = []
    appliance.refresh(offline, said.append)
    fresh = appliance.current(offline)
    assert stale and fresh and stale.version == done.stdout.split()[-1] != fresh.version
    assert "the guest was built of other files than are installed now: it is built anew" in said
    said.clear()
    appliance.refresh(offline, said.append)
    assert not said, "it is this nacre's now"


def test_a_guest_that_cannot_be_built_anew_goes_on_and_that_is_said(
    site: Path, offline: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(site, other)
    (other / "nacre/runc/hooks.py").write_text((other / "nacre/runc/hooks.py").read_text() + "OTHER = 1\n")
    assert build_from(other, offline.prefix).returncode == 0
    shutil.rmtree(f"{offline.data}/kata/cache", ignore_errors=True)
    monkeypatch.setenv("NACRE_PACKAGES", str(tmp_path / "none"))
    stale = appliance.current(offline)
    said: list[str] = []
    appliance.refresh(offline, said.append)
    assert appliance.current(offline) == stale
    assert "could not be built anew" in said[-1] and "nacre enable kata" in said[-1]
