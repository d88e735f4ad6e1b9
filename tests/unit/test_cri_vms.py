"""When the template of virtual machines is looked at: its maker is a process, which a pod must not pay for."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nacre.config import Config, KataConfig
from nacre.cri.vms import LOOK_AGAIN_S, Vms


class Counted(Vms):
    """With a maker that says where the template lies and counts how often it was asked."""

    made = 0

    async def _make(self) -> str | None:
        self.made += 1
        return None


@pytest.fixture
async def vms(tmp_path: Path) -> AsyncIterator[Counted]:
    pods: Any = SimpleNamespace(config=Config(prefix=str(tmp_path), kata=KataConfig(pool=0)), doing={})
    made = Counted(pods, dict)
    yield made
    await made.stop()


async def test_the_template_is_looked_at_when_it_is_old_and_not_after_each_pod(vms: Counted) -> None:
    vms._template = ("/no/matter", 1, 1)
    vms._looked_at = time.monotonic()
    await vms._tend()
    assert vms.made == 0
    vms._looked_at -= LOOK_AGAIN_S
    await vms._tend()
    assert vms.made == 1
    await vms._tend()
    assert vms.made == 1
