"""The doctor's look at the kernel: what it can do is tried in a child with namespaces of its own, so nothing stays."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

from nacre.cli.doctor.finding import Finding, Verdict
from nacre.config import Config
from nacre.linux import cgroups, links, mounts, namespaces, nftables, tap  # all: a trial hides /tmp, where nacre may lie
from nacre.oci.errors import Failure

NEEDED = ("memory", "pids", "cpu", "devices", "freezer")


def control_groups(_config: Config) -> Iterator[Finding]:
    """Per controller: where it is found; then a group is made with each of them and taken away."""
    layout = cgroups.discover()
    evidence = tuple(layout.describe())
    absent = [name for name in NEEDED if layout.find(name) is None]
    for name in absent[:1] if layout.mode == "none" else absent:
        failure = cgroups.missing(name, "limit pods", layout.looked)
        yield Finding("cgroups", Verdict.BAD, failure.cause, evidence, failure.remedy)
    if absent or os.geteuid() != 0:
        return
    trial = cgroups.Cgroup(layout, f"/nacre-doctor-{os.getpid()}")
    try:
        trial.create()
        trial.apply({"memory": {"limit": 64 << 20}, "pids": {"limit": 64}, "cpu": {"shares": 128}})
    except Failure as failure:
        yield Finding("cgroups", Verdict.BAD, str(failure), evidence, failure.remedy)
        return
    finally:
        trial.remove()
    yield Finding("cgroups", Verdict.OK, f"layout {layout.mode}; a group with limits could be made", evidence)


def features(_config: Config) -> Iterator[Finding]:
    """Every feature by doing it; needed ones make pods impossible, others make some of them impossible."""
    outcome = in_child(_try_features)
    needed = {"overlayfs", "veth", "bridge", "namespaces", "new mount API"}
    good = [name for name, error in outcome.items() if not error]
    if good:
        yield Finding("kernel features", Verdict.OK, f"Linux {os.uname().release}: {', '.join(good)}")
    for name, error in outcome.items():
        if error:
            verdict = Verdict.BAD if name in needed else Verdict.WARN
            yield Finding("kernel features", verdict, f"{name}: {error}", (), REMEDIES.get(name, ""))


REMEDIES = {
    "overlayfs": "modprobe overlay",
    "erofs": "modprobe erofs (only the host's own use of VM images needs it; guests bring theirs)",
    "veth": "modprobe veth",
    "bridge": "modprobe bridge",
    "nftables": "modprobe nf_tables (masquerade and host ports)",
    "tun": "modprobe tun (the network of VM pods)",
    "user namespaces": "sysctl user.max_user_namespaces=15000 (pods with hostUsers: false)",
}


def _try_features() -> dict[str, str]:
    """Runs in a child: own mount and network namespaces first, the rest inside them."""
    outcome: dict[str, str] = {}

    def attempt(name: str, act: Callable[[], object]) -> None:
        try:
            act()
            outcome[name] = ""
        except (OSError, Failure) as error:
            outcome[name] = str(error)

    Clone = namespaces.Clone
    attempt("namespaces", lambda: os_unshare(Clone.NEWNS | Clone.NEWNET | Clone.NEWUTS | Clone.NEWIPC))
    if not outcome["namespaces"]:
        attempt("private mounts", lambda: mounts.mount(None, "/", None, mounts.MountFlag.REC | mounts.MountFlag.PRIVATE))
    if any(outcome.values()):
        return outcome  # without them a trial would be seen outside
    directory = tempfile.gettempdir()
    mounts.mount("nacre-doctor", directory, "tmpfs", 0, "size=1m")
    attempt("new mount API", lambda: os.close(mounts.bind_tree(directory, recursive=False)))
    attempt("overlayfs", lambda: _overlay(directory))
    for name in ("erofs", "nftables", "veth", "bridge", "tun"):
        attempt(name, _TRIALS[name])
    attempt("user namespaces", lambda: os_unshare(Clone.NEWUSER))
    return outcome


def os_unshare(flags: namespaces.Clone) -> None:
    namespaces.unshare(flags)


def _overlay(directory: str) -> None:
    for name in ("lower", "upper", "work", "merged"):
        os.mkdir(f"{directory}/{name}")
    options = f"lowerdir={directory}/lower,upperdir={directory}/upper,workdir={directory}/work"
    mounts.mount("overlay", f"{directory}/merged", "overlay", 0, options)


def _erofs() -> None:
    with open("/proc/filesystems") as file:
        if any(line.split()[-1] == "erofs" for line in file):
            return
    raise OSError("not among /proc/filesystems")


def _nftables() -> None:
    nftables.list_tables()


def _veth() -> None:
    links.create_veth("doctor0", "doctor1")


def _bridge() -> None:
    links.create_bridge("doctor2")


def _tun() -> None:
    os.close(tap.open_tap("doctor3"))


_TRIALS = {"erofs": _erofs, "nftables": _nftables, "veth": _veth, "bridge": _bridge, "tun": _tun}


def in_child(work: Callable[[], dict[str, str]]) -> dict[str, str]:
    """`work`'s answer, done in a forked child whose namespaces end with it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = work()
        except BaseException as error:  # the child's boundary: whatever it was, the parent reads it
            answer = {"trial": f"{type(error).__name__}: {error}"}
        os.write(write, json.dumps(answer).encode())
        sys.stdout.flush()
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    answer = json.loads(data or b"{}")
    return {str(key): str(value) for key, value in answer.items()}


def seccomp(_config: Config) -> Iterator[Finding]:
    """libseccomp, through which the pods' filters are compiled."""
    from nacre.linux import seccomp_compiler

    if seccomp_compiler.available():
        yield Finding("seccomp", Verdict.OK, "libseccomp can be loaded")
    else:
        yield Finding("seccomp", Verdict.BAD, "libseccomp cannot be loaded", (), "apt-get install libseccomp2")
