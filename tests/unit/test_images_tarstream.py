from __future__ import annotations

import io
import tarfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nacre.images import streams
from nacre.images.tarstream import PAX_LIMIT, Kind, Reader, TarError

KINDS = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.DIRTYPE: Kind.DIRECTORY,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.LNKTYPE: Kind.HARDLINK,
    tarfile.CHRTYPE: Kind.CHARACTER,
    tarfile.FIFOTYPE: Kind.FIFO,
}


def archive(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=format) as tar:
        for member, body in members:
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return data.getvalue()


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def contents(data: bytes) -> dict[str, bytes]:
    """Every file's bytes, holes filled in."""
    found = {}
    reader = Reader(io.BytesIO(data))
    for entry in reader:
        body = bytearray(entry.size)
        for offset, piece in reader.data():
            body[offset : offset + len(piece)] = piece
        found[entry.name] = bytes(body)
    return found


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_three_formats_are_read_with_owner_mode_and_time(format: int) -> None:
    name = "d/" + "n" * 90 + ("/" + "m" * 80 if format != tarfile.USTAR_FORMAT else "")
    data = archive((member(name, mode=0o4751, uid=70000, gid=80000, mtime=1700000000), b"x" * 700), format=format)
    (entry,) = list(Reader(io.BytesIO(data)))
    assert (entry.name, entry.mode, entry.uid, entry.gid, entry.size) == (name, 0o4751, 70000, 80000, 700)
    assert entry.mtime_ns == 1700000000 * 10**9
    assert contents(data) == {name: b"x" * 700}


def test_large_ids_negative_times_and_attributes_survive() -> None:
    info = member("f", uid=4_000_000_000, mtime=-5.25)
    info.pax_headers = {"SCHILY.xattr.user.note": "caf\u00e9"}
    (entry,) = list(Reader(io.BytesIO(archive((info, b"")))))
    assert entry.uid == 4_000_000_000
    assert entry.mtime_ns == -5_250_000_000
    assert entry.xattrs == {"user.note": "caf\u00e9".encode()}


def test_sparse_files_of_every_dialect_come_out_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import subprocess

    with open(tmp_path / "holes", "wb") as file:
        for number in range(12):
            file.seek(number * 300_000 + 100_000)
            file.write(bytes([number + 1]) * 5000)
        file.truncate(4_000_000)
    plain = (tmp_path / "holes").read_bytes()
    for options in (["--format=gnu"], *(["--format=pax", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0"))):
        made = subprocess.run(["tar", "-C", str(tmp_path), "-cS", *options, "holes"], capture_output=True, check=True).stdout
        assert contents(made) == {"holes": plain}, options
        assert len(made) < 200_000


def test_a_cut_archive_is_an_error_that_names_the_entry() -> None:
    data = archive((member("first"), b"a" * 2000), (member("second"), b"b" * 2000))
    for cut in (100, 700, 2600, 3000, 4000):
        with pytest.raises(TarError, match="ends"):
            contents(data[:cut])
    with pytest.raises(TarError) as error:
        contents(data[: 512 + 2048 + 512 + 100])
    assert error.value.entry == "second"


def test_a_header_whose_checksum_is_wrong_is_refused() -> None:
    data = bytearray(archive((member("first"), b"")))
    data[0] ^= 1
    with pytest.raises(TarError, match="checksum"):
        contents(bytes(data))


def test_a_huge_extended_header_is_refused_before_memory_is_taken() -> None:
    info = member("x", type=tarfile.XHDTYPE)
    info.size = PAX_LIMIT + 1
    with pytest.raises(TarError, match="limit"):
        contents(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.map": "0,10,5,10", "GNU.sparse.size": "20"},
        {"GNU.sparse.map": "0,99", "GNU.sparse.size": "20"},
        {"GNU.sparse.map": "0,1", "GNU.sparse.size": "20"},
        {"GNU.sparse.map": "0", "GNU.sparse.size": "20"},
        {"GNU.sparse.map": "x,y", "GNU.sparse.size": "20"},
    ],
)
def test_sparse_maps_that_lie_are_refused(headers: dict[str, str]) -> None:
    info = member("f")
    info.pax_headers = headers
    with pytest.raises(TarError):
        contents(archive((info, b"a" * 20)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_archives_are_read_or_refused_but_never_anything_else(data: st.DataObject) -> None:
    info = member("pax/" + "n" * 200, mtime=1.5)
    info.pax_headers = {"SCHILY.xattr.user.a": "b"}
    whole = bytearray(
        archive((member("a"), b"x" * 600), (info, b"y" * 10), (member("l", type=tarfile.SYMTYPE, linkname="a"), b""))
    )
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    reader = Reader(io.BytesIO(bytes(whole[:cut])))
    try:
        for entry in reader:
            assert sum(len(piece) for _, piece in reader.data()) == max(entry.stored, 0) <= len(whole)
    except TarError as error:
        assert error.reason


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2048))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        contents(data[:512] + b"\0" * (512 - min(len(data), 512)) + data[512:])
    except TarError:
        pass


@given(st.binary(max_size=4000), st.integers(1, 700))
def test_streams_are_told_apart_by_their_first_bytes(data: bytes, size: int) -> None:
    import gzip

    import zstandard

    packed = (gzip.compress(data) + gzip.compress(data), zstandard.compress(data) + zstandard.compress(data))
    for one in packed:
        source = streams.decompressed(io.BytesIO(one))
        found = b""
        while piece := source.read(size):
            assert len(piece) <= size
            found += piece
        assert found == data + data


def test_a_gzip_stream_that_is_cut_or_broken_is_refused() -> None:
    import gzip

    packed = gzip.compress(bytes(range(256)) * 100)
    for bad in (packed[:-4], packed[:50], packed[:40] + b"\xff" * 40 + packed[80:]):
        with pytest.raises(streams.StreamError):
            source = streams.decompressed(io.BytesIO(bad))
            while source.read(1000):
                pass


def test_a_stream_beyond_its_limit_is_a_bomb() -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = bomb.compress(b"\0" * (4 << 20)) + bomb.flush()
    source = streams.Hashed(streams.decompressed(io.BytesIO(data)), 1 << 20)
    with pytest.raises(streams.StreamError, match="more than 1 MiB"):
        while source.read(65536):
            pass
