"""What daemon, zygote and shims say to one another: one JSON object a SOCK_SEQPACKET record, descriptors beside it.

A request is {"id": N, "op": NAME, …}, its answer {"id": N, "result": …} or {"id": N, "failure": encode(…)}; a shim also says
{"event": NAME, …} unasked. VERSION stands in shim.json: a newer daemon knows by it what an older shim speaks, and a shim that it cannot
read is named, not guessed at. Both ends run as root on one host; a record is still bounded and checked to be an object.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

VERSION = 1
LIMIT = 160 * 1024  # bytes of one record: below the default socket buffer
DESCRIPTORS = 8


def send(sock: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """One record. The descriptors stay the caller's. Raises OSError (EAGAIN on a full non-blocking socket), ValueError if too large."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > LIMIT:
        raise ValueError(f"a message of {len(data)} bytes is over the limit of {LIMIT}")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    sock.sendmsg([data], rights)


def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next record and its descriptors (close-on-exec, the caller's); None when the other end is gone."""
    data, ancillary, flags, _address = sock.recvmsg(LIMIT + 1, socket.CMSG_SPACE(DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
            descriptors += received
    if not data:
        close(descriptors)
        return None, []
    try:
        message = json.loads(data)
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or not isinstance(message, dict):
            raise ValueError("a record was cut short or is no object")
    except ValueError:
        close(descriptors)
        raise
    return message, descriptors


def close(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)
