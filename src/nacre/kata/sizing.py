"""How large a pod's VM is: CPUs and memory from the pod's limits.

Each guest boots with room for its kernel and agent and INCLUDED_BYTES beyond, which cost the host nothing until they are touched: most
pods are served by that, for plugging memory in takes the guest 80 ms. What a pod's limits ask for on top is hot-added. Inside, containers are held to
their own limits by the guest's cgroups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nacre.kata.machine import MIB, Shape
from nacre.oci.errors import Failure

INCLUDED_BYTES = 512 * MIB
DEFAULT_BYTES = INCLUDED_BYTES  # for containers without a limit, all of a pod's together
GRAIN = 4 * MIB  # virtio-mem plugs whole blocks of this size
_PAGE_SHARE = 64  # of hot-added memory the guest's kernel takes a 64th to keep account of its pages


class VmTooSmall(Failure):
    """The pod asks for more than a VM of this node can be given."""


def hot_bytes(limits: Iterable[int], pod_limit: int, shape: Shape) -> int:
    """Memory to add for containers with these limits (0: none) in a pod with this one (0: none known). Raises VmTooSmall."""
    known = list(limits)
    asked = max(pod_limit, sum(known) + (DEFAULT_BYTES if 0 in known else 0)) or DEFAULT_BYTES
    beyond = max(0, asked - INCLUDED_BYTES)
    wanted = -(-(beyond + beyond // _PAGE_SHARE) // GRAIN) * GRAIN
    if wanted > shape.hot_bytes:
        raise VmTooSmall(
            what="size the pod's virtual machine",
            cause=f"its limits come to {asked // MIB} MiB; this node can add {shape.hot_bytes // MIB} MiB to a VM",
            remedy="lower the pod's memory limits",
        )
    return wanted


def cpus(resources: Mapping[str, Any], shape: Shape) -> int:
    """Virtual CPUs for a quota, rounded up; one without a quota; never more than the host has."""
    cpu = resources.get("cpu") or {}
    quota, period = int(cpu.get("quota") or 0), int(cpu.get("period") or 100_000)
    return max(1, min(shape.max_cpus, -(-quota // period) if quota > 0 and period > 0 else 1))


def memory_limit(resources: Mapping[str, Any]) -> int:
    """The limit of an OCI linux.resources, 0 for none."""
    return max(0, int((resources.get("memory") or {}).get("limit") or 0))
