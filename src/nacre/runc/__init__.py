"""The container runtime: from an OCI bundle to processes in namespaces and cgroups, and back to nothing.

Called by the shim's set-up child, by the guest agent (the same code as PID 1's helper inside a VM) and by the command `nacre-runc`
(`main`). Imports `nacre.oci` and `nacre.linux`, standard library only. Owns a container's directory below the runtime's root and its
cgroups, from `create` to `delete`; bundle, root filesystem and reaping of the processes are the caller's.

How a container comes to be: `plan` turns config.json into frozen steps, `launch` forks a child into its namespaces, `init` runs the
steps there and waits at a gate (`steps`: file systems, `process_steps`: the process), `container` keeps the books.
"""

from nacre.runc.container import (
    Launch,
    create,
    delete,
    kill,
    list_states,
    oom_kills,
    pause,
    processes,
    resume,
    start,
    state,
    stats,
    update,
)
from nacre.runc.execute import execute

__all__ = [
    "Launch",
    "create",
    "delete",
    "execute",
    "kill",
    "list_states",
    "oom_kills",
    "pause",
    "processes",
    "resume",
    "start",
    "state",
    "stats",
    "update",
]
