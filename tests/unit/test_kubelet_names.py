"""What a pod is called, whom it asks for names, and what is left of its grace."""

from __future__ import annotations

from typing import Any

import pytest

from nacre.kubelet import names
from nacre.kubelet.ending import grace_left_s
from nacre.kubelet.times import stamp
from nacre.network.resolvers import Resolvers


def pod(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "web-0", "namespace": "shop"}, "spec": spec}


def test_a_domain_needs_a_subdomain_and_the_kernel_learns_it_only_when_asked() -> None:
    assert names.full_name(pod(hostname="web")) == "" and names.kernel_name(pod(hostname="web", setHostnameAsFQDN=True)) == "web"
    placed = pod(hostname="web", subdomain="team")
    assert names.full_name(placed) == "web.team.shop.svc.cluster.local" and names.kernel_name(placed) == "web"
    assert names.kernel_name(pod(subdomain="team", setHostnameAsFQDN=True)) == "web-0.team.shop.svc.cluster.local"
    assert names.kernel_name(pod(hostNetwork=True, hostname="web")) == ""


def test_a_long_name_is_cut_to_what_a_host_may_be_called() -> None:
    assert names.host_name({"metadata": {"name": "a" * 62 + "-b"}, "spec": {}}) == "a" * 62


def test_the_hosts_file_of_the_host_is_only_written_anew_for_aliases() -> None:
    aliases = {"hostAliases": [{"ip": "10.0.0.9", "hostnames": ["db", "cache"]}]}
    assert names.hosts(pod(hostNetwork=True), ["10.0.0.1"], "127.0.0.1 me\n") == ""
    shared = names.hosts(pod(hostNetwork=True, **aliases), ["10.0.0.1"], "127.0.0.1 me\n").splitlines()
    assert shared[1:] == ["127.0.0.1 me", "10.0.0.9\tdb\tcache"]
    own = names.hosts(pod(subdomain="team", **aliases), ["10.0.0.1", "fd00::1"], "127.0.0.1 me\n").splitlines()
    assert own[3:] == [f"{ip}\tweb-0.team.shop.svc.cluster.local\tweb-0" for ip in ("10.0.0.1", "fd00::1")] + [shared[-1]]


def test_resolvers_asked_for_come_after_the_hosts_and_options_replace_those_of_their_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = Resolvers(path="x", nameservers=("10.0.0.53",), search=("lan",), options=("ndots:1", "rotate"))
    monkeypatch.setattr("nacre.network.resolvers.find", lambda: host)
    asked = {
        "nameservers": ["192.0.2.1", "10.0.0.53"],
        "searches": ["corp"],
        "options": [{"name": "ndots", "value": "5"}, {"name": "x"}],
    }
    merged = names.resolvers({"dnsPolicy": "ClusterFirst", "dnsConfig": asked})
    assert list(merged.servers) == ["10.0.0.53", "192.0.2.1"] and list(merged.searches) == ["lan", "corp"]
    assert list(merged.options) == ["ndots:5", "rotate", "x"]
    alone = names.resolvers({"dnsPolicy": "None", "dnsConfig": asked})
    assert list(alone.servers) == ["192.0.2.1", "10.0.0.53"] and list(alone.searches) == ["corp"]
    assert names.resolvers({"dnsPolicy": "Default"}) is None


@pytest.mark.parametrize(("since_s", "left"), [(0, 30), (0.9, 30), (10, 20), (29.5, 1), (31, 0), (-60, 30)])
def test_of_a_grace_there_is_never_more_than_what_is_left(since_s: float, left: int) -> None:
    asked = 1_700_000_000.0
    marks = {"deletionTimestamp": stamp(asked + 30), "deletionGracePeriodSeconds": 30}
    assert grace_left_s(marks, asked + since_s) == left
