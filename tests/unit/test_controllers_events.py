"""Events and when they have had their time."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from nacre.api.kind import DNS_SUBDOMAIN
from nacre.controllers.collector import _last_seen
from nacre.controllers.events import Recorder
from nacre.wire.kube import Kube

MADE = "2026-01-01T12:00:00Z"


class Server(Kube):
    """The wire's far end: keeps what is created."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []

    async def create(self, path: str, body: Any, **params: Any) -> dict[str, Any]:
        self.created.append(body)
        return dict(body)


async def test_an_event_of_the_longest_name_has_a_name_that_the_server_takes() -> None:
    server = Server()
    recorder = Recorder(server, "test")
    for name in ("x" * 253, "x" * 235 + "." + "y" * 17, "x" * 235 + "-" + "y" * 17, "web"):
        recorder.record({"metadata": {"name": name, "namespace": "default"}}, "Normal", "Scheduled", name)
    await recorder.close()
    names = [event["metadata"]["name"] for event in server.created]
    assert len(names) == 4 and all(len(name) <= 253 and DNS_SUBDOMAIN.fullmatch(name) for name in names), names
    assert re.fullmatch(r"web\.[0-9a-f]+", names[-1])


def test_an_events_life_begins_with_its_last_write_whatever_it_tells_of() -> None:
    told = {"metadata": {"creationTimestamp": MADE}, "lastTimestamp": "0001-01-01T00:00:00Z"}
    assert _last_seen(told) == datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert _last_seen(told | {"lastTimestamp": "2026-01-01T13:00:00Z"}) == datetime(2026, 1, 1, 13, tzinfo=UTC)
