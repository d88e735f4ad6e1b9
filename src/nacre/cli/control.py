"""Commands to a running node: one JSON object a line over STATE/node.sock (mode 0600), one request a connection.

A request is `{"op": NAME, …}`. The daemon answers with any number of `{"progress": SENTENCE}` lines, then one line that ends it:
`{"result": {…}}` or `{"failure": oci.errors.encode(…)}`. A connection that closes before that means the daemon died.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from nacre.config import Config
from nacre.oci.errors import Failure, decode, encode, from_exception

LINE_LIMIT = 1 << 20
Progress = Callable[[str], None]
Operation = Callable[[dict[str, Any], Progress], Awaitable[dict[str, Any]]]
log = logging.getLogger("nacre.node")


class NodeDown(Failure):
    """No daemon answers on the node's control socket."""


def path(config: Config) -> str:
    return f"{config.state}/node.sock"


def ask(config: Config, op: str, *, progress: Progress = print, timeout_s: float | None = None, **request: Any) -> dict[str, Any]:
    """Send one request and answer its result. Raises NodeDown, or the Failure that the daemon sent."""
    what = f"ask the node to {op}" if op != "status" else "ask the node for its status"
    for message in _exchange(config, {"op": op} | request, what, timeout_s):
        if "progress" in message:
            progress(str(message["progress"]))
        elif "failure" in message:
            raise decode(message["failure"])
        else:
            result: dict[str, Any] = message.get("result", {})
            return result
    raise NodeDown(what=what, cause=f"the daemon closed {path(config)} without an answer", remedy="nacre logs node")


def running(config: Config) -> dict[str, Any] | None:
    """The node's status, None when no daemon listens."""
    try:
        return ask(config, "status", timeout_s=10)
    except NodeDown:
        return None


def _exchange(config: Config, request: dict[str, Any], what: str, timeout_s: float | None) -> Iterator[dict[str, Any]]:
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(timeout_s)
        try:
            # a long prefix does not fit sun_path (108 bytes), its descriptor's name does
            directory = os.open(config.state, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                link.connect(f"/proc/self/fd/{directory}/node.sock")
            finally:
                os.close(directory)
            link.sendall(json.dumps(request).encode() + b"\n")
            with link.makefile("rb") as lines:
                for line in lines:
                    yield json.loads(line)
        except PermissionError as error:
            raise Failure(what=what, cause=f"{path(config)}: permission denied", remedy="run it as root (sudo)") from error
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NodeDown(what=what, cause=f"no daemon listens on {path(config)}", remedy="nacre up") from error
        except TimeoutError as error:
            raise NodeDown(
                what=what, cause=f"no answer on {path(config)} within {timeout_s:.0f} s", remedy="nacre logs node"
            ) from error
        except OSError as error:
            raise from_exception(what, error) from error


async def serve(config: Config, operations: dict[str, Operation]) -> asyncio.Server:
    """Listen; `operations` are the requests understood. The socket of a dead daemon is replaced (the caller holds the node's lock)."""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def send(message: dict[str, Any]) -> None:
            writer.write(json.dumps(message, default=str).encode() + b"\n")

        try:
            request = json.loads(await reader.readline() or b"{}")
            send(await _operate(operations, request, lambda text: send({"progress": text})))
            await writer.drain()
        except (ConnectionError, ValueError) as error:
            log.info("control connection ended: %s", error)
        finally:
            writer.close()

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    directory = os.open(config.state, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    name = f"/proc/self/fd/{directory}/node.sock"
    try:
        if os.path.lexists(name):
            os.unlink(name)
        mask = os.umask(0o177)
        try:
            listener.bind(name)
        finally:
            os.umask(mask)
    finally:
        os.close(directory)
    return await asyncio.start_unix_server(client, sock=listener, limit=LINE_LIMIT)


async def _operate(operations: dict[str, Operation], request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    op = str(request.get("op", ""))
    if op not in operations:
        return {"failure": encode(Failure(what=f"node operation {op!r}", cause=f"known are {', '.join(sorted(operations))}"))}
    try:
        return {"result": await operations[op](request, progress)}
    except Exception as error:  # the boundary of the daemon: whatever it was, the caller reads it
        if not isinstance(error, Failure):
            log.exception("operation %s", op)
        return {"failure": encode(from_exception(f"node operation {op}", error))}
