"""What a pod's shim asks of the runtime below it; `shim.runc_handler` and `kata.handler` are the two that nacre brings.

One object per pod, living in that pod's single-threaded shim. Calls block and are short; anything that ends later (a process) is
reported through the `Host` given at construction. All text that names a file is an absolute host path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """A pod sandbox as the CRI service decided it; JSON-ready through `dataclasses.asdict`."""

    id: str
    pod_uid: str  # key of the recorder
    directory: str  # STATE/pods/ID: ns/, shm/, shim.json, containers/
    hostname: str
    cgroups_path: str  # the pod's cgroup, as an OCI cgroupsPath
    namespaces: dict[
        str, str
    ]  # kind (network, ipc, uts, pid, user) → path to join, "" to make and pin under directory/ns; absent: the host's
    sysctls: dict[str, str] = field(default_factory=dict)
    resources: dict[str, Any] = field(default_factory=dict)  # OCI linux.resources of the whole pod; kata sizes its VM by it
    overhead: dict[str, Any] = field(default_factory=dict)
    shm_bytes: int = 64 * 1024 * 1024
    annotations: dict[str, str] = field(default_factory=dict)
    dns: tuple[str, ...] = ()  # lines of resolv.conf
    settings: dict[str, Any] = field(default_factory=dict)  # the handler's own, from the configuration
    trace_dir: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rootfs:
    """Where a container's root comes from: an overlay of host directories, or one erofs file for a VM."""

    lower: tuple[str, ...] = ()  # top layer first
    upper: str = ""
    work: str = ""
    erofs: str = ""
    readonly: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stdio:
    """Descriptors for a new process. The handler owns them from the call on and closes them. With `tty`, all are None."""

    stdin: int | None = None  # None: /dev/null
    stdout: int | None = None
    stderr: int | None = None
    tty: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """A process of the pod ended. `exec_id` is empty for the container's own process."""

    container: str
    exec_id: str
    code: int  # 0…255, 128+N for signal N
    at_ns: int  # Unix time
    oom_killed: bool = False  # by this container's own counter, before against after
    failure: dict[str, Any] | None = None  # oci.errors.encode form, when it ended for a reason of ours (VMCrashed, shim died)


class Host(Protocol):
    """What the shim offers its handler."""

    def watch(self, fd: int, callback: Callable[[], None], *, write: bool = False) -> None:
        """Call back whenever `fd` is readable (writable); one watch a descriptor."""

    def unwatch(self, fd: int) -> None: ...

    def reap(self, pid: int, callback: Callable[[int], None]) -> None:
        """Call back with the wait status once child `pid` has ended; children that nobody named are reaped in silence."""

    def exited(self, exit: Exit) -> None:
        """Report an end; the shim writes it to disk before anyone hears of it."""

    def sandbox_lost(self, failure: dict[str, Any]) -> None:
        """The sandbox itself is gone (VM crashed, pid init died): NOTREADY from here on."""

    def inherited(self, name: str) -> int | None:
        """A descriptor that the zygote keeps for its children (`kata-template`), or None. Not owned by the caller."""


class Handler(Protocol):
    """Made as `factory(host)`; every call raises oci.errors.Failure on failure and then has undone what it did."""

    def warm(self, settings: dict[str, Any]) -> None:
        """Become a pool member: all that can be done before the pod is known (kata: clone a VM). A no-op where nothing can."""

    def create_sandbox(self, sandbox: Sandbox) -> dict[str, Any]:
        """Namespaces pinned, the VM claimed. Answers {"pid": host pid or 0}. The network is not there yet."""

    def network_ready(self, attachment: dict[str, Any]) -> None:
        """The pod's namespace now has its links (network.Attachment as JSON); kata joins its tap and configures the guest."""

    def create(self, container: str, bundle: str, rootfs: Rootfs, stdio: Stdio) -> int | None:
        """Create from BUNDLE/config.json, process not started. With tty answers the console's descriptor (read/write), caller owns it."""

    def start(self, container: str) -> int:
        """Start it; answers the host pid (0 inside a VM)."""

    def kill(self, container: str, signal: int, *, everyone: bool = False) -> None: ...

    def execute(self, container: str, exec_id: str, process: dict[str, Any], stdio: Stdio) -> int | None:
        """Run an OCI `process` inside; its end comes as Exit with exec_id. Answers the console as `create` does."""

    def kill_exec(self, container: str, exec_id: str, signal: int) -> None: ...

    def resize(self, container: str, exec_id: str, width: int, height: int) -> None: ...

    def update(self, container: str, resources: dict[str, Any]) -> None: ...

    def stats(self, container: str) -> dict[str, Any]:
        """{"cpu_ns", "memory_bytes", "working_set_bytes", "rss_bytes", "page_faults", "major_page_faults", "pids"}; container "" is the pod."""

    def delete(self, container: str) -> None:
        """Remove an ended container: mounts, cgroup, state. Deleting what is gone succeeds."""

    def destroy_sandbox(self) -> None:
        """Everything of the pod off the host; idempotent."""
