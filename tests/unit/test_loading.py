"""The short way from .pyc files: it takes what is certainly right, and leaves the rest to the import system."""

from __future__ import annotations

import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import nacre
from nacre.loading import Compiled


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A compiled package `sea` with a module `shell`."""
    package = tmp_path / "sea"
    package.mkdir()
    for name, text in (("__init__", "DEPTH = 7\n"), ("shell", '"""Words."""\nCOLOUR = "white"\n')):
        (package / f"{name}.py").write_text(text)
        py_compile.compile(str(package / f"{name}.py"), invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
    return package / "shell.py"


def loaded(source: Path, name: str = "sea.shell") -> ModuleType | None:
    finder = Compiled("sea", str(source.parent.parent))
    spec = finder.find_spec(name)
    if spec is None:
        return None
    module = ModuleType(name)
    module.__spec__ = spec
    finder.exec_module(module)
    return module


def test_a_compiled_module_is_what_its_source_says(source: Path) -> None:
    module = loaded(source)
    assert module is not None and module.COLOUR == "white" and module.__doc__ == "Words."
    assert module.__spec__ is not None and module.__spec__.origin == str(source)
    assert module.__spec__.cached == py_compile.compile(str(source))


def test_a_source_of_another_time_or_size_is_left_to_the_import_system(source: Path) -> None:
    then = source.stat()
    source.write_text('"""Words."""\nCOLOUR = "brown"\n')
    os.utime(source, ns=(then.st_atime_ns, then.st_mtime_ns + 1_000_000_000))
    assert loaded(source) is None, "the time differs"
    source.write_text('COLOUR = "white"\n')
    os.utime(source, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert loaded(source) is None, "the size differs"


def test_what_has_no_source_or_was_not_compiled_is_left_to_the_import_system(source: Path) -> None:
    assert loaded(source, "sea.pearl") is None and loaded(source, "land.shell") is None and loaded(source, "sea") is None
    shutil.rmtree(source.parent / "__pycache__")
    assert loaded(source) is None


def test_code_known_by_a_hash_is_left_to_the_import_system(source: Path) -> None:
    py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert loaded(source) is None


@settings(max_examples=50)
@given(head=some.binary(max_size=16))
def test_any_other_head_is_left_to_the_import_system(tmp_path_factory: pytest.TempPathFactory, head: bytes) -> None:
    package = tmp_path_factory.mktemp("any") / "sea"
    package.mkdir()
    (package / "shell.py").write_text("")
    compiled = Path(py_compile.compile(str(package / "shell.py")) or "")
    content = compiled.read_bytes()
    compiled.write_bytes(head + content[16:])
    assert head == content[:16] or loaded(package / "shell.py") is None


def test_the_command_finds_its_modules_so_and_the_import_system_those_that_changed(tmp_path: Path) -> None:
    copy = tmp_path / "nacre"
    shutil.copytree(Path(nacre.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "api", "cli", "kubelet"))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from nacre import loading; loading.shorten(); import nacre.runc.main\n"
        "print(*(name for name, module in sys.modules.items() if isinstance(module.__loader__, loading.Compiled)))"
    )

    def short() -> set[str]:
        done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert short() == set(), "nothing is compiled yet"
    first = short()
    assert {"nacre.runc", "nacre.runc.main", "nacre.oci.state"} <= first
    with (copy / "oci/state.py").open("a") as file:
        file.write("# more\n")
    assert short() == first - {"nacre.oci.state"}
    assert short() == first, "the import system has compiled it anew"
