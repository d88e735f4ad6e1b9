"""A port or a range that is in use is named with its holder."""

from __future__ import annotations

import os
import socket
from dataclasses import replace

import pytest

from nacre import config
from nacre.cli import taken


def test_a_listening_port_is_found_with_its_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        holder = taken.port("127.0.0.1", server.getsockname()[1])
        assert holder is not None
        assert f"pid {os.getpid()} (" in holder.who


def test_a_server_on_every_address_holds_the_port_of_each() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        assert taken.port("127.0.0.1", server.getsockname()[1]) is not None


def test_a_free_port_has_no_holder() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    assert taken.port("127.0.0.1", number) is None


def test_starting_on_a_taken_port_names_setting_holder_and_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = replace(config.load(""), api_port=server.getsockname()[1], kubelet_port=0, pod_cidr="auto")
        with pytest.raises(taken.Taken) as caught:
            taken.require_free(settings)
    assert "api_port" in caught.value.cause
    assert f"pid {os.getpid()}" in caught.value.cause
    assert "config.toml" in caught.value.remedy
