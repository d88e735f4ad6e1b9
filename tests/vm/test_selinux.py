"""nacre-runc where SELinux has a policy: Debian's own, permissive, as the machine's files have no labels; and enforcing for a container."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine_support import run
from test_runc_matrix import passed, suite

PACKAGES = ("selinux-policy-default", "policycoreutils")
PREPARE = """mount -t selinuxfs selinuxfs /sys/fs/selinux || exit 9
printf 'SELINUX=permissive\nSELINUXTYPE=default\n' > /etc/selinux/config; load_policy -i; cat /proc/self/attr/current; echo
"""
ENFORCE = "semodule -i /payload/selinux.cil && setenforce 1 || exit 8\n"
WORDS = "security=selinux selinux=1 enforcing=0"


@pytest.mark.slow
def test_labels_are_set_where_selinux_has_a_policy(tmp_path: Path) -> None:
    job = PREPARE + suite("v2", "selinux")
    outcome = run(job, "v2", [], tmp_path, timeout_s=1800, packages=PACKAGES, kernel_words=WORDS, processors=1)
    passed(outcome, 3)


@pytest.mark.slow
def test_a_container_is_confined_where_selinux_enforces(tmp_path: Path) -> None:
    """The policy is Debian's and a type for the container; whoever else is in the machine goes on as before."""
    job = PREPARE + ENFORCE + suite("v2", "selinux").rstrip() + " -k confined_to\n"
    module = [(Path(__file__).parent / "selinux.cil", "selinux.cil")]
    outcome = run(job, "v2", module, tmp_path, timeout_s=1800, packages=PACKAGES, kernel_words=WORDS, processors=1)
    passed(outcome, 1)
