"""What goes wrong between fork and QEMU is told by the starter, in words and with the remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nacre import config
from nacre.kata import accelerator
from nacre.kata.machine import Boot
from nacre.oci.errors import NotFound

START = """
import os
from nacre.kata import process
from nacre.oci.errors import Failure
try:
    process.start(lambda wires: ["/bin/true"], os.memfd_create("ram"), ())
except Failure as failure:
    print(failure.code, failure.what, failure.cause, failure.remedy, sep="|")
"""


def test_a_host_without_the_tun_module_is_told_to_load_it() -> None:
    command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh", sys.executable, "-c", START]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert said == "NotFound|start QEMU|/dev/net/tun is not there: the kernel's tun module is not loaded|modprobe tun"


def test_a_trial_in_which_qemu_never_ran_is_no_verdict_on_kvm(tmp_path: Path) -> None:
    boot = Boot(kernel=str(tmp_path / "vmlinux"), initrd=str(tmp_path / "initrd"), cmdline="")
    with pytest.raises(NotFound, match="vmlinux"):
        accelerator._trial(config.load(str(tmp_path)), boot)
