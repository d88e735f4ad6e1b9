"""nacre-runc where SELinux has a policy: Debian's own, permissive, so that the machine's unlabelled files do no harm."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine_support import run
from test_runc_matrix import passed, suite

PACKAGES = ("selinux-policy-default", "policycoreutils")
PREPARE = """mount -t selinuxfs selinuxfs /sys/fs/selinux || exit 9
printf 'SELINUX=permissive\nSELINUXTYPE=default\n' > /etc/selinux/config; load_policy -i; cat /proc/self/attr/current; echo
"""


@pytest.mark.slow
def test_labels_are_set_where_selinux_has_a_policy(tmp_path: Path) -> None:
    job = PREPARE + suite("v2", "selinux")
    words = "security=selinux selinux=1 enforcing=0"
    outcome = run(job, "v2", [], tmp_path, timeout_s=1800, packages=PACKAGES, kernel_words=words)
    passed(outcome, 3)
