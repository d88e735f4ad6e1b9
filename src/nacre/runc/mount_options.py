"""Mount options in words (config.md "Linux mount options") to flags, attributes, propagation and data: one table, pure."""

from __future__ import annotations

from nacre.linux.mounts import MountAttr, MountFlag
from nacre.oci.values import Value

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Sequence

_NO_FLAGS, _NO_ATTRIBUTES = MountFlag(0), MountAttr(0)

# word: (flag of mount(2), is it set). Words for the access times clear the others of their family.
_FLAGS: dict[str, tuple[MountFlag, bool]] = {
    "ro": (MountFlag.RDONLY, True),
    "rw": (MountFlag.RDONLY, False),
    "nosuid": (MountFlag.NOSUID, True),
    "suid": (MountFlag.NOSUID, False),
    "nodev": (MountFlag.NODEV, True),
    "dev": (MountFlag.NODEV, False),
    "noexec": (MountFlag.NOEXEC, True),
    "exec": (MountFlag.NOEXEC, False),
    "nosymfollow": (MountFlag.NOSYMFOLLOW, True),
    "symfollow": (MountFlag.NOSYMFOLLOW, False),
    "noatime": (MountFlag.NOATIME, True),
    "atime": (MountFlag.NOATIME, False),
    "nodiratime": (MountFlag.NODIRATIME, True),
    "diratime": (MountFlag.NODIRATIME, False),
    "relatime": (MountFlag.RELATIME, True),
    "norelatime": (MountFlag.RELATIME, False),
    "strictatime": (MountFlag.STRICTATIME, True),
    "nostrictatime": (MountFlag.STRICTATIME, False),
    "sync": (MountFlag.SYNCHRONOUS, True),
    "async": (MountFlag.SYNCHRONOUS, False),
    "dirsync": (MountFlag.DIRSYNC, True),
    "mand": (MountFlag.MANDLOCK, True),
    "nomand": (MountFlag.MANDLOCK, False),
    "lazytime": (MountFlag.LAZYTIME, True),
    "nolazytime": (MountFlag.LAZYTIME, False),
    "silent": (MountFlag.SILENT, True),
    "loud": (MountFlag.SILENT, False),
    "remount": (MountFlag.REMOUNT, True),
    "iversion": (MountFlag.I_VERSION, True),
    "noiversion": (MountFlag.I_VERSION, False),
}
_PROPAGATION: dict[str, MountFlag] = {
    "private": MountFlag.PRIVATE,
    "slave": MountFlag.SLAVE,
    "shared": MountFlag.SHARED,
    "unbindable": MountFlag.UNBINDABLE,
}
# flag: (attribute to set, attributes to clear): a bind mount's own, through mount_setattr(2)
_ATTRIBUTES: dict[MountFlag, MountAttr] = {
    MountFlag.RDONLY: MountAttr.RDONLY,
    MountFlag.NOSUID: MountAttr.NOSUID,
    MountFlag.NODEV: MountAttr.NODEV,
    MountFlag.NOEXEC: MountAttr.NOEXEC,
    MountFlag.NOSYMFOLLOW: MountAttr.NOSYMFOLLOW,
    MountFlag.NODIRATIME: MountAttr.NODIRATIME,
}
_TIMES: dict[str, MountAttr] = {
    "noatime": MountAttr.NOATIME,
    "strictatime": MountAttr.STRICTATIME,
    "relatime": MountAttr(0),
    "atime": MountAttr(0),
    "norelatime": MountAttr.STRICTATIME,
    "nostrictatime": MountAttr(0),
}


class Options(Value):
    """A mount's options, sorted by which call takes them."""

    flags: MountFlag = _NO_FLAGS  # mount(2), for file systems
    attr_set: MountAttr = _NO_ATTRIBUTES  # mount_setattr(2), for binds: only what was named
    attr_clear: MountAttr = _NO_ATTRIBUTES
    tree_set: MountAttr = _NO_ATTRIBUTES  # the r-words: for the mounts below too
    tree_clear: MountAttr = _NO_ATTRIBUTES
    propagation: tuple[tuple[MountFlag, bool], ...] = ()  # (kind, recursive), in order
    bind: bool = False
    recursive: bool = False
    copy_up: bool = False
    id_map: str = ""  # "idmap" or "ridmap": with the container's own mappings
    data: str = ""  # what the file system itself understands


_SEEN_LIMIT = 256
_seen: dict[tuple[str, ...], Options] = {}


def parse(words: Sequence[str]) -> Options:
    """Sort `words`; one that the table lacks is the file system's. Most documents say the same: what was sorted once is kept."""
    key = tuple(words)
    found = _seen.get(key)
    if found is None:
        if len(_seen) >= _SEEN_LIMIT:
            _seen.clear()
        found = _seen[key] = _sorted(key)
    return found


def _sorted(words: Sequence[str]) -> Options:
    flags, bind, recursive, copy_up, id_map = MountFlag(0), False, False, False, ""
    sets, clears = [MountAttr(0), MountAttr(0)], [MountAttr(0), MountAttr(0)]  # of the mount, of its tree
    propagation: list[tuple[MountFlag, bool]] = []
    data: list[str] = []
    for word in words:
        if word in ("bind", "rbind"):
            bind, recursive = True, recursive or word == "rbind"
        elif word in _FLAGS:
            flag, enable = _FLAGS[word]
            flags = flags | flag if enable else flags & ~flag
            _attribute(word, sets, clears, 0)
        elif word in _PROPAGATION:
            propagation.append((_PROPAGATION[word], False))
        elif word[:1] == "r" and word[1:] in _PROPAGATION:
            propagation.append((_PROPAGATION[word[1:]], True))
        elif word[:1] == "r" and (word[1:] in _TIMES or _ATTRIBUTES.get(_FLAGS.get(word[1:], (MountFlag(0), True))[0])):
            _attribute(word[1:], sets, clears, 1)
        elif word == "tmpcopyup":
            copy_up = True
        elif word in ("idmap", "ridmap"):
            id_map = word
        elif word not in ("defaults", ""):
            data.append(word)
    return Options(
        flags=flags,
        attr_set=sets[0],
        attr_clear=clears[0],
        tree_set=sets[1],
        tree_clear=clears[1],
        propagation=tuple(propagation),
        bind=bind,
        recursive=recursive,
        copy_up=copy_up,
        id_map=id_map,
        data=",".join(data),
    )


def _attribute(word: str, sets: list[MountAttr], clears: list[MountAttr], index: int) -> None:
    if word in _TIMES:
        sets[index] = (sets[index] & ~MountAttr.ATIME) | _TIMES[word]
        clears[index] |= MountAttr.ATIME  # the kernel wants the whole field cleared when one value is set
        return
    flag, enable = _FLAGS[word]
    attribute = _ATTRIBUTES.get(flag)
    if attribute is None:
        return
    if enable:
        sets[index], clears[index] = sets[index] | attribute, clears[index] & ~attribute
    else:
        sets[index], clears[index] = sets[index] & ~attribute, clears[index] | attribute


def with_context(data: str, label: str) -> str:
    """`data` with SELinux's label for all that is in the file system, unless it names one; quoted, as levels have commas."""
    if not label or any("context=" in word for word in data.split(",")):
        return data
    return ",".join(filter(None, (data, f'context="{label}"')))


def propagation(word: str) -> tuple[MountFlag, bool] | None:
    """`linux.rootfsPropagation` as (kind, recursive); None for a word that is none."""
    if word in _PROPAGATION:
        return _PROPAGATION[word], False
    if word[:1] == "r" and word[1:] in _PROPAGATION:
        return _PROPAGATION[word[1:]], True
    return None


def known() -> list[str]:
    """Every word of the tables, sorted, for `features`."""
    recursive = [f"r{word}" for word in (*_PROPAGATION, *_TIMES, *(word for word in _FLAGS if _FLAGS[word][0] in _ATTRIBUTES))]
    return sorted({*_FLAGS, *_PROPAGATION, *recursive, "bind", "rbind", "defaults", "idmap", "ridmap", "tmpcopyup"})
