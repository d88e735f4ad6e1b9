"""Run by the guest's interpreter, alone: `python3 -ISB appliance_collect.py SRC MODULE…` prints what importing the modules loads.

The answer is JSON: {"interpreter", "library" (the directory of the standard library), "version", "modules": {name: file}, "prepared" (the
table of `nacre.agent.prepared`, marshalled, hexadecimal)}. SRC is the directory that holds the package nacre.
"""

from __future__ import annotations

import importlib
import json
import marshal
import os
import sys


def main() -> None:
    source, *names = sys.argv[1:]
    library = os.path.dirname(os.__file__)
    sys.path.append(source)
    prepared = importlib.import_module("nacre.agent.prepared")
    table = prepared.record()
    for name in names:
        importlib.import_module(name)
    found = {
        name: module.__file__
        for name, module in sorted(sys.modules.items())
        if name != "__main__" and getattr(module, "__file__", None)
    }
    answer = {
        "interpreter": os.path.realpath(sys.executable),
        "library": library,
        "version": sys.version,
        "modules": found,
        "prepared": marshal.dumps(table).hex(),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
