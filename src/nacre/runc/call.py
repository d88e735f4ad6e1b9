"""One invocation of `nacre-runc`: its options and words, and where it tells what it has to say."""

from __future__ import annotations

import os
import sys
import time

from nacre import runc
from nacre.oci import state as store
from nacre.oci.errors import Invalid
from nacre.oci.jsontext import dumps

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Options = Mapping[str, Any]

DEFAULT_ROOT = "/run/nacre/runc"


def log(shared: Options, level: str, message: str, evidence: Sequence[str] = ()) -> None:
    """One line to --log; a log that cannot be written must not hide the failure itself."""
    if not shared.get("log"):
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = "\n".join([message, *evidence])
    if shared.get("log-format") == "json":
        line = dumps({"level": level, "msg": text, "time": now})
    else:
        line = f'time="{now}" level={level} msg={dumps(text)}'
    try:
        with open(shared["log"], "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        print(f"nacre-runc: {shared['log']}: {error.strerror}", file=sys.stderr)


def debug(shared: Options, message: str) -> None:
    """--debug: what the runtime does, to the log or to stderr."""
    if shared.get("debug"):
        if shared.get("log"):
            log(shared, "debug", message)
        else:
            print(f"nacre-runc: debug: {message}", file=sys.stderr)


class Call:
    """One invocation: the shared options, the command's own, the plain words."""

    def __init__(self, shared: Options, chosen: Options, plain: Sequence[str]) -> None:
        self.shared, self.options, self.plain = shared, chosen, list(plain)
        self.root = os.path.abspath(shared.get("root") or DEFAULT_ROOT)

    @property
    def id(self) -> str:
        if not self.plain:
            raise Invalid(what="read the command line", cause="the container's id is missing")
        return self.plain[0]

    def warn(self, words: str) -> None:
        """To the log, or where there is none to stderr: nothing is lost."""
        if self.shared.get("log"):
            log(self.shared, "warning", words)
        else:
            print(f"nacre-runc: warning: {words}", file=sys.stderr)

    def warn_all(self, launch: runc.Launch) -> None:
        """And which process it became, for who debugs."""
        debug(self.shared, f"process {launch.pid} is set up")
        for words in launch.warnings:
            self.warn(words)

    def ids(self) -> list[str]:
        """The ids meant: one, or with --regex all that match."""
        if not self.options.get("regex"):
            return [self.id]
        import re

        try:
            pattern = re.compile(self.id)
        except re.error as error:
            raise Invalid(what="read the command line", cause=f"{self.id!r} is no regular expression: {error}") from error
        return [identifier for identifier in store.identifiers(self.root) if pattern.search(identifier)]
