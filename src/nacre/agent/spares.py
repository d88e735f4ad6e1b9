"""Containers half made ahead (`runc.spare`) for the pod to come: what most documents of a pod have alike is done before there is a pod.

They are made while the template is, so that a clone has them for nothing; a pool member's rehearsal takes one. When none is left, and for
documents with another stock part, containers are made in the ordinary way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from nacre.agent import boot
from nacre.linux import cgroups
from nacre.oci import stock
from nacre.runc import spare

PLACE = f"{boot.RUN}/spare"
COUNT = 3
_STOCK = spare.Stock(
    mounts=stock.mounts(), masked=list(stock.MASKED), readonly=list(stock.READONLY), devices=stock.device_rules()
)


class Spares:
    """Those that wait, oldest first. `group` answers the cgroup of a name that no container has."""

    def __init__(self, group: Callable[[str], cgroups.Cgroup]) -> None:
        self._group = group
        self._waiting: list[spare.Spare] = []
        self._made = 0

    def fill(self) -> None:
        """Make what is missing; for times in which nobody waits."""
        os.makedirs(PLACE, mode=0o700, exist_ok=True)
        while len(self._waiting) < COUNT:
            self._made += 1
            self._waiting.append(spare.prepare(_STOCK, PLACE, self._group(f"_{self._made}")))

    def __len__(self) -> int:
        return len(self._waiting)

    def rest(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """What is left to do of a document; None when there is no spare for it."""
        return _STOCK.rest(config) if self._waiting else None

    def take(self) -> spare.Spare:
        return self._waiting.pop(0)

    def ended(self, pid: int) -> bool:
        """Whether the process that was reaped was one that waited: it is none any more."""
        for one in self._waiting:
            if one.pid == pid:
                self._waiting.remove(one)
                one.forget()
                return True
        return False
