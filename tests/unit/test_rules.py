"""The design's rules about the source itself: who imports whom, what is standard library only, how large things grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "nacre"
TESTS = Path(__file__).resolve().parents[1]
ORDER = ("cli", "api", "controllers", "kubelet", "cri", "images", "network", "shim", "kata", "agent", "runc", "oci", "linux")
APART = {"api", "controllers", "kubelet", "cri"}  # they meet on sockets only
BELOW_ALL = {"nacre.oci.errors", "nacre.oci.values"}  # import nothing of ours, so that linux may use them
STDLIB_ONLY = {"linux", "oci", "runc", "agent", "shim", "kata"}
LINES, FUNCTION_LINES = 700, 60
MODULES = sorted(path for path in SRC.rglob("*.py") if "_pb2" not in path.name)


def package_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Every module named in an import statement, "nacre.x.y" for `from nacre.x import y` where y is a module."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "nacre":
                yield from (f"nacre.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC)))
def test_a_module_imports_downwards_only(path: Path) -> None:
    own = package_of(path)
    for name in imports(path):
        other = name.split(".")[1] if name.startswith("nacre.") else ""
        if own in ORDER and other in ORDER:
            assert ORDER.index(other) >= ORDER.index(own) or (own == "linux" and name in BELOW_ALL), f"imports {name}"
            assert other == own or not {own, other} <= APART, f"imports {name}: they meet on sockets only"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if package_of(path) in STDLIB_ONLY], ids=lambda p: str(p.relative_to(SRC))
)
def test_the_hot_path_and_the_guest_need_the_standard_library_only(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] in sys.stdlib_module_names | {"nacre", "__future__"}, f"imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC)))
def test_ctypes_is_only_in_linux(path: Path) -> None:
    assert package_of(path) == "linux" or not any(name.split(".")[0] == "ctypes" for name in imports(path))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC)))
def test_modules_and_functions_keep_their_size(path: Path) -> None:
    assert path.read_text().count("\n") <= LINES
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= FUNCTION_LINES + 1, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC)))
def test_no_exception_is_swallowed_and_nothing_sleeps(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler) and len(node.body) == 1 and isinstance(node.body[0], ast.Pass):
            assert getattr(node.type, "id", "") not in ("", "Exception", "BaseException") or isinstance(
                node.type, ast.Tuple | ast.Attribute
            ), f"line {node.lineno} swallows every exception"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "time.sleep", f"line {node.lineno} sleeps"


@pytest.mark.parametrize("package", ORDER)
def test_a_package_says_what_it_is_for(package: str) -> None:
    text = ast.get_docstring(tree_of(SRC / package / "__init__.py")) or ""
    assert len(text) > 100, f"nacre/{package}/__init__.py does not say what it is for, who calls it and what it owns"


def test_only_the_command_line_exits() -> None:
    allowed = {"cli"}
    for path in MODULES:
        if package_of(path) in allowed or path.name in ("main.py", "__main__.py", "pki.py", "extract.py"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) != "sys.exit", f"{path.relative_to(SRC)}:{node.lineno}"


def test_names_of_test_files_are_unique() -> None:
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in sys.modules after `statement`, in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_answers_its_version_without_loading_anything() -> None:
    assert not loaded_by("import nacre.cli.main") & {"click", "rich", "grpc", "aiohttp", "asyncio", "yaml", "ctypes"}


def test_the_daemon_starts_the_zygote_before_anything_with_threads_is_loaded() -> None:
    assert not loaded_by("import nacre.cli.node, nacre.cri.service") & {"grpc", "aiohttp", "cryptography", "rich", "yaml"}


@pytest.mark.parametrize("service", ["api", "controllers", "kubelet"])
def test_a_service_never_loads_what_the_idle_node_has_no_room_for(service: str) -> None:
    loaded = loaded_by(f"import nacre.{service}.service")
    assert not loaded & {"cryptography", "rich", "pyroute2", "click", "kubernetes_validate", "numpy"}


def test_the_zygote_loads_neither_openssl_nor_what_it_forks_for_every_pod_in_vain() -> None:
    assert not loaded_by("import nacre.shim.zygote") & {
        "_hashlib",
        "secrets",
        "subprocess",
        "asyncio",
        "logging",
        "grpc",
        "msgspec",
    }


def test_a_short_command_of_the_runtime_loads_little() -> None:
    code = "import nacre.runtimes, nacre.runc.main, nacre.runc.tending, nacre.runc.life, nacre.linux.cgroups, _socket\n"
    code += "nacre.runc.options.signal_number('TERM')"
    loaded = loaded_by(code)
    assert not loaded & {"dataclasses", "inspect", "typing", "ctypes", "socket", "signal", "argparse"}
    assert not loaded & {"json", "re", "enum", "functools", "collections", "contextlib", "importlib.metadata"}


def test_what_makes_containers_loads_no_enumerations() -> None:
    loaded = loaded_by("import nacre.runtimes, nacre.runc.main, nacre.runc.launching, nacre.runc.foreground; nacre.runc.load()")
    assert not loaded & {"json", "re", "enum", "signal", "socket", "selectors", "dataclasses", "typing", "subprocess"}
    assert not loaded & {"contextlib", "functools", "collections", "ctypes"}


def test_what_is_forked_for_containers_has_the_whole_runtime_loaded() -> None:
    code = (
        "import sys; sys.dont_write_bytecode = True; from nacre import runc; runc.load(); before = set(sys.modules)\n"
        "import nacre.runc.hooks, nacre.runc.borrowed, nacre.linux.cgroups, nacre.oci.spec, nacre.linux.sockets\n"
        "import nacre.linux.cgroup_figures, nacre.linux.seccomp_compiler, nacre.linux.device_bpf\n"
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
