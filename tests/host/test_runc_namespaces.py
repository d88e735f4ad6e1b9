"""Namespaces: new ones, joined ones, a user namespace with mappings, without root, clocks (config-linux.md "Namespaces")."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from runc_support import RUNC, Bundle, environment, made, with_user_namespace

from nacre.linux.namespaces import KINDS, identity


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


def test_a_user_namespace_is_joined_by_path_and_owns_the_others(bundle: Bundle) -> None:
    with_user_namespace(bundle)
    words = ["unshare", "--user", "--kill-child", "--fork", "sh", "-c", "echo ready; exec sleep 1000"]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None and running.stdout.readline() == "ready\n"
    child = int(Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text())
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{child}/{name}").write_text("0 200000 65536\n")
    try:
        pid = set_namespaces(bundle, user=f"/proc/{child}/ns/user").up()
        assert identity("user", pid) == identity("user", child)
        assert bundle.inside("id -u") == "0\n"
    finally:
        os.kill(child, signal.SIGKILL)
        running.wait()
        running.stdout.close()


def test_without_root_a_user_runs_a_container_of_its_own(bundle: Bundle, tmp_path: Path) -> None:
    """`spec --rootless` as an ordinary user: one id mapped, no cgroups."""
    place = tmp_path / "mine"
    place.mkdir()
    for one in (tmp_path, *tmp_path.parents):
        if one != Path("/tmp") and str(one).startswith("/tmp"):
            one.chmod(0o755)
    os.chown(place, 4321, 4321)
    user = {"user": 4321, "group": 4321, "extra_groups": [], "env": environment(HOME=str(place), PYTHONDONTWRITEBYTECODE="1")}
    common = [RUNC, "--root", str(place / "state"), "--cgroup-manager", "disabled"]
    subprocess.run([*common, "spec", "--rootless", "--bundle", str(place)], check=True, **user)
    document = json.loads((place / "config.json").read_text())
    document["process"] |= {"terminal": False, "args": ["sh", "-c", "id -u; hostname; touch /tmp/x 2>/dev/null || echo ro"]}
    document["process"]["env"] = ["PATH=/bin"]
    document["root"]["path"] = str(bundle.rootfs)
    (place / "config.json").write_text(json.dumps(document))
    done = subprocess.run(
        [*common, "run", "-b", str(place), "mine"], capture_output=True, text=True, check=False, timeout=30, **user
    )
    assert done.stdout == "0\nnacre\nro\n", done.stderr


def test_clocks_are_moved_in_a_time_namespace(bundle: Bundle) -> None:
    set_namespaces(bundle, time="")
    bundle.linux["timeOffsets"] = {"monotonic": {"secs": 1000000}, "boottime": {"secs": 2000000, "nanosecs": 5}}
    pid = bundle.up("cut -d. -f1 /proc/uptime; exec sleep 100")
    inside, outside = int(bundle.output()), float(Path("/proc/uptime").read_text().split()[0])
    assert 1999990 < inside - outside < 2000010
    assert identity("time", pid) != identity("time")
    assert int(bundle.inside("cut -d. -f1 /proc/uptime")) >= inside, "a further process has the same clocks"


def test_time_offsets_without_a_time_namespace_are_refused(bundle: Bundle) -> None:
    bundle.linux["timeOffsets"] = {"monotonic": {"secs": 1}}
    assert "would move the host's clocks" in bundle.refuses("true")
