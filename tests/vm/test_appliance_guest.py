"""One guest, booted cold once, with real containers in it: what the host's half relies on."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import guest_support as support
import pytest
from guest_support import Guest

from nacre.agent import protocol as p
from nacre.agent.drives import DriveMismatch
from nacre.kata import appliance
from nacre.oci import stock
from nacre.oci.errors import AlreadyExists, Failure, Invalid, NotFound, Unsupported
from nacre.runc.failures import CommandNotFound

ROOT_ID = str(uuid.UUID(int=0x1234567890ABCDEF1234567890ABCDEF))


@pytest.fixture(scope="module")
def guest_image() -> appliance.Appliance:
    return support.appliance_for_tests()


@pytest.fixture(scope="module")
def busybox_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An erofs with a static busybox and what a shell needs."""
    busybox = next((path for path in (support.CACHE / "peers/bin/busybox", Path("/bin/busybox")) if path.exists()), None)
    assert busybox, "busybox-static is needed: ./run test unpacks it"
    base = tmp_path_factory.mktemp("root")
    tree = base / "tree"
    for name in ("bin", "etc", "proc", "dev", "sys", "tmp"):
        (tree / name).mkdir(parents=True)
    shutil.copy(busybox, tree / "bin/busybox")
    for name in ("sh", "cat", "echo", "sleep", "id", "stty", "head", "dd", "kill", "ls", "stat", "hostname", "ip", "wc", "true"):
        (tree / "bin" / name).symlink_to("busybox")
    (tree / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    target = base / "root.erofs"
    subprocess.run(["mkfs.erofs", "--quiet", f"-U{ROOT_ID}", str(target), str(tree)], check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def guest(guest_image: appliance.Appliance, busybox_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    workdir = tmp_path_factory.mktemp("guest")
    blank = workdir / "blank"
    blank.write_bytes(bytes(1 << 20))
    booted = support.boot(
        guest_image,
        workdir,
        drives={"slot0": busybox_root, "slot1": busybox_root, "slot2": blank},
        extra=("-netdev", "hubport,id=net,hubid=0", "-device", "virtio-net-pci,netdev=net"),
    )
    try:
        support.hello(booted)
        yield booted
    finally:
        booted.close()


def document(*args: str, terminal: bool = False, limit: int = 0, **process: Any) -> dict[str, Any]:
    """An OCI config.json as nacre's cri writes it for a pod."""
    guarded = ["nosuid", "noexec", "nodev"]
    return {
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs", "readonly": False},
        "hostname": "pod",
        "process": {
            "args": list(args),
            "env": ["PATH=/bin"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "terminal": terminal,
            "capabilities": {kind: ["CAP_KILL", "CAP_CHOWN"] for kind in ("bounding", "effective", "permitted")},
            **process,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": guarded},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["newinstance", "ptmxmode=0666", "gid=5"],
            },
            {"destination": "/dev/shm", "type": "bind", "source": "/run/nacre/shm", "options": ["rbind", "rw"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*guarded, "ro"]},
        ],
        "linux": {
            "namespaces": [
                {"type": "mount"},
                {"type": "network", "path": "/run/host/ns/net"},
                {"type": "ipc", "path": "/run/host/ns/ipc"},
                {"type": "uts", "path": "/run/host/ns/uts"},
                {"type": "pid"},
                {"type": "cgroup"},
            ],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]} | ({"memory": {"limit": limit}} if limit else {}),
            "cgroupsPath": "/host/kubepods/pod1/c1",
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
        },
    }


def create(
    guest: Guest, name: str, config_json: dict[str, Any], *, slot: str = "slot0", root_id: str = ROOT_ID, **streams: int
) -> None:
    root = p.Root(drive=slot, uuid=root_id)
    guest.call("create", container=name, config=config_json, root=root, **streams)


def run(guest: Guest, name: str, *args: str, **settings: Any) -> tuple[int, str]:
    """A container from create to delete: (code, what it wrote)."""
    out = guest.open(receives=True)
    create(guest, name, document(*args, **settings), stdout=out, stderr=0)
    guest.call("start", container=name)
    code = guest.exit_of(name).code
    text = guest.read(out)
    guest.call("delete", container=name)
    return code, text


def test_the_guest_answers_with_its_kernel_and_the_nonce(guest: Guest, guest_image: appliance.Appliance) -> None:
    greeting = support.hello(guest)
    assert greeting.kernel == guest_image.kernel_release
    assert greeting.cpus == 1
    assert greeting.memory_bytes > 80 << 20


def test_a_container_runs_from_an_erofs_slot_and_its_output_and_code_come_back(guest: Guest) -> None:
    guest.call("sandbox", hostname="web-0", sysctls={"net.ipv4.ip_unprivileged_port_start": "0"})
    script = (
        "echo hello from $(hostname); cat /proc/sys/net/ipv4/ip_unprivileged_port_start; echo written > /new; cat /new; exit 7"
    )
    code, text = run(guest, "first", "/bin/sh", "-c", script)
    assert (code, text) == (7, "hello from web-0\n0\nwritten\n")


def test_what_a_container_wrote_is_gone_when_the_slot_is_used_again(guest: Guest) -> None:
    assert run(guest, "writer", "/bin/sh", "-c", "echo secret > /left; cat /left") == (0, "secret\n")
    assert run(guest, "reader", "/bin/sh", "-c", "cat /left 2>/dev/null || echo nothing") == (0, "nothing\n")


def test_a_slot_with_another_root_than_announced_is_refused(guest: Guest) -> None:
    with pytest.raises(DriveMismatch, match="holds " + ROOT_ID):
        create(guest, "wrong", document("/bin/true"), root_id=str(uuid.UUID(int=1)))
    with pytest.raises(DriveMismatch, match="no erofs"):
        create(guest, "blank", document("/bin/true"), slot="slot2")
    with pytest.raises(NotFound, match="slot0, slot1, slot2"):
        create(guest, "none", document("/bin/true"), slot="slot9")


def test_a_failed_create_leaves_nothing_and_the_name_is_free(guest: Guest) -> None:
    out = guest.open(receives=True)
    broken = document("/bin/true") | {
        "mounts": [{"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]}]
    }
    with pytest.raises(Failure, match="/no/such"):
        create(guest, "again", broken, stdout=out)
    guest.until(lambda: out in guest.ended, "the stream to end")
    assert run(guest, "again", "/bin/echo", "fine") == (0, "fine\n")


def test_a_missing_program_is_named_when_the_container_starts(guest: Guest) -> None:
    create(guest, "missing", document("/bin/nonsense"))
    with pytest.raises(CommandNotFound, match="nonsense"):
        guest.call("start", container="missing")
    guest.call("delete", container="missing")
    guest.call("delete", container="missing")  # what is gone stays gone


def test_host_namespaces_and_hooks_are_refused(guest: Guest) -> None:
    joined = document("/bin/true")
    joined["linux"]["namespaces"].append({"type": "user", "path": "/proc/1/ns/user"})
    with pytest.raises(Unsupported, match="user namespace"):
        create(guest, "joined", joined)
    with pytest.raises(Unsupported, match="hooks"):
        create(guest, "hooked", document("/bin/true") | {"hooks": {"prestart": [{"path": "/bin/sh"}]}})


def test_a_seccomp_profile_holds_in_the_guest(guest: Guest) -> None:
    settings = document(
        "/bin/busybox", "sh", "-c", "busybox mkdir /tmp/x || echo refused; busybox grep Seccomp: /proc/self/status"
    )
    settings["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
    }
    out = guest.open(receives=True)
    create(guest, "filtered", settings, stdout=out)
    guest.call("start", container="filtered")
    assert guest.exit_of("filtered").code == 0
    assert guest.read(out).split() == ["refused", "Seccomp:", "2"]
    guest.call("delete", container="filtered")


def test_two_containers_at_once_and_executions_in_one(guest: Guest) -> None:
    feed, out = guest.open(sends=True), guest.open(receives=True)
    create(guest, "long", document("/bin/cat"), stdin=feed, stdout=out)
    guest.call("start", container="long")
    create(guest, "other", document("/bin/sleep", "1000"), slot="slot1")
    guest.call("start", container="other")
    with pytest.raises(AlreadyExists):
        create(guest, "other", document("/bin/true"), slot="slot1")

    said = guest.open(receives=True)
    process = document("/bin/sh", "-c", "echo inside; echo wrong >&2; exit 3")["process"]
    err = guest.open(receives=True)
    guest.call("execute", container="long", exec_id="e1", process=process, stdout=said, stderr=err)
    assert guest.exit_of("long", "e1").code == 3
    assert (guest.read(said), guest.read(err)) == ("inside\n", "wrong\n")

    guest.call("execute", container="long", exec_id="e2", process=document("/bin/sleep", "1000")["process"])
    guest.call("kill_exec", container="long", exec_id="e2", signal=15)
    assert guest.exit_of("long", "e2").code == 128 + 15
    guest.call("kill_exec", container="long", exec_id="e2", signal=15)

    guest.channel.send(feed, b"through the pipe\n")
    guest.channel.end(feed)
    assert guest.read(out) == "through the pipe\n"
    assert guest.exit_of("long").code == 0
    stats = guest.call("stats", container="other")
    assert stats["pids"] == 1 and stats["memory_bytes"] > 0
    guest.call("kill", container="other", signal=9, everyone=True)
    assert guest.exit_of("other").code == 137
    for name in ("long", "other"):
        guest.call("delete", container=name)


def test_a_terminal_has_its_size_and_ends_with_its_process(guest: Guest) -> None:
    console = guest.open(sends=True, receives=True)
    create(guest, "tty", document("/bin/sh", terminal=True), console=console)
    guest.call("start", container="tty")
    guest.call("resize", container="tty", exec_id="", width=91, height=37)
    guest.channel.send(console, b"stty size; exit 5\n")
    assert guest.exit_of("tty").code == 5
    assert "37 91" in guest.read(console)
    guest.until(lambda: console in guest.stopped, "the guest to want no more input")
    guest.call("delete", container="tty")


def test_output_waits_for_credit_and_none_is_lost(guest: Guest) -> None:
    out = guest.open(receives=True)
    guest.held_back.add(out)
    create(guest, "loud", document("/bin/sh", "-c", "dd if=/dev/zero bs=65536 count=32 2>/dev/null; echo end"), stdout=out)
    guest.call("start", container="loud")
    guest.until(lambda: len(guest.output.get(out, b"")) == support.frames.WINDOW, "the window to be full")
    assert guest.call("stats", container="loud")["pids"] >= 1  # it waits; the agent does not
    guest.held_back.discard(out)
    guest.channel.consumed(out, support.frames.WINDOW)
    guest.until(lambda: out in guest.ended, "the output to end")
    assert len(guest.output[out]) == 32 * 65536 + 4
    assert guest.output[out].endswith(b"\0end\n")
    assert guest.exit_of("loud").code == 0
    guest.call("delete", container="loud")


def test_input_that_nobody_reads_is_stopped(guest: Guest) -> None:
    feed = guest.open(sends=True)
    create(guest, "deaf", document("/bin/true"), stdin=feed)
    guest.call("start", container="deaf")
    assert guest.exit_of("deaf").code == 0
    guest.until(lambda: feed in guest.stopped, "the input to be stopped")
    guest.call("delete", container="deaf")


def test_a_hog_at_its_limit_ends_as_oom_killed_and_the_guest_lives_on(guest: Guest) -> None:
    create(
        guest, "hog", document("/bin/sh", "-c", "x=$(dd if=/dev/zero bs=1M count=64 2>/dev/null | head -c 64M)", limit=8 << 20)
    )
    guest.call("start", container="hog")
    ended = guest.exit_of("hog")
    guest.call("delete", container="hog")
    assert ended.code != 0
    assert ended.oom_killed or ended.code != 137
    assert run(guest, "after", "/bin/echo", "alive") == (0, "alive\n")


def test_a_clone_is_given_an_identity_of_its_own(guest: Guest) -> None:
    now = time.time_ns() + 3_600_000_000_000
    machine_id = uuid.uuid4().hex
    guest.call("identify", entropy=os.urandom(64), now_ns=now, hostname="clone-1", machine_id=machine_id)
    code, text = run(guest, "who", "/bin/sh", "-c", "hostname; busybox date +%s")
    name, seconds = text.split()
    assert (code, name) == (0, "clone-1")
    assert abs(int(seconds) - now // 10**9) < 60
    with pytest.raises(Invalid, match="entropy"):
        guest.call("identify", entropy=b"short", now_ns=now, hostname="x", machine_id=machine_id)


def test_the_link_gets_the_pods_addresses_and_routes(guest: Guest) -> None:
    guest.call(
        "network",
        mac="02:00:0a:76:00:07",
        addresses=["10.118.0.7/16"],
        gateway="10.118.0.1",
        routes=[["default", "10.118.0.1"], ["192.0.2.0/24", "10.118.0.9"]],
        mtu=1400,
        dns=["nameserver 192.0.2.53"],
    )
    _, text = run(guest, "net", "/bin/sh", "-c", "ip addr show eth0; ip route")
    assert "mtu 1400" in text and "02:00:0a:76:00:07" in text and "inet 10.118.0.7/16" in text
    assert "default via 10.118.0.1 dev eth0" in text and "192.0.2.0/24 via 10.118.0.9 dev eth0" in text


def test_a_volumes_files_switch_as_one(guest: Guest) -> None:
    first = [
        p.File(path="key", content=b"old", mode=0o400),
        p.File(path="deep/er", content=b"x"),
        p.File(path="gone", content=b"y"),
    ]
    place = guest.call("files", name="cm", generation="g1", files=first).path
    volume = {"destination": "/cm", "type": "bind", "source": place, "options": ["rbind", "ro"]}
    settings = document("/bin/sleep", "1000")
    settings["mounts"].append(volume)
    create(guest, "mounted", settings)
    guest.call("start", container="mounted")

    def inside(script: str) -> str:
        out = guest.open(receives=True)
        name = f"x{out}"
        process = document("/bin/sh", "-c", script)["process"]
        guest.call("execute", container="mounted", exec_id=name, process=process, stdout=out)
        return guest.read(out)

    assert inside("cat /cm/key /cm/deep/er; stat -L -c %a /cm/key") == "oldx400\n"
    guest.call("files", name="cm", generation="g2", files=[p.File(path="key", content=b"new")])
    assert inside("cat /cm/key; ls /cm") == "newkey\n"
    guest.call("kill", container="mounted", signal=9)
    guest.exit_of("mounted")
    guest.call("delete", container="mounted")
    guest.call("remove_volume", name="cm")


def test_a_file_that_a_container_wrote_can_be_read_back(guest: Guest) -> None:
    place = guest.call("files", name="term", files=[p.File(path="log", mode=0o666)]).path
    settings = document("/bin/sh", "-c", "echo why > /dev/termination-log")
    settings["mounts"].append(
        {"destination": "/dev/termination-log", "type": "bind", "source": f"{place}/log", "options": ["bind"]}
    )
    create(guest, "dying", settings)
    guest.call("start", container="dying")
    assert guest.exit_of("dying").code == 0
    assert guest.call("read_file", name="term", path="log").content == b"why\n"
    guest.call("delete", container="dying")
    with pytest.raises(Invalid, match="no path below it"):
        guest.call("files", name="term", files=[p.File(path="../x")])
    guest.call("files", name="term", files=[p.File(path="way", kind="link", content=b"/etc")])
    with pytest.raises(Failure):
        guest.call("files", name="term", files=[p.File(path="way", kind="directory", mode=0o777)])
    for path in ("../../etc/passwd", "/etc/passwd"):
        with pytest.raises(NotFound):
            guest.call("read_file", name="term", path=path)


def test_an_empty_directory_has_its_size_and_mode(guest: Guest) -> None:
    place = guest.call("volume", name="scratch", size_bytes=1 << 20, mode=0o1777).path
    settings = document("/bin/sh", "-c", "stat -c %a /s; dd if=/dev/zero of=/s/big bs=64k count=32 2>/dev/null || echo full")
    settings["mounts"].append({"destination": "/s", "type": "bind", "source": place, "options": ["bind"]})
    out = guest.open(receives=True)
    create(guest, "scratch", settings, stdout=out)
    guest.call("start", container="scratch")
    guest.exit_of("scratch")
    assert guest.read(out) == "1777\nfull\n"
    guest.call("delete", container="scratch")
    guest.call("remove_volume", name="scratch")


def test_memory_and_processors_that_are_plugged_in_are_used(guest: Guest) -> None:
    before = guest.call("machine")
    asked = guest.ask("machine", memory_bytes=200 << 20, cpus=2, wait_s=30)
    guest.step(0.1)
    guest.plug("qom-set", path="/machine/peripheral/memory", property="requested-size", value=200 << 20)
    guest.plug("device_add", driver="max-x86_64-cpu", id="cpu1", **{"socket-id": 1, "core-id": 0, "thread-id": 0})
    size = guest.answer(asked, "machine")
    assert size.cpus == before.cpus + 1
    assert size.memory_bytes == before.memory_bytes + (200 << 20) == before.memory_bytes + size.hot_memory_bytes
    guest.plug("qom-set", path="/machine/peripheral/memory", property="requested-size", value=240 << 20)
    assert guest.call("machine", memory_bytes=240 << 20).hot_memory_bytes == 240 << 20
    with pytest.raises(Failure, match=f"there are {240 << 20} bytes and 2 processors"):
        guest.call("machine", cpus=3, wait_s=1)


def test_containers_of_a_pod_can_share_their_processes(guest: Guest) -> None:
    guest.call("sandbox", hostname="shared", shared_pid=True)
    settings = document("/bin/sleep", "1000")
    for space in settings["linux"]["namespaces"]:
        if space["type"] == "pid":
            space["path"] = "/run/host/ns/pid"
    create(guest, "left", settings)
    guest.call("start", container="left")
    out = guest.open(receives=True)
    settings["process"]["args"] = ["/bin/busybox", "ps", "-o", "pid,args"]
    create(guest, "right", settings, slot="slot1", stdout=out)
    guest.call("start", container="right")
    assert guest.exit_of("right").code == 0
    listed = guest.read(out)
    assert "sleep 1000" in listed
    assert "nacre-pod-init" in listed or "    1 " in listed
    guest.call("kill", container="left", signal=9)
    assert guest.exit_of("left").code == 137
    for name in ("left", "right"):
        guest.call("delete", container=name)


def test_the_throw_away_container_warms_the_guest_and_leaves_nothing(guest: Guest) -> None:
    guest.call("warm")
    guest.call("warm")
    _, text = run(guest, "look", "/bin/sh", "-c", "cat /proc/self/mountinfo | wc -l; ls /sys/fs/cgroup")
    assert "nacre-warm" not in text


def stock_document(script: str, **process: Any) -> dict[str, Any]:
    """One for which the guest has containers made ahead."""
    config = document("/bin/sh", "-c", script, **process)
    binds = [one for one in config["mounts"] if one["type"] == "bind"]
    namespaces = [{"type": kind} for kind in ("mount", "pid", "cgroup")]
    linux = {"namespaces": namespaces, "maskedPaths": list(stock.MASKED), "readonlyPaths": list(stock.READONLY)}
    limits = {"devices": stock.device_rules(), "memory": {"limit": 64 << 20}, "pids": {"limit": 50}}
    config.pop("hostname")
    return config | {"mounts": [*stock.mounts(), *binds], "linux": linux | {"resources": limits}}


def told(guest: Guest, name: str, config: dict[str, Any]) -> tuple[int, str]:
    """(its pid in the guest, what it wrote)."""
    out = guest.open(receives=True)
    pid = guest.call("create", container=name, config=config, root=p.Root(drive="slot0", uuid=ROOT_ID), stdout=out).pid
    guest.call("start", container=name)
    assert guest.exit_of(name).code == 0
    text = guest.read(out)
    guest.call("delete", container=name)
    return pid, text


@pytest.mark.parametrize(
    "process",
    [
        {},
        {
            "user": {"uid": 7, "gid": 8, "additionalGids": [9]},
            "cwd": "/made/here",
            "noNewPrivileges": True,
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 128}],
        },
    ],
    ids=["root", "a user"],
)
def test_a_container_made_ahead_is_what_one_made_from_the_beginning_is(guest: Guest, process: dict[str, Any]) -> None:
    guest.call("warm")
    before, _ = told(guest, "before", _other_way(stock_document("true")))
    script = (
        "cat /proc/self/mountinfo; echo =; cat /proc/self/status; echo =; cat /proc/self/limits /proc/self/cgroup; pwd;"
        " ls -l /dev; ls /proc/sys /sys/fs/cgroup; cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max"
    )
    config = stock_document(script, **process)
    one_pid, one = told(guest, "this-way", config)
    other_pid, other = told(guest, "that-way", _other_way(config))
    assert one_pid < before < other_pid, "the first was not made ahead"
    for ahead, ordinary in zip(map(_comparable, one.split("=\n")), map(_comparable, other.split("=\n")), strict=True):
        assert ahead == ordinary
    assert " /proc/sys ro," in one and "67108864\n50\n" in one


def _comparable(text: str) -> list[str]:
    """Lines without what any two containers differ in: numbers of mounts and processes, sizes, times, their own names."""
    lines = text.replace("this-way", "NAME").replace("that-way", "NAME").splitlines()
    if " - overlay " in text:
        return sorted(" ".join(line.split()[3:]) for line in lines)
    own = ("Pid:", "PPid:", "Tgid:", "NS", "Vm", "Rss", "SigQ:", "State:", "voluntary", "nonvoluntary")
    return [re.sub(r"[A-Z][a-z]{2} +\d+ \d\d:\d\d", "TIME", line) for line in lines if not line.startswith(own)]


def _other_way(config: dict[str, Any]) -> dict[str, Any]:
    """The same in another order, which is not the common one."""
    return config | {"linux": config["linux"] | {"maskedPaths": list(reversed(stock.MASKED))}}


def test_a_request_of_the_wrong_shape_is_answered_not_believed(guest: Guest) -> None:
    with pytest.raises(Invalid, match=r"kill.*signal"):
        guest.channel.message({"id": 10**6, "method": "kill", "params": {"container": "x", "signal": "9"}})
        guest.answer(10**6, "kill")
    with pytest.raises(Invalid, match="no method"):
        guest.channel.message({"id": 10**6 + 1, "method": "__init__", "params": {}})
        guest.answer(10**6 + 1, "kill")
    with pytest.raises(Invalid, match="is no name"):
        guest.channel.message({"id": 10**6 + 2, "method": "start", "params": {"container": "../x"}})
        guest.answer(10**6 + 2, "start")
    assert support.hello(guest).version == p.VERSION


def test_a_host_that_breaks_the_protocol_ends_the_guest_with_the_reason_on_its_console(guest: Guest) -> None:
    """The last one here: the guest does not survive it."""
    guest.sock.sendall(struct.pack("!IIB3s", 5, 0xFFFFFF, 0, bytes(3)) + b"hello")
    assert guest.process.wait(30) == 0
    assert f"stream {0xFFFFFF} was never opened" in guest.said()
