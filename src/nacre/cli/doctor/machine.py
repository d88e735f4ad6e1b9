"""The doctor's look at the machine as such: who we are, what time it is, how much room there is."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Iterator

from nacre import __version__
from nacre.cli import kubectl as kubectl_command
from nacre.cli.doctor.finding import Finding, Verdict
from nacre.cli.output import size
from nacre.config import Config
from nacre.linux import capabilities
from nacre.oci.errors import NotFound

NEEDED = ("CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_CHOWN", "CAP_SETUID", "CAP_SETGID", "CAP_MKNOD", "CAP_SYS_CHROOT", "CAP_KILL")
WANTED = {
    "CAP_SYS_RESOURCE": "oom_score_adj cannot be lowered and hard rlimits cannot be raised: pods get what can be given",
    "CAP_SYS_PTRACE": "processes of other users cannot be named",
    "CAP_AUDIT_WRITE": "a login server's audit records fail",
}
DISK_BAD, DISK_WARN = 256 << 20, 3 << 30  # bytes
INOTIFY_WARN = 0.8  # of the limit


def privileges(_config: Config) -> Iterator[Finding]:
    """Root, and the capabilities a node needs, by what this process really has."""
    if os.geteuid() != 0:
        yield Finding("privileges", Verdict.BAD, f"user id {os.geteuid()} is not root", (), "sudo nacre doctor")
        return
    have = capability_names()
    missing = [name for name in NEEDED if name not in have]
    if missing:
        yield Finding(
            "privileges",
            Verdict.BAD,
            f"root without {', '.join(missing)}",
            (f"CapEff of this process: {len(have)} capabilities",),
            "start nacre outside this container, or give it these capabilities",
        )
        return
    lost = tuple(f"{name}: {effect}" for name, effect in WANTED.items() if name not in have)
    yield Finding(
        "privileges", Verdict.NOTE if lost else Verdict.OK, "root" + (", not with every capability" if lost else ""), lost
    )


def capability_names() -> set[str]:
    """Effective capabilities of this process."""
    effective, _permitted, _inheritable = capabilities.capget()
    return set(capabilities.names(effective))


def clock(_config: Config) -> Iterator[Finding]:
    """Certificates and caches need a clock that is not before nacre itself was made."""
    import nacre

    built = os.stat(nacre.__file__).st_mtime
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    if now < built - 86400:
        yield Finding(
            "clock",
            Verdict.BAD,
            f"{shown} lies before nacre {__version__} was installed",
            (f"installed {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(built))}",),
            "set the clock: timedatectl set-ntp true, or date -s",
        )
    else:
        yield Finding("clock", Verdict.OK, shown)


def disk(config: Config) -> Iterator[Finding]:
    """Room for images and state."""
    for title, path in (("data", config.data), ("state", config.state)):
        place = existing(path)
        free = shutil.disk_usage(place).free
        inodes = os.statvfs(place).f_favail
        verdict = Verdict.BAD if free < DISK_BAD else Verdict.WARN if free < DISK_WARN and title == "data" else Verdict.OK
        if os.statvfs(place).f_files and inodes < 10_000:
            verdict = Verdict.BAD
        says = f"{size(free)} free for {title} ({path})"
        remedy = "free some room, or put a disk there" if verdict is not Verdict.OK else ""
        yield Finding("disk", verdict, says, (f"{inodes} inodes free",) if verdict is Verdict.BAD else (), remedy)


def existing(path: str) -> str:
    """`path`, or its nearest ancestor that exists."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def limits(_config: Config) -> Iterator[Finding]:
    """File descriptors, inotify instances (nacre itself uses none per pod, other software on the host does), OOM score."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    verdict = Verdict.WARN if hard < 4096 else Verdict.OK
    yield Finding("limits", verdict, f"{hard} open files (now {soft})", (), "ulimit -Hn 65536" if verdict is Verdict.WARN else "")
    instances = _number("/proc/sys/fs/inotify/max_user_instances")
    used = _inotify_instances()
    if used > INOTIFY_WARN * instances:
        yield Finding(
            "limits",
            Verdict.WARN,
            f"{used} of root's {instances} inotify instances are in use",
            ("software in pods that watches files will say: too many open files",),
            "sysctl fs.inotify.max_user_instances=512",
        )
    score = _number("/proc/self/oom_score_adj")
    if score > 0:
        yield Finding("limits", Verdict.NOTE, f"oom_score_adj is {score} here, and the daemon inherits it")


def _number(path: str) -> int:
    with open(path) as file:
        return int(file.read())


def _inotify_instances() -> int:
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid == 0:
                count += sum(os.readlink(entry.path) == "anon_inode:inotify" for entry in os.scandir(f"/proc/{pid}/fd"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return count


def kubectl(_config: Config) -> Iterator[Finding]:
    try:
        yield Finding("kubectl", Verdict.OK, kubectl_command.find())
    except NotFound as error:
        yield Finding("kubectl", Verdict.WARN, error.cause, (), error.remedy)
