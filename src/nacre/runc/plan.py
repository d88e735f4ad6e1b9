"""From a checked config.json to what the child will do: a tuple of frozen steps. Pure but for looking whether host files are there.

The order of the steps is that of config.md and runtime.md "Lifecycle"; why each stands where it does is said at the step.
"""

from __future__ import annotations

import os
import resource
import stat

from nacre.linux.mounts import MountFlag
from nacre.linux.namespaces import KINDS
from nacre.linux.seccomp import NEW_LISTENER
from nacre.oci.errors import Invalid, Unsupported
from nacre.oci.values import Value
from nacre.runc import process_steps as ps
from nacre.runc import programs
from nacre.runc import steps as fs
from nacre.runc.hooks import RunCreateHooks, RunStartHooks
from nacre.runc.mount_options import Options
from nacre.runc.mount_options import parse as parse_options
from nacre.runc.mount_options import propagation as parse_propagation

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Tree = Mapping[str, Any]

# What a container always has: runtime-linux.md, config-linux.md "Default Devices".
DEFAULT_DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))
_FILE_TYPES = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}
# sysctl prefixes that belong to a namespace, and which: anything else would change the host.
_SYSCTLS = (
    ("net.", "network"),
    ("kernel.msg", "ipc"),
    ("kernel.sem", "ipc"),
    ("kernel.shm", "ipc"),
    ("fs.mqueue.", "ipc"),
    ("kernel.domainname", "uts"),
    ("user.", "user"),
)
_IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
_POLICIES = {"SCHED_OTHER": 0, "SCHED_FIFO": 1, "SCHED_RR": 2, "SCHED_BATCH": 3, "SCHED_IDLE": 5, "SCHED_DEADLINE": 6}
_SCHED_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 0x01,
    "SCHED_FLAG_RECLAIM": 0x02,
    "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08,
    "SCHED_FLAG_KEEP_PARAMS": 0x10,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}
PERSONALITIES = {"LINUX": 0, "LINUX32": 8}
MEMORY_POLICIES = {
    "MPOL_DEFAULT": 0,
    "MPOL_PREFERRED": 1,
    "MPOL_BIND": 2,
    "MPOL_INTERLEAVE": 3,
    "MPOL_LOCAL": 4,
    "MPOL_PREFERRED_MANY": 5,
    "MPOL_WEIGHTED_INTERLEAVE": 6,
}
MEMORY_POLICY_FLAGS = {"MPOL_F_STATIC_NODES": 1 << 15, "MPOL_F_RELATIVE_NODES": 1 << 14, "MPOL_F_NUMA_BALANCING": 1 << 13}


class Host(Value):
    """What the plan needs to know of the host."""

    bundle: str
    cgroup_directories: tuple[
        tuple[str, str], ...
    ] = ()  # of the container: (name below /sys/fs/cgroup, "" for v2 alone; directory)
    highest_capability: int = 40
    kcore: bool = True
    filter: bytes = b""
    filter_flags: int = 0
    tty: bool = False
    bare_newlines: bool = False  # of the terminal
    pivot: bool = True
    new_keyring: bool = True
    preserve: int = 0
    personality: str = ""
    memory_policy: Tree = {}
    nodes: bool = True  # devices can be made here
    trees: Mapping[int, int] = {}  # position in `mounts` to a detached mount that was made from outside (`id_maps`)
    seek_program: bool = False  # refuse a container whose program is nowhere
    borrowed: bool = False  # the mount namespace is not the container's own
    mount_namespace: int = -1  # to join
    furnish: fs.Step | None = None  # takes the root and brings in what was made ahead (spare): the rest of the document follows
    late_cgroups: bool = False  # a memory limit too small for the set-up: enter when all of it is over
    security: tuple[tuple[str, str], ...] = ()  # (file below /proc/PID, text)
    mount_label: str = ""  # SELinux's, for the file systems that are made
    alone: bool = False  # not root's, and in a user namespace that nobody else is in


def namespaces_of(spec: Tree) -> tuple[dict[str, str], set[str]]:
    """(joined: kind to path, new: kinds)."""
    joined: dict[str, str] = {}
    new: set[str] = set()
    for namespace in spec.get("linux", {}).get("namespaces", ()):
        if namespace.get("path"):
            joined[namespace["type"]] = namespace["path"]
        else:
            new.add(namespace["type"])
    return joined, new


def refuse_unsupported(spec: Tree) -> None:
    """Before the host is touched: what this runtime does not do, by name."""
    linux = spec.get("linux", {})
    what = "create the container"
    persona = linux.get("personality", {})
    if persona.get("domain", "LINUX") not in PERSONALITIES or persona.get("flags"):
        raise Unsupported(
            what=what,
            cause=f"linux.personality is {persona}",
            remedy=f"domains are {' and '.join(PERSONALITIES)}, flags are none",
        )


def setup_steps(spec: Tree, host: Host, state: Tree) -> tuple[fs.Step, ...]:
    """Everything up to "created"."""
    linux = spec.get("linux", {})
    joined, new = namespaces_of(spec)
    user_namespace = "user" in new or "user" in joined
    steps: list[fs.Step] = []
    if user_namespace:
        steps.append(ps.BecomeNamespaceRoot())
    if host.mount_namespace >= 0:
        steps.append(ps.JoinProcess(host.mount_namespace, KINDS["mount"][0], f"the mount namespace {joined['mount']}"))
    if host.new_keyring:
        label = spec.get("process", {}).get("selinuxLabel", "") if host.security else ""
        steps.append(ps.NewKeyring(f"nacre-{state['id']}", label))
    if "network" in new:
        steps.append(ps.RaiseLoopback())
    steps += _names_and_sysctls(spec, joined, new)
    steps += _root(spec, host)
    own_dev = True
    for position, mount in enumerate(spec.get("mounts", ())):
        step = _mount(mount, host, host.trees.get(position, -1))[0]
        steps.append(step)
        if clean(mount["destination"]) == "/dev":
            own_dev = not isinstance(step, fs.BindMount)
    if own_dev and host.furnish is None:
        steps += _devices(linux.get("devices", ()), nodes=host.nodes and not user_namespace)
        steps.append(fs.LinkDevices(core=host.kcore))
    if host.tty:
        size = spec.get("process", {}).get("consoleSize", {})
        steps.append(ps.OpenConsole(size.get("width", 0), size.get("height", 0), show=own_dev, bare_newlines=host.bare_newlines))
    steps += _create_hooks(spec, state)
    steps += _finish_root(spec, host)
    if host.seek_program:
        process = spec["process"]
        steps.append(programs.SeekProgram(process["args"][0], tuple(process.get("env", ())), process["cwd"]))
    steps.append(ps.NewSession())
    if not host.late_cgroups:
        steps.append(ps.EnterCgroups("cgroup" in new))
    return tuple(steps)


def _finish_root(spec: Tree, host: Host) -> list[fs.Step]:
    linux = spec.get("linux", {})
    steps: list[fs.Step] = [fs.MaskPath(path, host.mount_label) for path in dict.fromkeys(linux.get("maskedPaths", ()))]
    steps += [fs.ReadonlyPath(path) for path in linux.get("readonlyPaths", ())]
    if cwd := spec.get("process", {}).get("cwd", ""):
        steps.append(fs.MakeDirectory(cwd))
    for mount in spec.get("mounts", ()):
        if _mount(mount, host)[1]:
            steps.append(fs.MakeReadonly(clean(mount["destination"])))
    if spec.get("root", {}).get("readonly"):
        steps.append(fs.MakeReadonly("/"))
    steps.append(fs.EnterRoot(_rootfs(spec, host.bundle), host.pivot, _propagation(linux), host.borrowed))
    return steps


def _names_and_sysctls(spec: Tree, joined: Mapping[str, str], new: set[str]) -> list[fs.Step]:
    steps: list[fs.Step] = []
    if "hostname" in spec:
        steps.append(ps.SetName(spec["hostname"], domain=False))
    if "domainname" in spec:
        steps.append(ps.SetName(spec["domainname"], domain=True))
    for key, value in spec.get("linux", {}).get("sysctl", {}).items():
        name = key.replace("/", ".") if "." not in key.split("/")[0] else key
        kind = next((kind for prefix, kind in _SYSCTLS if name.startswith(prefix)), None)
        if kind is None or ".." in name:
            raise Invalid(what="read linux.sysctl", cause=f"{key} belongs to no namespace: it would change the host")
        if kind not in new and kind not in joined:
            raise Invalid(
                what="read linux.sysctl",
                cause=f"{key} needs a {kind} namespace of the container's own, or it would change the host",
                remedy=f'add {{"type": "{kind}"}} to linux.namespaces',
            )
        steps.append(ps.SetSysctl(name, value))
    return steps


def _rootfs(spec: Tree, bundle: str) -> str:
    root = spec.get("root", {}).get("path")
    if not root:
        raise Invalid(what="read config.json", cause="root.path is missing")
    return os.path.realpath(os.path.join(bundle, root))


def _propagation(linux: Tree) -> tuple[MountFlag, bool] | None:
    word = linux.get("rootfsPropagation")
    if not word:
        return None
    found = parse_propagation(word)
    if found is None:
        raise Invalid(what="read config.json", cause=f"linux.rootfsPropagation is {word!r}")
    return found


def _root(spec: Tree, host: Host) -> list[fs.Step]:
    """The new namespace first stops giving to the host (unless it is to), then takes the root as a mount."""
    if host.furnish is not None:
        return [host.furnish]
    if host.borrowed:
        return [fs.BindRoot(_rootfs(spec, host.bundle), shared=False, borrowed=True)]
    wanted = _propagation(spec.get("linux", {}))
    keep = wanted is not None and wanted[0] == MountFlag.SHARED
    before = fs.SetPropagation(MountFlag.SHARED if keep else MountFlag.SLAVE, recursive=True)
    return [before, fs.BindRoot(_rootfs(spec, host.bundle), keep, borrowed=False)]


def clean(path: str) -> str:
    return os.path.normpath("/" + path.lstrip("/"))


def _mount(mount: Tree, host: Host, tree: int = -1) -> tuple[fs.Step, bool]:
    """(the step, is it to be made read-only at the end: /dev gets its nodes first)."""
    destination = clean(mount["destination"])
    options = parse_options(mount.get("options", ()))
    kind, source = mount.get("type", ""), mount.get("source", "")
    if options.bind or kind in ("bind", "rbind"):
        if not options.bind:
            options = options.but(bind=True, recursive=kind == "rbind")
        if not source:
            raise Invalid(what="read config.json", cause=f"the bind mount on {destination} has no source")
        path = os.path.normpath(os.path.join(host.bundle, source))
        return fs.BindMount(destination, path, options, tree), False
    if kind in ("cgroup", "cgroup2"):
        return fs.MountCgroups(destination, host.cgroup_directories, options, host.mount_label), False
    if not kind:
        raise Invalid(what="read config.json", cause=f"the mount on {destination} has neither a type nor the option bind")
    deferred = destination == "/dev" and bool(options.flags & MountFlag.RDONLY)
    if deferred:
        options = _writable(options)
    return fs.MountFilesystem(destination, kind, source or kind, options, host.mount_label), deferred


def _writable(options: Options) -> Options:
    return options.but(flags=options.flags & ~MountFlag.RDONLY)


def _devices(devices: Sequence[Tree], *, nodes: bool) -> list[fs.Step]:
    wanted: dict[str, fs.MakeDevice] = {}
    for name, major, minor in DEFAULT_DEVICES:
        wanted[f"/dev/{name}"] = fs.MakeDevice(f"/dev/{name}", stat.S_IFCHR | 0o666, major, minor, 0, 0)
    for device in devices:
        path = clean(device["path"])
        mode = _FILE_TYPES[device["type"]] | (device.get("fileMode", 0o666) & 0o7777)
        ids = device.get("uid", 0), device.get("gid", 0)
        wanted[path] = fs.MakeDevice(path, mode, device.get("major", 0), device.get("minor", 0), *ids)
    if not nodes:
        return [
            one if stat.S_ISFIFO(one.mode) else fs.BindDevice(path, one.mode, one.major, one.minor)
            for path, one in wanted.items()
        ]
    return list(wanted.values())


def _create_hooks(spec: Tree, state: Tree) -> list[fs.Step]:
    found = spec.get("hooks", {}).get("createContainer", ())
    return [RunCreateHooks(tuple(found), state)] if found else []


def start_steps(spec: Tree, host: Host, state: Tree) -> tuple[fs.Step, ...]:
    """From "start" to execve, for the container's own process."""
    _, new = namespaces_of(spec)
    entered: list[fs.Step] = [ps.EnterCgroups("cgroup" in new)] if host.late_cgroups else []
    *steps, execute = process_steps(spec["process"], host)
    hooks = spec.get("hooks", {}).get("startContainer", ())
    if not hooks or not isinstance(execute, programs.Execute):
        return (*entered, *steps, execute)
    confinement = execute.confinement
    if confinement.offer is not None:
        steps.append(programs.Confine(confinement))
        confinement = programs.Confinement(no_new_privileges=confinement.no_new_privileges)
    run = RunStartHooks(tuple(hooks), state, execute.environment, confinement)
    return (*entered, *steps, run, execute.but(confinement=confinement))


def process_steps(process: Tree, host: Host) -> tuple[fs.Step, ...]:
    """What an OCI `process` asks for, ending in its execution; the same for a container's init and for `execute`."""
    _, masks = ps.settings(process, host.highest_capability)
    user = process.get("user", {})
    no_new_privileges = process.get("noNewPrivileges", False)
    steps: list[fs.Step] = [ps.SetSecurityLabel(file, text) for file, text in host.security]
    if host.personality:
        steps.append(ps.SetPersonality(host.personality, PERSONALITIES[host.personality]))
    if host.memory_policy:
        steps.append(_memory_policy(host.memory_policy))
    if limits := _limits(process):
        steps.append(ps.SetLimits(limits))
    if scheduling := _scheduling(process):
        steps.append(scheduling)
    steps.append(ps.BoundCapabilities(masks["bounding"], host.highest_capability))
    groups = tuple(user.get("additionalGids", ()))
    steps.append(ps.ChangeUser(user.get("uid", 0), user.get("gid", 0), groups, user.get("umask", 0o022), process["cwd"]))
    keep_admin = bool(host.filter) and not no_new_privileges
    steps.append(ps.SetCapabilities(masks["effective"], masks["permitted"], masks["inheritable"], masks["ambient"], keep_admin))
    confinement = programs.Confinement(no_new_privileges=no_new_privileges, filter=host.filter, filter_flags=host.filter_flags)
    if host.filter_flags & NEW_LISTENER:
        from nacre.runc.listener import Offer, OpenOffer

        confinement = confinement.but(offer=OpenOffer if host.alone else Offer)
    return (*steps, programs.Execute(tuple(process["args"]), tuple(process.get("env", ())), host.preserve, confinement))


def _limits(process: Tree) -> tuple[tuple[str, int, int], ...]:
    limits = []
    for index, rlimit in enumerate(process.get("rlimits", ())):
        if not hasattr(resource, rlimit["type"]):
            raise Invalid(
                what="read config.json", cause=f"process.rlimits[{index}].type {rlimit['type']!r} is unknown to this kernel"
            )
        limits.append((rlimit["type"], rlimit["soft"], rlimit["hard"]))
    return tuple(limits)


def _scheduling(process: Tree) -> ps.SetScheduling | None:
    scheduler, io = process.get("scheduler"), process.get("ioPriority")
    if not scheduler and not io:
        return None
    if io and io["class"] not in _IO_CLASSES:
        raise Invalid(
            what="read process.ioPriority", cause=f"class is {io['class']!r}", remedy=f"classes are {', '.join(_IO_CLASSES)}"
        )
    if io and not 0 <= io.get("priority", 0) <= 7:
        raise Invalid(what="read process.ioPriority", cause=f"priority is {io['priority']}, outside 0…7")
    io_priority = _IO_CLASSES[io["class"]] << 13 | io.get("priority", 0) if io else None
    return ps.SetScheduling(_attributes(scheduler) if scheduler else None, io_priority)


def _attributes(scheduler: Tree) -> tuple[int, int, int, int, tuple[int, int, int]]:
    """process.scheduler as sched_setattr(2) wants it."""
    if scheduler["policy"] not in _POLICIES:
        raise Invalid(
            what="read process.scheduler",
            cause=f"policy is {scheduler['policy']!r}",
            remedy=f"policies are {', '.join(_POLICIES)}",
        )
    flags = 0
    for word in scheduler.get("flags", ()):
        if word not in _SCHED_FLAGS:
            raise Invalid(
                what="read process.scheduler", cause=f"flags has {word!r}", remedy=f"flags are {', '.join(_SCHED_FLAGS)}"
            )
        flags |= _SCHED_FLAGS[word]
    for key, low, high in (("nice", -20, 19), ("priority", 0, 99)):
        if not low <= scheduler.get(key, 0) <= high:
            raise Invalid(what="read process.scheduler", cause=f"{key} is {scheduler[key]}, outside {low}…{high}")
    times = scheduler.get("runtime", 0), scheduler.get("deadline", 0), scheduler.get("period", 0)
    return _POLICIES[scheduler["policy"]], flags, scheduler.get("nice", 0), scheduler.get("priority", 0), times


def _memory_policy(policy: Tree) -> ps.SetMemoryPolicy:
    what, mode = "read linux.memoryPolicy", policy["mode"]
    if mode not in MEMORY_POLICIES:
        raise Invalid(what=what, cause=f"mode is {mode!r}", remedy=f"modes are {', '.join(MEMORY_POLICIES)}")
    number = MEMORY_POLICIES[mode]
    for word in policy.get("flags", ()):
        if word not in MEMORY_POLICY_FLAGS:
            raise Invalid(what=what, cause=f"flags has {word!r}", remedy=f"flags are {', '.join(MEMORY_POLICY_FLAGS)}")
        number |= MEMORY_POLICY_FLAGS[word]
    nodes = cpus(policy["nodes"], f"{what}.nodes", "memory nodes") if policy.get("nodes") else ()
    return ps.SetMemoryPolicy(" ".join(filter(None, (mode, *policy.get("flags", ()), policy.get("nodes")))), number, nodes)


def cpus(text: str, what: str, kind: str = "CPUs") -> tuple[int, ...]:
    """`0-2,7` as numbers. Raises Invalid."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_cpu(first) or (dash and not _is_cpu(last)) or int(last or first) < int(first):
            raise Invalid(what=what, cause=f"{text!r} is no list of {kind}", remedy="write it as 0-2,7")
        found |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def _is_cpu(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 5


def join_order(joined: Mapping[str, str]) -> list[str]:
    """The kinds in the order in which they must be joined."""
    return [kind for kind in KINDS if kind in joined]


def capability_masks(process: Tree) -> tuple[Sequence[str], dict[str, int]]:
    """(names that are no capability, set name to bits) of an OCI process."""
    return ps.settings(process, 63)


def has_selinux() -> bool:
    return os.path.exists("/sys/fs/selinux/enforce")


def mount_label(linux: Tree) -> str:
    """linux.mountLabel, where the host knows labels; elsewhere it has nothing to say. Raises Invalid."""
    label: str = linux.get("mountLabel", "")
    if '"' in label:
        raise Invalid(what="read linux.mountLabel", cause=f"{label!r} has a quotation mark, which no label has")
    return label if has_selinux() else ""


def cgroup_owner(spec: Tree) -> int | None:
    """The host's id of the container's user, if its cgroup is to be his: config-linux.md "Cgroup ownership"."""
    _, new = namespaces_of(spec)
    writable = any(
        mount.get("type") in ("cgroup", "cgroup2")
        and clean(mount["destination"]) == "/sys/fs/cgroup"
        and "ro" not in mount.get("options", ())
        for mount in spec.get("mounts", ())
    )
    if not writable or "cgroup" not in new:
        return None
    uid: int = spec.get("process", {}).get("user", {}).get("uid", 0)
    if "user" not in new:
        return uid
    for one in spec["linux"].get("uidMappings", ()):
        if one["containerID"] <= uid < one["containerID"] + one["size"]:
            return int(one["hostID"] + uid - one["containerID"])
    return None


_APPARMOR, _PROFILES = "/sys/module/apparmor/parameters/enabled", "/sys/kernel/security/apparmor/profiles"


def security_labels(apparmor: str, selinux: str) -> tuple[tuple[str, str], ...]:
    """What to write where for the labels of the next execve. Raises Invalid for a profile that this host cannot give."""
    found: list[tuple[str, str]] = []
    if apparmor and apparmor != "unconfined":
        _check_profile(apparmor)
        place = "attr/apparmor/exec"
        found.append((place if os.path.exists(f"/proc/self/{place}") else "attr/exec", f"exec {apparmor}"))
    if selinux and not has_selinux():
        raise Invalid(
            what=f"give the SELinux label {selinux}",
            cause="SELinux is off on this host (there is no /sys/fs/selinux/enforce)",
            remedy="remove process.selinuxLabel, or boot with SELinux",
        )
    if selinux:
        found.append(("attr/exec", selinux))
    return tuple(found)


def _check_profile(apparmor: str) -> None:
    what = f"confine by the AppArmor profile {apparmor}"
    try:
        with open(_APPARMOR, encoding="ascii") as file:
            said = file.read().strip()
    except OSError as error:
        said = str(error.strerror)
    if said != "Y":
        raise Invalid(
            what=what,
            cause=f"AppArmor is off on this host ({_APPARMOR}: {said})",
            remedy="remove process.apparmorProfile, or boot with apparmor=1",
        )
    try:
        with open(_PROFILES, encoding="utf-8") as file:
            loaded = any(line.rpartition(" (")[0] == apparmor for line in file)
    except OSError:
        return  # podman takes away what lies below /sys/kernel from who makes a container in a user namespace: the kernel knows
    if not loaded:
        raise Invalid(
            what=what, cause=f"it is not loaded ({_PROFILES} has it not)", remedy="load it with apparmor_parser -r FILE"
        )
