"""What host and guest say on stream 0: the methods with their parameters and results, the events. docs/architecture.md "agent" tells the order.

A request is {"id": 1…2**53, "method": NAME, "params": {…}}, its answer {"id", "result": {…}} or {"id", "failure": oci.errors.encode form}.
An event is {"event": NAME, "params": {…}}. `encode` and `decode` turn a class of this module into such an object and back; decode
believes nothing: an unknown, missing or mistyped field raises Invalid naming it. Fields with a default may be left out.

Annotations here are real types, not strings: `decode` reads them.
"""

import base64
import binascii
import re
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from nacre.oci.errors import Invalid

PORT = "nacre.agent"  # the virtio-serial port's name
VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")  # of containers, executions, volumes, generations
T = TypeVar("T")


# -- the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first request of a session, after boot and after every clone: streams of an earlier session are forgotten."""

    version: int
    nonce: str  # comes back: bytes of an earlier reader cannot be taken for the answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    version: int
    nonce: str
    nacre: str  # version of the package inside
    kernel: str  # uname -r
    memory_bytes: int
    cpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Identify:
    """What a clone must not share with its template or another clone."""

    entropy: bytes  # at least 32; credited, and the kernel's generator reseeded
    now_ns: int  # Unix time, set as the clock
    hostname: str
    machine_id: str  # 32 hex digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """network.Attachment, for the guest's one link that is not `lo`, which gets name and MAC."""

    interface: str = "eth0"
    mac: str = ""  # "": as it is
    addresses: list[str] = field(default_factory=list)  # "10.118.0.7/16"
    gateway: str = ""
    routes: list[list[str]] = field(default_factory=list)  # [destination, gateway or ""]
    mtu: int = 1500
    dns: list[str] = field(default_factory=list)  # lines of the guest's own /etc/resolv.conf


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Bring online what the host has plugged in; answered once so much is there, as Size. 0: whatever is there."""

    memory_bytes: int = 0  # hot-added on top of what the guest booted with
    cpus: int = 0  # in all
    wait_s: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    memory_bytes: int  # MemTotal
    hot_memory_bytes: int
    cpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """The pod's own settings; its network, ipc and uts namespaces are the guest's."""

    hostname: str
    sysctls: dict[str, str] = field(default_factory=dict)
    shm_bytes: int = 64 << 20  # of /run/nacre/shm, to be bound on /dev/shm
    shared_pid: bool = False  # containers share a PID namespace, whose init is the agent's


# -- volumes


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """Make an empty directory at VOLUMES/name. Answered with Place."""

    name: str
    memory: bool = False  # a tmpfs of its own; so is any volume with a size
    size_bytes: int = 0  # 0: no limit but the guest's memory
    mode: int = 0o777
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One entry below a volume; parent directories are made with mode 755."""

    path: str  # relative, without ".."
    kind: str = "file"  # file, directory, link
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    content: bytes = b""  # a link's: where it points
    kinds: ClassVar[tuple[str, ...]] = ("file", "directory", "link")


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The contents of volume `name`, which is made if need be.

    With `generation` as the kubelet writes ConfigMaps: the files go into ..GENERATION, `..data` is switched to it by rename, top-level
    names are links into `..data`, the former generation goes. Without, each file is replaced by rename where it stands, others stay.
    """

    name: str
    files: list[File]
    generation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFile:
    """Up to `limit` bytes from the end of a regular file of a volume (a termination message). Answered with Content."""

    name: str
    path: str
    limit: int = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveVolume:
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    path: str  # in the guest, to be named as the source of a bind mount


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    content: bytes


# -- containers


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """Where a container's root comes from: a block device with an erofs, under a writable layer in memory."""

    drive: str  # `serial` of the virtio-blk device
    uuid: str  # of the erofs super block: a slot that holds something else is refused
    readonly: bool = False  # no writable layer
    size_bytes: int = 0  # of the writable layer; 0: no limit but the guest's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Create:
    """The container from an OCI document, not started. Answered with Started.

    Namespaces with a path are the pod's: the guest's own stand in for them, whatever the path. Mount sources are guest paths, hooks
    are refused, cgroupsPath is replaced. Streams as numbers, 0 is /dev/null; with process.terminal only `console`.
    """

    container: str
    config: dict[str, Any]
    root: Root
    stdin: int = 0  # host to guest
    stdout: int = 0
    stderr: int = 0
    console: int = 0  # both ways


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    container: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    pid: int  # the guest's number


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    container: str
    signal: int
    everyone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Execute:
    """An OCI `process` in a running container, executing when Started comes."""

    container: str
    exec_id: str
    process: dict[str, Any]
    stdin: int = 0
    stdout: int = 0
    stderr: int = 0
    console: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KillExec:
    """Of an execution that has ended: nothing."""

    container: str
    exec_id: str
    signal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize:
    """A terminal's size; exec_id "" is the container's own."""

    container: str
    exec_id: str
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    container: str
    resources: dict[str, Any]  # OCI linux.resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Answered with the object of shim.handler.Handler.stats; container "" is the pod."""

    container: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """An ended (or killed) container with its mounts; when it is answered the slot holds no open block. What is gone stays gone."""

    container: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """Run the throw-away container once, so that clones (of a template) or this member (of a pool) need not learn how.

    With a `drive` it stands on that, as a pod's do, else on the guest's own root.
    """

    drive: str = ""
    uuid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """Sync and power off; answered before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """The result of a method that answers with no more than success."""


# -- events


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """After all that the process had written when it ended and the host gave credit for."""

    container: str
    exec_id: str  # "" for the container's own process
    code: int  # 0…255, 128+N for signal N
    at_ns: int  # the guest's clock
    oom_killed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Something an operator should know; also on the console."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The init of a shared PID namespace has died: the sandbox is NOTREADY."""

    failure: dict[str, Any]


METHODS: dict[str, tuple[type, type | None]] = {  # parameters, result (None: an object without fixed shape)
    "hello": (Hello, Greeting),
    "identify": (Identify, Nothing),
    "network": (Network, Nothing),
    "machine": (Machine, Size),
    "sandbox": (Sandbox, Nothing),
    "volume": (Volume, Place),
    "files": (Files, Place),
    "read_file": (ReadFile, Content),
    "remove_volume": (RemoveVolume, Nothing),
    "create": (Create, Started),
    "start": (Start, Started),
    "kill": (Kill, Nothing),
    "execute": (Execute, Started),
    "kill_exec": (KillExec, Nothing),
    "resize": (Resize, Nothing),
    "update": (Update, Nothing),
    "stats": (Stats, None),
    "delete": (Delete, Nothing),
    "warm": (Warm, Nothing),
    "shutdown": (Shutdown, Nothing),
}
EVENTS: dict[str, type] = {"exit": Exit, "log": Log, "lost": Lost}
NAMES = frozenset({"container", "exec_id", "name", "generation"})  # fields that become parts of paths


def encode(value: Any) -> Any:
    """A record as a JSON tree; bytes become base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if hasattr(type(value), "__dataclass_fields__"):
        return {one.name: encode(getattr(value, one.name)) for one in fields(value)}
    return value


def decode(kind: type[T], document: Any, where: str = "") -> T:
    """The record that `document` holds. Raises Invalid naming the field."""
    where = where or kind.__name__
    if not isinstance(document, dict):
        raise _wrong(where, "is no object")
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]  # every class above is a dataclass
    unknown = document.keys() - known.keys()
    if unknown:
        raise _wrong(f"{where}.{min(unknown)}", "is unknown")
    values = {}
    for name, one in known.items():
        place = f"{where}.{name}"
        if name in document:
            values[name] = _value(one.type, document[name], place)
            if name in NAMES and values[name] and not NAME.fullmatch(values[name]):
                raise _wrong(place, f"{values[name][:64]!r} is no name")
        elif one.default is MISSING and one.default_factory is MISSING:
            raise _wrong(place, "is missing")
    return kind(**values)


def _value(kind: Any, given: Any, where: str) -> Any:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is bytes:
        return _bytes(given, where)
    if hasattr(origin, "__dataclass_fields__"):
        return decode(origin, given, where)
    if origin is UnionType or not isinstance(given, origin) or (isinstance(given, bool) and origin is not bool):
        raise _wrong(where, f"is no {origin.__name__}")
    if origin is int and not -(1 << 63) <= given < 1 << 63:
        raise _wrong(where, "is out of range")
    if origin is list:
        return [_value(inner[0], item, f"{where}[{index}]") for index, item in enumerate(given)]
    if origin is dict and inner[1] is not Any:
        return {key: _value(inner[1], item, f"{where}[{key!r}]") for key, item in given.items()}
    return given


def _bytes(given: Any, where: str) -> bytes:
    try:
        return base64.b64decode(given, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise _wrong(where, "is no base64") from None


def _wrong(where: str, why: str) -> Invalid:
    return Invalid(what="read an agent message", cause=f"{where} {why}")
