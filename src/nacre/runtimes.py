"""Where the command `nacre-runc` begins: a process that will enter a container first gets itself out of the container's reach."""

from __future__ import annotations

import sys

_ENTERS = frozenset({"create", "run", "exec"})
_STATEMENT = "from nacre.runc.main import main; sys.exit(main())"


def runc() -> int:
    """The console script's entry point."""
    if _ENTERS & set(sys.argv[1:]):  # a word too many costs a few milliseconds, a word missed the host's interpreter
        from nacre.linux.interpreter import execute_out_of_reach

        execute_out_of_reach(_STATEMENT, sys.argv[1:])
    from nacre.runc.main import main

    return main()
