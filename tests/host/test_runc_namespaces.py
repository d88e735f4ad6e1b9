"""Namespaces: new ones, joined ones, a user namespace with mappings, without root, clocks (config-linux.md "Namespaces")."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runc_support import CALL_S, REPOSITORY, RUNC, Bundle, environment, made, with_user_namespace

from nacre.linux import mounts
from nacre.linux.mounts import MountFlag, UnmountFlag
from nacre.linux.namespaces import KINDS, identity

PEERS = REPOSITORY / ".cache" / "peers"


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as one:
        yield one


def set_namespaces(bundle: Bundle, **kinds: str | None) -> Bundle:
    """Kind to path; "" is a new one, None leaves the host's."""
    kept = {one["type"]: one.get("path", "") for one in bundle.linux["namespaces"]} | kinds
    bundle.linux["namespaces"] = [
        {"type": kind} | ({"path": path} if path else {}) for kind, path in kept.items() if path is not None
    ]
    return bundle


@pytest.fixture
def holder() -> Iterator[int]:
    """A process in namespaces of its own, to be joined."""
    words = [
        "unshare",
        "--net",
        "--ipc",
        "--uts",
        "--pid",
        "--cgroup",
        "--fork",
        "--kill-child",
        "sh",
        "-c",
        "hostname held; echo $$; exec sleep 1000",
    ]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None and running.stdout.readline() == "1\n"
    child = int(Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text())
    yield child
    os.kill(child, signal.SIGKILL)
    running.wait()
    running.stdout.close()


def test_every_kind_is_new_when_it_has_no_path_and_the_hosts_when_it_is_not_listed(bundle: Bundle) -> None:
    pid = set_namespaces(bundle, time="").up()
    assert {kind for kind in KINDS if identity(kind, pid) != identity(kind)} == set(KINDS) - {"user"}
    bundle.ok("delete", "--force", bundle.name)
    del bundle.config["hostname"]
    bundle.config["mounts"] = [one for one in bundle.config["mounts"] if one["type"] not in ("mqueue", "sysfs")]
    pid = set_namespaces(bundle, pid=None, network=None, ipc=None, uts=None, cgroup=None, time=None).up()
    assert {kind for kind in KINDS if identity(kind, pid) != identity(kind)} == {"mount"}


def test_namespaces_are_joined_by_path(bundle: Bundle, holder: int) -> None:
    joined = {kind: f"/proc/{holder}/ns/{KINDS[kind][1]}" for kind in ("network", "ipc", "uts", "pid")}
    del bundle.config["hostname"]
    pid = set_namespaces(bundle, **joined).up()
    for kind in joined:
        assert identity(kind, pid) == identity(kind, holder), kind
    assert bundle.inside("hostname; ps | grep -c 'sleep 1000'").splitlines()[0] == "held"


def test_a_joined_cgroup_namespace_is_the_one_given(bundle: Bundle, holder: int) -> None:
    pid = set_namespaces(bundle, cgroup=f"/proc/{holder}/ns/cgroup").up()
    assert identity("cgroup", pid) == identity("cgroup", holder)


@pytest.mark.parametrize(
    ("kind", "path", "word"),
    [
        ("network", "/nowhere/net", "No such file"),
        ("network", "/proc/self/ns/uts", "Invalid argument"),
        ("ipc", "/etc/passwd", "Invalid argument"),
    ],
)
def test_a_path_that_is_no_such_namespace_is_named(bundle: Bundle, kind: str, path: str, word: str) -> None:
    message = set_namespaces(bundle, **{kind: path}).refuses("true")
    assert word in message and kind in message


def test_loopback_is_up_in_a_new_network(bundle: Bundle) -> None:
    assert "LOOPBACK,UP" in bundle.says("ip link show lo")


def test_host_and_domain_name_are_set(bundle: Bundle) -> None:
    bundle.config |= {"hostname": "inside", "domainname": "example.test"}
    assert bundle.says("hostname; cat /proc/sys/kernel/domainname") == "inside\nexample.test\n"


def test_sysctls_of_the_containers_own_namespaces_are_set(bundle: Bundle) -> None:
    bundle.linux["sysctl"] = {"net.ipv4.ip_forward": "1", "kernel.shmmax": "12345", "net/ipv4/conf/lo/forwarding": "1"}
    told = bundle.says("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmax /proc/sys/net/ipv4/conf/lo/forwarding")
    assert told == "1\n12345\n1\n"


@pytest.mark.parametrize("key", ["kernel.panic", "vm.swappiness", "net.ipv4../../kernel/panic", "kernel.domainname/../panic"])
def test_a_sysctl_of_the_host_is_refused(bundle: Bundle, key: str) -> None:
    bundle.linux["sysctl"] = {key: "1"}
    assert "would change the host" in bundle.refuses("true")
    bundle.linux["sysctl"] = {"net.ipv4.ip_forward": "1"}
    assert "network namespace of the container's own" in set_namespaces(bundle, network=None).refuses("true")


def test_root_of_a_user_namespace_is_nobody_outside(bundle: Bundle) -> None:
    pid = with_user_namespace(bundle).up()
    assert bundle.inside("id -u; cat /proc/self/uid_map").split() == ["0", "0", "200000", "65536"]
    status = Path(f"/proc/{pid}/status").read_text()
    assert "Uid:\t200000\t200000\t200000\t200000" in status
    for kind in ("network", "uts", "ipc", "mount", "pid"):
        assert identity(kind, pid) != identity(kind)
    told = bundle.inside(
        "touch /made; ls -l /dev/null | cut -c1; echo x > /dev/null && echo open; ls /sys/kernel > /dev/null && echo sys"
    )
    assert told == "c\nopen\nsys\n" and (bundle.rootfs / "made").stat().st_uid == 200000


def test_a_user_inside_a_user_namespace_is_mapped_too(bundle: Bundle) -> None:
    with_user_namespace(bundle)
    bundle.process["user"] = {"uid": 1000, "gid": 1000, "additionalGids": [20]}
    pid = bundle.up("id -u; id -G; exec sleep 100")
    assert bundle.output() == "1000\n1000 20\n"
    assert "Uid:\t201000" in Path(f"/proc/{pid}/status").read_text()


def test_masked_and_read_only_paths_hold_in_a_user_namespace(bundle: Bundle) -> None:
    with_user_namespace(bundle)
    (bundle.rootfs / "etc" / "secret").write_text("s")
    bundle.linux["maskedPaths"].append("/etc/secret")
    told = bundle.says("cat /etc/secret; umount /etc/secret 2>/dev/null || echo held; echo 1 > /proc/sysrq-trigger || echo no")
    assert told == "held\nno\n"


def test_a_source_that_the_containers_root_may_not_reach_is_mounted(bundle: Bundle, tmp_path: Path) -> None:
    with_user_namespace(bundle)
    hidden = tmp_path / "hidden"
    (hidden / "in").mkdir(parents=True)
    (hidden / "in/word").write_text("seen")
    (hidden / "other").mkdir()
    (hidden / "other/marker").touch()
    hidden.chmod(0o700)
    mounts.mount(str(hidden), str(hidden), None, MountFlag.BIND)
    mounts.mount(None, str(hidden), None, MountFlag.SHARED)
    try:
        bundle.mount("/mnt", "bind", str(hidden / "in"), "bind").mount("/mnt", "bind", str(hidden / "in"), "rbind")
        bundle.mount("/tmp", "bind", str(hidden / "other"), "rbind")
        bundle.mount("/run", "bind", str(bundle.rootfs / "tmp"), "rbind")  # by then the mount above is there
        said = bundle.says("ls /run; cat /mnt/word; mount -t tmpfs none /tmp; touch /tmp/x; grep ' /tmp ' /proc/self/mountinfo")
        assert said.startswith("marker\nseen") and " shared:" not in said and " master:" in said
    finally:
        mounts.umount2(str(hidden), UnmountFlag.DETACH)


@pytest.fixture
def mapped() -> Iterator[int]:
    """A process in a user namespace of its own, to be joined."""
    words = ["unshare", "--user", "--kill-child", "--fork", "sh", "-c", "echo ready; exec sleep 1000"]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None and running.stdout.readline() == "ready\n"
    child = int(Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text())
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{child}/{name}").write_text("0 200000 65536\n")
    yield child
    os.kill(child, signal.SIGKILL)
    running.wait()
    running.stdout.close()


def test_a_user_namespace_is_joined_by_path_and_owns_the_others(bundle: Bundle, mapped: int) -> None:
    with_user_namespace(bundle)
    pid = set_namespaces(bundle, user=f"/proc/{mapped}/ns/user").up()
    assert identity("user", pid) == identity("user", mapped)
    assert bundle.inside("id -u") == "0\n"


def test_a_network_that_is_not_the_joined_user_namespaces_is_joined_too(bundle: Bundle, mapped: int, holder: int) -> None:
    """Root of the user namespace has no right over it; who runs the command has."""
    with_user_namespace(bundle)
    bundle.config["mounts"] = [one for one in bundle.config["mounts"] if one["type"] not in ("sysfs", "cgroup")]
    pid = set_namespaces(bundle, user=f"/proc/{mapped}/ns/user", network=f"/proc/{holder}/ns/net").up()
    assert (identity("user", pid), identity("network", pid)) == (identity("user", mapped), identity("network", holder))
    assert bundle.inside("readlink /proc/self/ns/net").strip() == os.readlink(f"/proc/{holder}/ns/net")


USER = 4321


class Ordinary:
    """Somebody who is not root, with a directory and a bundle of their own, and with ids that newuidmap grants if asked for."""

    def __init__(self, bundle: Bundle, place: Path) -> None:
        self.place, self._bundle = place / "mine", bundle
        self.place.mkdir()
        os.chown(self.place, USER, USER)
        self.call("spec", "--rootless", "--bundle", str(self.place))
        self.config = json.loads((self.place / "config.json").read_text())
        self.config["process"] |= {"terminal": False, "env": ["PATH=/bin"]}
        self.config["root"]["path"] = str(bundle.rootfs)

    def call(self, *words: str, path: str = "/usr/bin:/bin", granted: str = "", **files: Any) -> subprocess.CompletedProcess[str]:
        """nacre-runc by that user, in a mount namespace with a passwd, subuid and subgid of ours."""
        etc = {"passwd": f"mine:x:{USER}:{USER}::{self.place}:/bin/sh\n", "group": f"mine:x:{USER}:\n"}
        etc |= dict.fromkeys(("subuid", "subgid"), granted and f"mine:{granted}\n")
        lines = []
        for name, text in etc.items():
            (self.place / name).write_text(text)
            lines.append(f"test ! -e /etc/{name} || mount --bind {self.place}/{name} /etc/{name}")
        drop = f"exec setpriv --reuid {USER} --regid {USER} --clear-groups env PATH={path} HOME={self.place} "
        script = "\n".join([*lines, drop + '"$@"'])
        command = [RUNC, "--root", str(self.place / "state"), *words]
        return subprocess.run(
            ["unshare", "--mount", "sh", "-ec", script, "sh", *command],
            text=True,
            check=False,
            timeout=CALL_S,
            env=environment(PYTHONDONTWRITEBYTECODE="1"),
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | files,
        )

    def run(self, script: str, **settings: str) -> subprocess.CompletedProcess[str]:
        self.config["process"]["args"] = ["sh", "-c", script]
        (self.place / "config.json").write_text(json.dumps(self.config))
        return self.call("run", "-b", str(self.place), "mine", **settings)


@pytest.fixture
def ordinary() -> Iterator[Ordinary]:
    place = Path(tempfile.mkdtemp(prefix="nacre-ordinary-"))  # pytest's own directories are root's alone
    place.chmod(0o755)
    try:
        with made(place) as bundle:
            yield Ordinary(bundle, place)
    finally:
        shutil.rmtree(place)


def test_without_root_a_user_runs_a_container_of_its_own(ordinary: Ordinary) -> None:
    """`spec --rootless` as an ordinary user: one id mapped, no cgroups."""
    done = ordinary.run("id -u; hostname; touch /tmp/x 2>/dev/null || echo ro")
    assert done.stdout == "0\nnacre\nro\n", done.stderr


def test_without_root_a_container_is_entered_and_ended_by_its_starter(ordinary: Ordinary) -> None:
    ordinary.config["process"]["args"] = ["sleep", "100"]
    (ordinary.place / "config.json").write_text(json.dumps(ordinary.config))
    with (ordinary.place / "out").open("w") as out:
        assert ordinary.call("run", "--detach", "-b", str(ordinary.place), "mine", stdout=out, stderr=out).returncode == 0
    entered = ordinary.call("exec", "mine", "sh", "-c", "id -u; hostname; ps | grep -c '[s]leep 100'")
    assert entered.stdout == "0\nnacre\n1\n", entered.stderr
    assert ordinary.call("delete", "--force", "mine").returncode == 0


def with_granted_ids(ordinary: Ordinary) -> None:
    own = {"containerID": 0, "hostID": USER, "size": 1}
    further = {"containerID": 1, "hostID": 300000, "size": 1000}
    ordinary.config["linux"] |= {"uidMappings": [own, further], "gidMappings": [own, further]}
    ordinary.config["process"]["user"] = {"uid": 7, "gid": 8, "additionalGids": [9]}


def test_without_root_a_user_maps_the_ids_that_newuidmap_grants(ordinary: Ordinary) -> None:
    tools = ordinary.place.parent / "tools"
    tools.mkdir()
    for name in ("newuidmap", "newgidmap"):
        tool = shutil.copy(next(place for place in (Path("/usr/bin", name), PEERS / "usr/bin" / name) if place.exists()), tools)
        os.chmod(tool, 0o4755)
    with_granted_ids(ordinary)
    done = ordinary.run("id -u; id -G; cat /proc/self/uid_map", path=f"{tools}:/usr/bin:/bin", granted="300000:1000")
    assert done.stdout.split() == f"7 8 9 0 {USER} 1 1 300000 1000".split(), done.stderr
    refused = ordinary.run("true", path=f"{tools}:/usr/bin:/bin", granted="400000:1000")
    assert "newgidmap" in refused.stderr and "not allowed" in refused.stderr and "usermod --add-subgids" in refused.stderr


def test_without_newuidmap_further_ids_are_refused_with_what_is_missing(ordinary: Ordinary) -> None:
    with_granted_ids(ordinary)
    refused = ordinary.run("true", path="/nowhere", granted="300000:1000")
    assert "newgidmap: No such file" in refused.stderr and "apt-get install uidmap" in refused.stderr


def uptime_s() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def test_clocks_are_moved_in_a_time_namespace(bundle: Bundle) -> None:
    set_namespaces(bundle, time="")
    bundle.linux["timeOffsets"] = {"monotonic": {"secs": 1000000}, "boottime": {"secs": 2000000, "nanosecs": 5}}
    before = uptime_s()
    pid = bundle.up("cut -d. -f1 /proc/uptime; exec sleep 100")
    inside = int(bundle.output())
    assert before - 1 <= inside - 2_000_000 <= uptime_s()
    assert identity("time", pid) != identity("time")
    assert int(bundle.inside("cut -d. -f1 /proc/uptime")) >= inside, "a further process has the same clocks"


def test_time_offsets_without_a_time_namespace_are_refused(bundle: Bundle) -> None:
    bundle.linux["timeOffsets"] = {"monotonic": {"secs": 1}}
    assert "would move the host's clocks" in bundle.refuses("true")
