"""`python -m nacre.cli.codes`: every failure code of this version with its meaning, as the table in docs/errors.md has it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import nacre
from nacre.oci.errors import Failure


def codes() -> Iterator[tuple[str, str, str]]:
    """(code, package, meaning) of every failure, by code; imports every module that can be imported without side effects."""
    for module in pkgutil.walk_packages(nacre.__path__, "nacre."):
        if not module.name.endswith(("__main__", ".extract")):
            importlib.import_module(module.name)
    for kind in sorted(_descendants(Failure), key=lambda kind: kind.code):
        yield kind.code, kind.__module__.split(".")[1], (inspect.getdoc(kind) or "").split("\n")[0]


def _descendants(kind: type[Failure]) -> set[type[Failure]]:
    below = set(kind.__subclasses__())
    return below.union(*map(_descendants, below))


def main() -> None:
    print("| code | from | when |\n|-|-|-|")
    for code, package, meaning in codes():
        print(f"| {code} | {package} | {meaning} |")


if __name__ == "__main__":
    main()
