"""Dataclasses without the compiler: their methods' code comes from a table that was made when the appliance was built.

`dataclasses` writes each method as text and has it compiled, and loads `inspect` (with the whole of the syntax tree) to write signatures
into missing docstrings. Emulated, that is half of the time that Python needs to become an agent. `record` collects texts and code while the
modules are loaded on the build machine, `install` gives the same code for the same text in the guest; a text that is not in the
table is compiled as ever. Comes before the first import of `dataclasses`.
"""

import builtins
import marshal
import sys
from types import CodeType, ModuleType
from typing import Any

TABLE = "/lib/nacre/prepared"


def record() -> dict[str, CodeType]:
    """From now on every text that `dataclasses` has compiled, with its code."""
    table: dict[str, CodeType] = {}

    def execute(text: str, *namespaces: Any) -> None:
        table[text] = compile(text, "<dataclass>", "exec", dont_inherit=True, optimize=2)
        builtins.exec(table[text], *namespaces)

    _take_over(execute)
    return table


def install(path: str = TABLE) -> None:
    """Use the table at `path` from now on."""
    with open(path, "rb") as file:
        table: dict[str, CodeType] = marshal.load(file)

    def execute(text: str, *namespaces: Any) -> None:
        builtins.exec(table.get(text, text), *namespaces)

    _take_over(execute)


def remove() -> None:
    """Back to the compiler; the table may go."""
    del vars(sys.modules["dataclasses"])["exec"]


def _take_over(execute: Any) -> None:
    if "inspect" not in sys.modules:
        stand_in: Any = ModuleType("inspect", "The little of inspect that dataclasses asks for.")
        stand_in.signature = lambda _class: ""
        stand_in.get_annotations = lambda owner: vars(owner).get("__annotations__", {})
        sys.modules["inspect"] = stand_in
    import dataclasses

    vars(dataclasses)["exec"] = execute  # a name of the module hides the builtin of that name
