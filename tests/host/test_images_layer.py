"""Layers as they are put on the disk: what overlayfs needs, and what hostile ones are refused for, by the entry's name."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images_support import (
    NOTHING,
    Member,
    configuration,
    directory,
    docker_archive,
    entry,
    file,
    hardlink,
    kept,
    layer,
    store,
    symlink,
)

from nacre.images import Image
from nacre.images import layer as layers
from nacre.images.errors import DigestMismatch, LayerRefused
from nacre.images.merged import View
from nacre.images.tarstream import Reader, TarError
from nacre.images.tree import Refused
from nacre.oci.errors import Failure

OPAQUE = "trusted.overlay.opaque"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unpacking moves the working directory, in a child as a rule, in this process where a test calls it."""
    monkeypatch.chdir(tmp_path)


async def unpacked(prefix: Path, *members: list[Member]) -> list[Path]:
    """The `fs` directories of an image with these layers, bottom first."""
    async with store(prefix) as images:
        (image,) = await images.import_archive(str(docker_archive(prefix / "a.tar", [layer(*one) for one in members])))
        return [places(prefix, image, number) for number in range(len(members))]


def places(prefix: Path, image: Image, number: int) -> Path:
    return prefix / "var/lib/nacre/images/layers" / image.layers[number].directory / "fs"


def is_whiteout(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


async def test_files_keep_owner_mode_time_attributes_and_holes(tmp_path: Path) -> None:
    (fs,) = await unpacked(
        tmp_path,
        [
            directory("d", mode=0o1777, uid=7, gid=8, mtime=1000),
            file("d/f", b"x" * 5000, mode=0o4755, uid=70000, gid=70001, mtime=2000.5, xattrs={"user.note": "hello"}),
            hardlink("d/again", "d/f"),
            symlink("d/l", "/etc/../anything"),
            entry("d/null", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3),
            entry("d/pipe", tarfile.FIFOTYPE, mode=0o600, uid=9),
        ],
    )
    found = (fs / "d/f").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_nlink) == (0o4755, 70000, 70001, 2)
    assert found.st_mtime_ns == 2000_500_000_000
    assert os.getxattr(fs / "d/f", "user.note") == b"hello"
    assert os.path.samefile(fs / "d/f", fs / "d/again")
    assert os.readlink(fs / "d/l") == "/etc/../anything"
    assert (fs / "d/null").stat().st_rdev == os.makedev(1, 3)
    assert stat.S_ISFIFO((fs / "d/pipe").stat().st_mode) and (fs / "d/pipe").stat().st_uid == 9
    top = (fs / "d").stat()
    assert (stat.S_IMODE(top.st_mode), top.st_uid, top.st_gid, top.st_mtime) == (0o1777, 7, 8, 1000)


async def test_file_capabilities_survive_the_change_of_owner(tmp_path: Path) -> None:
    value = bytes.fromhex("0100000200200000000000000000000000000000")  # VFS_CAP_REVISION_2, CAP_NET_RAW
    (fs,) = await unpacked(
        tmp_path, [file("ping", b"x", mode=0o755, uid=5, xattrs={"security.capability": value.decode("latin-1")})]
    )
    assert os.getxattr(fs / "ping", "security.capability") == value


async def test_whiteouts_become_overlayfs_marks_only_where_something_lies_below(tmp_path: Path) -> None:
    _, top = await unpacked(
        tmp_path,
        [file("gone"), directory("d"), file("d/x"), directory("e"), file("e/x")],
        [file(".wh.gone"), file(".wh.never"), directory("d"), file("d/.wh..wh..opq"), file("d/new"), file("e/.wh.x")],
    )
    assert is_whiteout(top / "gone") and is_whiteout(top / "e/x")
    assert sorted(os.listdir(top)) == ["d", "e", "gone"]
    assert os.getxattr(top / "d", OPAQUE) == b"y"
    assert os.listdir(top / "d") == ["new"]


async def test_an_entry_and_its_whiteout_in_one_layer_leave_the_entry_in_either_order(tmp_path: Path) -> None:
    _, top = await unpacked(
        tmp_path,
        [directory("a"), file("a/x"), directory("b"), file("b/x"), file("c")],
        [
            directory("a"),
            file("a/new"),
            file(".wh.a"),
            file(".wh.b"),
            directory("b"),
            file("b/new"),
            file("c", b"2"),
            file(".wh.c"),
        ],
    )
    assert os.getxattr(top / "a", OPAQUE) == b"y" and os.getxattr(top / "b", OPAQUE) == b"y"
    assert (top / "c").read_bytes() == b"2"


async def test_parents_that_a_layer_leaves_out_are_as_they_were_below(tmp_path: Path) -> None:
    _, top = await unpacked(
        tmp_path,
        [
            directory("srv", mode=0o711, uid=5, mtime=77),
            directory("srv/tmp", mode=0o1777),
            symlink("lib", "usr/lib"),
            directory("usr"),
        ],
        [file("srv/tmp/f"), file("lib/libx"), file("new/f")],
    )
    found = (top / "srv").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_mtime) == (0o711, 5, 77)
    assert stat.S_IMODE((top / "srv/tmp").stat().st_mode) == 0o1777
    assert (top / "usr/lib/libx").is_file() and not (top / "lib").exists()
    assert stat.S_IMODE((top / "new").stat().st_mode) == 0o755


async def test_links_stay_inside_the_image_even_when_they_are_absolute(tmp_path: Path) -> None:
    (fs,) = await unpacked(tmp_path, [symlink("run", "/var/run"), directory("var/run"), file("run/mine"), file("/opt/abs")])
    assert (fs / "var/run/mine").is_file()
    assert (fs / "opt/abs").is_file()
    assert not os.path.exists("/var/run/mine")


async def test_a_hard_link_to_a_file_of_a_lower_layer_is_copied_up(tmp_path: Path) -> None:
    below, top = await unpacked(tmp_path, [file("a", b"data", uid=4, mode=0o640)], [hardlink("b", "a")])
    assert (top / "b").read_bytes() == b"data" and os.path.samefile(top / "a", top / "b")
    assert ((top / "a").stat().st_uid, (below / "a").stat().st_nlink) == (4, 1)


async def test_an_opaque_root_ends_the_list_of_lower_directories(tmp_path: Path) -> None:
    async with store(tmp_path) as images:
        archive = docker_archive(tmp_path / "a.tar", [layer(file("old")), layer(file(".wh..wh..opq"), file("new"))])
        (image,) = await images.import_archive(str(archive))
        assert len(images.rootfs(image, "c").lower) == 1


HOSTILE: dict[str, list[Member]] = {
    "climbs by name": [file("../evil")],
    "climbs inside a name": [file("a/../../evil")],
    "climbs by a link": [symlink("a", "../../.."), file("a/evil")],
    "climbs by links in turn": [directory("d"), symlink("d/a", ".."), symlink("b", "d/a/.."), file("b/evil")],
    "link circle": [symlink("a", "b"), symlink("b", "a"), file("a/evil")],
    "file as directory": [file("a"), file("a/evil")],
    "hard link outside": [hardlink("evil", "../../../etc/passwd")],
    "hard link through a climbing link": [symlink("a", "../.."), hardlink("evil", "a/etc/passwd")],
    "hard link to nothing": [hardlink("evil", "nowhere")],
    "hard link to a directory": [directory("a"), hardlink("evil", "a")],
    "whiteout of the parent": [file(".wh...")],
    "whiteout of nothing": [file(".wh.")],
    "whiteout of itself": [directory("d"), file("d/.wh..")],
    "whiteout with content": [file(".wh.a", b"x")],
    "whiteout directory": [file(".wh.a/b")],
    "overlay's own mark as device": [entry("evil", tarfile.CHRTYPE)],
    "overlay's own attribute": [directory("evil", xattrs={"trusted.overlay.redirect": "/etc"})],
    "too deep": [file("/".join(["a"] * 200))],
    "long component": [file("a" * 300)],
    "root as link": [symlink("./", "/etc")],
    "owner out of range": [file("evil", uid=2**40)],
    "many attributes": [file("evil", xattrs={f"user.{n}": "x" * 60000 for n in range(3)})],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_hostile_layer_is_refused_by_the_entrys_name_and_leaves_nothing(tmp_path: Path, members: list[Member]) -> None:
    archive = docker_archive(tmp_path / "a.tar", [layer(file("before"), *members)])
    async with store(tmp_path) as images:
        with pytest.raises(LayerRefused) as refused:
            await images.import_archive(str(archive))
        assert f"entry '{members[-1][0].name.rstrip('/')[:40]}" in refused.value.cause
        assert images.list() == []
    assert kept(tmp_path) == NOTHING


async def test_a_layer_that_is_not_what_the_configuration_says_is_refused(tmp_path: Path) -> None:
    archive = docker_archive(tmp_path / "a.tar", [layer(file("a"))], config=configuration([layer(file("b"))]))
    async with store(tmp_path) as images:
        with pytest.raises(DigestMismatch, match="configuration says"):
            await images.import_archive(str(archive))
    assert kept(tmp_path) == NOTHING


async def test_a_truncated_layer_is_refused(tmp_path: Path) -> None:
    whole = layer(file("a", b"x" * 100_000))
    async with store(tmp_path) as images:
        with pytest.raises(LayerRefused, match="'a'"):
            await images.import_archive(str(docker_archive(tmp_path / "a.tar", [whole[:50_000]])))
    assert kept(tmp_path) == NOTHING


def apply(tmp_path: Path, limits: layers.Limits, *members: Member) -> None:
    """The applier alone, in this process, with limits small enough for a test."""
    (tmp_path / "fs").mkdir()
    root = os.open(tmp_path / "fs", os.O_RDONLY | os.O_DIRECTORY)
    try:
        layers.Applier(root, View(()), limits).run(Reader(io.BytesIO(layer(*members))))
    finally:
        os.close(root)


def test_bombs_by_count_by_size_and_by_apparent_size_are_refused(tmp_path: Path) -> None:
    for number, (limits, members) in enumerate(
        (
            (layers.Limits(entries=3), [file(f"f{n}") for n in range(5)]),
            (layers.Limits(stored_bytes=1000), [file("a", b"x" * 600), file("b", b"x" * 600)]),
            (layers.Limits(file_bytes=100), [file("a", b"x" * 101)]),
        )
    ):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(Refused):
            apply(place, limits, *members)


def test_a_layer_larger_than_the_free_space_is_a_full_disk_before_the_disk_is_full(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        apply(tmp_path, layers.Limits(free_bytes=1000), file("a", b"x" * 2000))


WORDS = st.lists(st.sampled_from(["a", "b", "..", ".", "", ".wh.a", ".wh..wh..opq", "/"]), min_size=1, max_size=4).map("/".join)
MEMBERS = st.one_of(
    st.builds(lambda name: file(name, b"x"), WORDS),
    st.builds(directory, WORDS),
    st.builds(symlink, WORDS, st.one_of(WORDS, st.sampled_from(["../outside", "/", "../../outside"]))),
    st.builds(hardlink, WORDS, st.one_of(WORDS, st.just("../outside/canary"))),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(MEMBERS, max_size=8), st.lists(MEMBERS, max_size=8))
def test_no_order_of_links_and_names_reaches_outside_the_layer(lower: list[Member], upper: list[Member]) -> None:
    with tempfile.TemporaryDirectory() as place:
        outside = Path(place, "outside")
        outside.mkdir()
        (outside / "canary").write_bytes(b"alive")
        below: list[int] = []
        for number, members in enumerate((lower, upper)):
            fs = Path(place, str(number), "fs")
            fs.mkdir(parents=True)
            below.insert(0, os.open(fs, os.O_RDONLY | os.O_DIRECTORY))
            try:
                reader = Reader(io.BytesIO(layer(*members)))
                layers.Applier(below[0], View(below[1:]), layers.Limits()).run(reader)
            except (Refused, TarError):
                break
        for fd in below:
            os.close(fd)
        assert os.listdir(outside) == ["canary"] and (outside / "canary").stat().st_nlink == 1
        assert set(os.listdir(place)) <= {"outside", "0", "1"}
        assert all(os.listdir(Path(place, name)) == ["fs"] for name in os.listdir(place) if name != "outside")


async def test_the_unpacking_process_has_given_its_privileges_away(tmp_path: Path) -> None:
    """Looked at from outside, while it waits for its next request."""
    from nacre.images.child import Unpacker
    from nacre.images.places import Places, StoreLock

    places_ = Places(str(tmp_path))
    places_.make()
    lock = StoreLock(places_.lock)
    async with Unpacker(places_, lock) as unpacker:
        with pytest.raises(Failure):
            await unpacker.unpack({"blob": "0" * 64, "layer": "1" * 64, "diff_id": "sha256:" + "2" * 64, "below": []})
        process = unpacker._process
        assert process is not None
        assert os.readlink(f"/proc/{process.pid}/root") == places_.images
        assert os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net")
        status = Path(f"/proc/{process.pid}/status").read_text()
    lock.close()
    found = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    kept_bits = sum(
        1 << number for number in (0, 1, 3, 4, 21, 27, 31)
    )  # CHOWN DAC_OVERRIDE FOWNER FSETID SYS_ADMIN MKNOD SETFCAP
    assert int(found["CapEff"], 16) | kept_bits == kept_bits
    assert int(found["CapBnd"], 16) | kept_bits == kept_bits
    assert found["NoNewPrivs"] == "1"


async def test_a_killed_unpacker_is_a_failure_that_says_how_it_ended(tmp_path: Path) -> None:
    from nacre.images.child import Unpacker
    from nacre.images.places import Places, StoreLock

    places_ = Places(str(tmp_path))
    places_.make()
    lock = StoreLock(places_.lock)
    async with Unpacker(places_, lock) as unpacker:
        request = {"blob": "0" * 64, "layer": "1" * 64, "diff_id": "sha256:" + "2" * 64, "below": []}
        with pytest.raises(Failure):
            await unpacker.unpack(request)
        assert unpacker._process is not None
        unpacker._process.kill()
        with pytest.raises(Failure, match="ended with signal 9"):
            await unpacker.unpack(request)
    lock.close()
