"""`nacre-runc`: the OCI runtimes' common command line, for engines that drive a runtime binary (podman, containerd, conmon).

Exit status: 0; 1 for a failure; 255 for one of `exec` before its program runs; else the program's own (128+N for signal N).
A failure is told on stderr and in `--log`, as text or JSON lines of the shape that engines read (level, msg, time).
"""

from __future__ import annotations

import os
import sys

from nacre import __version__
from nacre.oci.errors import Failure, Invalid, from_exception
from nacre.runc import options as words_of
from nacre.runc.call import Call, debug, log

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

_STARTING = frozenset({"create", "run", "exec", "restore"})
_USAGE = (
    "usage: nacre-runc [--root DIR] [--log FILE] [--log-format text|json] [--systemd-cgroup] COMMAND [OPTIONS] ID …\ncommands: "
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The whole command; the console script's entry point. Never raises."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    shared: dict[str, Any] = {}
    command = ""
    try:
        shared, plain = words_of.parse(line, words_of.GLOBAL)
        if shared.get("version"):
            from nacre.oci.spec import VERSION

            print(f"nacre-runc version {__version__}\nspec: {VERSION}")
            return 0
        if shared.get("help") or not plain or plain[0] == "help":
            print(_USAGE + " ".join(sorted(words_of.COMMANDS)))
            return 0 if plain or shared else 1
        command = plain[0]
        _check_log(shared)
        if command not in words_of.COMMANDS:
            raise Invalid(what=f"run nacre-runc {command}", cause="there is no such command", remedy="nacre-runc help")
        if command in ("create", "run", "exec"):
            from nacre.linux.interpreter import execute_out_of_reach

            execute_out_of_reach("from nacre.runc.main import main; sys.exit(main())", line)
        chosen, rest = words_of.parse(plain[1:], {**words_of.COMMANDS[command], **words_of.HELP}, command)
        if chosen.get("help"):
            print(words_of.usage(command))
            return 0
        debug(shared, f"nacre-runc {__version__} is asked to {' '.join(plain)}")
        status = _handler(command)(Call(shared, chosen, rest))
        debug(shared, f"{command} ends with {status}")
        return status
    except BrokenPipeError:
        return 1
    except (Failure, OSError) as error:
        failure = from_exception(f"nacre-runc {command}".strip(), error)
        log(shared, "error", failure.sentence(), failure.evidence)
        print(f"nacre-runc: {failure.sentence()}", *failure.evidence, sep="\n  ", file=sys.stderr)
        return 255 if command == "exec" else 1


def _check_log(shared: dict[str, Any]) -> None:
    """An engine must not find out that nothing is told when something goes wrong."""
    if (written := shared.get("log-format", "text")) not in ("text", "json"):
        raise Invalid(what="read the options", cause=f"--log-format is {written!r}, neither text nor json")
    if path := shared.get("log"):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644))
        except OSError as error:
            del shared["log"]
            raise Invalid(what="open the log", cause=f"{path}: {error.strerror}", remedy="name a file for --log") from error


def _handler(command: str) -> Callable[[Call], int]:
    """Only what the command needs is loaded."""
    if command in _STARTING:
        from nacre.runc.launching import HANDLERS
    else:
        from nacre.runc.tending import HANDLERS
    return HANDLERS[command]


if __name__ == "__main__":
    sys.exit(main())
