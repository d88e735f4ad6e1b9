"""The guest's kernel: a distribution's package, downloaded by apt and unpacked here, never installed; its image made bootable by PVH.

CACHE/NAME_VERSION_ARCH.deb   as apt leaves it; apt itself downloads to a temporary name
"""

from __future__ import annotations

import lzma
import os
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nacre.oci.errors import Failure

Progress = Callable[[str], None]

# Distribution (os-release ID) to the meta packages that name a kernel, the small one for clouds first.
_META = {
    "debian": ("linux-image-cloud-amd64", "linux-image-amd64"),
    "ubuntu": ("linux-image-kvm", "linux-image-virtual"),
}
_IMAGE = re.compile(r"linux-image-(?:unsigned-)?\d[\w.+-]*")
# What the guest loads, in this order, with what each depends on; a missing one is built in.
MODULES = (
    *("virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio_rng", "virtio_mem"),
    *("erofs", "overlay"),
)
_SOFT = {"libcrc32c": ("crc32c_generic",)}  # asked for while it works, not named as a dependency
_XZ, _ZSTD, _GZIP, _LZ4 = b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x1f\x8b", b"\x02\x21\x4c\x18"
_TOOLS = {_ZSTD: ("zstd", "-dcq"), _GZIP: ("gzip", "-dc"), _LZ4: ("lz4", "-dc")}  # packing with tools of their own


class KernelUnavailable(Failure):
    """The guest's kernel could not be downloaded or unpacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel taken out of its package."""

    release: str  # uname -r
    image: bytes  # vmlinux, ELF
    modules: tuple[tuple[str, bytes], ...]  # (name, ELF), each after what it depends on


def package(cache: str, places: Sequence[str], progress: Progress) -> str:
    """The path of a kernel package: the newest in `cache` or in `places`, else downloaded into `cache`."""
    for directory in (cache, *places):
        found = _packages_in(directory)
        if found:
            return found[-1]
    os.makedirs(cache, exist_ok=True)
    try:
        name = _download(cache, progress)
    except KernelUnavailable as failure:  # no lists yet, or old ones whose package the mirror has dropped
        progress(f"{failure}; apt-get update")
        _run(["apt-get", "update", "-qq"], "refresh apt's lists", "/")
        name = _download(cache, progress)
    found = _packages_in(cache)
    if not found:
        raise KernelUnavailable(what=f"download {name}", cause=f"apt-get left no package in {cache}", remedy="apt-get update")
    return found[-1]


def _packages_in(directory: str) -> list[str]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    fitting = [name for name in names if _IMAGE.match(name) and name.endswith(".deb") and ("cloud" in name or "kvm" in name)]
    return [os.path.join(directory, name) for name in sorted(fitting, key=_order)]


def _order(name: str) -> list[int]:
    """6.1.0-50 after 6.1.0-9."""
    return [int(number) for number in re.findall(r"\d+", name)]


def _download(cache: str, progress: Progress) -> str:
    name = _package_name()
    progress(f"downloading {name}, which is not installed")
    _run(["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", name], f"download {name}", cache)
    return name


def _package_name() -> str:
    """Of the newest kernel that apt's lists know."""
    metas = _META.get(distribution(), _META["debian"])
    for meta in metas:
        shown = subprocess.run(["apt-cache", "depends", meta], capture_output=True, text=True, check=False)
        for line in shown.stdout.splitlines():
            word = line.partition("Depends:")[2].strip()
            if _IMAGE.fullmatch(word):
                return word
    raise KernelUnavailable(
        what="find the guest's kernel",
        cause=f"apt knows none of {', '.join(metas)}",
        remedy="put a linux-image-*-cloud-amd64 package's .deb into the appliance's cache directory",
    )


def distribution() -> str:
    """os-release(5)'s ID, or the first known one that it is like."""
    with open("/etc/os-release", encoding="utf-8") as file:
        pairs = dict(line.rstrip("\n").split("=", 1) for line in file if "=" in line)
    names = [pairs.get("ID", ""), *pairs.get("ID_LIKE", "").split()]
    return next((name for word in names if (name := word.strip('"')) in _META), "debian")


def _run(command: Sequence[str], what: str, directory: str) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise KernelUnavailable(
            what=what,
            cause=f"{' '.join(command)} ended with code {done.returncode}",
            evidence=tuple(lines),
            remedy="mend the network or /etc/apt/sources.list, then repeat",
        )


def unpack(path: str) -> Kernel:
    """Image and modules of the package at `path`."""
    try:
        files = _contents(path)
    except tarfile.TarError as error:
        raise _damaged(path, str(error)) from error
    images = [name for name in files if name.startswith("boot/vmlinuz-")]
    if len(images) != 1:
        raise _damaged(path, f"it has {len(images)} kernel images")
    release = images[0].removeprefix("boot/vmlinuz-")
    return Kernel(release=release, image=_vmlinux(files[images[0]]), modules=tuple(_modules(files)))


def _contents(path: str) -> dict[str, bytes]:
    """The files of the package that may be needed."""
    files: dict[str, bytes] = {}
    command = ["dpkg-deb", "--fsys-tarfile", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as reader:
        assert reader.stdout is not None
        with tarfile.open(fileobj=reader.stdout, mode="r|") as tar:
            for member in tar:
                name = member.name.removeprefix("./").removeprefix("usr/")
                if member.isreg() and _wanted(name):
                    taken = tar.extractfile(member)
                    files[name] = taken.read() if taken is not None else b""
    if reader.returncode:
        raise _damaged(path, f"dpkg-deb ended with code {reader.returncode}")
    return files


def _damaged(path: str, cause: str) -> KernelUnavailable:
    return KernelUnavailable(what=f"unpack {path}", cause=cause, remedy=f"rm {path}")


def _wanted(name: str) -> bool:
    if name.startswith("boot/vmlinuz-"):
        return True
    return name.startswith("lib/modules/") and any(
        f"/kernel/{part}/" in name
        for part in ("drivers/virtio", "drivers/block", "drivers/char", "drivers/net", "fs", "lib", "net/core", "crypto")
    )


def _modules(files: dict[str, bytes]) -> Iterable[tuple[str, bytes]]:
    """MODULES and what they need, dependencies first, as each module's own .modinfo names them."""
    there = {_module_name(path): path for path in files if ".ko" in path}
    done: dict[str, bytes] = {}

    def take(name: str) -> None:
        if name in done or name not in there:
            return
        data = _inflated(files[there[name]], there[name])
        for needed in _modinfo(data, b"depends").split(","):
            take(needed.replace("-", "_"))
        for helper in _SOFT.get(name, ()):
            take(helper)
        done[name] = data

    for name in MODULES:
        take(name)
    return done.items()


def _module_name(path: str) -> str:
    return os.path.basename(path).partition(".ko")[0].replace("-", "_")


def _modinfo(data: bytes, key: bytes) -> str:
    match = re.search(rb"\0" + key + rb"=([^\0]*)\0", data)
    return match[1].decode() if match else ""


def _inflated(data: bytes, name: str) -> bytes:
    return data if data.startswith(b"\x7fELF") else inflate(data, name)


def _vmlinux(image: bytes) -> bytes:
    """The ELF file inside a bzImage (Documentation/arch/x86/boot.rst: payload_offset and payload_length, protocol 2.08)."""
    if image[0x202:0x206] != b"HdrS":
        raise KernelUnavailable(what="unpack the guest's kernel", cause="the image has no x86 boot header")
    setup = (image[0x1F1] or 4) + 1
    offset = setup * 512 + int.from_bytes(image[0x248:0x24C], "little")
    length = int.from_bytes(image[0x24C:0x250], "little")
    return inflate(image[offset : offset + length], "the guest's kernel")


def inflate(data: bytes, name: str) -> bytes:
    """What was packed by xz, zstd, gzip or lz4; bytes after the end are left out."""
    if data.startswith(_XZ):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data)
    for magic, command in _TOOLS.items():
        if data.startswith(magic):
            return _inflated_by(command, data, name)
    raise KernelUnavailable(what=f"unpack {name}", cause=f"it begins with {data[:6].hex()}, which is no known compression")


def _inflated_by(command: Sequence[str], data: bytes, name: str) -> bytes:
    """What the tool put out; its exit code says nothing, as it complains of the bytes after the end."""
    try:
        done = subprocess.run(command, input=data, capture_output=True, check=False)
    except FileNotFoundError:
        raise KernelUnavailable(
            what=f"unpack {name}",
            cause=f"it is packed by {command[0]}, which is not installed",
            remedy=f"apt-get install --no-install-recommends {command[0]}",
        ) from None
    if not done.stdout:
        said = tuple(done.stderr.decode("utf-8", "replace").splitlines()[-5:])
        raise KernelUnavailable(what=f"unpack {name}", cause=f"{command[0]} ended with code {done.returncode}", evidence=said)
    return done.stdout
