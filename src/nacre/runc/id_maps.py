"""Bind mounts that need the host's rights: id-mapped ones (config.md "mounts", uidMappings; mount_setattr(2) MOUNT_ATTR_IDMAP), and those
of a container in a user namespace, whose root may not even reach their sources.

They are made here before the child is born, detached, and the child's step only attaches them.
"""

from __future__ import annotations

import errno
import os

from nacre.linux import mounts, process
from nacre.linux.contexts import ExitStack
from nacre.linux.libc import SyscallError, owned
from nacre.linux.mounts import MountAttr, MountFlag
from nacre.linux.namespaces import Clone, open_namespace
from nacre.linux.pids import signals
from nacre.oci.errors import Failure, Invalid
from nacre.runc import rootless
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


def open_trees(spec: Tree, bundle: str, held: ExitStack) -> dict[int, int]:
    """Position among the mounts to a detached one, for every mount that wants to be made from outside; `held` closes them."""
    trees: dict[int, int] = {}
    beyond = _sources_are_beyond(spec)
    rootfs = os.path.realpath(os.path.join(bundle, spec.get("root", {}).get("path", "")))
    for position, mount in enumerate(spec.get("mounts", ())):
        options = parse_options(mount.get("options", ()))
        bind = options.bind or mount.get("type") in ("bind", "rbind")
        mapped = bool(mount.get("uidMappings") or options.id_map)
        destination = os.path.normpath("/" + mount["destination"].lstrip("/"))
        source = os.path.normpath(os.path.join(bundle, mount.get("source", "")))
        if not (mapped or (beyond and bind and not f"{source}/".startswith(f"{rootfs}/"))):
            continue  # what is in the root may come with a mount before this one
        what = f"map the ids of the mount {source} on {destination}" if mapped else f"mount {source} on {destination}"
        if not bind:
            raise Invalid(what=what, cause="only bind mounts can have their ids mapped")
        try:
            trees[position] = tree = mounts.bind_tree(source, recursive=options.recursive or mount.get("type") == "rbind")
            held.callback(os.close, tree)
            if mapped:
                with owned(_namespace(spec, mount, what)) as user:
                    mounts.mount_setattr(tree, attr_set=MountAttr.IDMAP, userns_fd=user, recursive=options.id_map == "ridmap")
            if not spec.get("linux", {}).get("rootfsPropagation", "").endswith("shared"):  # as a bind from within would be
                mounts.mount_setattr(tree, propagation=MountFlag.SLAVE, recursive=True)
        except OSError as error:
            raise _explained(what, source, error) from error
    return trees


def _sources_are_beyond(spec: Tree) -> bool:
    """Whether the container's root may see less of the host than who makes it: a user namespace, and we are the host's root."""
    kinds = {one["type"]: one.get("path", "") for one in spec.get("linux", {}).get("namespaces", ())}
    return "user" in kinds and kinds.get("mount") == "" and os.geteuid() == 0 and not rootless.in_user_namespace()


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
