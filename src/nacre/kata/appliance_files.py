"""What stands in the guest's first root: an interpreter, of its library what the agent loads and no more, the C libraries, modules.

The agent's modules are found by importing them in the very interpreter that the guest gets (`appliance_collect`), and compiled by it, so
the guest needs no source and compiles nothing. Whatever the agent would load later than that, it cannot (a test boots it).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from nacre.kata import appliance_collect
from nacre.kata.appliance_cpio import Archive
from nacre.oci.errors import Failure

_ENTRIES = ("nacre.agent.__main__", "nacre.agent.main")
_LATER = (
    "encodings.ascii",
    "encodings.latin_1",
    "encodings.idna",
    "stringprep",
)  # loaded on use: here, at the start, they are in time
_SECCOMP = "libseccomp.so.2"
_ALONE = ("-sPSB", "-X", "utf8")  # -I would not let the hash seed be set
_COMPILE = """
import importlib._bootstrap_external as external, marshal, sys
for line in sys.stdin:
    source, target = line.rstrip("\\n").split("\\t")
    with open(source, "rb") as file:
        data = file.read()
    code = compile(data, target, "exec", dont_inherit=True, optimize=2)
    packed = external._code_to_hash_pyc(code, b"\\0" * 8, False)
    sys.stdout.buffer.write(len(packed).to_bytes(4, "big") + packed)
"""


class InterpreterUnfit(Failure):
    """The guest cannot be given this Python."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """What the guest's Python consists of; all paths are the host's and the guest's alike."""

    path: str
    library: str
    version: str
    modules: dict[str, str]  # name to source or shared object
    shared: tuple[str, ...]  # shared libraries, the loader among them
    prepared: bytes  # see nacre.agent.prepared


def source_directory() -> str:
    """The directory that holds the package nacre: a checkout's src, a site-packages, …"""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def interpreter() -> Interpreter:
    """The system's python3, or the one that runs this when the system's is too old or has none."""
    for path in ("/usr/bin/python3", os.path.realpath(sys.executable)):
        if os.path.exists(path) and _fits(path):
            break
    else:
        raise InterpreterUnfit(
            what="choose the guest's Python",
            cause="neither /usr/bin/python3 nor this one is 3.11 or newer",
            remedy="apt-get install python3",
        )
    command = [path, *_ALONE, appliance_collect.__file__, source_directory(), *_ENTRIES, *_LATER]
    found = json.loads(_output(command, "look what the agent loads"))
    modules = found["modules"]
    binaries = [found["interpreter"], *(file for file in modules.values() if ".so" in os.path.basename(file)), _seccomp(path)]
    return Interpreter(
        path=found["interpreter"],
        library=found["library"],
        version=found["version"].partition(" ")[0],
        modules=modules,
        shared=tuple(sorted({*_needed(binaries), binaries[-1]})),
        prepared=bytes.fromhex(found["prepared"]),
    )


def _fits(path: str) -> bool:
    done = subprocess.run([path, "-ISc", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False)
    return done.returncode == 0


def _output(command: list[str], what: str, given: str | None = None) -> bytes:
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONHASHSEED": "0"}  # sets are marshalled in the order of their hashes
    data = None if given is None else given.encode()
    done = subprocess.run(command, input=data, env=environment, capture_output=True, check=False)
    if done.returncode:
        raise InterpreterUnfit(
            what=what,
            cause=f"{command[0]} ended with code {done.returncode}",
            evidence=tuple(done.stderr.decode(errors="replace").splitlines()),
        )
    return done.stdout


def _seccomp(python: str) -> str:
    """The file of libseccomp, as the loader finds it and under the name by which the guest's loader looks: maps has the link's end."""
    code = f"import ctypes; ctypes.CDLL('{_SECCOMP}'); print(next(l.split()[-1] for l in open('/proc/self/maps') if '{_SECCOMP[:-5]}' in l))"
    return os.path.join(os.path.dirname(_output([python, "-ISc", code], f"find {_SECCOMP}").decode().strip()), _SECCOMP)


def _needed(binaries: list[str]) -> set[str]:
    """Every shared library that these need, by the loader's own word."""
    text = _output(["ldd", *binaries], "find the shared libraries of the guest's Python").decode()
    return set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", text, re.MULTILINE))


def write(archive: Archive, python: Interpreter, modules: Iterable[tuple[str, bytes]]) -> None:
    """The whole root, in an order that is the same every time."""
    files: dict[str, tuple[bytes, int]] = {python.path: (_read(python.path), 0o755)}
    for path in python.shared:
        files[_merged(path)] = (_read(path), 0o755)
    files |= {path: (data, 0o644) for path, data in _library(python).items()}
    order = []
    for name, data in modules:
        order.append(name)
        files[f"/lib/nacre/modules/{name}.ko"] = (data, 0o644)
    files["/lib/nacre/modules/order"] = ("\n".join(order).encode(), 0o644)
    files["/lib/nacre/prepared"] = (python.prepared, 0o644)
    files["/etc/passwd"] = (b"root:x:0:0:root:/:/bin/false\n", 0o644)
    files["/etc/group"] = (b"root:x:0:\n", 0o644)
    files = {_merged(path): value for path, value in files.items()}
    directories = {"/dev", "/proc", "/sys", "/run", "/tmp", "/etc", "/usr", *(f"/usr/{name}" for name in ("bin", "lib", "lib64"))}
    for path in files:
        while (path := os.path.dirname(path)) != "/":
            directories.add(path)
    for path in sorted(directories):
        archive.directory(path)
    for name in ("bin", "lib", "lib64"):
        archive.link(f"/{name}", f"usr/{name}")
    archive.character_device("/dev/console", 5, 1)
    for path, (data, mode) in sorted(files.items()):
        archive.regular(path, data, mode)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _merged(path: str) -> str:
    """Where /lib and /lib64 are links into /usr, as in the guest always."""
    return f"/usr{path}" if path.split("/")[1] in ("lib", "lib64", "bin") else path


def _library(python: Interpreter) -> dict[str, bytes]:
    """Path in the guest to contents: compiled modules where their sources stood, nacre's below the library; shared objects as they are."""
    source, result = source_directory(), {}
    to_compile: list[tuple[str, str]] = []
    for file in python.modules.values():
        target = file if not file.startswith(f"{source}/nacre/") else python.library + file.removeprefix(source)
        if file.endswith(".py"):
            to_compile.append((file, target))
        else:
            result[target] = _read(file)
    lines = "".join(f"{file}\t{target}\n" for file, target in to_compile)
    packed = _output([python.path, *_ALONE, "-c", _COMPILE], "compile the agent", lines)
    for _file, target in to_compile:
        length = int.from_bytes(packed[:4], "big")
        result[target + "c"] = packed[4 : 4 + length]
        packed = packed[4 + length :]
    return result
