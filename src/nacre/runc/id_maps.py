"""Id-mapped mounts (config.md "mounts", uidMappings; mount_setattr(2) MOUNT_ATTR_IDMAP).

Mapping a mount needs rights over the file system, which the host's side has and a container in a user namespace has not: the mounts
are made here before the child is born, detached, and the child's step only attaches them.
"""

from __future__ import annotations

import errno
import os

from nacre.linux import mounts, process
from nacre.linux.contexts import ExitStack
from nacre.linux.libc import SyscallError, owned
from nacre.linux.mounts import MountAttr
from nacre.linux.namespaces import Clone, open_namespace
from nacre.linux.pids import signals
from nacre.oci.errors import Failure, Invalid
from nacre.runc.failures import step_failed
from nacre.runc.mount_options import parse as parse_options

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Tree = Mapping[str, Any]


def lines(mappings: Sequence[Mapping[str, int]]) -> str:
    """OCI id mappings as /proc/PID/uid_map takes them."""
    return "".join(f"{one['containerID']} {one['hostID']} {one['size']}\n" for one in mappings)


def open_trees(spec: Tree, bundle: str, held: ExitStack) -> dict[str, int]:
    """Destination to a detached, mapped mount, for every mount that wants one; `held` closes them."""
    trees: dict[str, int] = {}
    for mount in spec.get("mounts", ()):
        options = parse_options(mount.get("options", ()))
        if not (mount.get("uidMappings") or options.id_map):
            continue
        destination = os.path.normpath("/" + mount["destination"].lstrip("/"))
        source = os.path.normpath(os.path.join(bundle, mount.get("source", "")))
        what = f"map the ids of the mount {source} on {destination}"
        if not options.bind and mount.get("type") not in ("bind", "rbind"):
            raise Invalid(what=what, cause="only bind mounts can have their ids mapped")
        recursive = options.recursive or mount.get("type") == "rbind"
        try:
            tree = mounts.bind_tree(source, recursive=recursive)
            held.callback(os.close, tree)
            with owned(_namespace(spec, mount, what)) as user:
                mounts.mount_setattr(tree, attr_set=MountAttr.IDMAP, userns_fd=user, recursive=options.id_map == "ridmap")
        except OSError as error:
            raise _explained(what, source, error) from error
        trees[destination] = tree
    return trees


def _namespace(spec: Tree, mount: Tree, what: str) -> int:
    """A user namespace whose mapping is the mount's own, or else the container's."""
    linux = spec.get("linux", {})
    owner = mount if mount.get("uidMappings") else linux
    if owner.get("uidMappings") and owner.get("gidMappings"):
        return _with_maps(lines(owner["uidMappings"]), lines(owner["gidMappings"]), what)
    for namespace in linux.get("namespaces", ()):
        if namespace["type"] == "user" and namespace.get("path"):
            return os.open(namespace["path"], os.O_RDONLY | os.O_CLOEXEC)
    raise Invalid(
        what=what, cause="neither the mount nor the container has mappings", remedy="give the mount uidMappings and gidMappings"
    )


def _with_maps(uid_map: str, gid_map: str, what: str) -> int:
    """A descriptor of a new user namespace with these mappings; the process that held it until then is gone again."""
    pid = process.fork(Clone.NEWUSER)
    if pid == 0:
        while True:
            signals.pause()
    try:
        for name, text in (("uid_map", uid_map), ("gid_map", gid_map)):
            with owned(os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)) as fd:
                try:
                    os.write(fd, text.encode())
                except OSError as error:
                    raise step_failed(what, SyscallError("write", error.errno or 0, f"{name} {text.strip()!r}")) from error
        return open_namespace("user", pid)
    finally:
        os.kill(pid, signals.SIGKILL)
        os.waitpid(pid, 0)


def _explained(what: str, source: str, error: OSError) -> Failure:
    failure = step_failed(what, error)
    if getattr(error, "call", "") == "mount_setattr" and error.errno == errno.EINVAL:
        failure.cause += f": the file system of {source} cannot map ids"
        failure.remedy = "put the volume on ext4, xfs, btrfs or tmpfs, or mount it without mappings"
    return failure
