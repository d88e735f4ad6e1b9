"""The system call numbers that libc has no function for, by machine. Apart from `libc` as a command begins without that (`interpreter`)."""

from __future__ import annotations

import os


def machine() -> str:
    """The machine's name as the syscall table has it: x86_64 or aarch64."""
    return _MACHINE


_MACHINE = os.uname().machine  # once: a 32-bit personality would change the answer

# asm-generic numbers are the same for every call since 5.1 (424 and up); older ones differ.
_COMMON = {
    "pidfd_send_signal": 424,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "pidfd_open": 434,
    "clone3": 435,
    "close_range": 436,
    "openat2": 437,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
}
_NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": _COMMON
    | {
        "pivot_root": 155,
        "umount2": 166,
        "finit_module": 313,
        "seccomp": 317,
        "bpf": 321,
        "keyctl": 250,
        "capget": 125,
        "capset": 126,
        "ioprio_set": 251,
        "sched_setattr": 314,
        "set_mempolicy": 238,
    },
    "aarch64": _COMMON
    | {
        "pivot_root": 41,
        "umount2": 39,
        "finit_module": 273,
        "seccomp": 277,
        "bpf": 280,
        "keyctl": 219,
        "capget": 90,
        "capset": 91,
        "ioprio_set": 30,
        "sched_setattr": 274,
        "set_mempolicy": 237,
    },
}


def number(call: str) -> int:
    """The number of `call` on this machine. A machine that the table lacks is an error: a foreign number is another call."""
    table = _NUMBERS.get(machine())
    if table is None:
        raise OSError(f"no system call table for machine {machine()}: known are {', '.join(sorted(_NUMBERS))}")
    return table[call]
