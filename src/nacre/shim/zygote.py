"""The zygote: executed by the daemon before it has a thread, imports what a shim needs, forks shims.

Single-threaded, blocking on one SOCK_SEQPACKET to its daemon (descriptor 3). It ends when that socket closes; its shims live on. It
holds no keys: the only things it keeps for its children are descriptors that the daemon gave it by name (`adopt`).
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from typing import Any

from nacre.oci.errors import encode, from_exception
from nacre.shim import messages
from nacre.shim.runc_handler import host_layout
from nacre.shim.shared import Shim

CHANNEL = 3


def main() -> None:
    """Serve until the daemon is gone."""
    daemon = socket.socket(fileno=CHANNEL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C is the daemon's business
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # shims are nobody's children: the kernel reaps those that die before us
    _prime()
    inherited: dict[str, int] = {}
    messages.send(daemon, {"event": "ready", "pid": os.getpid()})
    while True:
        request, descriptors = messages.receive(daemon)
        if request is None:
            return
        try:
            result = _serve(request, descriptors, inherited, daemon)
            messages.send(daemon, {"id": request["id"], "result": result})
        except Exception as error:  # whatever it was, it is the caller's, and the zygote serves on
            messages.send(daemon, {"id": request.get("id"), "failure": encode(from_exception("serve the daemon", error))})


def _prime() -> None:
    """What a fork must not do for the first time, then everything out of the collector's sight."""
    host_layout()
    gc.collect()
    gc.freeze()


def _serve(request: dict[str, Any], descriptors: list[int], inherited: dict[str, int], daemon: socket.socket) -> dict[str, Any]:
    if request["op"] == "adopt":
        former = inherited.pop(request["name"], None)
        if former is not None:
            os.close(former)
        if descriptors:
            inherited[request["name"]] = descriptors[0]
        return {}
    if request["op"] == "spawn":
        (listener,) = descriptors
        pid = os.fork()
        if pid == 0:
            daemon.close()
            _become_shim(request, listener, inherited)
        os.close(listener)
        return {"pid": pid}
    raise ValueError(f"the zygote knows no {request['op']}")


def _become_shim(request: dict[str, Any], listener: int, inherited: dict[str, int]) -> None:
    """Never returns."""
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        void = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(void, 0)
        os.close(void)
        shim = Shim(inherited)
        shim.hold(request["directory"], request["handler"], socket.socket(fileno=listener))
        shim.run()
        os._exit(0)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
