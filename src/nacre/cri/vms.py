"""The VM pods' template and their warm pool: what is made before a pod is known, so that it need not wait for it.

`Vms` has the template made (in a process of its own, `python -m nacre.kata.template`), gives its sealed copy to the zygote, and keeps
[kata] pool shims with a cloned VM each. A pool member is a shim under a sandbox id that is not given yet: its directory STATE/pods/ID is
there, no record has it, so a daemon that comes after a kill takes it away as half made. RunPodSandbox takes the id and the shim together.

The pool refills when no VM pod has been asked for during REFILL_S, and the template is looked at once an hour: an old one is made anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from typing import Any

from nacre.cri import callers
from nacre.cri.pods import Pods, background
from nacre.images import child
from nacre.kata import process, template
from nacre.kata.handler import TEMPLATE
from nacre.kata.template import TemplateBroken
from nacre.oci.errors import Failure, decode
from nacre.wire.cri import progress_of

log = logging.getLogger("nacre.kata")
_SUBJECT = progress_of("handler", "kata")
_FIRST = "building the guest of virtual machines, once on this machine, about a minute"
_ANEW = "looking after the template of virtual machines"
REFILL_S = 1.0
LOOK_AGAIN_S = 3600.0
RETRY_S = 30.0


class VmsInTheMaking(Failure):
    """What virtual machines are made of takes longer than the caller waits."""


class Vms:
    """See the module. `settings` answers what a kata shim is told of the configuration."""

    def __init__(self, pods: Pods, settings: Any) -> None:
        self._pods, self._settings = pods, settings
        self._members: list[str] = []  # sandbox ids, oldest first
        self._template: tuple[str, int, int] | None = None  # path, inode, modification time of what the zygote has
        self._looked_at = 0.0  # when it was last found to be of this kernel, QEMU and nacre, by time.monotonic
        self._preparing: asyncio.Task[None] | None = None
        self._filling = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    def start(self) -> None:
        """Begin, where VM pods have been run or `kata` was enabled; nothing waits for it."""
        if self._is_built():
            self._later(0.0)

    def offered(self) -> bool:
        """Whether this machine can have VMs: the guest is built at first use."""
        return process.find(self._pods.config.kata.qemu) is not None

    def _is_built(self) -> bool:
        return os.path.isdir(f"{self._pods.config.data}/kata/appliance")

    async def stop(self) -> None:
        """Pool members go with the daemon: nobody else could give them a pod."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.gather(self._preparing, return_exceptions=True)
        async with self._filling:
            await self._discard_all()

    async def take(self) -> str:
        """The id of a sandbox whose shim has a warm VM, else a fresh id; the template is there then. Raises why there can be no VM."""
        self._later(REFILL_S)
        if self._replaced():
            self._template = None
            await self._prepared(callers.current().patience_s())
        while self._members:
            member = self._members.pop(0)
            if await self._lives(member):
                return member
            await self._discard(member)
        await self._prepared(callers.current().patience_s())
        return secrets.token_hex(32)

    async def give_back(self, member: str) -> None:
        """It was not used after all."""
        if member in self._pods.connections:
            await self._discard(member)

    # the template

    async def _prepared(self, patience_s: float | None = None) -> None:
        """Every VM pod needs it: made by whoever comes first, the others wait for the same. Raises VmsInTheMaking to who has no patience."""
        if self._template is not None or (self._preparing is None and not self._pods.config.kata.template and self._has_plan()):
            return
        if self._preparing is None or self._preparing.done():
            self._preparing = asyncio.get_running_loop().create_task(self._prepare())
        began = time.monotonic()
        done, _still = await asyncio.wait({self._preparing}, timeout=patience_s)
        if not done:
            raise VmsInTheMaking(
                what="start a virtual machine",
                cause=f"{self._pods.doing.get(_SUBJECT, _ANEW)}; waited for {time.monotonic() - began:.0f} s",
                remedy="none is needed: it goes on, and a later try finds it done; nacre logs kata",
            )
        self._preparing.result()

    def _replaced(self) -> bool:
        """Somebody else, such as `nacre enable kata`, has made another template than the one the zygote has."""
        if self._template is None:
            return False
        path, inode, modified = self._template
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return True
        return (found.st_ino, found.st_mtime_ns) != (inode, modified)

    def _has_plan(self) -> bool:
        return os.path.exists(f"{self._pods.config.data}/kata/plan.json")

    async def _prepare(self) -> None:
        path = await self._make()
        self._looked_at = time.monotonic()
        if path is None:
            return
        found = os.stat(path)
        if self._template == (path, found.st_ino, found.st_mtime_ns):
            return
        sealed = await self._sealed(path)
        found = os.stat(path)
        await self._pods.zygote.adopt(TEMPLATE, sealed)
        self._template = (path, found.st_ino, found.st_mtime_ns)
        async with self._filling:
            await self._discard_all()

    async def _sealed(self, path: str) -> int:
        """The copy for the zygote; a file that is not what was written is made anew, once."""
        try:
            return await asyncio.to_thread(template.open_sealed, path)
        except TemplateBroken as failure:
            log.warning("%s; it is built again", failure)
            os.unlink(path)
            await self._make()
            return await asyncio.to_thread(template.open_sealed, path)

    async def _make(self) -> str | None:
        """Run the maker to its end; its progress into our log, and to who waits. Raises the Failure that it tells."""
        doing = self._pods.doing
        words = doing[_SUBJECT] = _ANEW if self._is_built() else _FIRST

        def say(news: str) -> None:
            log.info("%s", news)
            doing[_SUBJECT] = f"{words}: {news}"

        try:
            what, prefix = "make the template of virtual machines", self._pods.config.prefix
            path: str | None = (await child.made(what, "nacre.kata.template", prefix, progress=say))["path"]
            return path
        finally:
            doing.pop(_SUBJECT, None)

    # the pool

    def _later(self, delay_s: float) -> None:
        """Look after template and pool in so many seconds; a later call starts the wait anew."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._stopped:
            self._timer = asyncio.get_running_loop().call_later(delay_s, lambda: background(self._tend()))

    async def _tend(self) -> None:
        try:
            if self._template is None:
                await self._prepared()
            elif time.monotonic() - self._looked_at >= LOOK_AGAIN_S:
                await self._prepare()
            async with self._filling:
                while len(self._members) < self._pods.config.kata.pool and not self._stopped:
                    self._members.append(await self._member())
                    log.info("a virtual machine is ready for the next pod")
            self._later(LOOK_AGAIN_S)
        except (Failure, OSError) as failure:
            log.warning("virtual machines ahead of their pods: %s; tried again in %.0f s", failure, RETRY_S)
            for line in getattr(failure, "evidence", ()):
                log.warning("  %s", line)
            self._later(RETRY_S)

    async def _member(self) -> str:
        identifier = secrets.token_hex(32)
        directory = self._pods.directory(identifier)
        os.makedirs(directory, mode=0o711)
        try:
            shim = await self._pods.spawn(identifier, "kata")
            await shim.ask("warm", settings=self._settings() | {"directory": directory})
        except BaseException:
            await self._discard(identifier)
            raise
        return identifier

    async def _lives(self, member: str) -> bool:
        connection = self._pods.connections.get(member)
        if connection is None or connection.closed:
            return False
        state, _none = await connection.ask("state")
        if state["lost"]:
            log.warning("a warm virtual machine had ended: %s", decode(state["lost"]))
        return not state["lost"]

    async def _discard_all(self) -> None:
        while self._members:
            await self._discard(self._members.pop())

    async def _discard(self, member: str) -> None:
        connection = self._pods.connections.get(member)
        if connection is not None and not connection.closed:
            try:
                await connection.ask("destroy")
            except Failure as failure:
                log.warning("a warm virtual machine: %s", failure)
        self._pods.forget(member)
