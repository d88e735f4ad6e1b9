"""An OCI seccomp profile becomes a BPF program, by libseccomp: it is opened for that alone, and never in a container.

config-linux.md "Seccomp", seccomp_rule_add(3).
"""

from __future__ import annotations

import errno
import os
import struct

from nacre.linux import cdata
from nacre.linux.memfd import from_bytes
from nacre.linux.seccomp import SeccompRefused
from nacre.oci.errors import Invalid

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

_ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_NOTIFY": 0x7FC00000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
_LETS_PASS = frozenset({"SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_NOTIFY"})  # or may, if asked
_X32_BIT = 1 << 30
_WITH_DATA = frozenset({"SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"})
_ARCHITECTURES = {
    "SCMP_ARCH_X86": 0x40000003,
    "SCMP_ARCH_X86_64": 0xC000003E,
    "SCMP_ARCH_X32": 0x4000003E,
    "SCMP_ARCH_ARM": 0x40000028,
    "SCMP_ARCH_AARCH64": 0xC00000B7,
}
# Profiles list the machines of the world; programs of these cannot run on the two kernels that nacre knows.
_FAMILIES = {
    "LOONGARCH": ("64",),
    "M68K": ("",),
    "MIPS": ("", "64", "64N32", "EL", "EL64", "EL64N32"),
    "PARISC": ("", "64"),
    "PPC": ("", "64", "64LE"),
    "RISCV": ("64",),
    "S390": ("", "X"),
    "SH": ("", "EB"),
}
_FOREIGN = frozenset(f"SCMP_ARCH_{family}{kind}" for family, kinds in _FAMILIES.items() for kind in kinds)
_OPERATORS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
_OPTIMIZE = 8  # SCMP_FLTATR_CTL_OPTIMIZE: 2 is a binary tree instead of a list of comparisons


class _Comparison(cdata.Structure):
    _fields_ = [("arg", cdata.c_uint), ("op", cdata.c_int), ("datum_a", cdata.c_uint64), ("datum_b", cdata.c_uint64)]


_library: cdata.CDLL | None = None


def _seccomp() -> cdata.CDLL:
    """libseccomp with its prototypes; its functions answer -errno, unlike libc's."""
    global _library
    if _library is None:
        try:
            library = cdata.CDLL("libseccomp.so.2")
        except OSError as error:
            raise SeccompRefused(
                what="compile a seccomp profile",
                cause=f"libseccomp.so.2 cannot be opened: {error}",
                remedy="apt-get install libseccomp2",
            ) from error
        context, uint = cdata.c_void_p, cdata.c_uint32
        library.seccomp_init.argtypes, library.seccomp_init.restype = [uint], context
        library.seccomp_release.argtypes, library.seccomp_release.restype = [context], None
        library.seccomp_arch_add.argtypes = library.seccomp_arch_remove.argtypes = [context, uint]
        library.seccomp_arch_exist.argtypes = [context, uint]
        library.seccomp_arch_native.argtypes, library.seccomp_arch_native.restype = [], uint
        library.seccomp_attr_set.argtypes = [context, cdata.c_int, uint]
        library.seccomp_syscall_resolve_name.argtypes = [cdata.c_char_p]
        library.seccomp_syscall_resolve_name_arch.argtypes = [uint, cdata.c_char_p]
        library.seccomp_rule_add_array.argtypes = [context, uint, cdata.c_int, cdata.c_uint, cdata.POINTER(_Comparison)]
        library.seccomp_export_bpf.argtypes = [context, cdata.c_int]
        _library = library
    return _library


def available() -> bool:
    """Whether profiles can be compiled here."""
    try:
        _seccomp()
    except SeccompRefused:
        return False
    return True


class _Version(cdata.Structure):
    _fields_ = [("major", cdata.c_uint), ("minor", cdata.c_uint), ("micro", cdata.c_uint)]


def version() -> str:
    """libseccomp's, such as 2.5.4; "" where there is none."""
    if not available():
        return ""
    answer = _seccomp().seccomp_version
    answer.argtypes, answer.restype = [], cdata.POINTER(_Version)
    found = answer().contents
    return f"{found.major}.{found.minor}.{found.micro}"


def compile_profile(profile: Mapping[str, Any]) -> bytes:
    """The BPF program of an OCI profile. System calls that this libseccomp does not know are left out.

    They fall to the default; but one that is newer than every call of the profile is answered ENOSYS where the default forbids: libc
    then does without it, as on a kernel that lacks it.
    """
    library = _seccomp()
    default = _action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    context = library.seccomp_init(default)
    if not context:
        raise SeccompRefused(what="compile the seccomp profile", cause=f"seccomp_init refuses {profile['defaultAction']}")
    try:
        machines = {library.seccomp_arch_native()}
        for word in profile.get("architectures", ()):
            architecture = _ARCHITECTURES.get(word)
            if architecture is None and word not in _FOREIGN:
                raise Invalid(what="read linux.seccomp", cause=f"architectures has {word!r}, which is none")
            if architecture is not None and _fits(architecture, library.seccomp_arch_native()):
                _checked(library.seccomp_arch_add(context, architecture), f"add {word}", errno.EEXIST)
                machines.add(architecture)
        library.seccomp_attr_set(context, _OPTIMIZE, 2)  # libseccomp before 2.5 has it not
        for rule in profile.get("syscalls", ()):
            _add_rule(library, context, rule, default)
        program = _exported(library, context)
        if profile["defaultAction"] in _LETS_PASS:
            return program
        return b"".join(_too_new(one, _newest(library, one, profile)) for one in sorted(machines)) + program
    finally:
        library.seccomp_release(context)


def _fits(architecture: int, native: int) -> bool:
    """Whether programs of `architecture` can run on a `native` kernel; rules for others would be dead weight."""
    families = ({0x40000003, 0xC000003E, 0x4000003E}, {0x40000028, 0xC00000B7})
    return any({architecture, native} <= family for family in families)


def _newest(library: cdata.CDLL, architecture: int, profile: Mapping[str, Any]) -> int:
    """The highest number among the calls that the profile names; -1 for none."""
    names = {name for rule in profile.get("syscalls", ()) for name in rule["names"]}
    return max((library.seccomp_syscall_resolve_name_arch(architecture, name.encode()) for name in names), default=-1)


def _too_new(architecture: int, newest: int) -> bytes:
    """BPF instructions that answer ENOSYS to what is above `newest` on this architecture; all else goes on behind them."""
    if newest < 0:
        return b""
    audit, first, last = architecture, newest + 1, 0xFFFFFFFF
    if architecture == _ARCHITECTURES["SCMP_ARCH_X86_64"]:
        last = _X32_BIT - 1
    elif architecture == _ARCHITECTURES["SCMP_ARCH_X32"]:  # to the kernel it is x86_64 with that bit in the numbers
        audit = _ARCHITECTURES["SCMP_ARCH_X86_64"]
    load, equal, above, not_below, answer = 0x20, 0x15, 0x25, 0x35, 0x06
    instructions = (  # (operation, how many to skip if so, if not, operand); a load's operand is a place in struct seccomp_data
        (load, 0, 0, 4),
        (equal, 0, 4, audit),
        (load, 0, 0, 0),
        (not_below, 0, 2, first),
        (above, 1, 0, last),
        (answer, 0, 0, _ACTIONS["SCMP_ACT_ERRNO"] | errno.ENOSYS),
    )
    return b"".join(struct.pack("=HBBI", *one) for one in instructions)


def _action(word: str, data: int | None) -> int:
    if word not in _ACTIONS:
        raise Invalid(what="read linux.seccomp", cause=f"{word!r} is no action", remedy=f"actions are {', '.join(_ACTIONS)}")
    if data is not None and word not in _WITH_DATA:
        raise Invalid(what="read linux.seccomp", cause=f"{word} has errnoRet {data}: it answers none")
    if word in _WITH_DATA:
        return _ACTIONS[word] | ((errno.EPERM if data is None else data) & 0xFFFF)
    return _ACTIONS[word]


def _add_rule(library: cdata.CDLL, context: int, rule: Mapping[str, Any], default: int) -> None:
    action = _action(rule["action"], rule.get("errnoRet"))
    if action == default:
        return  # libseccomp refuses what says nothing new
    groups = _comparisons(rule.get("args", ()))
    for name in rule["names"]:
        system_call = library.seccomp_syscall_resolve_name(name.encode())
        if system_call == -1:
            continue
        for group in groups:
            array = (_Comparison * max(1, len(group)))(*group)
            code = library.seccomp_rule_add_array(context, action, system_call, len(group), array)
            _checked(code, f"add a rule for {name}", errno.EEXIST, errno.EDOM, errno.EFAULT)


def _comparisons(arguments: Sequence[Mapping[str, Any]]) -> list[list[_Comparison]]:
    """One group per rule to add: comparisons of different arguments are one rule (and), several of one argument are several (or)."""
    made: list[_Comparison] = []
    for argument in arguments:
        operator = _OPERATORS.get(argument["op"])
        if operator is None or argument["index"] > 5:
            raise Invalid(what="read linux.seccomp", cause=f"an argument has op {argument['op']!r}, index {argument['index']}")
        made.append(_Comparison(argument["index"], operator, argument["value"], argument.get("valueTwo", 0)))
    indices = [argument["index"] for argument in arguments]
    if len(set(indices)) == len(indices):
        return [made]
    return [[comparison] for comparison in made]


def _exported(library: cdata.CDLL, context: int) -> bytes:
    fd = from_bytes("nacre-seccomp", b"")
    try:
        _checked(library.seccomp_export_bpf(context, fd), "export the program")
        size = os.fstat(fd).st_size
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)


def _checked(code: int, what: str, *fine: int) -> None:
    if code < 0 and -code not in fine:
        raise SeccompRefused(
            what=f"compile the seccomp profile: {what}", cause=f"libseccomp: {os.strerror(-code)} (errno {-code})"
        )


def known_actions() -> list[str]:
    return sorted(_ACTIONS)


def known_operators() -> list[str]:
    return sorted(_OPERATORS)


def known_architectures() -> list[str]:
    return sorted({*_ARCHITECTURES, *_FOREIGN})
