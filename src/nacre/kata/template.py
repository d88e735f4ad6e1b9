"""The saved machine that pods' VMs are cloned from: DATA/kata/template/KEY, one file, root's alone.

    RAM (ram_bytes, with holes) | QEMU's device state | JSON: plan, digest of all before, time | its length u32, MAGIC

Written under a temporary name, synced, renamed: a kill leaves a `.new` file that the next build takes away. A key names everything
that must be the same in a clone (kernel, root, command line, QEMU, CPU model); a file of another key is stale and goes.

Clones never see the file: `open_sealed` copies it into a memory file and seals that against writing, because QEMU opens its RAM
file for writing even for a private mapping. `python -m nacre.kata.template PREFIX PARENT` makes the template in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from nacre.agent import protocol
from nacre.kata import plan as plans
from nacre.kata.plan import Plan
from nacre.kata.vm import IGNORE_SHARED, Place, Vm
from nacre.kata.waiting import PATIENCE, Nobody
from nacre.linux import memfd
from nacre.linux.libc import owned
from nacre.oci.errors import Failure

Progress = Callable[[str], None]
MAGIC = b"nacre-template-1"
MAX_AGE_S = 24 * 3600
SAVE_S = 60.0
_FOOTER = struct.Struct(f"!I{len(MAGIC)}s")
_META_LIMIT = 64 * 1024
_BLOCK = 1 << 20
_HASHED = 1 << 16
_ZEROS = bytes(_HASHED)


class TemplateBroken(Failure):
    """A template file is not what was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """An open template: where its parts lie."""

    plan: Plan
    state_offset: int
    made_at: float


def directory(data: str) -> str:
    return f"{data}/kata/template"


def ensure(config: Any, progress: Progress) -> str | None:
    """The path of a whole, young template for the plan of now, built if need be; None where `template = false`.

    Raises Failure: of the plan, of the guest that would not boot, of the disk.
    """
    from nacre.kata import accelerator, appliance, planning  # here: shims load this module too, and never build

    planning.qemu(config.kata.qemu)  # before a kernel is fetched for it
    appliance.refresh(config, progress)
    plan = planning.make(config, accelerator.probe(config).name)
    if not config.kata.template:
        return None
    home = directory(config.data)
    os.makedirs(home, mode=0o700, exist_ok=True)
    key = planning.key(plan)
    path = f"{home}/{key}"
    reason = _why_rebuild(path)
    if reason:
        progress(f"building the template: {reason}")
        build(plan, path, progress, config.patience)
    for name in os.listdir(home):
        if name != key:
            os.unlink(f"{home}/{name}")
    return path


def _why_rebuild(path: str) -> str:
    """Empty when the file is good."""
    try:
        with owned(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
            age = time.time() - read(fd, path).made_at
    except FileNotFoundError:
        return "there is none for this kernel, QEMU and guest"
    except TemplateBroken as failure:
        return failure.cause
    return f"it is {age / 3600:.0f} hours old" if not 0 <= age < MAX_AGE_S else ""


def build(plan: Plan, path: str, progress: Progress, patience: int = 1) -> None:
    """Boot a guest, warm it, save it as `path`."""
    fresh = f"{path}.{os.getpid()}.new"
    with ExitStack() as undo:
        ram = os.memfd_create("nacre-template", os.MFD_CLOEXEC)
        undo.callback(os.close, ram)
        os.ftruncate(ram, plan.shape.ram_bytes)
        state = os.memfd_create("nacre-template-state", os.MFD_CLOEXEC)
        undo.callback(os.close, state)
        vm = Vm(Nobody(), plan.shape, lambda event: _say(event, progress), patience)
        undo.callback(vm.end)
        began = time.monotonic()
        greeting = vm.boot(plan.boot, ram, Place(), shared=True)
        progress(f"the guest booted in {time.monotonic() - began:.1f} s under Linux {greeting.kernel}")
        vm.rehearse()
        _save(vm, state)
        vm.end()
        file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        undo.callback(os.close, file)
        try:
            _write(file, plan, ram, state)
            os.rename(fresh, path)
        except BaseException:
            os.unlink(fresh)
            raise


def _say(event: Any, progress: Progress) -> None:
    if isinstance(event, protocol.Log):
        progress(f"the guest says: {event.text[:200]}")


def _save(vm: Vm, state: int) -> None:
    """Write the machine's device state to `state`; its RAM lies in the shared file already.

    QEMU stops it at the end by itself: one stopped before would have its clones wait for a `cont`.
    """
    qmp = vm.qmp
    qmp.execute("migrate-set-capabilities", {"capabilities": [IGNORE_SHARED, {"capability": "events", "state": True}]})
    qmp.execute("getfd", {"fdname": "state"}, (state,))
    qmp.execute("migrate", {"uri": "fd:state"})
    limit_s = SAVE_S * vm.patience
    if not vm.watches.wait(lambda: vm.migration in ("completed", "failed"), limit_s) or vm.migration != "completed":
        shown = qmp.execute("query-migrate")
        raise Failure(
            what="save the template",
            cause=str(shown.get("error-desc", f"QEMU's migration is {shown.get('status')} after {limit_s:.0f} s")),
            evidence=vm.evidence(),
            remedy="" if "error-desc" in shown else PATIENCE,
        )


def _write(file: int, plan: Plan, ram: int, state: int) -> None:
    size, state_size = plan.shape.ram_bytes, os.fstat(state).st_size
    _copy(ram, file, 0)
    _copy(state, file, size)
    end = size + state_size
    os.ftruncate(file, end)
    facts = {"version": plans.VERSION, **asdict(plan), "digest": _digest(file, end), "made_at": time.time()}
    meta = json.dumps(facts).encode()
    os.pwrite(file, meta + _FOOTER.pack(len(meta), MAGIC), end)
    os.fsync(file)


def _copy(source: int, target: int, offset: int) -> None:
    """The whole of `source` to `target` at `offset`; holes stay holes, as most of a small guest's RAM was never touched."""
    for begin, end in _extents(source, os.fstat(source).st_size):
        for block in range(begin, end, _BLOCK):
            os.pwrite(target, os.pread(source, min(_BLOCK, end - block), block), offset + block)


def _digest(fd: int, size: int) -> str:
    """Of where the bytes lie that are not zero: holes, which copies may have or not, make no difference."""
    import hashlib

    whole = hashlib.sha256(str(size).encode())
    for begin, end in _extents(fd, size):
        for block in range(begin - begin % _HASHED, end, _HASHED):
            data = os.pread(fd, min(_HASHED, size - block), block)
            if data != _ZEROS[: len(data)]:
                whole.update(f"@{block}:".encode() + data)
    return whole.hexdigest()


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of all that is no hole, each block of _HASHED bytes in one extent only."""
    position = 0
    while position < size:
        try:
            begin = max(position, os.lseek(fd, position, os.SEEK_DATA))
        except OSError:  # ENXIO: nothing but a hole is left
            return
        end = min(size, -(-os.lseek(fd, begin, os.SEEK_HOLE) // _HASHED) * _HASHED)
        yield begin, end
        position = end


def read(fd: int, name: str = "the template") -> Template:
    """What the footer says. Raises TemplateBroken."""
    size = os.fstat(fd).st_size
    try:
        length, magic = _FOOTER.unpack(os.pread(fd, _FOOTER.size, max(0, size - _FOOTER.size)))
        if magic != MAGIC or not 0 < length < _META_LIMIT:
            raise ValueError("its end is not that of a template")
        document = json.loads(os.pread(fd, length, size - _FOOTER.size - length))
        plan = plans.decode(document)
        if not plan.shape.ram_bytes < size - _FOOTER.size - length:
            raise ValueError("it is shorter than its guest's memory")
        return Template(plan=plan, state_offset=plan.shape.ram_bytes, made_at=float(document["made_at"]))
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise TemplateBroken(what=f"read {name}", cause=f"it cannot be used: {error}", remedy="nacre enable kata") from error


def open_sealed(path: str) -> int:
    """The template at `path` as a memory file that nobody can write any more, checked by its digest. The caller owns it.

    Raises TemplateBroken, FileNotFoundError.
    """
    with owned(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as file:
        read(file, path)
        copy = os.memfd_create("nacre-template", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(copy, os.fstat(file).st_size)
            _copy(file, copy, 0)
            memfd.seal(copy)
            _check(copy, path)
        except BaseException:
            os.close(copy)
            raise
    return copy


def _check(fd: int, path: str) -> None:
    size = os.fstat(fd).st_size
    length, _magic = _FOOTER.unpack(os.pread(fd, _FOOTER.size, size - _FOOTER.size))
    end = size - _FOOTER.size - length
    if json.loads(os.pread(fd, length, end))["digest"] != _digest(fd, end):
        raise TemplateBroken(what=f"read {path}", cause="its bytes have changed since it was made", remedy="nacre enable kata")


def open_state(template: int, found: Template) -> int:
    """The device state, positioned for one clone to read. The caller owns it."""
    fd = os.open(f"/proc/self/fd/{template}", os.O_RDONLY | os.O_CLOEXEC)  # a file position of its own
    os.lseek(fd, found.state_offset, os.SEEK_SET)
    return fd


def main() -> None:
    """PREFIX PARENT: make sure of the template; progress on stdout, on the last line the path or the failure."""
    from nacre import config
    from nacre.linux.process import set_parent_death_signal
    from nacre.oci.errors import encode, from_exception

    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):
        os._exit(1)
    try:
        path = ensure(config.load(sys.argv[1]), lambda text: print(json.dumps({"progress": text}), flush=True))
        print(json.dumps({"path": path}), flush=True)
    except (Failure, OSError) as error:
        print(json.dumps({"failure": encode(from_exception("make the template of virtual machines", error))}), flush=True)


if __name__ == "__main__":
    main()
