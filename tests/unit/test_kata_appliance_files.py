"""The appliance's small formats: the cpio that the kernel unpacks, package names in order, packed files."""

from __future__ import annotations

import io
import lzma
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.kata import appliance_kernel as kernel
from nacre.kata.appliance_cpio import Archive


def entries(data: bytes) -> list[tuple[str, int, bytes, tuple[int, int]]]:
    """(name, mode, contents, device) as the format's description reads."""
    found, offset = [], 0
    while True:
        assert data[offset : offset + 6] == b"070701"
        numbers = [int(data[offset + 6 + 8 * index : offset + 14 + 8 * index], 16) for index in range(13)]
        size, name_size = numbers[6], numbers[11]
        name = data[offset + 110 : offset + 110 + name_size - 1].decode()
        begin = (offset + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found.append((name, numbers[1], data[begin : begin + size], (numbers[9], numbers[10])))
        offset = (begin + size + 3) & ~3


@given(st.lists(st.tuples(st.from_regex(r"[a-z]{1,9}", fullmatch=True), st.binary(max_size=50)), max_size=5))
def test_files_come_out_of_the_cpio_as_they_went_in(files: list[tuple[str, bytes]]) -> None:
    buffer = io.BytesIO()
    archive = Archive(buffer)
    archive.directory("/dir", 0o711)
    archive.link("/lib", "usr/lib")
    archive.character_device("/dev/console", 5, 1)
    for name, data in files:
        archive.regular(f"/dir/{name}", data, 0o644)
    archive.close()
    assert len(buffer.getvalue()) % 512 == 0
    assert entries(buffer.getvalue()) == [
        ("dir", stat.S_IFDIR | 0o711, b"", (0, 0)),
        ("lib", stat.S_IFLNK | 0o777, b"usr/lib", (0, 0)),
        ("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)),
        *((f"dir/{name}", stat.S_IFREG | 0o644, data, (0, 0)) for name, data in files),
    ]


def test_the_newest_kernel_is_the_last_by_numbers_not_by_letters() -> None:
    names = [f"linux-image-6.1.0-{number}-cloud-amd64_6.1.{number}_amd64.deb" for number in (50, 9, 100)]
    assert sorted(names, key=kernel._order) == [names[1], names[0], names[2]]


@given(st.binary(max_size=2000), st.binary(max_size=20))
def test_packed_bytes_come_out_whole_whatever_follows_them(data: bytes, tail: bytes) -> None:
    assert kernel.inflate(lzma.compress(data) + tail, "x") == data


@pytest.mark.parametrize("data", [b"", b"MZ\x90", b"\xfd7zX"])
def test_an_unknown_compression_is_named(data: bytes) -> None:
    with pytest.raises(kernel.KernelUnavailable, match="no known compression"):
        kernel.inflate(data, "x")


@pytest.mark.parametrize(("magic", "tool"), [(b"\x02\x21\x4c\x18", "lz4"), (b"\x28\xb5\x2f\xfd", "zstd")])
def test_a_packing_whose_tool_is_missing_is_named_with_the_package(
    monkeypatch: pytest.MonkeyPatch, magic: bytes, tool: str
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(kernel.KernelUnavailable, match=f"packed by {tool}, which is not installed") as caught:
        kernel.inflate(magic + b"rest", "the guest's kernel")
    assert caught.value.remedy.endswith(tool)


@pytest.mark.parametrize("image", [b"", b"x" * 4096], ids=["empty", "no header"])
def test_what_is_no_kernel_image_is_refused(image: bytes) -> None:
    with pytest.raises(kernel.KernelUnavailable, match="x86 boot header"):
        kernel._vmlinux(image)


def test_a_dataclass_made_with_the_table_is_like_any_other(tmp_path: Path) -> None:
    """In a fresh interpreter each, as `inspect` must not be loaded before."""
    define = (
        "import dataclasses\n"
        "@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)\n"
        "class A:\n    x: int\n    y: list = dataclasses.field(default_factory=list)\n"
        "a = A(x=1)\n"
        "out = [repr(a), a == A(x=1), hash(dataclasses.replace(a, y=())), dataclasses.asdict(a)]\n"
        "try: a.x = 2\nexcept dataclasses.FrozenInstanceError: out.append('frozen')\n"
    )
    record = f"from nacre.agent import prepared\ntable = prepared.record()\n{define}import marshal\n"
    record += f"open({str(tmp_path) + '/table'!r}, 'wb').write(marshal.dumps(table))\nprint(out)"
    install = (
        f"from nacre.agent import prepared\nprepared.install({str(tmp_path) + '/table'!r})\n"
        f"{define}prepared.remove()\nimport sys\n"
        "assert 'ast' not in sys.modules\nprint(out)"
    )
    plain = f"{define}print(out)"
    said = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for code in (record, install, plain)
    ]
    assert said[0] == said[1] == said[2]
