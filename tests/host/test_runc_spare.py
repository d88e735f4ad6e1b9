"""A container made ahead is, once it has its orders, what the ordinary way makes of the same document."""

from __future__ import annotations

import json
import os
import select
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from runc_support import fill

from nacre import runc
from nacre.linux import cgroups, mounts
from nacre.linux.mounts import MountFlag, UnmountFlag
from nacre.oci import stock
from nacre.oci.errors import Failure
from nacre.runc import spare
from nacre.runc.failures import CommandNotFound
from nacre.runc.spare import Spare

STOCK = spare.Stock(mounts=stock.mounts(), masked=list(stock.MASKED), readonly=list(stock.READONLY), devices=stock.device_rules())
PARENT = f"/nacre-test-spare-{os.getpid()}"
SLEEP = ["/bin/sleep", "1000"]
OWN = (
    "State",
    "Pid",
    "Tgid",
    "NStgid",
    "NSpid",
    "NSpgid",
    "NSsid",
    "Vm",
    "Rss",
    "SigQ",
    "voluntary",
    "nonvoluntary",
)  # of one process


@dataclass
class Place:
    """A directory with a bundle, files to mount, and what was made of them."""

    base: Path
    layout: cgroups.Layout = field(default_factory=cgroups.discover)
    pids: dict[str, int] = field(default_factory=dict)
    waiting: list[Spare] = field(default_factory=list)

    @property
    def bundle(self) -> Path:
        return self.base / "bundle"

    def document(self, *args: str, **process: Any) -> dict[str, Any]:
        own = [("/etc/hosts", "hosts", "ro"), ("/data/deep", "data", "rw"), ("/dev/shm", "shm", "rw")]
        binds = [
            {"destination": target, "type": "bind", "source": str(self.base / name), "options": ["rbind", "rprivate", access]}
            for target, name, access in own
        ]
        return {
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs", "readonly": False},
            "process": {"args": list(args or SLEEP), "cwd": "/root", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
            | process,
            "mounts": [*stock.mounts(), *binds],
            "linux": {
                "namespaces": [{"type": kind} for kind in ("mount", "pid", "cgroup")],
                "resources": {"devices": stock.device_rules(), "memory": {"limit": 64 << 20}},
                "maskedPaths": list(stock.MASKED),
                "readonlyPaths": list(stock.READONLY),
            },
        }

    def spare(self, name: str = "ahead") -> Spare:
        (self.base / "place").mkdir(exist_ok=True)
        made = spare.prepare(STOCK, str(self.base / "place"), cgroups.Cgroup(self.layout, f"{PARENT}/{name}"))
        self.waiting.append(made)
        return made

    def ordinary(self, name: str, config: dict[str, Any]) -> int:
        config = config | {"linux": config["linux"] | {"cgroupsPath": f"{PARENT}/{name}"}}
        (self.bundle / "config.json").write_text(json.dumps(config))
        launch = runc.create(str(self.base / "runc"), name, str(self.bundle), stdio=(None, None, None), layout=self.layout)
        self.pids[name] = launch.pid
        runc.start(str(self.base / "runc"), name)
        if launch.console is not None:
            os.close(launch.console)  # not before: a terminal that hangs up ends a container that was not started
        return launch.pid

    def ahead(self, name: str, config: dict[str, Any], *, stdio: Any = (None, None, None)) -> int:
        rest = STOCK.rest(config)
        assert rest is not None
        made = self.spare(name)
        self.waiting.remove(made)
        launch = made.create(str(self.base / "runc"), name, str(self.bundle), rest, stdio=stdio)
        self.pids[name] = launch.pid
        made.start()
        if launch.console is not None:
            os.close(launch.console)
        return launch.pid

    def delete(self, name: str) -> None:
        runc.delete(str(self.base / "runc"), name, force=True, layout=self.layout)
        os.waitpid(self.pids.pop(name), 0)

    def end(self) -> None:
        for name in list(self.pids):
            self.delete(name)
        for made in self.waiting:
            made.discard()
        parent = cgroups.Cgroup(self.layout, PARENT)
        assert parent.pids() == []
        parent.remove()


@contextmanager
def a_place(base: Path) -> Iterator[Place]:
    runc.load()
    place = Place(base)
    fill(place.bundle / "rootfs")
    for name in ("data", "shm", "runc"):
        (base / name).mkdir()
    (base / "hosts").write_text("127.0.0.1 localhost\n")
    try:
        yield place
    finally:
        place.end()
        assert os.listdir(base / "runc") in ([], [".seccomp"])
        assert str(base) not in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with a_place(tmp_path) as made:
        yield made


def mounts_of(pid: int, name: str) -> list[str]:
    """Every mount below the root: what, where, how; without the numbers that any mount has of its own."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().replace(f"{PARENT}/{name}", "CGROUP").splitlines()
    return sorted(" ".join(line.split()[3:]) for line in lines)


def facts(pid: int, file: str) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/{file}").read_text().splitlines() if not line.startswith(OWN)]


DOCUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a user with rights and limits": {
        "user": {"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 0o077},
        "capabilities": {key: ["CAP_CHOWN"] for key in ("bounding", "permitted", "inheritable", "ambient", "effective")},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}],
        "noNewPrivileges": True,
        "cwd": "/made/here",
        "oomScoreAdj": 500,
    },
    "a terminal": {"terminal": True},
}


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("settings", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_mounts_rights_and_limits_are_those_of_the_ordinary_way(place: Place, settings: dict[str, Any], readonly: bool) -> None:
    config = place.document(**settings)
    config["root"]["readonly"] = readonly
    config["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}],
    }
    one, other = place.ordinary("ordinary", config), place.ahead("ahead", config)
    assert mounts_of(other, "ahead") == mounts_of(one, "ordinary")
    for file in ("status", "limits", "environ", "cmdline", "oom_score_adj", "setgroups", "uid_map"):
        assert facts(other, file) == facts(one, file), file
    for link in ("cwd", "exe"):
        assert os.readlink(f"/proc/{other}/{link}") == os.readlink(f"/proc/{one}/{link}")
    for path in ("dev", "dev/pts", "proc/sys", "sys", "etc"):
        assert sorted(os.listdir(f"/proc/{other}/root/{path}")) == sorted(os.listdir(f"/proc/{one}/root/{path}")), path
    same = [kind for kind in os.listdir("/proc/self/ns") if _namespace(other, kind) == _namespace(one, kind)]
    assert set(same) & {"mnt", "pid", "cgroup"} == set() and "net" in same


def _namespace(pid: int, kind: str) -> int:
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


def test_its_program_runs_where_the_document_says_and_sees_its_mounts(place: Place) -> None:
    read, write = os.pipe2(os.O_CLOEXEC)
    script = "hostname >/dev/null; echo x >/data/deep/new; echo y >/etc/hosts; cat /proc/timer_list; pwd; cat /etc/hosts; echo $$"
    place.ahead("teller", place.document("/bin/sh", "-c", script), stdio=(None, write, None))
    os.close(write)
    with open(read) as said:
        assert said.read().splitlines() == ["/root", "127.0.0.1 localhost", "1"]
    assert (place.base / "data/new").read_text() == "x\n"


def test_what_it_is_given_is_no_peer_of_the_hosts_mounts(place: Place) -> None:
    """Under systemd all mounts are shared: a container's mount would come to the host, and its root could not be entered."""
    shared = str(place.base)
    mounts.mount(shared, shared, None, MountFlag.BIND)
    mounts.mount(None, shared, None, MountFlag.SHARED)
    try:
        pid = place.ahead("ahead", place.document())
        assert " shared:" not in Path(f"/proc/{pid}/mountinfo").read_text()
    finally:
        mounts.umount2(shared, UnmountFlag.DETACH)


def test_two_of_them_share_nothing_that_two_containers_do_not(place: Place) -> None:
    first, second = place.ahead("first", place.document()), place.ahead("second", place.document())
    (Path(f"/proc/{first}/root/dev/mark")).write_text("of the first")
    assert "mark" not in os.listdir(f"/proc/{second}/root/dev")
    assert os.stat(f"/proc/{first}/root/dev/pts").st_dev != os.stat(f"/proc/{second}/root/dev/pts").st_dev
    assert os.stat(f"/proc/{first}/root/proc").st_dev != os.stat(f"/proc/{second}/root/proc").st_dev
    groups = [Path(f"/proc/{pid}/cgroup").read_text() for pid in (first, second)]
    assert f"{PARENT}/first" in groups[0] and f"{PARENT}/second" in groups[1]


def test_a_create_that_fails_leaves_nothing_and_the_name_is_free(place: Place) -> None:
    config = place.document()
    config["mounts"][-1]["source"] = "/no/such"
    made, rest = place.spare(), STOCK.rest(config)
    place.waiting.clear()
    assert rest is not None
    with pytest.raises(OSError, match="no/such"):
        made.create(str(place.base / "runc"), "again", str(place.bundle), rest, stdio=(None, None, None))
    with pytest.raises(ProcessLookupError):
        os.kill(made.pid, 0)
    assert not made.cgroup.exists()
    place.ahead("again", place.document())


def test_what_the_waiting_process_cannot_do_is_told_as_ever(place: Place) -> None:
    config = place.document()
    (place.bundle / "rootfs/etc/hosts").mkdir()
    made, rest = place.spare(), STOCK.rest(config)
    place.waiting.clear()
    assert rest is not None
    with pytest.raises(Failure, match="/etc/hosts for container odd"):
        made.create(str(place.base / "runc"), "odd", str(place.bundle), rest, stdio=(None, None, None))


def test_a_filter_that_asks_an_agent_goes_the_ordinary_way(place: Place) -> None:
    config = place.document()
    config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_LOG"}]}
    assert STOCK.rest(config) is not None
    config["linux"]["seccomp"]["syscalls"][0]["action"] = "SCMP_ACT_NOTIFY"
    assert STOCK.rest(config) is None


def test_links_of_an_image_lead_nowhere(place: Place) -> None:
    shutil.rmtree(place.bundle / "rootfs/proc")
    (place.bundle / "rootfs/proc").symlink_to("/etc")
    made, rest = place.spare(), STOCK.rest(place.document())
    place.waiting.clear()
    assert rest is not None
    with pytest.raises(Failure, match="has a link on the way to /proc"):
        made.create(str(place.base / "runc"), "linked", str(place.bundle), rest, stdio=(None, None, None))


def test_a_missing_program_is_named_when_it_is_started(place: Place) -> None:
    with pytest.raises(CommandNotFound, match="nonsense"):
        place.ahead("missing", place.document("/bin/nonsense"))


def test_it_ends_with_who_made_it(place: Place) -> None:
    made = place.spare()
    place.waiting.clear()
    with open(f"/proc/{made.pid}/cgroup"):
        pidfd = os.pidfd_open(made.pid)
    made.forget()
    assert select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)
    os.waitpid(made.pid, 0)
    assert not made.cgroup.exists()
