"""Where the command `nacre-runc` begins: a process that will enter a container first gets itself out of the container's reach."""

from __future__ import annotations

import gc
import sys

_ENTERS = frozenset({"create", "run", "exec"})
_STATEMENT = "import gc; gc.disable(); from nacre.runc.main import main; sys.exit(main())"


def runc() -> int:
    """The console script's entry point."""
    gc.disable()  # a command is short: looking for garbage while modules load was a tenth of it
    if _ENTERS & set(sys.argv[1:]):  # a word too many costs a few milliseconds, a word missed the host's interpreter
        from nacre.linux.interpreter import execute_out_of_reach

        execute_out_of_reach(_STATEMENT, sys.argv[1:])
    from nacre.runc.main import main

    return main()
