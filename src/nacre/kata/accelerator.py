"""KVM or emulation, by trial: KVM counts only after a guest has really booted under it in a bounded time.

A /dev/kvm that opens, and even one that makes a virtual CPU, proves nothing where virtualization is itself emulated: the guest then
hangs. The verdict is kept in DATA/kata/accelerator.json for the pair of host kernel and QEMU (and the guest tried, if one was built).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from nacre.config import Config
from nacre.kata import appliance, planning
from nacre.kata.machine import Boot
from nacre.kata.process import KVM
from nacre.kata.vm import Place, Vm
from nacre.kata.waiting import Nobody
from nacre.oci.errors import Failure

TRIAL_S = 15.0  # a guest under working KVM answers in less than two


class NoAccelerator(Failure):
    """The accelerator that the configuration insists on does not work here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    name: str  # kvm, tcg
    reason: str
    evidence: tuple[str, ...] = field(default=())


def probe(config: Config) -> Accelerator:
    """What VMs of this node run under. Raises NoAccelerator when `kvm` is demanded and does not work, QemuMissing."""
    wish = config.kata.accelerator
    if wish == "tcg":
        return Accelerator(name="tcg", reason="the configuration says so")
    found = _remembered(config)
    if wish == "kvm" and found.name != "kvm":
        raise NoAccelerator(
            what="run virtual machines under KVM",
            cause=found.reason,
            evidence=found.evidence,
            remedy=f'set accelerator = "auto" under [kata] in {config.etc}/config.toml',
        )
    return found


def _remembered(config: Config) -> Accelerator:
    """The kept verdict if it is about this kernel, QEMU and guest; else a trial."""
    try:
        fd = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return Accelerator(name="tcg", reason=f"emulation, as {KVM} cannot be opened: {error.strerror}")
    os.close(fd)
    guest = appliance.current(config)
    if guest is None:
        return Accelerator(
            name="tcg",
            reason=f"{KVM} opens, but no guest has been booted under it yet: the first VM pod tries it, or nacre enable kata",
        )
    about = {"kernel": os.uname().release, "qemu": planning.qemu(config.kata.qemu)[1], "guest": guest.version}
    path = f"{config.data}/kata/accelerator.json"
    try:
        with open(path, "rb") as file:
            kept = json.load(file)
        if kept["about"] == about:
            return Accelerator(**kept["verdict"] | {"evidence": tuple(kept["verdict"]["evidence"])})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # never tried, or by another version: tried now
    verdict = _trial(config, Boot(kernel=guest.kernel, initrd=guest.initrd, cmdline=guest.cmdline))
    planning.keep(path, {"about": about, "verdict": asdict(verdict)})
    return verdict


def _trial(config: Config, boot: Boot) -> Accelerator:
    """Boot the guest under KVM until its agent answers, or for TRIAL_S seconds, times the patience."""
    shape = planning.shape(config.kata, "kvm")
    ram = os.memfd_create("nacre-trial", os.MFD_CLOEXEC)
    vm = Vm(Nobody(), shape, _nothing, config.patience)
    try:
        os.ftruncate(ram, shape.ram_bytes)
        greeting = vm.boot(boot, ram, Place(), shared=False, patience_s=TRIAL_S)
        return Accelerator(name="kvm", reason=f"a guest with Linux {greeting.kernel} booted under it")
    except Failure as failure:
        if not vm.pid:
            raise  # QEMU never ran, for a reason of the host's: nothing is known of KVM, and nothing is kept
        reason = f"emulation, as a guest under KVM did not boot: {failure.cause}"
        return Accelerator(name="tcg", reason=reason, evidence=failure.evidence)
    finally:
        vm.end()
        os.close(ram)


def _nothing(_event: Any) -> None:
    """What a guest on trial has to say beyond its greeting."""
