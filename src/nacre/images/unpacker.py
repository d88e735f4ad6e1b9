"""The child process that reads hostile layers: `python -m nacre.images.unpacker IMAGES PARENT`, spoken to in JSON lines.

stdin: {"blob": HEX, "layer": HEX, "diff_id": "sha256:…", "below": [HEX, …top first], "limits": {…}}, one at a time.
stdout: {"ok": layer.json's content} or {"failure": errors.encode form}. It ends when stdin does, or when its parent dies.

It sees DATA/images as its root and nothing else, has no network, and of root's capabilities keeps only those that making files
of any owner, mode and kind takes. Everything it needs is imported before it gives the host's root away.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from dataclasses import asdict
from typing import Any

import zstandard  # noqa: F401  # loaded while the host's files are in sight

from nacre.images.errors import DigestMismatch, ImageRefused, LayerRefused, disk_full
from nacre.images.layer import Applier, Limits, Summary
from nacre.images.merged import View
from nacre.images.places import NEW, fsync_directory, read_layer
from nacre.images.streams import Hashed, StreamError, decompressed
from nacre.images.tarstream import Reader, TarError
from nacre.images.tree import Refused, remove_tree
from nacre.linux import capabilities, mounts
from nacre.linux.libc import Int, SyscallError, bind
from nacre.linux.namespaces import Clone, unshare
from nacre.linux.process import set_dumpable, set_no_new_privileges, set_parent_death_signal
from nacre.oci.errors import Failure, encode, from_exception

KEPT = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_MKNOD",
    "CAP_SETFCAP",
    "CAP_SYS_ADMIN",  # for attributes trusted.*, which are how overlayfs wants opaque directories marked
)
RESERVE = 64 << 20  # bytes of the file system that a layer may not take
_syncfs = bind("syncfs", Int, blocking=True)


def confine(images: str, parent: int) -> None:
    """Give away what unpacking does not need; afterwards "/" is DATA/images. Ends the process if the parent is gone already."""
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    try:
        unshare(Clone.NEWNS | Clone.NEWNET | Clone.NEWIPC)
        mounts.mount(None, "/", None, mounts.MountFlag.REC | mounts.MountFlag.PRIVATE)
    except SyscallError as error:
        print(f"unpacking without namespaces of its own: {error}", file=sys.stderr)  # a host that forbids them; the rest holds
    os.chroot(images)
    os.chdir("/")
    os.umask(0)
    permitted = capabilities.capget()[1]
    kept = capabilities.mask(KEPT) & permitted
    capabilities.bound(kept, len(capabilities.NAMES) - 1)
    capabilities.capset(kept, kept, 0)
    set_no_new_privileges()
    set_dumpable(enabled=False)


def unpack(request: dict[str, Any]) -> dict[str, Any]:
    """One layer, from blob to layers/HEX. Answers layer.json's content; a layer that is there already is taken as it is."""
    what = f"unpack layer {request['diff_id']}"
    final = f"/layers/{request['layer']}"
    if os.path.exists(f"{final}/layer.json"):
        return read_layer(final)
    staging = f"/layers/{NEW}{request['layer'][:16]}-{os.urandom(4).hex()}"
    os.makedirs(f"{staging}/fs", 0o755)
    try:
        document = _fill(what, request, f"{staging}/fs")
        with open(f"{staging}/layer.json", "w", encoding="utf-8") as file:
            json.dump(document, file)
        root = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _syncfs(root)  # all of it is on the disk before it gets its name
        finally:
            os.close(root)
        try:
            os.rename(staging, final)
        except FileExistsError:
            return read_layer(final)  # another process was quicker; ours goes with `finally`
        except OSError:
            if os.path.exists(f"{final}/layer.json"):
                return read_layer(final)
            raise
        fsync_directory("/layers")
        return document
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(what, "/layers", shown=sys.argv[1]) from error
        raise
    finally:
        _discard(staging)


def _fill(what: str, request: dict[str, Any], target: str) -> dict[str, Any]:
    limits = _limits(request.get("limits", {}))
    roots = [os.open(f"/layers/{name}/fs", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for name in request["below"]]
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with open(f"/blobs/sha256/{request['blob']}", "rb") as blob:
            source = Hashed(decompressed(blob), limits.stored_bytes + (limits.entries << 10))
            reader = Reader(source)
            summary = Applier(root, View(roots), limits).run(reader)
            reader.drain()
        if source.digest != request["diff_id"]:
            raise DigestMismatch(
                what=what, cause=f"the layer unpacks to {source.digest}, the image's configuration says {request['diff_id']}"
            )
        return _document(request, summary, source.size, len(os.listdir(root)))
    except (Refused, TarError) as error:
        raise LayerRefused(what=what, cause=f"entry {error.entry!r}: {error.reason}") from error
    except StreamError as error:
        raise LayerRefused(what=what, cause=str(error)) from error
    finally:
        for fd in (*roots, root):
            os.close(fd)


def _document(request: dict[str, Any], summary: Summary, size: int, top: int) -> dict[str, Any]:
    """What layer.json holds; `top` is the number of names in fs/, the cheap check after a power loss."""
    return {"version": 1, "diff_id": request["diff_id"], "stream_bytes": size, "top": top, **asdict(summary)}


def _limits(given: dict[str, int]) -> Limits:
    found = os.statvfs("/layers")
    free = max(found.f_bavail * found.f_frsize - RESERVE, 0)
    return Limits(**{"free_bytes": free, **given})


def _discard(staging: str) -> None:
    head, name = os.path.split(staging)
    fd = os.open(head, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_tree(fd, name)
    finally:
        os.close(fd)


def main() -> None:
    images, parent = sys.argv[1], int(sys.argv[2])
    confine(images, parent)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": unpack(request)}
        except Failure as failure:
            answer = {"failure": encode(failure)}
        except (OSError, RecursionError, MemoryError) as error:
            answer = {"failure": encode(from_exception(f"unpack layer {request['diff_id']}", error))}
        except (ValueError, ArithmeticError, LookupError) as error:  # bytes that our own checks did not foresee
            cause = f"{type(error).__name__}: {error}"
            answer = {"failure": encode(ImageRefused(what=f"unpack layer {request['diff_id']}", cause=cause))}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
