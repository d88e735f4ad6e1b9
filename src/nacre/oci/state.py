"""What a runtime remembers of a container (runtime.md "State"), one directory each, and the only way its status changes.

    ROOT/ID/            held by flock(2) while something changes; mode 0700
        state.json      the Record; replaced whole (temporary name, rename): a kill leaves the old one or the new one;
                        not synced, as a power cut ends the container too
        process.json    config.json's `process` as it was at create, for a later exec: the bundle's file may have changed
        start.sock      where init waits to be started; goes with the directory

A kill before the first state.json leaves an empty directory, which `delete --force` removes.
"""

from __future__ import annotations

import fcntl
import os

from nacre.oci.errors import AlreadyExists, Failure, NotFound, WrongStatus
from nacre.oci.jsontext import dumps, loads
from nacre.oci.values import Value

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

FORMAT = 1


class Status:
    """runtime.md "State", and `paused`, which every runtime adds. Plain words: the module enum takes longer to load than a command to run."""

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


_NEXT: dict[str, frozenset[str]] = {
    Status.CREATING: frozenset({Status.CREATED, Status.STOPPED}),
    Status.CREATED: frozenset({Status.RUNNING, Status.STOPPED}),
    Status.RUNNING: frozenset({Status.PAUSED, Status.STOPPED}),
    Status.PAUSED: frozenset({Status.RUNNING, Status.STOPPED}),
    Status.STOPPED: frozenset(),
}


class Record(Value):
    """One container, as state.json holds it."""

    id: str
    root: str  # the runtime's root: ROOT/ID is the directory
    bundle: str  # absolute
    status: str = Status.CREATING
    pid: int = 0  # init, as the host numbers it
    start_time: int = 0  # of init, clock ticks since boot: tells it from a later process of the same number
    creator: int = 0  # who is creating; a dead one in status creating never finished
    cgroup: str = ""  # path below every hierarchy; "" when the host has no cgroups
    unit: str = ""  # the systemd scope that it is, made in `slice`; "" when we made it
    slice: str = ""
    rootfs: str = ""
    mounts_beneath: int = -1  # on rootfs before ours, in a mount namespace that is not the container's own (runc.borrowed)
    mount_namespace: str = ""  # the path by which that one was joined, "" for the runtime's
    mount_identity: str = ""
    joined: dict[str, str] = {}  # kind to path of the namespaces that are not its own
    cgroup_namespace: bool = False  # one of its own
    shares_pids: bool = False  # its init is not 1 of a PID namespace: when that dies the others live on
    user_namespace: bool = False
    oci_version: str = ""
    created_ns: int = 0  # Unix time
    annotations: dict[str, str] = {}
    hooks: dict[str, Any] = {}  # poststart and poststop
    seccomp: str = ""  # file with the compiled filter, for `execute`
    seccomp_flags: int = 0
    listener: dict[str, str] = {}  # path and metadata of who is asked about system calls, for a filter that asks
    apparmor: str = ""
    selinux: str = ""
    personality: str = ""
    memory_policy: dict[str, Any] = {}  # linux.memoryPolicy
    resctrl: dict[str, str] = {}  # where its processes go and what to remove (runc.resctrl)

    @property
    def directory(self) -> str:
        return os.path.join(self.root, self.id)


def advance(record: Record, to: str, **facts: Any) -> Record:
    """The only way a status changes. The caller holds the container's lock; on return the new record is in its file."""
    if to not in _NEXT[record.status]:
        raise WrongStatus(what=f"move container {record.id} to {to}", cause=f"it is {record.status}")
    record = record.but(status=to, **facts)
    save(record)
    return record


_held: dict[tuple[str, str], Record] | None = None  # root and id to record, of a process that keeps them in memory


def keep_in_memory() -> None:
    """Records are this process's own from now on, and no files: for one that alone acts on its containers, and whose end is theirs."""
    global _held
    _held = {} if _held is None else _held


def save(record: Record) -> None:
    """Write state.json whole."""
    if _held is not None:
        _held[record.root, record.id] = record
        return
    document = vars(record) | {"format": FORMAT}
    path = os.path.join(record.directory, "state.json")
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, dumps(document).encode())
    finally:
        os.close(fd)
    os.rename(path + ".new", path)


def read(root: str, identifier: str) -> Record:
    """The record of a container. Raises NotFound, or Failure for a file that no nacre wrote."""
    path = os.path.join(root, identifier, "state.json")
    if _held is not None:
        if (root, identifier) in _held:
            return _held[root, identifier]
        raise NotFound(what=f"find container {identifier}", cause="this process holds no record of it")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(what=f"find container {identifier}", cause=f"there is no {path} ({error.strerror})") from error
    try:
        document = loads(os.read(fd, 16 << 20))
        if document["format"] != FORMAT:
            raise Failure(what=f"read {path}", cause=f"it has format {document['format']}, this nacre knows {FORMAT}")
        facts = {name: _typed(name, kind, document[name]) for name, kind in Record.__annotations__.items() if name in document}
        return Record(**facts | {"root": root})
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(
            what=f"read {path}", cause=f"it is damaged: {error}", remedy=f"delete --force {identifier}, then create it anew"
        ) from error
    finally:
        os.close(fd)


def forget(root: str, identifier: str) -> None:
    """What is kept in memory; files go with their directory."""
    if _held is not None:
        _held.pop((root, identifier), None)


def keep_process(record: Record, tree: Mapping[str, Any]) -> None:
    """Not synced: a power cut ends the container too."""
    if _held is not None:
        return  # who keeps records in memory is told each further process whole
    with open(os.path.join(record.directory, "process.json"), "w", encoding="utf-8") as file:
        file.write(dumps(tree))


def kept_process(record: Record) -> dict[str, Any]:
    """Raises Failure when it is not there: the container was made by an older nacre, or its creation was killed."""
    path = os.path.join(record.directory, "process.json")
    try:
        with open(path, "rb") as file:
            return dict(loads(file.read()))
    except (OSError, ValueError) as error:
        raise Failure(what=f"read {path}", cause=str(error), remedy="give the process by --process") from error


def _typed(name: str, kind: str, value: Any) -> Any:
    """The value of a field, which has its type: the file may have been damaged or written by somebody else."""
    wanted = {"int": int, "bool": bool}.get(kind, dict if kind.startswith("dict") else str)
    low, high = (0, (1 << 31) - 1) if name in ("pid", "creator") else (-1, (1 << 63) - 1)
    fine = type(value) is wanted
    if fine and wanted is int:
        fine = low <= value <= high
    elif fine and name == "status":
        fine = value in _NEXT
    elif fine and wanted is str:
        fine = value.isprintable()
    elif fine and name == "hooks":
        fine = all(isinstance(hooks, list) and all(isinstance(hook, dict) for hook in hooks) for hooks in value.values())
    if not fine:
        raise ValueError(f"{name} is {value!r}"[:200])
    return value


def reserve(root: str, identifier: str) -> int:
    """Make ROOT/ID and lock it; the descriptor is the lock, the caller closes it. Raises AlreadyExists naming the holder."""
    directory = os.path.join(root, identifier)
    try:
        os.mkdir(directory, 0o700)
    except FileNotFoundError:
        os.makedirs(root, 0o711, exist_ok=True)
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            raise _taken(root, identifier) from None
    except FileExistsError:
        raise _taken(root, identifier) from None
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def _taken(root: str, identifier: str) -> AlreadyExists:
    try:
        record = read(root, identifier)
        holder = f"held by a container that is {record.status}, pid {record.pid or record.creator}, bundle {record.bundle}"
    except Failure as error:
        holder = f"its directory {os.path.join(root, identifier)} exists ({error.cause})"
    return AlreadyExists(what=f"create container {identifier}", cause=f"the id is taken: {holder}")


class locked:  # used as a function; see linux.pids.owned
    """The container's directory, open and locked for the block. Raises NotFound."""

    def __init__(self, root: str, identifier: str, *, exclusive: bool = True) -> None:
        self._directory, self._exclusive = os.path.join(root, identifier), exclusive
        self._what = f"find container {identifier}"

    def __enter__(self) -> int:
        try:
            self._fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFound(what=self._what, cause=f"there is no {self._directory} ({error.strerror})") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX if self._exclusive else fcntl.LOCK_SH)
            if os.fstat(self._fd).st_nlink == 0:
                raise NotFound(what=self._what, cause="it was deleted meanwhile")
        except BaseException:
            os.close(self._fd)
            raise
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def identifiers(root: str) -> list[str]:
    """The ids below ROOT, sorted; names that begin with a dot are nacre's own."""
    try:
        return sorted(name for name in os.listdir(root) if not name.startswith("."))
    except FileNotFoundError:
        return []
