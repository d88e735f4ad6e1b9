"""cgroup v2 has no device list: a small BPF program attached to the cgroup decides each open and mknod. bpf(2).

The rules are tried from the last to the first, so that the last one that matches decides, as writing them in order to v1's
devices.allow and devices.deny would. What no rule matches is allowed, as in a fresh v1 cgroup.
"""

from __future__ import annotations

import struct

from nacre.linux import cdata
from nacre.linux.cgroup_values import DeviceRule
from nacre.linux.libc import owned, syscall

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Sequence

_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _PROG_GET_FD_BY_ID, _PROG_QUERY = 5, 8, 9, 13, 16
_PROG_TYPE_CGROUP_DEVICE, _ATTACH_CGROUP_DEVICE, _ALLOW_MULTI = 15, 6, 2
_MKNOD, _READ, _WRITE = 1, 2, 4
_ACCESS = {"m": _MKNOD, "r": _READ, "w": _WRITE}
_KIND = {"b": 1, "c": 2}
_LOAD_WORD, _MOV, _MOV_REG, _AND, _SHIFT_RIGHT, _EXIT = 0x61, 0xB7, 0xBF, 0x57, 0x77, 0x95
_JUMP_NOT_EQUAL, _JUMP_EQUAL = 0x55, 0x15


def _instruction(code: int, destination: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("<BBhi", code, source << 4 | destination, offset, immediate)


def program(rules: Sequence[DeviceRule]) -> bytes:
    """The instructions for `rules`. Registers: r2 kind, r3 access asked for, r4 major, r5 minor."""
    code = [
        _instruction(_LOAD_WORD, 2, 1, 0),
        _instruction(_MOV_REG, 3, 2),
        _instruction(_AND, 2, immediate=0xFFFF),
        _instruction(_SHIFT_RIGHT, 3, immediate=16),
        _instruction(_LOAD_WORD, 4, 1, 4),
        _instruction(_LOAD_WORD, 5, 1, 8),
    ]
    for rule in reversed(rules):
        block = _block(rule)
        code += block
        if len(block) == 2:
            return b"".join(code)  # matches everything: the verifier refuses instructions that cannot be reached
    return b"".join([*code, _instruction(_MOV, 0, immediate=1), _instruction(_EXIT)])


def _block(rule: DeviceRule) -> list[bytes]:
    """One rule: tests that jump behind the block, then the answer."""
    access = sum(_ACCESS[letter] for letter in set(rule.access))
    tests: list[tuple[int, int, int]] = []  # (jump, register, value)
    prepare: list[bytes] = []
    if rule.kind in _KIND:
        tests.append((_JUMP_NOT_EQUAL, 2, _KIND[rule.kind]))
    if access != 7:
        # Allowed when nothing else is asked for; denied as soon as one of the denied is asked for.
        prepare = [_instruction(_MOV_REG, 1, 3), _instruction(_AND, 1, immediate=(7 & ~access) if rule.allow else access)]
        tests.append((_JUMP_NOT_EQUAL if rule.allow else _JUMP_EQUAL, 1, 0))
    if rule.major >= 0:
        tests.append((_JUMP_NOT_EQUAL, 4, rule.major))
    if rule.minor >= 0:
        tests.append((_JUMP_NOT_EQUAL, 5, rule.minor))
    answer = [_instruction(_MOV, 0, immediate=int(rule.allow)), _instruction(_EXIT)]
    jumps = [
        _instruction(jump, register, offset=len(tests) - index - 1 + len(answer), immediate=value)
        for index, (jump, register, value) in enumerate(tests)
    ]
    return [*prepare, *jumps, *answer]


def attach(cgroup: int, rules: Sequence[DeviceRule]) -> None:
    """Make `rules` the device program of the cgroup whose directory is open as `cgroup`, in place of any before.

    Raises SyscallError (bpf(2)); EPERM without CAP_BPF or CAP_SYS_ADMIN.
    """
    before = _attached(cgroup)
    code = program(rules)
    instructions, licence = cdata.create_string_buffer(code, len(code)), cdata.create_string_buffer(b"Apache-2.0")
    head = (_PROG_TYPE_CGROUP_DEVICE, len(code) // 8, cdata.addressof(instructions), cdata.addressof(licence))
    with owned(_bpf(_PROG_LOAD, struct.pack("=IIQQIIQII16sI", *head, 0, 0, 0, 0, 0, b"nacre_devices", 0))) as new:
        _bpf(_PROG_ATTACH, struct.pack("=IIIII", cgroup, new, _ATTACH_CGROUP_DEVICE, _ALLOW_MULTI, 0))
    for identifier in before:
        with owned(_bpf(_PROG_GET_FD_BY_ID, struct.pack("=III", identifier, 0, 0))) as old:
            _bpf(_PROG_DETACH, struct.pack("=III", cgroup, old, _ATTACH_CGROUP_DEVICE))


def _attached(cgroup: int) -> list[int]:
    identifiers = (cdata.c_uint32 * 64)()
    attribute = cdata.create_string_buffer(
        struct.pack("=IIIIQII", cgroup, _ATTACH_CGROUP_DEVICE, 0, 0, cdata.addressof(identifiers), 64, 0), 64
    )
    syscall("bpf", _PROG_QUERY, attribute, 64)
    (count,) = struct.unpack_from("=I", attribute.raw, 24)
    return list(identifiers[:count])


def _bpf(command: int, attribute: bytes) -> int:
    buffer = cdata.create_string_buffer(attribute, 128)
    return syscall("bpf", command, buffer, 128)
