"""Making the plan (see `plan`): a look at QEMU, the host and the appliance, in a process that has time for it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import asdict
from typing import Any

from nacre.config import Config, KataConfig
from nacre.kata import appliance, machine, process, sizing
from nacre.kata.machine import Boot, Shape, Wires
from nacre.kata.plan import VERSION, Plan, path
from nacre.oci.errors import Failure

MIN_RAM_MIB = 128  # kernel, initrd and agent: with less the guest does not come up
FORMAT = 4  # of a template


class GuestMissing(Failure):
    """The guest's kernel and root have not been built."""


def make(config: Config, accelerator: str) -> Plan:
    """Work it out and keep it. Raises QemuMissing, GuestMissing."""
    guest = appliance.current(config)
    if guest is None:
        raise GuestMissing(what="plan the virtual machines", cause="their guest is not built", remedy="nacre enable kata")
    made = Plan(
        shape=shape(config.kata, accelerator),
        boot=Boot(kernel=guest.kernel, initrd=guest.initrd, cmdline=guest.cmdline),
        guest=guest.version,
    )
    keep(path(config.data), {"version": VERSION, **asdict(made)})
    return made


def shape(settings: KataConfig, accelerator: str) -> Shape:
    """The shape of this node's VMs."""
    binary, version = qemu(settings.qemu)
    ram_mib = max(MIN_RAM_MIB, settings.memory_mib)
    return Shape(
        qemu=binary,
        qemu_version=version,
        accelerator=accelerator,
        ram_bytes=(ram_mib + ram_mib % 2) * machine.MIB + sizing.INCLUDED_BYTES,
        hot_bytes=machine.hot_bytes_of_host(),
        max_cpus=machine.cpus_of_host(),
    )


def qemu(name: str) -> tuple[str, str]:
    """(path, version) of the QEMU called `name`. Raises QemuMissing."""
    binary = process.find(name)
    if binary is None:
        raise process.missing(name)
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        said = tuple((done.stderr or done.stdout).splitlines())
        what = "start virtual machines"
        raise process.QemuMissing(what=what, cause=f"{binary} --version ended with code {done.returncode}", evidence=said)
    return binary, done.stdout.partition("\n")[0]


def key(plan: Plan) -> str:
    """Names a template: the guest's version, the shape, and everything else that its command line is made of."""
    facts = asdict(plan.shape) | {
        "guest": plan.guest,
        "words": machine.common(plan.shape, Wires.sample()),
        "boot": machine.kernel_words(plan.shape, plan.boot.cmdline),
        "format": FORMAT,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def keep(target: str, document: dict[str, Any]) -> None:
    """Write a small file whole."""
    fresh = f"{target}.{os.getpid()}.new"
    with open(fresh, "w", encoding="utf-8") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(fresh, target)
