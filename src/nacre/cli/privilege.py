"""Root or a sentence."""

from __future__ import annotations

import os
import shlex
import sys

from nacre.oci.errors import Failure


class NotRoot(Failure):
    """The command touches the host and was started by an ordinary user."""


def require_root(what: str) -> None:
    if os.geteuid() != 0:
        line = shlex.join(["sudo", os.path.abspath(sys.argv[0]), *sys.argv[1:]])
        raise NotRoot(what=what, cause=f"user id {os.geteuid()} is not root", remedy=line)
