"""`python -m nacre.cli.codes [PAGE]`: every failure code of this version with its meaning; with PAGE (docs/errors.md) into its table."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
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


def table() -> str:
    rows = [f"| {code} | {package} | {meaning} |" for code, package, meaning in codes()]
    return "\n".join(("| code | from | when |", "|-|-|-|", *rows)) + "\n"


def main() -> None:
    if len(sys.argv) == 1:
        print(table(), end="")
        return
    with open(sys.argv[1]) as file:
        page = file.read()
    head, heading, rest = page.partition("## Codes\n")
    said = "".join(line for line in rest.partition("\n## ")[0].splitlines(keepends=True) if not line.startswith("|"))
    tail = rest[rest.index("\n## ") :]
    with open(sys.argv[1], "w") as file:
        file.write(f"{head}{heading}{said.rstrip()}\n\n{table()}{tail}")


if __name__ == "__main__":
    main()
