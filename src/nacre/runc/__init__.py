"""The container runtime: from an OCI bundle to processes in namespaces and cgroups, and back to nothing.

Called by shims, by the guest agent (the same code as PID 1's helper inside a VM) and by the command `nacre-runc`
(`main`). Imports `nacre.oci` and `nacre.linux`, standard library only. Owns a container's directory below the runtime's root and its
cgroups, from `create` to `delete`; bundle, root filesystem and reaping of the processes are the caller's.

How a container comes to be: `plan` turns config.json into frozen steps, `launch` forks a child into its namespaces, `init` runs the
steps there and waits at a gate (`steps`: file systems, `process_steps`: the process, `programs`: what it executes), `container` keeps
the books. From then on `life` acts on it.

The names below are loaded when first used: the command line needs few of them. Whoever forks calls `load` before.
"""

from __future__ import annotations

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from nacre.runc.container import Launch, create
    from nacre.runc.joining import execute
    from nacre.runc.life import (
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

__all__ = [
    "Launch",
    "create",
    "delete",
    "execute",
    "kill",
    "list_states",
    "load",
    "oom_kills",
    "pause",
    "processes",
    "resume",
    "start",
    "state",
    "stats",
    "update",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"nacre.runc has no {name}")
    if name in ("Launch", "create"):
        from nacre.runc import container

        found: object = getattr(container, name)
    elif name == "execute":
        from nacre.runc import joining

        found = joining.execute
    else:
        from nacre.runc import life

        found = getattr(life, name)
    globals()[name] = found
    return found


def load() -> None:
    """All of it, now: a child that is forked for each container shall find everything there."""
    from nacre.linux import cgroup_figures, device_bpf, seccomp_compiler  # noqa: F401

    for name in __all__:
        if name not in globals():
            __getattr__(name)
