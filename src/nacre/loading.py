"""Our modules from their .pyc files by the shortest way, for a command that loads forty and lasts as long as that takes.

The import system lists every directory, opens files as Python objects and asks each path of `sys.path`: a seventh of what a `create` loads.
Only the plain case is taken here: a .pyc that has the time and the size of its source. Whatever else there is (never compiled, changed since,
`-O`, PYTHONPYCACHEPREFIX) goes to the import system, which writes the .pyc for the next command.
"""

from __future__ import annotations

import os
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import MAGIC_NUMBER
from marshal import loads

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import Any

_BY_TIME = MAGIC_NUMBER + bytes(4)  # PEP 552: the other kinds of .pyc are known by a hash
_HEAD = len(_BY_TIME) + 8


class Compiled:
    """Finder and loader of what is in `package`, whose directory is in `place`."""

    def __init__(self, package: str, place: str) -> None:
        self._prefix, self._place = f"{package}.", place
        self._suffix = f".{sys.implementation.cache_tag}.pyc"

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(self._prefix):
            return None
        base = f"{self._place}/{name.replace('.', '/')}"
        return self._spec(name, base) or self._spec(name, f"{base}/__init__", package=True)

    def _spec(self, name: str, base: str, *, package: bool = False) -> ModuleSpec | None:
        directory, _, word = base.rpartition("/")
        source, compiled = f"{base}.py", f"{directory}/__pycache__/{word}{self._suffix}"
        try:
            of_source = os.stat(source)
            content = _read(compiled)
        except OSError:
            return None
        stamp = (int(of_source.st_mtime) & 0xFFFFFFFF).to_bytes(4, "little") + (of_source.st_size & 0xFFFFFFFF).to_bytes(
            4, "little"
        )
        if content[:_HEAD] != _BY_TIME + stamp:
            return None
        code = loads(memoryview(content)[_HEAD:])
        loader: Any = self  # the stubs want a class of importlib.abc, which takes longer to load than all of this
        spec = ModuleSpec(name, loader, origin=source, loader_state=code, is_package=package)
        spec.has_location, spec.cached = True, compiled
        if package:
            spec.submodule_search_locations = [directory]
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """The import system's own kind of module will do."""

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        code, spec.loader_state = spec.loader_state, None
        exec(code, module.__dict__)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def shorten() -> None:
    """From now on, in this process."""
    if not sys.flags.optimize and sys.pycache_prefix is None:
        package, _, _ = __name__.partition(".")
        sys.meta_path.insert(0, Compiled(package, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
