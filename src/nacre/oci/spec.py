"""config.json at the edge: a bundle's document becomes a checked JSON tree, or an Invalid that names the element (config.md).

After `check` every property that nacre knows has the type the specification gives it, JSON nulls and unknown properties are gone,
and no string holds what a system call could not take. Meaning that needs the host (is a path there?) is judged later.
"""

from __future__ import annotations

import os

from nacre.oci.errors import Invalid
from nacre.oci.jsontext import loads

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from typing import Any

    Tree = dict[str, Any]

VERSION = "1.3.0"  # what `features` and `state` announce; any 1.x is taken
DOCUMENT_LIMIT = 16 << 20

# A schema is "str", "bool", "int" (64 bit, signed), "uint" (64 bit), "u32", [schema] for a list, {"*": schema} for a map of any keys,
# {key: schema} for an object. "!" before a key: it must be there.
_ID_MAP = [{"!containerID": "u32", "!hostID": "u32", "!size": "u32"}]
_USER = {"uid": "u32", "gid": "u32", "umask": "u32", "additionalGids": ["u32"], "username": "str"}
_CAPABILITIES = {key: ["str"] for key in ("bounding", "effective", "inheritable", "permitted", "ambient")}
PROCESS: Tree = {
    "terminal": "bool",
    "consoleSize": {"!height": "uint", "!width": "uint"},
    "user": _USER,
    "args": ["str"],
    "env": ["str"],
    "!cwd": "str",
    "capabilities": _CAPABILITIES,
    "rlimits": [{"!type": "str", "!soft": "uint", "!hard": "uint"}],
    "noNewPrivileges": "bool",
    "apparmorProfile": "str",
    "oomScoreAdj": "int",
    "selinuxLabel": "str",
    "ioPriority": {"!class": "str", "priority": "int"},
    "execCPUAffinity": {"initial": "str", "final": "str"},
    "scheduler": {
        "!policy": "str",
        "nice": "int",
        "priority": "int",
        "flags": ["str"],
        **dict.fromkeys(("runtime", "deadline", "period"), "uint"),
    },
}
_DEVICE_RATE = [{"!major": "int", "!minor": "int", "!rate": "uint"}]
RESOURCES: Tree = {
    "devices": [{"!allow": "bool", "type": "str", "major": "int", "minor": "int", "access": "str"}],
    "memory": {
        **dict.fromkeys(("limit", "reservation", "swap", "kernel", "kernelTCP"), "int"),
        "swappiness": "uint",
        "disableOOMKiller": "bool",
        "useHierarchy": "bool",
        "checkBeforeUpdate": "bool",
    },
    "cpu": {
        "shares": "uint",
        "quota": "int",
        "burst": "uint",
        "period": "uint",
        "realtimeRuntime": "int",
        "realtimePeriod": "uint",
        "cpus": "str",
        "mems": "str",
        "idle": "int",
    },
    "pids": {"limit": "int"},
    "blockIO": {
        "weight": "uint",
        "leafWeight": "uint",
        "weightDevice": [{"!major": "int", "!minor": "int", "weight": "uint", "leafWeight": "uint"}],
        **dict.fromkeys(("throttleReadBpsDevice", "throttleWriteBpsDevice"), _DEVICE_RATE),
        **dict.fromkeys(("throttleReadIOPSDevice", "throttleWriteIOPSDevice"), _DEVICE_RATE),
    },
    "hugepageLimits": [{"!pageSize": "str", "!limit": "uint"}],
    "network": {"classID": "u32", "priorities": [{"!name": "str", "!priority": "u32"}]},
    "rdma": {"*": {"hcaHandles": "u32", "hcaObjects": "u32"}},
    "unified": {"*": "str"},
}
SECCOMP: Tree = {
    "!defaultAction": "str",
    "defaultErrnoRet": "u32",
    "architectures": ["str"],
    "flags": ["str"],
    "listenerPath": "str",
    "listenerMetadata": "str",
    "syscalls": [
        {
            "!names": ["str"],
            "!action": "str",
            "errnoRet": "u32",
            "args": [{"!index": "u32", "!value": "uint", "valueTwo": "uint", "!op": "str"}],
        }
    ],
}
_HOOK = [{"!path": "str", "args": ["str"], "env": ["str"], "timeout": "int"}]
HOOK_POINTS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_LINUX: Tree = {
    "namespaces": [{"!type": "str", "path": "str"}],
    "uidMappings": _ID_MAP,
    "gidMappings": _ID_MAP,
    "timeOffsets": {"*": {"secs": "int", "nanosecs": "u32"}},
    "devices": [
        {"!type": "str", "!path": "str", "major": "int", "minor": "int", "fileMode": "u32", "uid": "u32", "gid": "u32"},
    ],
    "netDevices": {"*": {"name": "str"}},
    "cgroupsPath": "str",
    "resources": RESOURCES,
    "intelRdt": {
        **dict.fromkeys(("closID", "l3CacheSchema", "memBwSchema"), "str"),
        "schemata": ["str"],
        **dict.fromkeys(("enableMonitoring", "enableCMT", "enableMBM"), "bool"),
    },
    "memoryPolicy": {"!mode": "str", "nodes": "str", "flags": ["str"]},
    "sysctl": {"*": "str"},
    "seccomp": SECCOMP,
    "rootfsPropagation": "str",
    "maskedPaths": ["str"],
    "readonlyPaths": ["str"],
    "mountLabel": "str",
    "personality": {"!domain": "str", "flags": ["str"]},
}
CONFIG: Tree = {
    "!ociVersion": "str",
    "process": PROCESS,
    "root": {"!path": "str", "readonly": "bool"},
    "hostname": "str",
    "domainname": "str",
    "mounts": [
        {
            "!destination": "str",
            "type": "str",
            "source": "str",
            "options": ["str"],
            "uidMappings": _ID_MAP,
            "gidMappings": _ID_MAP,
        }
    ],
    "hooks": dict.fromkeys(HOOK_POINTS, _HOOK),
    "annotations": {"*": "str"},
    "linux": _LINUX,
}

NAMESPACES = frozenset({"pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time"})
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_ID_SIGNS = _LETTERS | set(".+-")
_VERSION_SIGNS = _LETTERS - {"_"} | set(".-")
_INTEGERS = {"int": (-(1 << 63), (1 << 63) - 1), "uint": (0, (1 << 64) - 1), "u32": (0, (1 << 32) - 1)}


def check_id(identifier: str) -> str:
    """A container id as runtimes take it: letters, digits, `_.+-`, not beginning with a dot. Raises Invalid."""
    if not (0 < len(identifier) <= 1024 and identifier[0] in _LETTERS and _ID_SIGNS.issuperset(identifier)):
        raise Invalid(
            what=f"use {identifier!r} as container id",
            cause="an id has letters, digits and _ . + -, and begins with no punctuation",
        )
    return identifier


def load(bundle: str, path: str = "") -> Tree:
    """The checked BUNDLE/config.json, or the document at `path`. Raises Invalid, also for a file that is missing or no JSON."""
    path = path or os.path.join(bundle, "config.json")
    what = f"read {path}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            if size > DOCUMENT_LIMIT:
                raise Invalid(what=what, cause=f"it has {size} bytes, more than {DOCUMENT_LIMIT}")
            data = b"".join(iter(lambda: os.read(fd, 1 << 20), b""))
        finally:
            os.close(fd)
    except OSError as error:
        remedy = f"{bundle} is no bundle: a directory with config.json and a root filesystem"
        if os.path.isdir(bundle):
            remedy = f"nacre-runc spec --bundle {bundle} writes one to begin with" if isinstance(error, FileNotFoundError) else ""
        raise Invalid(what=what, cause=f"open(2): {error.strerror} (errno {error.errno})", remedy=remedy) from error
    return check(parse(data, what), what)


def parse(data: bytes | str, what: str) -> Any:
    """JSON text to a tree. Raises Invalid with the place of the mistake."""
    try:
        return loads(data)
    except (ValueError, RecursionError) as error:
        raise Invalid(what=what, cause=f"not JSON: {error}" if isinstance(error, ValueError) else "nested too deeply") from error


def check(document: Any, what: str = "read config.json") -> Tree:
    """The document cut down to what nacre knows. Raises Invalid naming the path of the first element that is wrong."""
    if not isinstance(document, dict):
        raise Invalid(what=what, cause=f"the document is {_kind(document)}, not an object")
    version = document.get("ociVersion")
    if not isinstance(version, str) or not _is_version(version):
        raise Invalid(what=what, cause=f"ociVersion is {version!r}, not a version such as {VERSION}")
    if not version.startswith("1."):
        raise Invalid(what=what, cause=f"ociVersion {version} is not of the major version 1")
    tree = _walk(document, CONFIG, "", what)
    _check_meaning(tree, what)
    _as_meant(tree.get("linux", {}).get("resources", {}), version)
    return dict(tree)


def _is_version(text: str) -> bool:
    """Three numbers, then perhaps `-` and a pre-release, then perhaps `+` and a build (semver.org)."""
    text, plus, build = text.partition("+")
    text, dash, early = text.partition("-")
    extras = [word for mark, word in ((dash, early), (plus, build)) if mark]
    numbers = text.split(".")
    return (
        len(numbers) == 3
        and all(number.isascii() and number.isdecimal() for number in numbers)
        and all(word and _VERSION_SIGNS.issuperset(word) for word in extras)
    )


def check_process(document: Any, what: str = "read the process") -> Tree:
    """An OCI `process` alone, as `execute` takes it."""
    tree = _walk(document, PROCESS, "process", what)
    _check_process(tree, what)
    return dict(tree)


def check_resources(document: Any, version: str, what: str = "read the resources") -> Tree:
    """OCI `linux.resources` alone, as `update` takes it for a container whose document is of `version`."""
    tree = dict(_walk(document, RESOURCES, "linux.resources", what))
    _check_resources(tree, what)
    _as_meant(tree, version)
    return tree


def is_since(version: str, minor: int) -> bool:
    """Whether a document of `version` is of 1.`minor` or later."""
    return int(version.split(".")[1]) >= minor


def _as_meant(resources: Tree, version: str) -> None:
    """pids.limit 0 is a limit since 1.3; before, the specification said nothing, and engines write it for none."""
    pids = resources.get("pids", {})
    if pids.get("limit") == 0 and not is_since(version, 3):
        pids["limit"] = -1


def _walk(value: Any, schema: Any, path: str, what: str) -> Any:
    if isinstance(schema, str):
        return _scalar(value, schema, path, what)
    if isinstance(schema, list):
        if not isinstance(value, list):
            raise _wrong(value, "a list", path, what)
        item = schema[0]
        if item == "str":  # the long ones (environment, names of system calls)
            return [_scalar(one, item, f"{path}[{index}]", what) for index, one in enumerate(value)]
        return [_walk(one, item, f"{path}[{index}]", what) for index, one in enumerate(value) if one is not None]
    if not isinstance(value, dict):
        raise _wrong(value, "an object", path, what)
    if "*" in schema:
        for key in value:
            _scalar(key, "str", f"{path} (a key)", what)
        return {key: _walk(one, schema["*"], f'{path}["{key}"]', what) for key, one in value.items() if one is not None}
    result: Tree = {}
    for marked, inner in schema.items():
        key = marked.lstrip("!")
        below = f"{path}.{key}" if path else key
        one = value.get(key)
        if one is not None:
            result[key] = _walk(one, inner, below, what)
        elif marked[0] == "!":
            raise Invalid(what=what, cause=f"{below} is missing")
    return result


def _scalar(value: Any, kind: str, path: str, what: str) -> Any:
    if kind == "str":
        if not isinstance(value, str):
            raise _wrong(value, "a string", path, what)
        if not value.isascii():
            try:
                value.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                raise Invalid(what=what, cause=f"{path} holds a lone surrogate") from None
        if "\0" in value:
            raise Invalid(what=what, cause=f"{path} holds a NUL")
        return value
    if kind == "bool":
        if not isinstance(value, bool):
            raise _wrong(value, "true or false", path, what)
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(value, "an integer", path, what)
    low, high = _INTEGERS[kind]
    if not low <= value <= high:
        raise Invalid(what=what, cause=f"{path} is {value}, outside {low}…{high}")
    return value


def _wrong(value: Any, wanted: str, path: str, what: str) -> Invalid:
    return Invalid(what=what, cause=f"{path} is {_kind(value)}, not {wanted}")


def _kind(value: Any) -> str:
    for kind, word in (
        (bool, "a boolean"),
        (str, "a string"),
        (int, "a number"),
        (float, "a number"),
        (list, "a list"),
        (dict, "an object"),
    ):
        if isinstance(value, kind):
            return word
    return "null"


def _check_meaning(tree: Tree, what: str) -> None:
    process, linux = tree.get("process"), tree.get("linux", {})
    if process is not None:
        _check_process(process, what)
    kinds: set[str] = set()
    for index, namespace in enumerate(linux.get("namespaces", ())):
        kind, place = namespace["type"], f"linux.namespaces[{index}].type"
        if kind not in NAMESPACES:
            raise Invalid(what=what, cause=f"{place} is {kind!r}", remedy=f"kinds are {', '.join(sorted(NAMESPACES))}")
        if kind in kinds:
            raise Invalid(what=what, cause=f"{place} names {kind} a second time")
        if namespace.get("path") and not namespace["path"].startswith("/"):
            raise Invalid(what=what, cause=f"linux.namespaces[{index}].path {namespace['path']!r} is not absolute")
        kinds.add(kind)
    for point, hooks in tree.get("hooks", {}).items():
        for index, hook in enumerate(hooks):
            if not hook["path"].startswith("/"):
                raise Invalid(what=what, cause=f"hooks.{point}[{index}].path {hook['path']!r} is not absolute")
            if hook.get("timeout", 1) <= 0:
                raise Invalid(what=what, cause=f"hooks.{point}[{index}].timeout is {hook['timeout']}, not above 0")
    for index, device in enumerate(linux.get("devices", ())):
        if device["type"] not in ("c", "b", "u", "p"):
            raise Invalid(what=what, cause=f"linux.devices[{index}].type is {device['type']!r}, not c, b, u or p")
        if device["type"] != "p" and not ("major" in device and "minor" in device):
            raise Invalid(what=what, cause=f"linux.devices[{index}] has no major and minor")
    _check_resources(linux.get("resources", {}), what)
    _check_contents(tree, what)
    for clock in linux.get("timeOffsets", {}):
        if clock not in ("monotonic", "boottime"):
            raise Invalid(what=what, cause=f"linux.timeOffsets has {clock!r}", remedy="clocks are monotonic and boottime")
        if "time" not in kinds:
            raise Invalid(what=what, cause="linux.timeOffsets is set without a time namespace: it would move the host's clocks")
    for index, mount in enumerate(tree.get("mounts", ())):
        if bool(mount.get("uidMappings")) != bool(mount.get("gidMappings")):
            raise Invalid(what=what, cause=f"mounts[{index}] has mappings of users or groups alone")
    _check_net_devices(linux.get("netDevices", {}), kinds, what)
    if "hostname" in tree and "uts" not in kinds:
        raise Invalid(what=what, cause="hostname is set without a uts namespace: it would rename the host")
    if "domainname" in tree and "uts" not in kinds:
        raise Invalid(what=what, cause="domainname is set without a uts namespace: it would rename the host")


def _check_net_devices(devices: Tree, kinds: set[str], what: str) -> None:
    if devices and "network" not in kinds:
        raise Invalid(what=what, cause="linux.netDevices is set without a network namespace: they would stay where they are")
    taken: set[str] = set()
    for key, device in devices.items():
        name, place = device.get("name") or key, f'linux.netDevices["{key}"]'
        plain = name.replace("%d", "", 1)
        if not 0 < len(key) < 16 or not 0 < len(name) < 16 or name in (".", "..") or set(plain) & set("/:% \t\n\r\v\f"):
            raise Invalid(what=what, cause=f"{place}: {name!r} is no name of a network device")
        if name == plain and name in taken:
            raise Invalid(what=what, cause=f"{place}: a second device is to be called {name}")
        taken.add(name)


def _check_contents(tree: Tree, what: str) -> None:
    """Words that may not be empty, and paths that may not be relative."""
    linux = tree.get("linux", {})
    if "" in tree.get("annotations", {}):
        raise Invalid(what=what, cause="annotations has an empty key")
    for key in ("maskedPaths", "readonlyPaths"):
        for index, path in enumerate(linux.get(key, ())):
            if not path.startswith("/"):
                raise Invalid(what=what, cause=f"linux.{key}[{index}] {path!r} is not absolute")
    for index, rule in enumerate(linux.get("seccomp", {}).get("syscalls", ())):
        if not rule["names"]:
            raise Invalid(what=what, cause=f"linux.seccomp.syscalls[{index}].names is empty")


def _check_resources(resources: Tree, what: str) -> None:
    for index, weight in enumerate(resources.get("blockIO", {}).get("weightDevice", ())):
        if not weight.keys() & {"weight", "leafWeight"}:
            raise Invalid(what=what, cause=f"linux.resources.blockIO.weightDevice[{index}] has neither weight nor leafWeight")
    for device, limits in resources.get("rdma", {}).items():
        if not limits:
            raise Invalid(what=what, cause=f'linux.resources.rdma["{device}"] has neither hcaHandles nor hcaObjects')
    for index, device in enumerate(resources.get("devices", ())):
        place = f"linux.resources.devices[{index}]"
        if device.get("type", "a") not in ("a", "b", "c", ""):
            raise Invalid(what=what, cause=f"{place}.type is {device['type']!r}, not a, b or c")
        if not set(device.get("access", "rwm")) <= set("rwm"):
            raise Invalid(what=what, cause=f"{place}.access is {device['access']!r}, not made of r, w and m")
    for index, limit in enumerate(resources.get("hugepageLimits", ())):
        number, unit = limit["pageSize"][:-2], limit["pageSize"][-2:]
        if unit not in ("KB", "MB", "GB") or not (number.isascii() and number.isdigit()) or number.startswith("0"):
            cause = f"linux.resources.hugepageLimits[{index}].pageSize is {limit['pageSize']!r}"
            raise Invalid(what=what, cause=cause, remedy="write it as the kernel does: 64KB, 2MB, 1GB")


def _check_process(process: Tree, what: str) -> None:
    if not process["cwd"].startswith("/"):
        raise Invalid(what=what, cause=f"process.cwd {process['cwd']!r} is not absolute")
    if not process.get("args"):
        raise Invalid(what=what, cause="process.args is empty: there is nothing to execute")
    seen: set[str] = set()
    for index, rlimit in enumerate(process.get("rlimits", ())):
        kind = rlimit["type"]
        if not kind.startswith("RLIMIT_") or kind in seen:
            problem = "is given a second time" if kind in seen else "is no resource limit"
            raise Invalid(what=what, cause=f"process.rlimits[{index}].type {kind!r} {problem}")
        if rlimit["soft"] > rlimit["hard"]:
            raise Invalid(what=what, cause=f"process.rlimits[{index}]: soft {rlimit['soft']} is above hard {rlimit['hard']}")
        seen.add(kind)
    adjustment = process.get("oomScoreAdj", 0)
    if not -1000 <= adjustment <= 1000:
        raise Invalid(what=what, cause=f"process.oomScoreAdj is {adjustment}, outside -1000…1000")
