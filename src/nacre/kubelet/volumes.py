"""Volumes of pods, in the layout that every kubelet has: DIR/pods/UID/volumes/kubernetes.io~TYPE/NAME.

ConfigMap, Secret, downward and projected volumes are written atomically: the files lie in a directory `..TIME`, `..data` is a link to
it that is replaced by rename, each visible name is a link through `..data`. emptyDir is a directory, or a tmpfs with medium Memory. A
kill leaves at most an unreferenced `..TIME` and a `..data_tmp`, taken out by the next write, and names that the next look links. Teardown
unmounts, removes what is ours, and never crosses a mount.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nacre.kubelet.expand import ConfigError, Sources
from nacre.kubelet.resources import quantity
from nacre.linux import mounts
from nacre.linux.mounts import MountFlag
from nacre.oci.errors import Failure, Unsupported

COPIED = ("configMap", "secret", "downwardAPI", "projected")
OFFERED = (*COPIED, "emptyDir", "hostPath")
_PLUGIN = {
    "configMap": "kubernetes.io~configmap",
    "secret": "kubernetes.io~secret",
    "downwardAPI": "kubernetes.io~downward-api",
    "projected": "kubernetes.io~projected",
    "emptyDir": "kubernetes.io~empty-dir",
}
_PROJECTED_UNSUPPORTED = ("clusterTrustBundle", "podCertificate")


class MountFailed(Failure):
    """A volume could not be made ready: FailedMount."""

    code = "FailedMount"


def kind_of(volume: Mapping[str, Any]) -> str:
    """The one key of a volume that is not its name. Raises Unsupported for a type nacre does not offer."""
    kinds = [key for key in volume if key != "name"] or ["emptyDir"]
    if kinds[0] not in OFFERED:
        raise Unsupported(
            what=f"mount volume {volume['name']}",
            cause=f"volumes of type {kinds[0]} are not offered",
            remedy=f"use one of {', '.join(OFFERED)}",
        )
    return kinds[0]


class PodVolumes:
    """The volumes of one pod, below DIR/pods/UID."""

    def __init__(self, base: str, uid: str) -> None:
        self.directory = f"{base}/pods/{uid}"

    def path(self, volume: Mapping[str, Any]) -> str:
        kind = kind_of(volume)
        if kind == "hostPath":
            return str(volume["hostPath"]["path"])
        return f"{self.directory}/volumes/{_PLUGIN[kind]}/{volume['name']}"

    def prepare(self, pod: Mapping[str, Any], sources: Sources) -> bool:
        """Make every volume ready, or up to date; answers whether one shows other files now. Raises MountFailed, ConfigError, Unsupported."""
        group = (pod["spec"].get("securityContext") or {}).get("fsGroup")
        changes = [self._prepare(volume, sources, group) for volume in pod["spec"].get("volumes") or []]
        return any(changes)

    def _prepare(self, volume: Mapping[str, Any], sources: Sources, group: int | None) -> bool:
        kind, path = kind_of(volume), self.path(volume)
        try:
            if kind == "hostPath":
                _host_path(path, str(volume["hostPath"].get("type") or ""))
            elif kind == "emptyDir":
                _empty_directory(path, volume.get("emptyDir") or {}, group)
            else:
                options = volume[kind]
                default = int(options.get("defaultMode", 0o644))
                return write_atomically(path, dict(_files(kind, options, default, sources)), group)
        except OSError as error:
            raise MountFailed(
                what=f"mount volume {volume['name']}", cause=f"{error.filename or path}: {error.strerror}"
            ) from error
        return False

    def teardown(self) -> None:
        """Everything of the pod away. A mount that cannot be unmounted is named and nothing below it is touched."""
        if not os.path.isdir(self.directory):
            return
        for point in _mounts_below(self.directory):
            mounts.umount2(point, 0)
        if any(_mounts_below(self.directory)):
            raise Failure(
                what=f"remove {self.directory}",
                cause=f"{next(_mounts_below(self.directory))} is still mounted",
                remedy="see who holds it: fuser -vm on that path",
            )
        shutil.rmtree(self.directory)


def unmount_all(base: str) -> None:
    """Every mount of every pod's volumes away: the node goes down, and what lay in memory with it."""
    for point in _mounts_below(f"{base}/pods"):
        mounts.umount2(point, 0)


def write_atomically(path: str, files: Mapping[str, tuple[bytes, int]], group: int | None) -> bool:
    """Make directory `path` show exactly `files` (relative name → content, mode), by the ..data link; False: it already did."""
    os.makedirs(path, mode=0o755, exist_ok=True)
    current, shared = f"{path}/..data", 0 if group is None else 0o440
    files = {name: (data, mode | shared) for name, (data, mode) in files.items()}
    names = {name.split("/")[0] for name in files}
    if _shown(current) == files:
        _link_names(path, names)  # a kill may have come before them
        return False
    fresh = f"..{time.time_ns()}"
    for name, (data, mode) in files.items():
        target = f"{path}/{fresh}/{name}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:  # writes all of it: write(2) on a full disk takes less, and says so the next time only
            file.write(data)
            os.fchmod(fd, mode)
            if group is not None:
                os.fchown(fd, -1, group)
    os.makedirs(f"{path}/{fresh}", exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{path}/..data_tmp")  # left by a kill
    os.symlink(fresh, f"{path}/..data_tmp")
    os.rename(f"{path}/..data_tmp", current)
    _link_names(path, names)
    for name in os.listdir(path):
        if name.startswith("..") and name not in ("..data", fresh):
            shutil.rmtree(f"{path}/{name}")
    return True


def _link_names(path: str, wanted: set[str]) -> None:
    for name in os.listdir(path):
        if not name.startswith("..") and name not in wanted:
            os.unlink(f"{path}/{name}")
    for name in wanted:
        if not os.path.islink(f"{path}/{name}"):
            os.symlink(f"..data/{name}", f"{path}/{name}")


def _shown(current: str) -> dict[str, tuple[bytes, int]] | None:
    if not os.path.islink(current):
        return None
    shown = {}
    for directory, _names, files in os.walk(current + "/"):
        for name in files:
            full = os.path.join(directory, name)
            with open(full, "rb") as file:
                shown[os.path.relpath(full, current)] = (file.read(), stat.S_IMODE(os.fstat(file.fileno()).st_mode))
    return shown


def _files(kind: str, options: Mapping[str, Any], default: int, sources: Sources) -> Iterator[tuple[str, tuple[bytes, int]]]:
    if kind == "projected":
        for source in options.get("sources") or []:
            for inner, inner_options in source.items():
                if inner in _PROJECTED_UNSUPPORTED:
                    raise Unsupported(what="fill a projected volume", cause=f"source {inner} is not offered")
                if inner != "serviceAccountToken":  # tokens come with the API's TokenRequest; coverage.md says so
                    yield from _files(inner, inner_options, default, sources)
        return
    if kind == "downwardAPI":
        for item in options.get("items") or []:
            text = (
                sources.field(item["fieldRef"]["fieldPath"])
                if "fieldRef" in item
                else sources.resource(item["resourceFieldRef"], {"name": item["resourceFieldRef"].get("containerName", "")})
            )
            yield _safe(item["path"]), (text.encode(), int(item.get("mode", default)))
        return
    named = "ConfigMap" if kind == "configMap" else "Secret"
    name = options.get("secretName") or options.get("name") or ""
    values = sources.data(named, name, optional=bool(options.get("optional")))
    if values is None:
        return
    items = options.get("items")
    if items is None:
        yield from ((key, (data, default)) for key, data in values.items())
        return
    for item in items:
        if item["key"] not in values:
            if options.get("optional"):
                continue
            raise ConfigError(
                what=f"fill a volume from {named} {name}",
                cause=f"references non-existent config key: {item['key']}",
                remedy="add the key, or take the item out",
            )
        yield _safe(item["path"]), (values[item["key"]], int(item.get("mode", default)))


def _safe(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ConfigError(what="fill a volume", cause=f"path {path} leads out of it")
    return os.path.normpath(path)


def _empty_directory(path: str, options: Mapping[str, Any], group: int | None) -> None:
    fresh = not os.path.isdir(path)
    os.makedirs(path, exist_ok=True)
    if options.get("medium") == "Memory" and not os.path.ismount(path):
        size = f"size={int(quantity(options['sizeLimit']))}" if options.get("sizeLimit") else None
        mounts.mount("tmpfs", path, "tmpfs", MountFlag.NOSUID | MountFlag.NODEV, size)
    if fresh:
        os.chmod(path, 0o777)
        if group is not None:
            os.chown(path, -1, group)
            os.chmod(path, 0o2777)


def _host_path(path: str, kind: str) -> None:
    checks: dict[str, Callable[[str], bool]] = {
        "Directory": os.path.isdir,
        "File": os.path.isfile,
        "Socket": lambda p: stat.S_ISSOCK(os.stat(p).st_mode),
        "CharDevice": lambda p: stat.S_ISCHR(os.stat(p).st_mode),
        "BlockDevice": lambda p: stat.S_ISBLK(os.stat(p).st_mode),
    }
    if kind == "DirectoryOrCreate":
        os.makedirs(path, mode=0o755, exist_ok=True)
    elif kind == "FileOrCreate":
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
    elif kind in checks and not (os.path.exists(path) and checks[kind](path)):
        raise MountFailed(
            what=f"mount host path {path}",
            cause=f"hostPath type check failed: {path} is not a {kind}",
            remedy="mend the path, or its type",
        )
    elif kind not in checks and not os.path.exists(path):
        os.makedirs(path, mode=0o755)  # as container engines do for an untyped path


def _mounts_below(directory: str) -> Iterator[str]:
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        points = [line.split()[4].encode().decode("unicode_escape") for line in file]
    yield from sorted((point for point in points if point.startswith(directory + "/")), reverse=True)
