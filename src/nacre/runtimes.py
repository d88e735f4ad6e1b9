"""Where the command `nacre-runc` begins: a process that will enter a container first gets itself out of the container's reach."""

from __future__ import annotations

import gc
import os
import sys

from nacre import loading

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from typing import NoReturn

_ENTERS = frozenset({"create", "run", "exec"})
_STATEMENT = "from nacre.runtimes import runc; runc()"


def runc() -> NoReturn:
    """The command, from its first line to its exit status."""
    gc.disable()  # a command is short: looking for garbage while modules load was a tenth of it
    loading.shorten()
    if _ENTERS & set(sys.argv[1:]):  # a word too many costs a few milliseconds, a word missed the host's interpreter
        from nacre.linux.interpreter import execute_out_of_reach

        execute_out_of_reach(_STATEMENT, sys.argv[1:])
    from nacre.runc.main import main

    _leave(main())


def _leave(status: int) -> NoReturn:
    """End without taking everything loaded to pieces first, which is the kernel's to do and another tenth."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:
            status = status or 1
        except OSError as error:  # a full disk: an answer that did not arrive is no success
            status = status or 1
            if stream is not sys.stderr:
                os.write(2, f"nacre-runc: write the answer: {error.strerror}\n".encode())
    os._exit(status)
