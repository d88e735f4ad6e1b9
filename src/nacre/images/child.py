"""The daemon's side of the processes that do long work for it: makers, the unpacker's conversation, and one-shot tools with their stderr."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from nacre.images.places import Places, StoreLock
from nacre.oci.errors import EVIDENCE_LINES, Failure, decode


def environment() -> dict[str, str]:
    """What a child of ours gets of the environment: nothing that a proxy, a locale or a plugin hangs on."""
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH") if key in os.environ}
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", **kept}


def python(module: str, *arguments: str) -> list[str]:
    """The command line that runs one of our modules in this very interpreter."""
    return [sys.executable, "-P", "-m", module, *arguments]


def last_lines(data: bytes) -> tuple[str, ...]:
    return tuple(data.decode("utf-8", "replace").splitlines()[-EVIDENCE_LINES:])


async def made(what: str, module: str, *arguments: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Have one of our modules make something that takes long, in a process of its own that ends with ours (its last argument is our pid).

    It says one JSON object a line: {"progress"} for `progress`, and at the end a {"failure"}, which is raised, or what it answers.
    Cancelled, it is killed and reaped. Its environment is ours, as it may need a proxy.
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *python(module, *arguments, str(os.getpid())), stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        async for line in process.stdout:
            said: dict[str, Any] = json.loads(line)
            if "failure" in said:
                raise decode(said["failure"])
            if "progress" not in said:
                return said
            progress(said["progress"])
        raise Failure(what=what, cause="its maker ended without a word", evidence=last_lines(await process.stderr.read()))
    except asyncio.CancelledError:
        if process.returncode is None:
            process.kill()
        raise
    finally:
        await process.wait()


class Unpacker:
    """One unpacking child, started at the first layer; use as an async context manager, within the store's shared lock."""

    def __init__(self, places: Places, lock: StoreLock) -> None:
        self._places = places
        self._lock = lock
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Unpacker:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.communicate()  # reaps it and closes its pipes

    async def unpack(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answers layer.json's content. Raises the child's Failure, or one that says how the child ended."""
        process = self._process or await self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
        except (BrokenPipeError, ConnectionResetError):
            line = b""
        if not line.endswith(b"\n"):
            raise await self._ended(f"unpack layer {request['diff_id']}")
        answer = json.loads(line)
        if "failure" in answer:
            raise decode(answer["failure"])
        document: dict[str, Any] = answer["ok"]
        return document

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *python("nacre.images.unpacker", self._places.images, str(os.getpid())),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=environment(),
            pass_fds=(self._lock.fd,),
            limit=1 << 20,
        )
        return self._process

    async def _ended(self, what: str) -> Failure:
        process, self._process = self._process, None
        assert process is not None
        _, err = await process.communicate()
        code = process.returncode or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Failure(what=what, cause=f"the unpacking process ended with {how}", evidence=last_lines(err))


async def run(command: list[str]) -> tuple[int, bytes]:
    """Run a one-shot child to its end; (exit code, stderr). Cancelled, it is killed and reaped. Raises FileNotFoundError."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=environment(),
    )
    try:
        _, err = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, err
