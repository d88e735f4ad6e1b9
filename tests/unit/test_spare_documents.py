"""Which documents a container made ahead is one for, and what of them is left to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from nacre.oci import stock
from nacre.runc import spare

STOCK = spare.Stock(mounts=stock.mounts(), masked=list(stock.MASKED), readonly=list(stock.READONLY), devices=stock.device_rules())
Change = Callable[[dict[str, Any]], object]


def bind(destination: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": "/source", "options": ["rbind", *options]}


def document() -> dict[str, Any]:
    return {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {"args": ["/bin/true"], "cwd": "/"},
        "mounts": [*stock.mounts(), bind("/dev/shm"), bind("/dev/termination-log"), bind("/etc/hosts", "ro")],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("mount", "pid", "cgroup")],
            "resources": {"devices": stock.device_rules(), "memory": {"limit": 64 << 20}},
            "cgroupsPath": "/pod/c",
            "maskedPaths": list(stock.MASKED),
            "readonlyPaths": list(stock.READONLY),
        },
    }


def test_the_rest_of_a_document_is_what_the_stock_has_not() -> None:
    rest = STOCK.rest(document())
    assert rest is not None
    assert [one["destination"] for one in rest["mounts"]] == ["/dev/shm", "/dev/termination-log", "/etc/hosts"]
    assert rest["process"] == document()["process"] and rest["root"] == document()["root"]
    assert rest["linux"].keys() == {"namespaces", "resources"}
    assert rest["linux"]["resources"] == {"memory": {"limit": 64 << 20}}


def test_device_rules_and_a_filter_of_its_own_are_kept_in_the_rest() -> None:
    config = document()
    config["linux"]["resources"]["devices"] = [{"allow": True, "access": "rwm"}]
    config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"}
    rest = STOCK.rest(config)
    assert rest is not None
    assert rest["linux"]["resources"] == config["linux"]["resources"]
    assert rest["linux"]["seccomp"] == config["linux"]["seccomp"]


CHANGES: dict[str, Change] = {
    "another masked path": lambda c: c["linux"]["maskedPaths"].append("/proc/more"),
    "one masked path less": lambda c: c["linux"]["maskedPaths"].pop(),
    "masked paths in another order": lambda c: c["linux"]["maskedPaths"].reverse(),
    "no read-only paths": lambda c: c["linux"].pop("readonlyPaths"),
    "a stock mount with other options": lambda c: c["mounts"][4]["options"].remove("ro"),
    "a stock mount missing": lambda c: c["mounts"].pop(3),
    "an own mount before the stock": lambda c: c["mounts"].insert(0, bind("/data")),
    "an own mount in /proc": lambda c: c["mounts"].append(bind("/proc/meminfo")),
    "an own mount in /sys": lambda c: c["mounts"].append(bind("//sys/x/../firmware")),
    "an own mount on /dev": lambda c: c["mounts"].append(bind("/dev")),
    "an own mount on a device": lambda c: c["mounts"].append(bind("/dev/null")),
    "an own mount below the terminals": lambda c: c["mounts"].append(bind("/dev/pts/x")),
    "an own mount on the root": lambda c: c["mounts"].append(bind("/")),
    "a file system of its own": lambda c: c["mounts"].append({"destination": "/t", "type": "tmpfs", "source": "tmpfs"}),
    "an id-mapped mount": lambda c: c["mounts"].append(bind("/m", "idmap")),
    "a mount with mappings": lambda c: c["mounts"].append(bind("/m") | {"uidMappings": []}),
    "two mounts on one place": lambda c: c["mounts"].extend([bind("/a"), bind("/a/")]),
    "a mount that is no object": lambda c: c["mounts"].append("x"),
    "a joined namespace": lambda c: c["linux"]["namespaces"][1].update(path="/proc/1/ns/pid"),
    "a further namespace": lambda c: c["linux"]["namespaces"].append({"type": "uts"}),
    "devices of its own": lambda c: c["linux"].update(devices=[{"path": "/dev/x", "type": "c"}]),
    "id maps": lambda c: c["linux"].update(uidMappings=[]),
    "a propagation of the root": lambda c: c["linux"].update(rootfsPropagation="shared"),
    "a personality": lambda c: c["linux"].update(personality={"domain": "LINUX32"}),
    "sysctls": lambda c: c["linux"].update(sysctl={"net.x": "1"}),
    "hooks": lambda c: c.update(hooks={"prestart": [{"path": "/x"}]}),
    "a host name": lambda c: c.update(hostname="x"),
    "too little memory for a set-up": lambda c: c["linux"]["resources"]["memory"].update(limit=4 << 20),
    "no process": lambda c: c.pop("process"),
    "no resources": lambda c: c["linux"].pop("resources"),
    "no linux": lambda c: c.pop("linux"),
    "mounts that are no list": lambda c: c.update(mounts={}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_document_with_this_is_made_in_the_ordinary_way(change: Change) -> None:
    config = copy.deepcopy(document())
    change(config)
    assert STOCK.rest(config) is None
