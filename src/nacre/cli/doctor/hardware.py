"""The doctor's look at virtual machines: QEMU, and which accelerator really boots a guest."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from nacre.cli.doctor.finding import Finding, Verdict
from nacre.config import Config


def qemu(config: Config) -> Iterator[Finding]:
    """QEMU and mkfs.erofs; without them containers run and VM pods do not."""
    for binary, package in ((config.kata.qemu, "qemu-system-x86"), ("mkfs.erofs", "erofs-utils")):
        path = shutil.which(binary)
        if not path:
            remedy = f"apt-get install --no-install-recommends {package}"
            yield Finding("virtual machines", Verdict.WARN, f"{binary} is not installed: no VM pods", (), remedy)
            continue
        yield Finding("virtual machines", Verdict.OK, f"{path}, {_version(path)}")


def _version(path: str) -> str:
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    said = (answer.stdout or answer.stderr).strip().splitlines()
    return said[0] if said else "which does not tell its version"


def accelerator(config: Config) -> Iterator[Finding]:
    """The accelerator by trial: a guest has booted under it, or why not (cached by kernel and QEMU version)."""
    if not shutil.which(config.kata.qemu):
        return
    from nacre.kata import accelerator as trial

    try:
        result = trial.probe(config)
    except trial.NoAccelerator as failure:
        says = f"{config.kata.accelerator} is asked for, and no guest has booted under it"
        yield Finding("accelerator", Verdict.WARN, says, (failure.cause, *failure.evidence), failure.remedy)
        return
    verdict = Verdict.OK if result.name == "kvm" else Verdict.NOTE
    yield Finding("accelerator", verdict, f"{result.name}: {result.reason}", tuple(result.evidence))
