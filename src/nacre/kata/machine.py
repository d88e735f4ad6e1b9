"""A virtual machine as data: what template and clones must share (`Shape`), and the QEMU command line made of it.

Every device that a pod may need is plugged before the template is saved, for a clone must be the same machine: drive slots whose
backing is an endless null device until an image is swapped in (`blockdev-add`, then qom-set of the slot's `drive`: 3 ms where
hot-plugging takes 200), a link, memory that grows (virtio-mem), CPUs that can be added, an entropy source, the agent's port.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

MIB = 1 << 20
SLOTS = 8  # images at once in one VM
MAX_CPUS = 8
MAX_HOT_BYTES = 64 << 30
HOT_ALIGN = 128 * MIB  # Linux' memory block on x86
NULL_BYTES = 1 << 40  # a slot's capacity: the guest reads it once, erofs never reads past its own end
TB_SIZE_MIB = 128  # a cache of translated code smaller than the working set is flushed for ever; unused, it costs nothing
AGENT_PORT = "nacre.agent"
TEMPLATE_MAC = "02:6e:61:63:72:65"  # replaced in each guest by its pod's
HOST_WORDS = "console=ttyS0 swiotlb=noforce"  # the latter: room beyond 4 GiB makes Linux set 64 MiB of bounce buffers aside, unused by virtio
# An emulated processor speculates on nothing, and pays for each guard of the kernel's; the wall is the VM, not these. It repeats a
# string instruction byte by byte, so pages are better cleared and copied by loops: neither kernel nor C library shall think it quick.
# On a slow host its timer's first ticks come later than the kernel waits for them, which then takes it for broken and panics (under KVM
# Linux leaves that check out by itself).
TCG_WORDS = (
    "mitigations=off nosmap init_on_alloc=0 randomize_kstack_offset=off hardened_usercopy=off audit=0 lsm=capability "
    "clearcpuid=rep_good,erms,fsrm no_timer_check"
)
CPU_MODELS = {"tcg": "max,la57=off,erms=off,fsrm=off", "kvm": "host,migratable=on"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decides whether a saved machine can be loaded into another process."""

    qemu: str  # path of the binary
    qemu_version: str
    accelerator: str  # tcg, kvm
    ram_bytes: int
    hot_bytes: int  # the most that can be added
    max_cpus: int
    machine: str = "pc"  # its PCI bus is hot-pluggable as a whole, by ACPI
    slots: int = SLOTS

    @property
    def cpu_model(self) -> str:
        return CPU_MODELS[self.accelerator]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wires:
    """Descriptors that QEMU inherits, under the numbers they have in it."""

    qmp: int
    agent: int
    console: int
    tap: int
    ram: int

    @classmethod
    def sample(cls) -> Wires:
        return cls(qmp=10, agent=11, console=12, tap=13, ram=14)

    def all(self) -> tuple[int, ...]:
        return (self.qmp, self.agent, self.console, self.tap, self.ram)


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What a cold boot starts from."""

    kernel: str
    initrd: str
    cmdline: str


def cold_line(shape: Shape, wires: Wires, boot: Boot, *, shared: bool) -> list[str]:
    """Boot the guest. With `shared` what it writes to its RAM goes to the file, which is how a template is made."""
    return [
        *common(shape, wires),
        *("-object", _ram(shape, wires, shared=shared)),
        *("-kernel", boot.kernel, "-initrd", boot.initrd, "-append", kernel_words(shape, boot.cmdline)),
    ]


def kernel_words(shape: Shape, guest: str) -> str:
    """The kernel's command line; `guest` is the appliance's part of it."""
    return " ".join((HOST_WORDS, *((TCG_WORDS,) if shape.accelerator == "tcg" else ()), guest))


def clone_line(shape: Shape, wires: Wires) -> list[str]:
    """A machine that waits for a template's state; its RAM is a private view of the template's file."""
    return [*common(shape, wires), *("-object", _ram(shape, wires, shared=False)), *("-incoming", "defer")]


def _ram(shape: Shape, wires: Wires, *, shared: bool) -> str:
    share = "on" if shared else "off"
    return f"memory-backend-file,id=ram,size={shape.ram_bytes},mem-path=/proc/self/fd/{wires.ram},share={share},prealloc=off"


def common(shape: Shape, wires: Wires) -> list[str]:
    """What template and clone have to have alike."""
    accelerator = f"tcg,thread=multi,tb-size={TB_SIZE_MIB}" if shape.accelerator == "tcg" else shape.accelerator
    return [
        shape.qemu,
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-name", "nacre"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-machine", f"{shape.machine},memory-backend=ram,usb=off,smm=off,hpet=off,vmport=off"),
        *("-accel", accelerator, "-cpu", shape.cpu_model),
        *("-smp", f"cpus=1,maxcpus={shape.max_cpus},sockets={shape.max_cpus},cores=1,threads=1"),
        *("-m", f"size={shape.ram_bytes // MIB}M,slots=1,maxmem={(shape.ram_bytes + shape.hot_bytes) // MIB}M"),
        *("-rtc", "base=utc,clock=host"),
        *("-chardev", f"socket,id=qmp,fd={wires.qmp}", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=console,fd={wires.console}", "-serial", "chardev:console"),
        *("-device", "virtio-serial-pci,id=serial,max_ports=2,romfile="),
        *("-chardev", f"socket,id=agent,fd={wires.agent}", "-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"),
        *("-object", "rng-builtin,id=entropy", "-device", "virtio-rng-pci,rng=entropy,romfile="),
        *("-netdev", f"tap,id=link,fd={wires.tap}"),
        *("-device", f"virtio-net-pci,netdev=link,id=nic,mac={TEMPLATE_MAC},romfile="),
        *("-object", f"memory-backend-ram,id=more,size={shape.hot_bytes},reserve=off"),
        *("-device", f"virtio-mem-pci,id=memory,memdev=more,requested-size=0,block-size={2 * MIB},romfile="),
        *(word for slot in range(shape.slots) for word in _slot(slot)),
    ]


def empty_node(slot: int) -> str:
    return f"empty{slot}"


def slot_name(slot: int) -> str:
    """The device's id in QEMU, and the serial that the guest finds the disk by."""
    return f"slot{slot}"


def _slot(slot: int) -> list[str]:
    null = f"null-co,node-name={empty_node(slot)},size={NULL_BYTES},read-zeroes=on,read-only=on"
    disk = f"virtio-blk-pci,id={slot_name(slot)},drive={empty_node(slot)},serial={slot_name(slot)},num-queues=1,romfile="
    return ["-blockdev", null, "-device", disk]


def hot_bytes_of_host() -> int:
    """The most a VM could be given here: the host's memory."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(MAX_HOT_BYTES, total) // HOT_ALIGN * HOT_ALIGN


def cpus_of_host() -> int:
    return min(MAX_CPUS, os.cpu_count() or 1)
