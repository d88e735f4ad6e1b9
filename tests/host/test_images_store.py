"""The store: names, roots, users, block devices, what is kept and what goes, and what a kill at any step leaves."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from images_support import NOTHING, configuration, directory, docker_archive, file, hardlink, kept, layer, store, symlink

from nacre import config
from nacre.images import Store
from nacre.images.errors import DiskFull, ImageNotFound, ImageRefused, SnapshotRefused, UserNotFound
from nacre.images.model import User
from nacre.images.places import StoreLock
from nacre.linux import mounts
from nacre.linux.namespaces import Clone, unshare

PASSWD = b"root:x:0:0::/:\nweb:x:101:102::/:\nbroken\nhuge:x:99999999999:1::/:\n"
GROUP = b"root:x:0:\nweb:x:102:\nextra:x:200:other,web\nalso:x:201:web\n"
BASE = layer(directory("etc"), file("etc/passwd", PASSWD), file("etc/group", GROUP), file("shared", b"s" * 1000))


def archive(path: Path, name: str, *layers: bytes, **fields: object) -> str:
    return str(docker_archive(path / f"{name.replace('/', '-')}.tar", layers, [name], configuration(layers, **fields)))


async def test_an_image_is_found_by_every_form_of_its_name_and_by_its_id(tmp_path: Path) -> None:
    async with store(tmp_path) as images:
        (image,) = await images.import_archive(archive(tmp_path, "nginx:1", BASE))
        digest = image.digests[0]
        short = image.id.removeprefix("sha256:")
        for name in ("nginx:1", "docker.io/library/nginx:1", digest, image.id, short, short[:12], image.id[:19]):
            assert images.get(name) == image, name
        for name in ("nginx", "nginx:2", "", "NOT A NAME", short[:3], "sha256:", "f" * 64):
            assert images.get(name) is None, name
        assert image.references == ("docker.io/library/nginx:1",)
        assert image.pulled_as == "", "no registry has the manifest that was made of the archive"
        assert {image.called(name) for name in ("nginx:1", "other:2", image.id, "NOT A NAME")} == {"docker.io/library/nginx:1"}
        assert image.size == image.config_blob.size + len(BASE)


async def test_a_name_moves_to_the_image_that_took_it_last(tmp_path: Path) -> None:
    async with store(tmp_path) as images:
        (old,) = await images.import_archive(archive(tmp_path, "a:1", BASE))
        (new,) = await images.import_archive(archive(tmp_path, "a:1", BASE, layer(file("x"))))
        found, former = images.get("a:1"), images.get(old.id)
        assert found is not None and found.id == new.id
        assert former is not None and former.references == () and len(former.digests) == 1


async def test_a_root_is_an_overlay_that_the_kernel_mounts(tmp_path: Path) -> None:
    async with store(tmp_path) as images:
        upper = layer(directory("./", mode=0o711, uid=3), file("etc/.wh.group"), file("etc/new", b"n"))
        (image,) = await images.import_archive(archive(tmp_path, "a", BASE, upper))
        root = images.rootfs(image, "c1")
        assert images.rootfs(image, "c1") == root
        found = os.stat(root.upper)
        assert (found.st_mode & 0o7777, found.st_uid) == (0o711, 3)
        point = tmp_path / "point"
        point.mkdir()
        child = os.fork()
        if child == 0:
            try:
                unshare(Clone.NEWNS)
                mounts.mount(None, "/", None, mounts.MountFlag.REC | mounts.MountFlag.PRIVATE)
                data = f"lowerdir={':'.join(root.lower)},upperdir={root.upper},workdir={root.work}"
                mounts.mount("overlay", str(point), "overlay", 0, data)
                seen = sorted(os.listdir(point / "etc"))
                os._exit(0 if seen == ["new", "passwd"] and (point / "shared").stat().st_size == 1000 else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        images.release("c1")
        images.release("c1")
    assert kept(tmp_path)["snapshots"] == []


@pytest.mark.parametrize(
    ("spec", "user"),
    [
        ("", User(0, 0)),
        ("0", User(0, 0)),
        ("web", User(101, 102, (200, 201))),
        ("101", User(101, 102, (200, 201))),
        ("101:7", User(101, 7)),
        ("web:extra", User(101, 200)),
        ("5000", User(5000, 0)),
        ("5000:web", User(5000, 102)),
        ("web:", User(101, 102, (200, 201))),
    ],
)
async def test_users_come_from_the_images_own_files(tmp_path: Path, spec: str, user: User) -> None:
    async with store(tmp_path) as images:
        (image,) = await images.import_archive(archive(tmp_path, "a", BASE))
        assert images.resolve_user(image, spec) == user


async def test_a_user_that_the_image_lacks_is_a_failure_in_dockers_words(tmp_path: Path) -> None:
    async with store(tmp_path) as images:
        (image,) = await images.import_archive(archive(tmp_path, "a", BASE, User="nobody:here"))
        with pytest.raises(UserNotFound, match="unable to find user nobody: no matching entries in passwd file"):
            images.resolve_user(image, image.user)
        with pytest.raises(UserNotFound, match="unable to find group here"):
            images.resolve_user(image, "web:here")
        with pytest.raises(UserNotFound):
            images.resolve_user(image, "huge")


async def test_passwd_is_read_beneath_the_image_whatever_links_it_lays(tmp_path: Path) -> None:
    host = os.path.abspath(tmp_path / "host-passwd")
    Path(host).write_bytes(b"evil:x:666:666::/:\n")
    tricks = layer(file("etc/.wh.passwd"), symlink("etc/group", f"../../../../../..{host}"), symlink("etc/passwd", host))
    async with store(tmp_path) as images:
        (image,) = await images.import_archive(archive(tmp_path, "a", BASE, tricks))
        with pytest.raises(UserNotFound):
            images.resolve_user(image, "evil")
        (linked,) = await images.import_archive(
            archive(tmp_path, "b", BASE, layer(symlink("etc/passwd", "/etc/x"), file("etc/x", PASSWD)))
        )
        assert images.resolve_user(linked, "web").uid == 101


async def test_a_block_device_holds_what_a_container_would_see(tmp_path: Path) -> None:
    upper = layer(
        file("etc/.wh.group"),
        directory("d"),
        file("d/.wh..wh..opq"),
        file("d/a", b"1"),
        hardlink("d/b", "d/a"),
        symlink("d/l", "a"),
    )
    lower = layer(directory("etc"), file("etc/passwd", PASSWD), file("etc/group"), directory("d"), file("d/hidden"))
    async with store(tmp_path) as images:
        (image,) = await images.import_archive(archive(tmp_path, "a", lower, upper))
        assert images.erofs_state(image) == "absent"
        first, second = await asyncio.gather(images.vm_rootfs(image, "c1"), images.vm_rootfs(image, "c2"))
        assert first == second and images.erofs_state(image) == "ready"
        listed = subprocess.run(["dump.erofs", "-s", first.erofs], capture_output=True, text=True, check=True).stdout
        assert image.id[7:15] in listed.replace("-", "")
        point = tmp_path / "point"
        point.mkdir()
        loop = subprocess.run(
            [
                "unshare",
                "-m",
                "sh",
                "-c",
                f"mount -t erofs -o loop,ro {first.erofs} {point} && cd {point} && find . -printf '%p %y %n\\n'",
            ],
            capture_output=True,
            text=True,
        )
        if "loop" in loop.stderr:
            pytest.skip(f"mount(2) of a loop device: {loop.stderr.strip()}")
        assert sorted(loop.stdout.split("\n"))[1:] == [
            ". d 4", "./d d 2", "./d/a f 2", "./d/b f 2", "./d/l l 1", "./etc d 2", "./etc/passwd f 1",
        ]  # fmt: skip
        images.release("c1")
        images.release("c2")
        assert await images.remove("a")
    assert kept(tmp_path) == NOTHING


async def test_shared_layers_stay_until_the_last_image_that_needs_them_goes(tmp_path: Path) -> None:
    async with store(tmp_path) as images:
        await images.import_archive(archive(tmp_path, "a", BASE, layer(file("a"))))
        await images.import_archive(archive(tmp_path, "b", BASE, layer(file("b"))))
        assert len(kept(tmp_path)["layers"]) == 3
        before = images.usage()
        assert await images.remove("a")
        assert len(kept(tmp_path)["layers"]) == 2
        assert images.usage() < before
        assert not await images.remove("a")
        assert await images.remove("b")
        assert images.usage() == (0, 0)
    assert kept(tmp_path) == NOTHING


async def test_an_image_under_a_container_goes_only_when_its_root_is_released(tmp_path: Path) -> None:
    async with store(tmp_path) as images:
        (image,) = await images.import_archive(archive(tmp_path, "a", BASE))
        root = images.rootfs(image, "c1")
        assert await images.remove(image.id)
        assert images.list() == [] and os.path.exists(root.lower[0])
    async with store(tmp_path) as images:
        assert images.snapshots() == {"c1": image.id} and os.path.exists(root.lower[0])
        images.release("c1")
    assert kept(tmp_path) == NOTHING


async def test_removing_one_of_two_names_by_hand_keeps_the_image(tmp_path: Path) -> None:
    async with store(tmp_path) as images:
        path = archive(tmp_path, "a:1", BASE)
        await images.import_archive(path)
        await images.import_archive(path, name="b:1")
        assert await images.remove("a:1", untag=True)
        assert [image.references for image in images.list()] == [("docker.io/library/b:1",)]
        assert await images.remove("b:1", untag=True)
        assert images.list() == []


async def test_two_stores_of_one_node_see_each_others_images(tmp_path: Path) -> None:
    async with store(tmp_path) as daemon, store(tmp_path) as command:
        assert daemon.get("a") is None
        await command.import_archive(archive(tmp_path, "a", BASE))
        assert daemon.get("a") is not None
        await daemon.remove("a")
        assert command.get("a") is None


async def test_nothing_is_collected_while_another_store_adds_content(tmp_path: Path) -> None:
    async with store(tmp_path) as daemon, store(tmp_path) as command:
        await daemon.import_archive(archive(tmp_path, "a", BASE))
        with command._session():
            await daemon.remove("a")
            assert len(kept(tmp_path)["layers"]) == 1
        await daemon.import_archive(archive(tmp_path, "b", layer(file("b"))))
        assert len(kept(tmp_path)["layers"]) == 1


async def test_what_somebody_kept_from_being_collected_at_open_goes_at_close(tmp_path: Path) -> None:
    async with store(tmp_path):
        pass
    data = tmp_path / "var/lib/nacre/images"
    rubbish = data / "blobs/sha256" / ("0" * 64)
    rubbish.touch()
    somebody = StoreLock(str(data / "lock"))
    images = Store(config.load(str(tmp_path)))
    with somebody.shared():
        await images.open()
        assert rubbish.exists()
    await images.close()
    somebody.close()
    assert not rubbish.exists()


async def test_layers_that_a_power_loss_emptied_are_unpacked_again_at_open(tmp_path: Path) -> None:
    async with store(tmp_path) as images:
        (image,) = await images.import_archive(archive(tmp_path, "a", BASE, layer(file("x", b"1"))))
        lower = images.rootfs(image, "c").lower
    for number, path in enumerate(lower):
        if number == 0:
            shutil.rmtree(os.path.dirname(path))
        else:
            shutil.rmtree(os.path.join(path, "etc"))
    async with store(tmp_path) as images:
        assert images.get("a") is not None
        assert (Path(lower[0]) / "x").read_bytes() == b"1" and (Path(lower[1]) / "etc/passwd").read_bytes() == PASSWD
        assert images.rootfs(image, "c").lower == lower


async def test_an_image_whose_blobs_and_layers_are_both_gone_is_dropped_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with store(tmp_path) as images:
        (image,) = await images.import_archive(archive(tmp_path, "a", BASE))
    data = tmp_path / "var/lib/nacre/images"
    shutil.rmtree(data / "layers" / image.layers[0].directory)
    os.unlink(data / "blobs/sha256" / image.layers[0].blob.digest.removeprefix("sha256:"))
    async with store(tmp_path) as images:
        assert images.list() == []
    assert kept(tmp_path) == NOTHING
    assert f"nacre image pull {image.name}" in caplog.text


KILLER = """
import asyncio, os, signal, sys
from nacre import config
from nacre.images import Store
left = int(sys.argv[3])
def counted(name):
    real = getattr(os, name)
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(os, name, call)
for name in ("rename", "fsync", "mkdir", "symlink", "unlink"):
    counted(name)
import nacre.images.database as database
real_write = database.Database._write
def write(self, *statements):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real_write(self, *statements)
database.Database._write = write
async def main():
    store = Store(config.load(sys.argv[1]))
    await store.open()
    (image,) = await store.import_archive(sys.argv[2])
    store.rootfs(image, "c1")
    await store.vm_rootfs(image, "c2")
    store.release("c1")
    store.release("c2")
    await store.remove(image.id)
    await store.close()
asyncio.run(main())
"""


def until_nobody_adds(prefix: Path) -> None:
    """A killed process's unpacker dies with it, but a moment later, and holds its lock until then."""
    try:
        lock = os.open(prefix / "var/lib/nacre/images/lock", os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    finally:
        os.close(lock)


async def test_a_kill_at_any_step_leaves_what_the_next_open_finishes_or_undoes(tmp_path: Path) -> None:
    """The steps are counted: the child is killed before each call that changes the disk, until it survives."""
    path = archive(tmp_path, "a", BASE, layer(file("x", b"1")))
    for step in range(1, 200):
        prefix = tmp_path / str(step)
        prefix.mkdir()
        done = subprocess.run([sys.executable, "-c", KILLER, str(prefix), path, str(step)], capture_output=True, text=True)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        until_nobody_adds(prefix)
        async with store(prefix) as images:
            found = images.get("a")
            for image in images.list():
                assert images.resolve_user(image, "web").uid == 101
            for container in images.snapshots():
                images.release(container)
            if found is not None:
                await images.remove("a")
        assert kept(prefix) == NOTHING, f"step {step}"
        shutil.rmtree(prefix)
    assert step > 20


async def test_a_full_disk_is_a_failure_and_gives_its_space_back(tmp_path: Path) -> None:
    """A small tmpfs, in a mount namespace of the test's own child, so that nothing is mounted where others look."""
    big = archive(tmp_path, "big", layer(file("x", os.urandom(6 << 20))))
    code = """
import asyncio, os, sys
from nacre.linux import mounts
from nacre.linux.namespaces import Clone, unshare
from nacre import config
from nacre.images import Store
from nacre.images.errors import DiskFull
unshare(Clone.NEWNS)
mounts.mount(None, "/", None, mounts.MountFlag.REC | mounts.MountFlag.PRIVATE)
place = sys.argv[1]
mounts.mount("tmpfs", place, "tmpfs", 0, "size=8m")
async def main():
    store = Store(config.load(place))
    await store.open()
    try:
        await store.import_archive(sys.argv[2])
    except DiskFull as full:
        print(full.sentence())
    print(os.listdir(place + "/var/lib/nacre/images/blobs/sha256"), os.listdir(place + "/var/lib/nacre/images/ingest"))
    print(os.listdir(place + "/var/lib/nacre/images/layers"))
    await store.close()
asyncio.run(main())
"""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(place), big], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert "no space left on device" in said[0] and "MiB free" in said[0] and "nacre image rm" in said[0]
    assert said[1:] == ["[] []", "['empty']"]
    assert DiskFull.code == "DiskFull"


async def test_data_on_an_overlay_is_refused_by_the_file_systems_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import asyncio, os, sys
from nacre.linux import mounts
from nacre.linux.namespaces import Clone, unshare
from nacre import config
from nacre.images import Store
from nacre.oci.errors import Failure
unshare(Clone.NEWNS)
mounts.mount(None, "/", None, mounts.MountFlag.REC | mounts.MountFlag.PRIVATE)
place = sys.argv[1]
for name in "luwm":
    os.mkdir(place + "/" + name)
mounts.mount("overlay", place + "/m", "overlay", 0, f"lowerdir={place}/l,upperdir={place}/u,workdir={place}/w")
async def main():
    store = Store(config.load(place + "/m"))
    await store.open()
    (image,) = await store.import_archive(sys.argv[2])
    try:
        store.rootfs(image, "c")
    except Failure as failure:
        print(failure.code, failure.sentence())
    await store.close()
asyncio.run(main())
"""
    place = tmp_path / "place"
    place.mkdir()
    path = archive(tmp_path, "a", BASE)
    done = subprocess.run([sys.executable, "-c", code, str(place), path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(SnapshotRefused.code) and "type overlay (mounted on " in done.stdout


async def test_containers_trees_of_any_depth_are_deleted(tmp_path: Path) -> None:
    async with store(tmp_path) as images:
        (image,) = await images.import_archive(archive(tmp_path, "a", BASE))
        root = images.rootfs(image, "c1")
        here = os.getcwd()
        try:
            os.chdir(root.upper)
            for _ in range(1500):
                os.mkdir("d")
                os.chdir("d")
        finally:
            os.chdir(here)
        images.release("c1")
    assert kept(tmp_path)["snapshots"] == []


@pytest.mark.parametrize("container", ["../x", "a/b", ".", "", ".gone-1", "a" * 300])
async def test_a_container_id_that_is_no_file_name_is_refused(tmp_path: Path, container: str) -> None:
    async with store(tmp_path) as images:
        (image,) = await images.import_archive(archive(tmp_path, "a", BASE))
        with pytest.raises(Exception, match="no file name"):
            images.rootfs(image, container)
        images.release(container)


async def test_a_file_that_is_no_archive_is_refused_by_name(tmp_path: Path) -> None:
    async with store(tmp_path) as images:
        for name, data in (
            ("text", b"hello\n" * 200),
            ("empty", b""),
            ("other", layer(file("readme"))),
            ("gz", b"\x1f\x8b" + b"x" * 99),
        ):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(ImageRefused, match=f"import {tmp_path / name}"):
                await images.import_archive(str(tmp_path / name))
        with pytest.raises(ImageNotFound, match="no such file"):
            await images.import_archive(str(tmp_path / "missing"))
    assert kept(tmp_path) == NOTHING


async def test_an_archive_that_lies_about_a_blob_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path, "a", BASE)
    async with store(tmp_path) as images:
        await images.import_archive(path)
        await images.export_archive(["a"], str(tmp_path / "oci"), "oci-dir")
        await images.remove("a")
        blobs = tmp_path / "oci/blobs/sha256"
        largest = max(blobs.iterdir(), key=lambda one: one.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[600] ^= 1
        largest.write_bytes(data)
        with pytest.raises(Exception, match=r"content that came is sha256:"):
            await images.import_archive(str(tmp_path / "oci"))
    assert kept(tmp_path) == NOTHING


async def test_what_is_exported_imports_as_the_same_image_in_every_format(tmp_path: Path) -> None:
    async with store(tmp_path) as images:
        (image,) = await images.import_archive(archive(tmp_path, "a:1", BASE, layer(file("x"))))
        for form in ("oci", "oci-dir", "docker"):
            await images.export_archive(["a:1"], str(tmp_path / form), form)
        await images.remove("a:1")
        for form in ("oci", "oci-dir", "docker"):
            (back,) = await images.import_archive(str(tmp_path / form))
            assert (back.id, back.references) == (image.id, image.references)
            await images.remove("a:1")
        with tarfile.open(tmp_path / "docker") as tar:
            listed = json.load(tar.extractfile("manifest.json"))  # type: ignore[arg-type]
        assert listed[0]["RepoTags"] == ["docker.io/library/a:1"]


async def test_a_store_that_is_not_open_says_so() -> None:
    with pytest.raises(Exception, match="not open"):
        await Store(config.Config(prefix="/nowhere")).import_archive("x")
