"""More ids than one's own, without root: newuidmap(1) and newgidmap(1), set-uid programs that know what /etc/subuid and /etc/subgid grant."""

from __future__ import annotations

import os

from nacre.linux.libc import owned
from nacre.linux.memfd import from_bytes
from nacre.oci.errors import Failure

_TOOLS = {"uid_map": "newuidmap", "gid_map": "newgidmap"}
_GRANTS = {"uid_map": "--add-subuids", "gid_map": "--add-subgids"}


class MappingRefused(Failure):
    """newuidmap or newgidmap is not there, or does not grant the ids of a user namespace; its own words are the evidence."""


def is_needed(uid_map: str, gid_map: str) -> bool:
    """Whether the kernel would refuse these maps to an ordinary user: it may map its own id, and a single one."""
    return not (_is_own(uid_map, os.geteuid()) and _is_own(gid_map, os.getegid()))


def _is_own(text: str, own: int) -> bool:
    lines = [line.split() for line in text.splitlines()]
    return len(lines) == 1 and lines[0][1:] == [str(own), "1"]


def write_map(pid: int, name: str, text: str) -> None:
    """Have the map `name` (`uid_map`, `gid_map`) of process `pid` written. Raises MappingRefused."""
    tool = _TOOLS[name]
    what = f"map the ids of process {pid}"
    with owned(from_bytes("nacre-mapping", b"")) as output:
        try:
            child = os.posix_spawnp(
                tool,
                [tool, str(pid), *text.split()],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, output, number) for number in (1, 2)],
            )
        except OSError as error:
            raise MappingRefused(
                what=what,
                cause=f"{tool}: {error.strerror} (errno {error.errno}); without root it takes that to map more than one's own id",
                remedy="apt-get install uidmap, or map one id alone (nacre-runc spec --rootless)",
            ) from error
        _, status = os.waitpid(child, 0)
        said = os.pread(output, 1 << 16, 0).decode("utf-8", "replace").splitlines()
    if code := os.waitstatus_to_exitcode(status):
        raise MappingRefused(
            what=what,
            cause=f"{tool} {pid} {' '.join(text.split())} ended with {code}",
            evidence=said,
            remedy=f"grant the ids, as root: usermod {_GRANTS[name]} FIRST-LAST USER",
        )
