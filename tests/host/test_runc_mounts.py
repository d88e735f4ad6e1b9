"""Mounts, devices, masked and read-only paths, the root's own state (config.md "Mounts", config-linux.md)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runc_support import RUNC, Bundle, made, with_user_namespace

from nacre.linux import mounts
from nacre.linux.mounts import MountFlag, UnmountFlag


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as one:
        yield one


def options_of(bundle: Bundle, *places: str) -> dict[str, set[str]]:
    """Mount point to its options, as a container sees them."""
    lines = bundle.says("cat /proc/self/mountinfo").splitlines()
    return {line.split()[4]: set(line.split()[5].split(",")) for line in lines if line.split()[4] in places}


def test_a_bind_mount_shows_a_directory_and_a_file_making_what_is_missing(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "a").write_text("in dir\n")
    (tmp_path / "file").write_text("in file\n")
    bundle.mount("/deep/er/dir", "none", str(tmp_path / "dir"), "bind")
    bundle.mount("/deep/file", "bind", str(tmp_path / "file"))
    assert bundle.says("cat /deep/er/dir/a /deep/file; echo new > /deep/er/dir/b") == "in dir\nin file\n"
    assert (tmp_path / "dir" / "b").read_text() == "new\n"


def test_a_relative_source_is_relative_to_the_bundle(bundle: Bundle) -> None:
    (bundle.path / "beside").mkdir()
    (bundle.path / "beside" / "x").write_text("y")
    assert bundle.mount("/mnt", "none", "beside", "rbind").says("cat /mnt/x") == "y"


@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_every_flag_of_a_mount_is_set(bundle: Bundle, tmp_path: Path, kind: str) -> None:
    words = ("ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "nosymfollow")
    if kind == "bind":
        bundle.mount("/mnt", "none", str(tmp_path), "bind", *words)
    else:
        bundle.mount("/mnt", "tmpfs", "tmpfs", *words, "size=1m", "mode=700")
    assert options_of(bundle, "/mnt")["/mnt"] >= set(words)


def test_opposite_words_undo_flags_in_order(bundle: Bundle) -> None:
    bundle.mount("/mnt", "tmpfs", "tmpfs", "ro", "nosuid", "noexec", "rw", "suid", "exec", "strictatime")
    found = options_of(bundle, "/mnt")["/mnt"]
    assert "rw" in found and not found & {"nosuid", "noexec", "ro", "relatime"}


def test_recursive_attributes_reach_the_mounts_below(bundle: Bundle, tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    bundle.mount("/mnt", "none", str(tmp_path / "outer"), "rbind", "rro", "rnoexec")
    bundle.mount("/tmp", "none", str(tmp_path / "outer"), "rbind", "ro")
    bundle.script("cat /proc/self/mountinfo; touch /mnt/inner/x /mnt/x; touch /tmp/inner/y; ls /tmp/inner").write()
    line = f'mount -t tmpfs tmpfs {inner} && exec "$@"'
    caller = Bundle(**{**vars(bundle), "runtime": ("unshare", "-m", "sh", "-c", line, "sh", RUNC)})
    told = caller.ok("run", "-b", str(bundle.path), bundle.name)
    found = {line.split()[4]: set(line.split()[5].split(",")) for line in told.splitlines() if " - " in line}
    assert found["/mnt"] >= {"ro", "noexec"} and found["/mnt/inner"] >= {"ro", "noexec"}
    assert "ro" in found["/tmp"] and "rw" in found["/tmp/inner"], "without the r only the top is changed"
    assert told.splitlines()[-1] == "y"


def test_what_the_file_system_understands_is_passed_on(bundle: Bundle) -> None:
    assert bundle.mount("/mnt", "tmpfs", "tmpfs", "size=64k", "mode=711").says("stat -c %a /mnt") == "711\n"
    message = bundle.mount("/mnt", "tmpfs", "tmpfs", "flavour=sweet").refuses()
    assert "mount tmpfs on /mnt" in message and "errno 22" in message


def test_a_tmpfs_has_the_mode_of_the_directory_that_it_hides_unless_one_is_asked(bundle: Bundle) -> None:
    for name, mode in (("hidden", 0o2710), ("asked", 0o710)):
        (bundle.rootfs / name).mkdir()
        (bundle.rootfs / name).chmod(mode)
    bundle.mount("/hidden", "tmpfs", "tmpfs", "size=64k").mount("/asked", "tmpfs", "tmpfs", "mode=0440")
    bundle.mount("/missing", "tmpfs", "tmpfs")
    assert bundle.says("stat -c %a /hidden /asked /missing").split() == ["2710", "440", "1777"]


def test_copy_up_fills_a_tmpfs_with_what_it_hides(bundle: Bundle) -> None:
    place = bundle.rootfs / "data"
    (place / "sub").mkdir(parents=True)
    (place / "sub" / "file").write_text("kept\n")
    (place / "link").symlink_to("sub/file")
    os.chown(place / "sub" / "file", 7, 8)
    os.chmod(place / "sub" / "file", 0o4644)
    bundle.mount("/data", "tmpfs", "tmpfs", "tmpcopyup", "rw")
    told = bundle.says(
        "cat /data/link; stat -c '%a %u %g' /data/sub/file; echo changed > /data/sub/file; mount | grep -c ' /data '"
    )
    assert told == "kept\n4644 7 8\n1\n" and (place / "sub" / "file").read_text() == "kept\n"


@contextmanager
def outside(path: Path, kind: MountFlag) -> Iterator[None]:
    """`path` is a mount of its own, of this propagation whatever the host's others are (systemd shares them all)."""
    mounts.mount(str(path), str(path), None, MountFlag.BIND)
    try:
        for one in (MountFlag.PRIVATE, kind):
            mounts.mount(None, str(path), None, one)
        yield
    finally:
        mounts.umount2(str(path), UnmountFlag.DETACH)


def tags_of(bundle: Bundle, place: str) -> set[str]:
    """The optional fields of the mount at `place`, without their numbers, as the container sees them."""
    (line,) = (one for one in bundle.says("cat /proc/self/mountinfo").splitlines() if one.split()[4] == place)
    return {tag.partition(":")[0] for tag in line.split()[6 : line.split().index("-")]}


OUTSIDE = pytest.mark.parametrize("kind", [MountFlag.PRIVATE, MountFlag.SHARED], ids=["private-outside", "shared-outside"])
# What a mount is, by the word and by what lies outside: shared mounts give into the container's namespace, and never take.
TAGS = {
    "shared": {MountFlag.PRIVATE: {"shared"}, MountFlag.SHARED: {"shared", "master"}},
    "slave": {MountFlag.PRIVATE: set(), MountFlag.SHARED: {"master"}},
    "private": {MountFlag.PRIVATE: set(), MountFlag.SHARED: set()},
    "unbindable": {MountFlag.PRIVATE: {"unbindable"}, MountFlag.SHARED: {"unbindable"}},
}


@OUTSIDE
@pytest.mark.parametrize("word", ["shared", "rshared", "slave", "private", "rprivate", "unbindable"])
def test_a_mounts_propagation_is_as_asked(bundle: Bundle, tmp_path: Path, word: str, kind: MountFlag) -> None:
    (tmp_path / "p").mkdir()
    bundle.mount("/mnt", "none", str(tmp_path / "p"), "rbind", word)
    with outside(tmp_path / "p", kind):
        assert tags_of(bundle, "/mnt") == TAGS[word.removeprefix("r")][kind]


@OUTSIDE
@pytest.mark.parametrize("word", ["shared", "slave", "private", "unbindable", "rprivate"])
def test_the_roots_propagation_is_as_asked(bundle: Bundle, word: str, kind: MountFlag) -> None:
    """A shared root takes nothing from outside: what it lies in is made private before, as pivot_root(2) wants it."""
    bundle.linux["rootfsPropagation"] = word
    wanted = {"shared"} if word == "shared" else TAGS[word.removeprefix("r")][kind]
    with outside(bundle.path, kind):
        assert tags_of(bundle, "/") == wanted


@pytest.mark.parametrize(
    ("word", "inwards", "outwards"), [("rslave", True, False), ("rshared", True, True), ("rprivate", False, False)]
)
def test_mounts_pass_between_host_and_container_as_propagation_says(
    bundle: Bundle, tmp_path: Path, word: str, inwards: bool, outwards: bool
) -> None:
    """A shared mount in a mount namespace of the test's own stands for the host."""
    shared = tmp_path / "shared"
    (shared / "from-host").mkdir(parents=True)
    (shared / "from-container").mkdir()
    bundle.linux["rootfsPropagation"] = word
    bundle.process["capabilities"] = {kind: ["CAP_SYS_ADMIN"] for kind in ("bounding", "permitted", "effective")}
    bundle.mount("/mnt", "none", str(shared), "rbind", word)
    bundle.script(
        "mount -t tmpfs inside /mnt/from-container; echo mounted > /mnt/go; "
        "while [ ! -e /mnt/went ]; do sleep 0.02; done; grep -c '^outside ' /proc/mounts; exit 0"
    ).write()
    line = f"""mount --bind {shared} {shared} && mount --make-shared {shared} && "$@" & child=$!
while [ ! -e {shared}/go ]; do sleep 0.02; done
grep -c '^inside ' /proc/mounts; mount -t tmpfs outside {shared}/from-host; touch {shared}/went; wait $child"""
    bundle.runtime = ("unshare", "-m", "--propagation", "private", "sh", "-c", line, "sh", RUNC)
    done = bundle.call("run", "-b", str(bundle.path), bundle.name)
    assert done.stdout.split() == [str(int(outwards)), str(int(inwards))], done.stderr


def test_the_default_devices_are_the_containers_own_and_work(bundle: Bundle) -> None:
    told = bundle.says(
        "for n in null zero full random urandom tty; do stat -c '%n %F %t:%T %a' /dev/$n; done; head -c 3 /dev/zero | wc -c;"
        " echo x > /dev/null; echo x > /dev/full 2>/dev/null || echo full; readlink /dev/fd /dev/ptmx; readlink /dev/stdout; chmod 600 /dev/null"
    ).splitlines()
    assert told[0] == "/dev/null character special file 1:3 666" and told[5] == "/dev/tty character special file 5:0 666"
    assert told[6:8] == ["3", "full"]
    assert stat.S_IMODE(os.stat("/dev/null").st_mode) == 0o666, "the host's own is another node"


def test_devices_are_made_as_listed(bundle: Bundle) -> None:
    bundle.linux["devices"] = [
        {"type": "c", "path": "/dev/fuse2", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 3, "gid": 4},
        {"type": "b", "path": "/dev/sub/loop9", "major": 7, "minor": 9},
        {"type": "p", "path": "/dev/pipe", "fileMode": 0o600},
    ]
    told = bundle.says("stat -c '%F %t:%T %a %u %g' /dev/fuse2 /dev/sub/loop9 /dev/pipe")
    assert told.splitlines() == [
        "character special file a:e5 640 3 4",
        "block special file 7:9 666 0 0",
        "fifo 0:0 600 0 0",
    ]


def test_masked_files_are_empty_and_masked_directories_too(bundle: Bundle) -> None:
    (bundle.rootfs / "etc" / "secret").write_text("s")
    (bundle.rootfs / "etc" / "secrets").mkdir()
    (bundle.rootfs / "etc" / "secrets" / "one").write_text("s")
    bundle.linux["maskedPaths"] = ["/etc/secret", "/etc/secrets", "/etc/not-there"]
    assert bundle.says("cat /etc/secret; ls /etc/secrets; touch /etc/secrets/x 2>/dev/null || echo no") == "no\n"


def test_masked_directories_are_one_file_system_and_mounted_once_each(bundle: Bundle) -> None:
    for name in ("one", "two"):
        (bundle.rootfs / name).mkdir()
        (bundle.rootfs / name / "secret").touch()
    bundle.linux["maskedPaths"] = ["/one", "/two", "/one"]
    said = bundle.says("ls /one /two; touch /two/x; stat -c %d /one /two; grep -c -E ' /(one|two) ' /proc/self/mountinfo; true")
    one, two, mounted = said.split()[-3:]
    assert one == two and mounted == "2" and "secret" not in said


def test_a_created_container_holds_no_file_of_its_set_up(bundle: Bundle) -> None:
    bundle.create()
    place = f"/proc/{bundle.state()['pid']}/fd"
    held = {os.readlink(f"{place}/{number}") for number in os.listdir(place)}
    assert not [path for path in held if path.startswith(("/proc", "/sys", "/dev")) and path != "/dev/null"], held


def test_read_only_paths_can_be_read_and_not_written(bundle: Bundle) -> None:
    (bundle.rootfs / "etc" / "keep").mkdir()
    (bundle.rootfs / "etc" / "keep" / "file").write_text("text")
    bundle.linux["readonlyPaths"] = ["/etc/keep", "/etc/passwd", "/proc/sys", "/not/there"]
    told = bundle.says(
        "cat /etc/keep/file; touch /etc/keep/file 2>/dev/null || echo a; echo x >> /etc/passwd 2>/dev/null || echo b;"
        " touch /etc/free && echo c; echo 1 > /proc/sys/kernel/domainname 2>/dev/null || echo d"
    )
    assert told == "texta\nb\nc\nd\n"


def test_a_read_only_root_stays_writable_where_mounts_are(bundle: Bundle) -> None:
    bundle.config["root"]["readonly"] = True
    bundle.mount("/tmp", "tmpfs", "tmpfs")
    assert bundle.says("touch /x 2>/dev/null || echo ro; touch /tmp/x && echo rw; touch /dev/x && echo dev") == "ro\nrw\ndev\n"


def test_a_read_only_dev_gets_its_nodes_first(bundle: Bundle) -> None:
    next(one for one in bundle.config["mounts"] if one["destination"] == "/dev")["options"].append("ro")
    assert bundle.says("touch /dev/x 2>/dev/null || echo ro; ls /dev/null") == "ro\n/dev/null\n"


def test_a_bound_dev_is_left_as_it_is(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    bundle.config["mounts"] = [one for one in bundle.config["mounts"] if not one["destination"].startswith("/dev")]
    bundle.mount("/dev", "bind", str(tmp_path / "dev"), "bind")
    assert bundle.says("ls /dev") == "" and os.listdir(tmp_path / "dev") == []


def test_a_mounts_destination_goes_through_links_inside_the_root_only(bundle: Bundle, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (bundle.rootfs / "way").symlink_to(outside)
    (bundle.rootfs / "up").symlink_to("../../../../../../../..")
    bundle.mount("/way/in", "tmpfs", "tmpfs").mount("/up/side", "tmpfs", "tmpfs")
    assert bundle.says(f"grep -c ' {outside}/in ' /proc/mounts; grep -c ' /side ' /proc/mounts") == "1\n1\n"
    assert os.listdir(outside) == [] and (bundle.rootfs / str(outside).lstrip("/") / "in").is_dir()


def test_an_id_mapped_mount_shows_other_owners(bundle: Bundle, tmp_path: Path) -> None:
    place = tmp_path / "volume"
    place.mkdir()
    (place / "file").write_text("")
    os.chown(place / "file", 1000, 1000)
    mapping = [{"containerID": 1000, "hostID": 5000, "size": 10}]
    bundle.mount("/mnt", "none", str(place), "bind", uidMappings=mapping, gidMappings=mapping)
    assert bundle.says("stat -c '%u %g' /mnt/file") == "5000 5000\n"
    assert (place / "file").stat().st_uid == 1000


def test_an_id_mapped_mount_takes_the_containers_own_mapping(bundle: Bundle, tmp_path: Path) -> None:
    place = tmp_path / "volume"
    place.mkdir()
    (place / "file").write_text("")
    os.chown(place / "file", 7, 7)
    with_user_namespace(bundle)
    bundle.mount("/mnt", "none", str(place), "bind", "idmap")
    assert bundle.says("stat -c '%u %g' /mnt/file; touch /mnt/made").split() == ["7", "7"]
    assert (place / "made").stat().st_uid == 0, "root inside is root on the volume"


def test_cgroups_are_mounted_read_only_below_the_containers_own(bundle: Bundle) -> None:
    told = bundle.says(
        "ls /sys/fs/cgroup; touch /sys/fs/cgroup/x 2>/dev/null || echo ro; "
        "cat /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/*/cgroup.procs 2>/dev/null | head -n 1"  # v2, or v1's many
    )
    assert "ro" in told.split() and told.split()[-1] == "1"


def test_proc_over_a_link_or_elsewhere_is_refused(bundle: Bundle) -> None:
    (bundle.rootfs / "proc").rmdir()
    (bundle.rootfs / "proc").symlink_to("/tmp")
    assert "/proc" in bundle.refuses()


def test_in_a_user_namespace_a_device_is_shown_only_if_the_host_has_that_very_one(bundle: Bundle) -> None:
    with_user_namespace(bundle)
    bundle.linux["devices"] = [
        {"path": "/dev/fifo", "type": "p", "fileMode": 0o600},
        {"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11},
    ]
    assert bundle.says("stat -c '%F %t:%T' /dev/fifo /dev/kmsg") == "fifo 0:0\ncharacter special file 1:b\n"
    bundle.linux["devices"] = [{"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 5}]
    assert "it is not device 1:5 there" in bundle.refuses("true")


def test_recursive_words_hold_for_file_systems_too(bundle: Bundle) -> None:
    bundle.mount("/x", "tmpfs", "tmpfs", "rro", "rnoexec", "iversion")
    options = bundle.says("grep ' /x ' /proc/self/mountinfo").split()[5].split(",")
    assert {"ro", "noexec"} <= set(options)
