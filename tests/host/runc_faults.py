"""The ways in which a container fails to start, each as a change to a bundle that starts: for test_runc_errors and for docs/errors.md.

A fault has a name, a change, the words that nacre's message must have (its object, and the step or the key), and whether there is a remedy.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runc_support import Bundle

from nacre.linux import cgroups

Change = Callable[[Bundle], Any]


@dataclass(frozen=True)
class Fault:
    name: str
    change: Change
    words: tuple[str, ...]
    remedy: bool = False


FAULTS: list[Fault] = []


def fault(name: str, change: Change, *words: str, remedy: bool = False) -> None:
    FAULTS.append(Fault(name, change, words, remedy))


def put(bundle: Bundle, name: str, content: bytes | str, mode: int = 0o755) -> None:
    place = bundle.rootfs / "bin" / name
    place.write_bytes(content.encode() if isinstance(content, str) else content)
    place.chmod(mode)
    bundle.args(f"/bin/{name}")


def namespaces(bundle: Bundle, *without: str, **paths: str) -> None:
    kept = [one for one in bundle.linux["namespaces"] if one["type"] not in (*without, *paths)]
    bundle.linux["namespaces"] = kept + [{"type": kind, "path": path} for kind, path in paths.items()]


def elf_for(bundle: Bundle, machine: int) -> None:
    binary = bytearray((bundle.rootfs / "bin" / "busybox").read_bytes())
    binary[18:20] = machine.to_bytes(2, "little")
    put(bundle, "foreign", bytes(binary))


def dynamic(bundle: Bundle) -> None:
    shutil.copy("/bin/true", bundle.rootfs / "bin" / "dynamic")
    bundle.args("/bin/dynamic")


# -- the document
fault("config.json is missing", lambda b: b.config.clear(), "config.json", "No such file", remedy=True)
fault("config.json is not JSON", lambda b: b.config.update({"": b"raw"}), "config.json", "not JSON")
fault("ociVersion of another major", lambda b: b.config.update(ociVersion="2.0.0"), "ociVersion 2.0.0")
fault("no process", lambda b: b.config.pop("process"), "process is missing")
fault("no arguments", lambda b: b.args(), "process.args is empty")
fault("a relative working directory", lambda b: b.process.update(cwd="tmp"), "process.cwd 'tmp'")
fault("a number where a string belongs", lambda b: b.process.update(args=["echo", 7]), "process.args[1]", "not a string")
fault("no root", lambda b: b.config.pop("root"), "root.path is missing")
fault("a root that is not there", lambda b: b.config.update(root={"path": "nowhere"}), "nowhere", "root filesystem")
fault(
    "an unknown namespace", lambda b: b.linux["namespaces"].append({"type": "galaxy"}), "linux.namespaces", "galaxy", remedy=True
)
fault("a host name without a uts namespace", lambda b: namespaces(b, "uts"), "hostname", "rename the host")
fault(
    "a namespace to join that is not there",
    lambda b: namespaces(b, network="/run/netns/gone"),
    "/run/netns/gone",
    "network namespace",
)
fault("a namespace to join of another kind", lambda b: namespaces(b, network="/proc/self/ns/uts"), "network namespace")
# -- mounts
fault(
    "a bind mount's source is missing",
    lambda b: b.mount("/mnt", "bind", "/not/here", "bind"),
    "mount /not/here on /mnt",
    "No such file",
    remedy=True,
)
fault(
    "a directory mounted on a file",
    lambda b: b.mount("/etc/passwd", "bind", "/tmp", "bind"),
    "mount /tmp on /etc/passwd",
    "Not a directory",
)
fault(
    "a file mounted on a directory",
    lambda b: b.mount("/tmp", "bind", "/etc/hostname", "bind"),
    "mount /etc/hostname on /tmp",
    "Invalid argument",
    remedy=True,
)
fault(
    "an unknown file system", lambda b: b.mount("/mnt", "nosuchfs", "x"), "mount nosuchfs on /mnt", "No such device", remedy=True
)
fault(
    "an option that the file system lacks",
    lambda b: b.mount("/mnt", "tmpfs", "x", "taste=sour"),
    "mount tmpfs on /mnt",
    "Invalid argument",
    remedy=True,
)
fault("a mount without type", lambda b: b.mount("/mnt", "", "/tmp"), "mount on /mnt", "neither a type nor the option bind")
fault(
    "proc over a link of the image",
    lambda b: ((b.rootfs / "proc").rmdir(), (b.rootfs / "proc").symlink_to("tmp")),
    "mount proc on /proc",
    "link",
    remedy=True,
)
fault(
    "a mount id-mapped for users alone",
    lambda b: b.mount("/mnt", "bind", "/tmp", "bind", uidMappings=[{"containerID": 0, "hostID": 1, "size": 1}]),
    "mounts[7]",
    "alone",
)
fault(
    "a device that is something else already",
    lambda b: (
        b.mount("/dev/tun", "bind", "/etc/hostname", "bind"),
        b.linux.update(devices=[{"type": "c", "path": "/dev/tun", "major": 10, "minor": 200}]),
    ),
    "make device /dev/tun",
    "File exists",
)
fault("a bad rootfsPropagation", lambda b: b.linux.update(rootfsPropagation="everywhere"), "rootfsPropagation", "everywhere")
# -- kernel settings
fault("a sysctl of the host", lambda b: b.linux.update(sysctl={"vm.swappiness": "1"}), "vm.swappiness", "would change the host")
fault(
    "a sysctl that does not exist",
    lambda b: b.linux.update(sysctl={"net.no.such": "1"}),
    "set sysctl net.no.such",
    "No such file",
)
fault(
    "a sysctl value that the kernel refuses",
    lambda b: b.linux.update(sysctl={"net.ipv4.ip_forward": "many"}),
    "set sysctl net.ipv4.ip_forward to 'many'",
    "Invalid argument",
)
fault(
    "an unknown resource limit",
    lambda b: b.process.update(rlimits=[{"type": "RLIMIT_LUCK", "soft": 1, "hard": 1}]),
    "RLIMIT_LUCK",
)
fault(
    "a soft limit above the hard one",
    lambda b: b.process.update(rlimits=[{"type": "RLIMIT_CORE", "soft": 2, "hard": 1}]),
    "soft 2 is above hard 1",
)
fault("an unknown scheduling policy", lambda b: b.process.update(scheduler={"policy": "SCHED_LAZY"}), "SCHED_LAZY", remedy=True)
fault(
    "an unknown I/O class",
    lambda b: b.process.update(ioPriority={"class": "IOPRIO_CLASS_X", "priority": 1}),
    "IOPRIO_CLASS_X",
    remedy=True,
)
fault("an oom score out of range", lambda b: b.process.update(oomScoreAdj=5000), "oomScoreAdj is 5000")
fault(
    "an AppArmor profile that is not loaded",
    lambda b: b.process.update(apparmorProfile="no-such"),
    "AppArmor profile no-such",
    remedy=True,
)
fault(
    "overlapping id maps",
    lambda b: (
        b.linux["namespaces"].append({"type": "user"}),
        b.linux.update({k: [{"containerID": 0, "hostID": 1, "size": 9}] * 2 for k in ("uidMappings", "gidMappings")}),
    ),
    "map the ids of container",
    "Invalid argument",
)
fault(
    "a user that the namespace does not map",
    lambda b: (
        b.linux["namespaces"].append({"type": "user"}),
        b.linux.update({k: [{"containerID": 0, "hostID": 0, "size": 10}] for k in ("uidMappings", "gidMappings")}),
        b.process.update(user={"uid": 99, "gid": 0}),
    ),
    "become user 99:0",
    "Invalid argument",
)
# -- cgroups
fault("a CPU that is not there", lambda b: b.linux["resources"].update(cpu={"cpus": "900"}), "cpuset.cpus", "'900'")
fault(
    "a CPU quota below the kernel's least",
    lambda b: b.linux["resources"].update(cpu={"quota": 1, "period": 100000}),
    "cpu.",
    "Invalid argument",
)
fault(
    "swap below memory",
    lambda b: b.linux["resources"].update(memory={"limit": 64 << 20, "swap": 32 << 20}),
    "memory.swap",
    "below memory.limit",
)
fault("a controller that is nowhere", lambda b: b.linux["resources"].update(network={"classID": 1}), "net_cls", remedy=True)
fault(
    "a huge page size that does not exist",
    lambda b: b.linux["resources"].update(hugepageLimits=[{"pageSize": "3MB", "limit": 0}]),
    "hugetlb.3MB",
)
if cgroups.discover().need("memory", "know which faults there are").version == 1:
    fault("a v2 key on v1", lambda b: b.linux["resources"].update(unified={"memory.high": "1"}), "memory.high", remedy=True)
fault("cache allocation", lambda b: b.linux.update(intelRdt={"closID": "x"}), "linux.intelRdt", remedy=True)
# -- seccomp
fault("an unknown seccomp action", lambda b: b.linux.update(seccomp={"defaultAction": "SCMP_ACT_X"}), "SCMP_ACT_X", remedy=True)
fault(
    "a filter that forbids execve",
    lambda b: b.linux.update(
        seccomp={"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["execve"], "action": "SCMP_ACT_ERRNO"}]}
    ),
    "execute 'true'",
    "operation not permitted",
)
# -- hooks
fault(
    "a hook that is not there",
    lambda b: b.config.update(hooks={"createRuntime": [{"path": "/no/hook"}]}),
    "createRuntime hook /no/hook",
    "No such file",
)
fault(
    "a hook that fails",
    lambda b: b.config.update(hooks={"prestart": [{"path": "/bin/sh", "args": ["sh", "-c", "echo no license >&2; exit 9"]}]}),
    "prestart hook /bin/sh",
    "status 9",
    "no license",
)
fault(
    "a hook that hangs",
    lambda b: b.config.update(hooks={"createContainer": [{"path": "/bin/sleep", "args": ["sleep", "60"], "timeout": 1}]}),
    "createContainer hook /bin/sleep",
    "within 1 s",
)
# -- the program
fault(
    "a program that is nowhere in PATH",
    lambda b: b.args("nginx"),
    'exec: "nginx": executable file not found in $PATH',
    remedy=True,
)
fault(
    "a shell line given as program", lambda b: b.args("echo hello; echo world"), "executable file not found in $PATH", remedy=True
)
fault("a path that is not there", lambda b: b.args("/usr/sbin/nginx"), 'exec: "/usr/sbin/nginx"', "no such file", remedy=True)
fault(
    "a program without the x bit",
    lambda b: put(b, "tool", "#!/bin/sh\n", 0o644),
    "/bin/tool",
    "permission denied",
    "644",
    remedy=True,
)
fault("a directory as program", lambda b: b.args("/bin"), "/bin", "is a directory", remedy=True)
fault(
    "a script whose interpreter is missing",
    lambda b: put(b, "tool", "#!/usr/bin/python3\n"),
    "/bin/tool",
    "/usr/bin/python3",
    remedy=True,
)
fault("a script with DOS line ends", lambda b: put(b, "tool", "#!/bin/sh\r\ntrue\r\n"), "/bin/tool", "DOS line ends", remedy=True)
fault("a script without its first line", lambda b: put(b, "tool", "true\n"), "exec format error", "no #! line", remedy=True)
fault("an empty program", lambda b: put(b, "tool", ""), "exec format error", "empty", remedy=True)
fault("a program for another machine", lambda b: elf_for(b, 183), "built for aarch64", "x86_64", remedy=True)
fault("a program whose loader is missing", dynamic, "dynamic loader is not in the image", remedy=True)
fault(
    "a program on a mount with noexec",
    lambda b: (b.mount("/mnt", "bind", str(b.rootfs / "bin"), "bind", "noexec"), b.args("/mnt/busybox", "true")),
    "/mnt/busybox",
    "ermission denied",
)
fault(
    "a working directory that is a file",
    lambda b: b.process.update(cwd="/etc/passwd"),
    "chdir(2) /etc/passwd",
    "Not a directory",
    remedy=True,
)
fault(
    "a network device that is not there",
    lambda b: b.linux.update(netDevices={"gone0": {}}),
    "gone0",
    "No such device",
    remedy=True,
)
fault(
    "a seccomp agent that is not there",
    lambda b: b.linux.update(
        seccomp={
            "defaultAction": "SCMP_ACT_ALLOW",
            "listenerPath": "/nowhere/agent",
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}],
        }
    ),
    "/nowhere/agent",
    "No such file",
    remedy=True,
)


def break_bundle(bundle: Bundle, one: Fault) -> None:
    """The bundle on disk with the fault in it."""
    one.change(bundle)
    if not bundle.config:
        (bundle.path / "config.json").unlink(missing_ok=True)
    elif "" in bundle.config:
        (bundle.path / "config.json").write_text("{not json")
    else:
        bundle.write()
