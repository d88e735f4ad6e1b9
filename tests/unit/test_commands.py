"""The commands as a wheel installs them, in a virtual environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = (sys.executable, "-m", "pip", "--quiet", "--isolated", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of an environment that holds this checkout's wheel and nothing else."""
    place = tmp_path_factory.mktemp("commands")
    wheel = (*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={place}", str(ROOT))
    subprocess.run(wheel, check=True, capture_output=True)
    venv.create(place / "venv", symlinks=True)
    into = f"--python={place}/venv/bin/python"
    subprocess.run((*PIP, into, "install", "--no-deps", "--no-index", *place.glob("*.whl")), check=True, capture_output=True)
    return place / "venv/bin"


def packages(installed: Path) -> Path:
    return next(installed.parent.glob("lib/python3*/site-packages"))


def said(*words: str | Path, **environment: str) -> str:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(words, capture_output=True, text=True, cwd="/", env=outside | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", ["nacre", "nacre-runc", "nacre-kata"])
def test_a_wheel_brings_the_command(installed: Path, command: str) -> None:
    assert said(installed / command, "--version").split()[0] == command


def test_the_runtime_is_found_through_a_link_as_pipx_and_uv_make_it(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "nacre-runc").symlink_to(installed / "nacre-runc")
    (tmp_path / "deeper/nacre-runc").symlink_to("../nacre-runc")
    assert said(tmp_path / "deeper/nacre-runc", "--version").startswith("nacre-runc version")


def test_the_runtime_is_found_by_its_bare_name(installed: Path) -> None:
    assert said("nacre-runc", "--version", PATH=f"{installed}:/usr/bin:/bin").startswith("nacre-runc version")


def test_the_runtime_starts_without_site_and_without_the_callers_modules(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json/__init__.py").write_text("raise SystemExit('the caller’s json')")
    customized = packages(installed) / "customized.pth"
    customized.write_text("import sys; print('site was loaded')")
    try:
        assert "site was loaded" in said(installed / "python", "-c", ""), "else this proves nothing"
        lines = said(installed / "nacre-runc", "--root", tmp_path / "state", "list", PYTHONPATH=str(tmp_path))
    finally:
        customized.unlink()
    assert lines.split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]


def test_the_runtime_is_started_by_python3_where_none_stands_beside_it(installed: Path, tmp_path: Path) -> None:
    alone = tmp_path / "nacre-runc"
    alone.write_bytes((installed / "nacre-runc").read_bytes())
    alone.chmod(0o755)
    environment = {"PATH": f"{installed}:/usr/bin:/bin"}
    assert said(alone, "--version", **environment).startswith("nacre-runc version")


@pytest.mark.parametrize("name", ["PYTHONDONTWRITEBYTECODE", "NOTHING"])
def test_byte_code_is_written_unless_the_caller_says_no(installed: Path, name: str) -> None:
    cache = packages(installed) / "nacre/runc/__pycache__"
    for path in cache.glob("options.*.pyc"):
        path.unlink()
    said(installed / "nacre-runc", "help", **{name: "1"})
    assert bool(list(cache.glob("options.*.pyc"))) is (name == "NOTHING")
