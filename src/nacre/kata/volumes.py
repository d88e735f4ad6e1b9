"""What a container's mounts mean, and how each comes into the VM. There is no file system shared with the host.

| meaning | in the guest |
|-|-|
| ConfigMap, Secret, downward API, projected | copied over the agent channel, `..data` and all |
| emptyDir | a directory of the VM, a tmpfs where it has medium Memory or a size |
| /etc/hosts, /etc/resolv.conf, /etc/hostname | copied |
| the termination log | a file of the VM, read back when the container ends |
| /dev/shm | the VM's |
| anything else (hostPath) | a directory of the VM of that name, empty at first, shared by the pod's containers |

Our kubelet says what each mount is in an annotation; for other kubelets the well-known layout below pods/UID is recognised, of this pod's
UID only. What is copied is bounded by a control message of the agent.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nacre.agent import protocol
from nacre.oci.errors import Failure, Unsupported

MEANINGS = "nacre.dev/mounts"
COPIED = frozenset({"configMap", "secret", "downwardAPI", "projected"})
COPY_LIMIT = 5 << 20  # bytes of one volume: base64 makes them a third more, and a message holds 8 MiB
SHM, VOLUMES = "/run/nacre/shm", "/run/nacre/volumes"  # of the guest
_PLUGINS = {
    "configmap": "configMap", "secret": "secret", "downward-api": "downwardAPI", "projected": "projected", "empty-dir": "emptyDir",
}  # fmt: skip
_KERNEL_FILESYSTEMS = frozenset({"proc", "tmpfs", "devpts", "mqueue", "sysfs", "cgroup", "cgroup2"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """One bind mount: `kind` is a volume type of Kubernetes, or file, shm."""

    kind: str
    name: str
    memory: bool = False
    size_bytes: int = 0
    sub_path: str = ""


def meanings(config: Mapping[str, Any]) -> dict[str, Meaning]:
    """destination → what our kubelet says of it; empty from other kubelets."""
    try:
        listed = json.loads((config.get("annotations") or {}).get(MEANINGS, "[]"))
        return {
            str(one["destination"]): Meaning(
                kind=str(one["type"]),
                name=str(one["name"]),
                memory=one.get("medium") == "Memory",
                size_bytes=int(one.get("size_bytes", 0)),
                sub_path=str(one.get("sub_path", "")),
            )
            for one in listed
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # an annotation of somebody else's making: the layout decides


def by_layout(source: str, pod_uid: str) -> Meaning:
    """What a path below a kubelet's pods/UID is; hostPath for any other."""
    match = re.search(rf"/pods/{re.escape(pod_uid)}/(.+)$", source) if pod_uid else None
    inside = match[1] if match else ""
    plugin = re.match(r"volumes/kubernetes\.io~([a-z-]+)/([^/]+)(?:/(.*))?$", inside)
    if plugin and plugin[1] in _PLUGINS:
        return Meaning(kind=_PLUGINS[plugin[1]], name=plugin[2], sub_path=plugin[3] or "")
    if inside == "etc-hosts":
        return Meaning(kind="file", name="hosts")
    if re.match(r"containers/[^/]+/[^/]+$", inside):
        return Meaning(kind="file", name="termination-log")
    return Meaning(kind="hostPath", name=source)


class Volumes:
    """The pod's volumes inside its VM. `call` speaks to the agent, `ahead` without awaiting the answer."""

    def __init__(self, call: Callable[[Any], Any], ahead: Callable[[Any], None], directory: str, pod_uid: str) -> None:
        self._call, self._ahead, self._directory, self._pod_uid = call, ahead, directory, pod_uid
        self._places: dict[str, str] = {}  # volume → path in the guest
        self._shown: dict[str, tuple[str, str]] = {}  # copied volume → host directory, generation last copied
        self._numbers: dict[str, int] = {}  # what has no name that the agent would take
        self._read_back: dict[str, tuple[str, str, str]] = {}  # container → (volume, path in it, host file)

    def translate(self, container: str, config: dict[str, Any]) -> list[dict[str, Any]]:
        """The document's mounts with sources in the guest, each made there. Raises Unsupported, Failure."""
        said = meanings(config)
        return [
            mount if mount.get("type") in _KERNEL_FILESYSTEMS else self._bind(container, mount, said)
            for mount in config.get("mounts") or []
        ]

    def refresh(self) -> None:
        """Copy again what shows other files on the host than when it was copied last: `..data` leads elsewhere."""
        for name, (source, generation) in list(self._shown.items()):
            if _generation(source) not in ("", generation):
                self._copied(source, name, f"bring volume {name} up to date in the VM")

    def ended(self, container: str) -> None:
        """The container ended: what it left in its termination log goes to the host's file."""
        found = self._read_back.pop(container, None)
        if found is None:
            return
        volume, path, target = found
        content = self._call(protocol.ReadFile(name=volume, path=path)).content
        fd = os.open(target, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.write(fd, content)
        finally:
            os.close(fd)

    def _bind(self, container: str, mount: dict[str, Any], said: Mapping[str, Meaning]) -> dict[str, Any]:
        source, target = str(mount.get("source", "")), str(mount.get("destination", ""))
        if source.startswith(self._directory + "/"):
            meaning = Meaning(kind="shm" if source == f"{self._directory}/shm" else "file", name=os.path.basename(source))
        else:
            meaning = said.get(target) or by_layout(source, self._pod_uid)
        return mount | {"type": "bind", "source": self._place(container, source, meaning, f"mount {target} in the VM")}

    def _place(self, container: str, source: str, meaning: Meaning, what: str) -> str:
        if meaning.kind == "shm":
            return SHM
        if meaning.kind in COPIED:
            return self._copied(source, f"{meaning.kind}-{self._word(meaning.name)}", what)
        if meaning.kind == "emptyDir":
            return self._empty(source, meaning)
        if meaning.kind == "file" and meaning.name == "termination-log":
            volume = f"log-{container[:16]}"
            self._read_back[container] = (volume, "log", source)
            return self._file(volume, protocol.File(path="log", mode=0o666))
        if meaning.kind == "file":
            return self._copied(source, f"file-{self._word(meaning.name)}", what)
        return self._of_the_vm(source, what)

    def _copied(self, source: str, name: str, what: str) -> str:
        if os.path.isdir(source):
            if generation := _generation(source):
                if self._shown.get(name) != (source, generation):  # else another container of the pod brought it in
                    self._files(name, tree(os.path.join(source, f"..{generation}"), what), generation)
                    self._shown[name] = (source, generation)
                return self._places[name]
            return self._files(f"{name}-{self._number(source)}", tree(source, what))
        one = entry(source, "file", what, COPY_LIMIT)
        return self._file(f"{name}-{self._number(source)}", one)

    def _empty(self, source: str, meaning: Meaning) -> str:
        name = f"empty-{self._word(meaning.name)}"
        if name not in self._places:
            top = source.removesuffix("/" + meaning.sub_path) if meaning.sub_path else source
            found = os.stat(top)
            volume = protocol.Volume(
                name=name, memory=meaning.memory, size_bytes=meaning.size_bytes,
                mode=stat.S_IMODE(found.st_mode), uid=found.st_uid, gid=found.st_gid,
            )  # fmt: skip
            self._places[name] = self._call(volume).path
        if not meaning.sub_path:
            return self._places[name]
        self._files(name, [protocol.File(path=meaning.sub_path, kind="directory", mode=0o777)])
        return f"{self._places[name]}/{meaning.sub_path}"

    def _of_the_vm(self, source: str, what: str) -> str:
        """hostPath: the VM's own directory of that name, or an empty file where the host has a file."""
        name = f"host-{self._number(source)}"
        try:
            mode = os.stat(source).st_mode
        except OSError as error:
            raise Failure(what=what, cause=f"{source}: {error.strerror}") from error
        if stat.S_ISREG(mode):
            if name not in self._places:
                self._files(name, [protocol.File(path="file", mode=stat.S_IMODE(mode))])
            return self._places[name] + "/file"
        if not stat.S_ISDIR(mode):
            raise Unsupported(
                what=what,
                cause=f"{source} is a device or a socket of the host, which a virtual machine is not given",
                remedy="run the pod without runtimeClassName: kata",
            )
        if name not in self._places:
            self._places[name] = self._call(protocol.Volume(name=name, mode=0o755)).path
        return self._places[name]

    def _word(self, name: str) -> str:
        """A volume's name as the agent takes it."""
        return name if re.fullmatch(r"[A-Za-z0-9_.-]{1,80}", name) else str(self._number(name))

    def _number(self, text: str) -> int:
        return self._numbers.setdefault(text, len(self._numbers) + 1)

    def _file(self, name: str, file: protocol.File) -> str:
        """A volume of one file, made anew for each container: nobody needs to know that it is there before the container is made."""
        self._ahead(protocol.Files(name=name, files=[file]))
        return f"{VOLUMES}/{name}/{file.path}"

    def _files(self, name: str, files: list[protocol.File], generation: str = "") -> str:
        place: str = self._call(protocol.Files(name=name, files=files, generation=generation)).path
        self._places[name] = place
        return place


def _generation(directory: str) -> str:
    """What a kubelet's volume shows now, "" for any other directory."""
    data = os.path.join(directory, "..data")
    return os.readlink(data).lstrip(".") if os.path.islink(data) else ""


def tree(top: str, what: str) -> list[protocol.File]:
    """Everything below `top`, parents first. Raises Failure when it is more than a message holds."""
    found: list[protocol.File] = []
    left = COPY_LIMIT
    for directory, names, files in os.walk(top):
        for name in sorted([*names, *files]):
            path = os.path.join(directory, name)
            one = entry(path, os.path.relpath(path, top), what, left)
            left -= len(one.content)
            found.append(one)
    return found


def entry(source: str, path: str, what: str, limit: int) -> protocol.File:
    """One file, link or directory of the host as the guest is told of it."""
    found = os.lstat(source)
    mode, uid, gid = stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid
    if stat.S_ISLNK(found.st_mode) and path != "file":
        return protocol.File(path=path, kind="link", mode=0o777, content=os.fsencode(os.readlink(source)), uid=uid, gid=gid)
    if stat.S_ISDIR(found.st_mode):
        return protocol.File(path=path, kind="directory", mode=mode, uid=uid, gid=gid)
    with open(source, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise Failure(what=what, cause=f"its files are larger than {COPY_LIMIT >> 20} MiB together, too large to be copied in")
    return protocol.File(path=path, mode=stat.S_IMODE(os.stat(source).st_mode), content=content, uid=uid, gid=gid)
