"""checkpoint and restore: what CRIU is asked, what is refused, and the whole way where this machine has a CRIU that works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runc_support import Bundle, environment, leftovers, made

from nacre.oci.errors import Invalid
from nacre.oci.state import Record
from nacre.runc import checkpoint

CRIU = os.environ.get("NACRE_TEST_CRIU", "criu")


def criu_refuses() -> str:
    """Why CRIU cannot be used here; "" when it can."""
    if shutil.which(CRIU) is None:
        return f"there is no {CRIU} (NACRE_TEST_CRIU)"
    done = subprocess.run([CRIU, "check"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"criu check: {done.stderr.strip().splitlines()[-1:]}"


with_criu = pytest.mark.skipif(bool(why := criu_refuses()), reason=why)


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as one:
        yield one


def counting(bundle: Bundle, place: Path) -> Bundle:
    place.mkdir()
    bundle.mount("/mnt", "bind", str(place), "rbind")
    return bundle.script("i=0; while :; do i=$((i+1)); echo $i >/mnt/new; mv /mnt/new /mnt/count; sleep 0.1; done")


def count(place: Path) -> int:
    return int((place / "count").read_text())


def grows(place: Path) -> int:
    """Wait until the container counts on; what it counts from."""
    before, until = count(place), time.monotonic() + 20
    while count(place) == before:
        assert time.monotonic() < until, "it does not count any more"
        time.sleep(0.05)
    return before


def started(bundle: Bundle, command: str, *options: str) -> subprocess.Popen[str]:
    """A foreground run or restore, its stdio pipes and /dev/null."""
    words = [*bundle.runtime, "--root", str(bundle.root), "--criu", CRIU, command, "-b", str(bundle.path), *options, bundle.name]
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=environment(), **settings)


def ended(command: subprocess.Popen[str]) -> int:
    command.communicate(timeout=20)
    return command.returncode


def until_running(bundle: Bundle) -> None:
    until = time.monotonic() + 20
    while bundle.call("state", bundle.name).stdout.find('"running"') < 0:
        assert time.monotonic() < until
        time.sleep(0.05)


@with_criu
def test_a_container_is_frozen_to_disk_and_counts_on_where_it_was(bundle: Bundle, tmp_path: Path) -> None:
    place, images = tmp_path / "volume", str(tmp_path / "images")
    counting(bundle, place).write()
    first = started(bundle, "run")
    until_running(bundle)
    grows(place)
    bundle.ok("--criu", CRIU, "checkpoint", "--image-path", images, bundle.name)
    assert ended(first) == 137
    assert bundle.ok("list", "-q") == "", "what is frozen is gone, as with runc"
    frozen = count(place)
    second = started(bundle, "restore", "--image-path", images)
    until_running(bundle)
    assert grows(place) >= frozen
    told = bundle.inside(
        "echo $(hostname); cat /proc/1/comm; cut -d: -f3 /proc/1/cgroup | sort -u | grep -c nacre-test; echo end"
    )
    assert told.split() == ["nacre", "sh", "0", "end"], "its own names and cgroups"
    bundle.ok("kill", bundle.name, "KILL")
    assert ended(second) == 137
    assert bundle.ok("list", "-q") == ""


@with_criu
def test_a_container_may_go_on_after_its_checkpoint(bundle: Bundle, tmp_path: Path) -> None:
    place = tmp_path / "volume"
    counting(bundle, place).write()
    first = started(bundle, "run")
    until_running(bundle)
    bundle.ok("--criu", CRIU, "checkpoint", "--image-path", str(tmp_path / "images"), "--leave-running", bundle.name)
    grows(place)
    bundle.ok("kill", bundle.name, "KILL")
    assert ended(first) == 137


def identity(path: str) -> str | None:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return None  # a namespace of processes has nobody yet


@contextmanager
def held(kind: str, *words: str) -> Iterator[str]:
    """The path of a namespace that `unshare` makes and a process holds meanwhile."""
    with subprocess.Popen(["unshare", *words]) as holder:
        try:
            path, until = f"/proc/{holder.pid}/ns/{kind}", time.monotonic() + 10
            while identity(path) in (None, identity(f"/proc/self/ns/{kind}")):
                assert time.monotonic() < until
            yield path
        finally:
            holder.kill()


def join(bundle: Bundle, kind: str, path: str) -> None:
    kept = [one for one in bundle.linux["namespaces"] if one["type"] != kind]
    bundle.linux["namespaces"] = [*kept, {"type": kind, "path": path}]


def thawed(bundle: Bundle, tmp_path: Path) -> int:
    """Run, frozen to disk and restored in the background; the pid of its init then."""
    images = str(tmp_path / "images")
    counting(bundle, tmp_path / "volume").write()
    first = started(bundle, "run")
    until_running(bundle)
    grows(tmp_path / "volume")
    bundle.ok("--criu", CRIU, "checkpoint", "--image-path", images, bundle.name)
    assert ended(first) == 137
    bundle.quietly("--criu", CRIU, "restore", "--detach", "-b", str(bundle.path), "--image-path", images, bundle.name)
    grows(tmp_path / "volume")
    return int(bundle.state()["pid"])


@with_criu
def test_a_network_from_outside_is_joined_again_and_restore_may_return_at_once(bundle: Bundle, tmp_path: Path) -> None:
    with held("net", "--net", "sleep", "1000") as path:
        join(bundle, "network", path)
        assert os.readlink(f"/proc/{thawed(bundle, tmp_path)}/ns/net") == os.readlink(path)
        bundle.ok("delete", "--force", bundle.name)


@with_criu
def test_a_pid_namespace_from_outside_is_joined_again(bundle: Bundle, tmp_path: Path) -> None:
    reaps = ("sh", "-c", "sleep 1000 & wait")  # a dead member of the container's session would hold its number
    with held("pid_for_children", "--pid", "--fork", "--kill-child", *reaps) as path:
        join(bundle, "pid", path)
        assert os.readlink(f"/proc/{thawed(bundle, tmp_path)}/ns/pid") == os.readlink(path)
        bundle.ok("delete", "--force", bundle.name)


@with_criu
def test_hooks_of_a_restore_see_the_restored_network_and_criu_reads_the_annotations_file(bundle: Bundle, tmp_path: Path) -> None:
    told, script = tmp_path / "told", tmp_path / "script"
    look = f"""pid=$(sed 's/.*"pid": *\\([0-9]*\\).*/\\1/'); echo $pid $(readlink /proc/$pid/ns/net) >> {told}"""
    bundle.config["hooks"] = {"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", look]}]}
    script.write_text(f'#!/bin/sh\necho "$CRTOOLS_SCRIPT_ACTION" >> {tmp_path}/actions\n')
    script.chmod(0o755)
    (tmp_path / "criu.conf").write_text(f"action-script {script}\n")
    bundle.config["annotations"] = {"org.criu.config": str(tmp_path / "criu.conf")}
    pid = thawed(bundle, tmp_path)
    assert told.read_text().splitlines()[-1].split() == [str(pid), os.readlink(f"/proc/{pid}/ns/net")]
    assert len(told.read_text().splitlines()) == 2, "at its creation and at its restore"
    assert "post-dump" in (tmp_path / "actions").read_text().split()
    bundle.ok("delete", "--force", bundle.name)


@with_criu
def test_images_that_are_none_are_told_and_nothing_is_left(bundle: Bundle, tmp_path: Path) -> None:
    bundle.script("true").write()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "descriptors.json").write_text('["/dev/null", "pipe:[1]", "pipe:[2]"]')
    words = ("--criu", CRIU, "restore", "-b", str(bundle.path), "--image-path", str(tmp_path / "images"), bundle.name)
    told = bundle.fails(*words)
    assert "restore container" in told and "criu restore ended with 1" in told and "restore.log" in told


def test_without_criu_both_are_refused_with_the_way_to_get_it(bundle: Bundle) -> None:
    bundle.up()
    for words in (("checkpoint", bundle.name), ("restore", "-b", str(bundle.path), "other")):
        told = bundle.fails("--criu", "/nowhere/criu", *words)
        assert "/nowhere/criu is not installed" in told and "apt-get install criu" in told


@pytest.fixture
def failing_criu(tmp_path: Path) -> str:
    tool = tmp_path / "criu"
    tool.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 3\n")
    tool.chmod(0o755)
    return str(tool)


def test_what_criu_says_is_the_evidence_and_the_container_goes_on(bundle: Bundle, tmp_path: Path, failing_criu: str) -> None:
    bundle.up()
    images = tmp_path / "images"
    told = bundle.fails("--criu", failing_criu, "checkpoint", "--image-path", str(images), bundle.name)
    assert "criu dump ended with 3" in told and "no such option" in told and f"{images}/dump.log" in told
    assert bundle.state()["status"] == "running"
    bundle.ok("delete", "--force", bundle.name)
    (images / "descriptors.json").write_text("[]")
    told = bundle.fails("--criu", failing_criu, "restore", "-b", str(bundle.path), "--image-path", str(images), bundle.name)
    assert "criu restore ended with 3" in told and leftovers(bundle) == []


SEEMING = """#!/bin/sh
while [ $# -gt 0 ]; do case $1 in --pidfile) pidfile=$2;; --action-script) script=$2;; esac; shift; done
setsid sleep 1000 > /dev/null 2>&1 & echo $! > "$pidfile"; export CRTOOLS_INIT_PID=$!
for CRTOOLS_SCRIPT_ACTION in pre-restore setup-namespaces post-restore; do
    export CRTOOLS_SCRIPT_ACTION; "$script" || { kill $CRTOOLS_INIT_PID; exit 1; }
done
"""


@pytest.fixture
def seeming_criu(bundle: Bundle, tmp_path: Path) -> tuple[str, ...]:
    """What CRIU's other end does, with a process that is no container's: the words of a restore."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "descriptors.json").write_text("[]")
    (tmp_path / "criu").write_text(SEEMING)
    (tmp_path / "criu").chmod(0o755)
    images = str(tmp_path / "images")
    return ("--criu", str(tmp_path / "criu"), "restore", "--detach", "-b", str(bundle.path), "--image-path", images, bundle.name)


def test_hooks_of_the_creation_are_run_once_the_namespaces_are_there(
    bundle: Bundle, tmp_path: Path, seeming_criu: tuple[str, ...]
) -> None:
    told = tmp_path / "told"
    for point in ("prestart", "createRuntime", "createContainer", "startContainer", "poststart"):
        hook = {"path": "/bin/sh", "args": ["sh", "-c", f"printf '{point} ' >> {told}; cat >> {told}; echo >> {told}"]}
        bundle.config.setdefault("hooks", {})[point] = [hook]
    bundle.write()
    bundle.quietly(*seeming_criu)
    lines = [line.partition(" ") for line in told.read_text().splitlines()]
    assert [point for point, _, _ in lines] == ["prestart", "createRuntime"], "those that runc runs then"
    pid = bundle.state()["pid"]
    assert [(json.loads(text)["pid"], json.loads(text)["status"]) for _, _, text in lines] == [(pid, "created")] * 2
    assert sorted(os.listdir(tmp_path / "images")) == ["descriptors.json"]
    bundle.ok("delete", "--force", bundle.name)


def test_a_hook_that_fails_ends_the_restore_and_poststop_is_due(
    bundle: Bundle, tmp_path: Path, seeming_criu: tuple[str, ...]
) -> None:
    bundle.config["hooks"] = {
        "createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", "echo no network; exit 3"]}],
        "poststop": [{"path": "/bin/sh", "args": ["sh", "-c", f"cat > {tmp_path}/stopped"]}],
    }
    bundle.write()
    told = bundle.fails(*seeming_criu)
    assert "run the createRuntime hook" in told and "status 3" in told and "no network" in told
    assert json.loads((tmp_path / "stopped").read_text())["status"] == "stopped" and leftovers(bundle) == []


def test_what_cannot_be_frozen_is_refused_by_name(bundle: Bundle, tmp_path: Path, failing_criu: str) -> None:
    def told(name: str, *options: str) -> str:
        return bundle.fails("--criu", failing_criu, "checkpoint", "--image-path", str(tmp_path / "i"), *options, name)

    bundle.script("sleep 100").create()
    assert "it is created" in told(bundle.name)
    bundle.ok("start", bundle.name)
    assert "--manage-cgroups-mode is 'hard'" in told(bundle.name, "--manage-cgroups-mode", "hard")
    assert "--page-server is 'here'" in told(bundle.name, "--page-server", "here")
    assert "--empty-ns is 'pid'" in told(bundle.name, "--empty-ns", "pid")
    bundle.ok("delete", "--force", bundle.name)
    bundle.linux["namespaces"] = [
        one | {"path": "/proc/self/ns/uts"} if one["type"] == "uts" else one for one in bundle.linux["namespaces"]
    ]
    del bundle.config["hostname"]
    bundle.up()
    assert "it shares the uts namespace" in told(bundle.name)


def test_criu_is_asked_for_what_the_options_say() -> None:
    record = Record(
        id="web", root="/r", bundle="/b", rootfs="/b/rootfs", pid=os.getpid(), joined={"network": "/run/netns/x", "pid": "/p"}
    )
    options = {
        "tcp-established": True,
        "leave-running": True,
        "parent-path": "../old",
        "page-server": "10.0.0.1:27",
        "status-fd": 9,
    }
    words = " ".join(checkpoint.dump_words(record, options, "/i", "/w", ["file[1a:3]", "pipe:[7]"], "/sys/fs/cgroup/freezer/web"))
    network, pids = (os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "pid"))
    for part in (
        f"dump --tree {os.getpid()} --images-dir /i --work-dir /w ",
        "--external mnt[]:ms",
        "--tcp-established --leave-running",
        "--manage-cgroups=soft --freeze-cgroup /sys/fs/cgroup/freezer/web",
        "--prev-images-dir ../old --status-fd 9 --page-server --address 10.0.0.1 --port 27",
        "--external file[1a:3]",
        f"--external net[{network}]:nacre-network --external pid[{pids}]:nacre-pid",
    ):
        assert part in words
    assert "pipe" not in words
    words = " ".join(checkpoint.restore_words(record, {"lsm-profile": "apparmor:x"}, "/i", "/w", ["file[1a:3]", "pipe:[7]"]))
    assert "restore --images-dir /i" in words and "--lsm-profile apparmor:x" in words and "--root /b/rootfs" in words
    assert (
        "--inherit-fd fd[100]:file[1a:3] --inherit-fd fd[101]:pipe:[7] --inherit-fd fd[102]:nacre-network --inherit-fd fd[103]:nacre-pid"
        in words
    )
    asked = record.but(annotations={"org.criu.config": "/etc/mine.conf"})
    assert "--config /etc/mine.conf" in " ".join(checkpoint.restore_words(asked, {}, "/i", "/w", []))
    assert "--config" not in checkpoint.dump_words(record.but(annotations={"org.criu.config": ""}), {}, "/i", "/w", [], "")
    with pytest.raises(Invalid, match="hard"):
        checkpoint.restore_words(record, {"manage-cgroups-mode": "hard"}, "/i", "/w", [])
