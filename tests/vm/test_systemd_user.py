"""`--systemd-cgroup` without root: the systemd that a user has of his own makes the scope, over its socket or over his bus."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine_support import REPOSITORY, run
from test_runc_matrix import proven

PROBE = REPOSITORY / "tests" / "vm" / "user_probe.py"
# A manager as logind would start it; what speaks to it is outside of its part of the cgroups, as a login's session is.
MANAGER = """echo mine:x:4322:4322::/home/mine:/bin/sh >> /etc/passwd; echo mine:x:4322: >> /etc/group
mkdir -p /run/user/4322; chown 4322:4322 /run/user/4322; chmod 700 /run/user/4322; export XDG_RUNTIME_DIR=/run/user/4322
systemd-run -q --unit=mine --uid=4322 --gid=4322 -p Delegate=yes -p Type=notify -E XDG_RUNTIME_DIR=/run/user/4322 \\
    /lib/systemd/systemd --user || exit 9
"""
JOB = f"""{MANAGER}setpriv --reuid 4322 --regid 4322 --clear-groups env HOME=/run/user/4322 python {PROBE}
"""
PROVEN = (
    "PLACED in the user's own manager",
    "LIMITED by systemd and in the files",
    "ENTERED by exec",
    "GONE after delete",
    "NAMED by itself",
)


@pytest.mark.slow
def test_the_systemd_of_a_user_makes_the_cgroups_of_his_containers(tmp_path: Path) -> None:
    proven(run(JOB, "systemd", [], tmp_path, timeout_s=600), *PROVEN)
