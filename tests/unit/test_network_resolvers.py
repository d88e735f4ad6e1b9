"""Which resolvers pods are given."""

from __future__ import annotations

from pathlib import Path

from nacre.config import Config
from nacre.network import resolvers


def put(root: Path, path: str, text: str) -> None:
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_real_resolvers_are_passed_on_with_search_and_options(tmp_path: Path) -> None:
    put(
        tmp_path,
        "/etc/resolv.conf",
        "# home\nsearch old.example\nsearch a.example b.example\nnameserver 192.0.2.53\noptions ndots:2\n",
    )
    assert resolvers.find(str(tmp_path)).lines() == ["nameserver 192.0.2.53", "search a.example b.example", "options ndots:2"]


def test_a_loopback_resolver_is_replaced_by_its_upstream_file(tmp_path: Path) -> None:
    put(tmp_path, "/etc/resolv.conf", "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch lan\n")
    put(tmp_path, "/run/systemd/resolve/resolv.conf", "nameserver 192.0.2.1\nnameserver fe80::1%eth0\nsearch other\n")
    assert resolvers.find(str(tmp_path)).lines() == ["nameserver 192.0.2.1", "search lan"]


def test_networkmanagers_file_is_taken_when_resolved_has_none(tmp_path: Path) -> None:
    put(tmp_path, "/etc/resolv.conf", "nameserver ::1\n")
    put(tmp_path, "/run/systemd/resolve/resolv.conf", "nameserver 127.0.0.1\n")
    put(tmp_path, "/run/NetworkManager/no-stub-resolv.conf", "nameserver 198.51.100.7\n")
    assert resolvers.find(str(tmp_path)).lines() == ["nameserver 198.51.100.7"]


def test_a_loopback_beside_a_real_one_is_left_out_and_ipv4_comes_first(tmp_path: Path) -> None:
    put(tmp_path, "/etc/resolv.conf", "nameserver 127.0.0.1\nnameserver 2001:db8::53\nnameserver 192.0.2.9\n")
    assert resolvers.find(str(tmp_path)).lines() == ["nameserver 192.0.2.9", "nameserver 2001:db8::53"]


def test_no_more_than_three_are_given(tmp_path: Path) -> None:
    put(tmp_path, "/etc/resolv.conf", "".join(f"nameserver 192.0.2.{n}\n" for n in range(1, 6)))
    assert len(resolvers.find(str(tmp_path)).lines()) == 3


def test_without_a_usable_resolver_there_is_none_and_a_finding_says_why(tmp_path: Path) -> None:
    put(tmp_path, "/etc/resolv.conf", "nameserver 127.0.0.53\nnameserver rubbish\n")
    assert not any("nameserver" in line for line in resolvers.find(str(tmp_path)).lines())
    found = resolvers.finding(Config(), str(tmp_path))
    assert found and "127.0.0.53" in found["what"] and found["remedy"]


def test_without_any_file_there_is_a_finding_too(tmp_path: Path) -> None:
    assert resolvers.find(str(tmp_path)).lines() == []
    assert resolvers.finding(Config(), str(tmp_path)) is not None
