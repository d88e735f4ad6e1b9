"""Leases: one file an address, whole, exclusive, found again."""

from __future__ import annotations

import errno
import ipaddress
import os
import threading
from pathlib import Path

import pytest

from nacre.network.leases import Leases
from nacre.network.types import PortMapping, RangeFull
from nacre.oci.errors import Invalid

SMALL = ipaddress.IPv4Network("10.9.8.0/29")  # 10.9.8.2 to 10.9.8.6


def test_gateway_network_and_broadcast_are_never_leased(tmp_path: Path) -> None:
    leases = Leases(str(tmp_path), SMALL)
    assert [leases.reserve(f"s{n}", "", ()).address for n in range(5)] == [f"10.9.8.{n}" for n in range(2, 7)]


def test_a_full_range_says_who_has_the_addresses(tmp_path: Path) -> None:
    leases = Leases(str(tmp_path), SMALL)
    for number in range(5):
        leases.reserve(f"s{number}", f"default/p{number}", ())
    with pytest.raises(RangeFull) as caught:
        leases.reserve("one too many", "", ())
    assert "all 5 addresses of 10.9.8.0/29" in caught.value.cause
    assert "10.9.8.2 default/p0" in caught.value.evidence
    assert not [name for name in tmp_path.iterdir() if name.name.startswith(".")]


def test_a_full_disk_takes_no_address_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = Leases(str(tmp_path), SMALL)

    def full(_source: str, _target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", full)
        for number in range(5):
            with pytest.raises(OSError, match="No space left"):
                leases.reserve(f"s{number}", "", ())
    assert len({leases.reserve(f"s{number}", "", ()).address for number in range(5)}) == 5


def test_a_freed_address_is_used_again_last(tmp_path: Path) -> None:
    leases = Leases(str(tmp_path), SMALL)
    leases.release(leases.reserve("a", "", ()))
    assert leases.reserve("b", "", ()).address == "10.9.8.3"


def test_another_process_finds_the_leases_with_their_ports(tmp_path: Path) -> None:
    port = PortMapping(container_port=80, host_port=8080, protocol="UDP", host_ip="127.0.0.1")
    Leases(str(tmp_path), SMALL).reserve("a", "default/web", (port,))
    (found,) = Leases(str(tmp_path), SMALL).all()
    assert (found.address, found.sandbox_id, found.title, found.ports) == ("10.9.8.2", "a", "default/web", (port,))


def test_two_processes_never_lease_the_same_address(tmp_path: Path) -> None:
    one, two = Leases(str(tmp_path), SMALL), Leases(str(tmp_path), SMALL)
    assert one.reserve("a", "", ()).address != two.reserve("b", "", ()).address


def test_threads_never_lease_the_same_address(tmp_path: Path) -> None:
    leases = Leases(str(tmp_path), ipaddress.IPv4Network("10.9.0.0/24"))
    threads = [threading.Thread(target=lambda k=k: [leases.reserve(f"{k}-{n}", "", ()) for n in range(20)]) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({lease.address for lease in leases.all()}) == 160


def test_a_torn_file_keeps_its_address_taken_until_it_is_released(tmp_path: Path) -> None:
    (tmp_path / "10.9.8.2").write_text('{"sandbox": "a", "ti')
    leases = Leases(str(tmp_path), SMALL)
    (torn,) = leases.all()
    assert torn.sandbox_id == "" and leases.reserve("b", "", ()).address == "10.9.8.3"
    leases.release(torn)
    assert [lease.sandbox_id for lease in leases.all()] == ["b"]


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".4711").write_text("{")
    Leases(str(tmp_path), SMALL)
    assert not list(tmp_path.iterdir())


def test_ports_are_given_up_before_the_address(tmp_path: Path) -> None:
    leases = Leases(str(tmp_path), SMALL)
    lease = leases.reserve("a", "t", (PortMapping(container_port=80, host_port=8080),))
    assert leases.without_ports(lease).ports == () == Leases(str(tmp_path), SMALL).all()[0].ports


def test_a_range_without_room_is_invalid(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="pod_cidr"):
        Leases(str(tmp_path), ipaddress.IPv4Network("10.9.8.0/31"))


@pytest.mark.parametrize("wrong", [{"protocol": "ICMP"}, {"host_port": 70000}, {"container_port": 0}])
def test_a_port_mapping_that_cannot_be_is_invalid(wrong: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        PortMapping(**{"container_port": 80, "host_port": 80} | wrong)  # type: ignore[arg-type]
