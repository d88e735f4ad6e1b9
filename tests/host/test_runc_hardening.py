"""What containers have used to get out of other runtimes, tried against this one; each test fails when its defence is taken away."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from runc_support import RUNC, Bundle, made, with_user_namespace
from test_runc_crashes import STRACE

from nacre.linux import paths
from nacre.linux.interpreter import HELD
from nacre.linux.libc import SyscallError
from nacre.linux.namespaces import Clone, unshare


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as one:
        yield one


def test_the_hosts_interpreter_is_not_what_a_container_finds_at_proc_self_exe(bundle: Bundle) -> None:
    """CVE-2019-5736: who holds /proc/PID/exe of the runtime may overwrite what the host's root runs next."""
    bundle.script("sleep 100").create()
    place = f"/proc/{bundle.state()['pid']}/exe"
    assert os.path.samefile(place, sys.executable) is False or os.statvfs(place).f_flag & os.ST_RDONLY
    with pytest.raises(OSError, match="Read-only file system"):
        os.chmod(
            place, os.stat(place).st_mode & 0o7777
        )  # opening it to write is refused while any python3 runs, which proves nothing


def traced(bundle: Bundle, trace: Path, before: str, *arguments: str) -> str:
    """Run nacre-runc after the shell line `before`, in a mount namespace with nothing at HELD; the calls that concern its interpreter."""
    os.makedirs(HELD, exist_ok=True)
    line = f'mount -t tmpfs none {HELD}; {before} exec "$@"'
    words = ("unshare", "-m", "sh", "-ec", line, "sh", STRACE, "-q", "-e", "trace=execve,open_tree,mount_setattr,move_mount")
    done = Bundle(**{**vars(bundle), "runtime": (*words, "-o", str(trace), RUNC)}).call(*arguments)
    assert done.returncode == 0, done.stderr
    return trace.read_text()


AGAIN = r'open_tree\(AT_FDCWD, "/proc/self/exe".*\n.*mount_setattr\(.*RDONLY.*\n(.*\n)*execve\("/proc/self/fd/'


def test_the_interpreter_of_exec_is_out_of_reach_too(bundle: Bundle, tmp_path: Path) -> None:
    bundle.up()
    lines = traced(bundle, tmp_path / "trace", "", "exec", bundle.name, "true")
    assert re.search(AGAIN, lines) and lines.count("move_mount(") == 1, lines


def test_the_next_command_starts_from_the_mount_that_the_first_one_left(bundle: Bundle, tmp_path: Path) -> None:
    bundle.up()
    lines = traced(
        bundle, tmp_path / "trace", f"{RUNC} --root {bundle.root} exec {bundle.name} true;", "exec", bundle.name, "true"
    )
    assert re.findall(r'execve\("([^"]*)"', lines) == [RUNC, f"{HELD}/bin/python"], lines


def test_reset_takes_that_mount_away_and_finds_nothing_the_second_time(bundle: Bundle) -> None:
    bundle.up()
    code = "from nacre.linux import interpreter as i; import os; i.let_go(); i.let_go(); print(os.path.lexists(i.HELD))"
    line = f'mount -t tmpfs none /run; "$@"; test -s {HELD}/bin/python; exec {sys.executable} -c "{code}"'
    caller = Bundle(**{**vars(bundle), "runtime": ("unshare", "-m", "sh", "-ec", line, "sh", RUNC)})
    done = caller.call("exec", bundle.name, "true")
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (f"mount --bind {os.path.realpath(sys.executable)} {HELD}/bin/python", False),  # anyone could write through that
        (f"cp {os.path.realpath(sys.executable)} {HELD}/x; mount --bind {HELD}/x {HELD}/bin/python", False),  # another's
        (
            f"cp {os.path.realpath(sys.executable)} {HELD}/x; mount --bind {HELD}/x {HELD}/bin/python; rm {HELD}/x",
            True,
        ),  # upgraded
    ],
    ids=["writable", "another installation's", "one that an upgrade replaced"],
)
def test_what_else_stands_in_the_place_of_that_mount_is_not_trusted(
    bundle: Bundle, tmp_path: Path, there: str, taken: bool
) -> None:
    bundle.up()
    before = f"mkdir {HELD}/bin; touch {HELD}/bin/python; {there};"
    lines = traced(bundle, tmp_path / "trace", before, "exec", bundle.name, "true")
    assert re.search(AGAIN, lines), lines
    assert ("move_mount(" in lines) is taken, lines


def test_where_mounts_cannot_be_made_the_interpreter_is_a_sealed_copy(tmp_path: Path) -> None:
    code = "from nacre.linux import interpreter as i; import os, errno\n"
    code += "def no(*a, **k): raise OSError(errno.EPERM, 'no')\ni._readonly_clone = no\n"
    code += "i.execute_out_of_reach('import os; print(os.readlink(\\'/proc/self/exe\\'), *sys.argv[1:])', ['a', 'b c'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "/memfd:nacre-interpreter (deleted) a b c\n"


def test_no_descriptor_of_the_host_is_left_for_the_container(bundle: Bundle) -> None:
    """CVE-2024-21626: a directory of the host that stays open is a way back, by /proc/self/fd or as working directory."""
    bundle.process["cwd"] = "/proc/self/fd/9"
    host = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    bundle.script("ls; pwd").write()
    caller = Bundle(**{**vars(bundle), "runtime": ("bash", "-c", f'exec "$@" 8<&{host} 9<&{host}', "bash", RUNC)})
    done = caller.call("run", "-b", str(bundle.path), bundle.name, pass_fds=(host,))
    assert done.returncode == 1 and "/proc/self/fd/9" in done.stderr, done.stdout
    bundle.process["cwd"] = "/"
    bundle.script("ls /proc/self/fd").write()
    done = caller.call("run", "-b", str(bundle.path), bundle.name, pass_fds=(host,))
    assert done.stdout.split() == ["0", "1", "2", "3"], "3 is ls's own"
    os.close(host)


def test_a_working_directory_outside_the_root_is_noticed(bundle: Bundle, tmp_path: Path) -> None:
    """The second half of CVE-2024-21626: whatever way led there, getcwd(2) tells."""
    from nacre.oci.errors import Failure
    from nacre.runc.process_steps import ChangeUser
    from nacre.runc.steps import Context

    (tmp_path / "jail").mkdir()
    pid = os.fork()
    if pid == 0:
        outcome = 1
        try:
            os.chdir(tmp_path)
            os.chroot(tmp_path / "jail")
            ChangeUser(0, 0, (), 0o022, ".").run(Context())
        except Failure as failure:
            outcome = 0 if "leads out of the container" in failure.cause else 2
        finally:
            os._exit(outcome)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_exec_into_a_directory_that_the_container_made_a_link_outside_stays_inside(bundle: Bundle) -> None:
    bundle.up("ln -s /proc/1/root/../../../.. /tmp/out; ln -s /proc/self/fd /tmp/fds; sleep 100")
    while not (bundle.rootfs / "tmp" / "fds").is_symlink():
        pass
    assert bundle.inside("ls /", "--cwd", "/tmp/out") == bundle.inside("ls /")
    for number in range(3, 12):
        done = bundle.exec("--cwd", f"/tmp/fds/{number}", bundle.name, "ls")
        assert done.returncode == 255 or done.stdout == bundle.inside("ls /"), (
            number,
            done.stdout,
        )  # one is the container's root


def test_a_link_swapped_in_while_mounts_are_made_leads_nowhere(bundle: Bundle, tmp_path: Path) -> None:
    """CVE-2021-30465: the race between looking at a mount's place and mounting there."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (bundle.rootfs / "race").mkdir()
    (bundle.rootfs / "race.link").symlink_to(f"../../../../../../../../../..{outside}")
    bundle.mount("/race/a", "tmpfs", "tmpfs").mount("/race/b", "tmpfs", "tmpfs").args("true").write()
    stop = threading.Event()
    place, link = (os.fsencode(bundle.rootfs / name) for name in ("race", "race.link"))
    exchange = ctypes.CDLL(None).renameat2

    def swap() -> None:
        while not stop.is_set():
            exchange(-100, place, -100, link, 2)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(8):
            bundle.call("run", "-b", str(bundle.path), bundle.name)
            assert os.listdir(outside) == []
    finally:
        stop.set()
        swapper.join()


@pytest.mark.parametrize("name", ["proc", "sys"])
def test_proc_and_sys_are_never_mounted_through_a_link(bundle: Bundle, name: str) -> None:
    """CVE-2019-19921, CVE-2023-27561: what the runtime writes to /proc must reach the kernel."""
    (bundle.rootfs / name).rmdir()
    (bundle.rootfs / name).symlink_to("tmp")
    bundle.config["mounts"] = [one for one in bundle.config["mounts"] if one["type"] != "cgroup"]
    assert f"a link on the way to /{name}" in bundle.refuses("true")


def test_a_mask_is_made_of_the_hosts_null_and_not_the_images(bundle: Bundle) -> None:
    """CVE-2025-31133: /dev/null of the image may be a link to something else."""
    bundle.config["mounts"] = [one for one in bundle.config["mounts"] if not one["destination"].startswith("/dev")]
    (bundle.rootfs / "etc" / "chosen").write_text("chosen by the image")
    (bundle.rootfs / "etc" / "secret").write_text("secret")
    bundle.mount("/dev", "bind", str(bundle.rootfs / "dev"), "bind")
    (bundle.rootfs / "dev" / "null").symlink_to("/etc/chosen")
    bundle.linux["maskedPaths"] = ["/etc/secret"]
    assert bundle.says("cat /etc/secret; stat -c %F /etc/secret") == "character special file\n"


def test_the_console_is_not_mounted_through_a_link(bundle: Bundle) -> None:
    """CVE-2025-52565: over a link the terminal could cover, or keep from being covered, a file of proc."""
    bundle.config["mounts"] = [one for one in bundle.config["mounts"] if one["destination"] != "/dev"]
    bundle.process["terminal"] = True
    (bundle.rootfs / "dev" / "pts").mkdir()
    (bundle.rootfs / "dev" / "console").symlink_to("/etc/passwd")
    bundle.write()
    message = bundle.fails("run", "-b", str(bundle.path), bundle.name)
    assert "open a terminal" in message and "symbolic links" in message


def test_a_proc_that_is_none_or_covered_is_not_written_to(tmp_path: Path) -> None:
    """CVE-2025-52881: labels are written after the container's root has been entered."""
    pid = os.fork()
    if pid == 0:
        outcomes = []
        unshare(Clone.NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        own = f"/proc/{os.getpid()}/attr/exec"
        os.close(paths.open_own_proc("comm", os.O_WRONLY))
        subprocess.run(["mount", "--bind", "/dev/null", f"/proc/{os.getpid()}/comm"], check=True)
        for prepare in ([], ["mount", "-t", "tmpfs", "tmpfs", "/proc"]):
            if prepare:
                subprocess.run(prepare, check=True)
                os.makedirs(os.path.dirname(own))
                Path(f"/proc/{os.getpid()}/comm").touch()
            try:
                os.close(paths.open_own_proc("comm", os.O_WRONLY))
                outcomes.append("opened")
            except SyscallError as error:
                outcomes.append(os.strerror(error.errno or 0))
        os._exit(0 if outcomes == ["Invalid cross-device link", "Bad file descriptor"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_no_capability_is_inheritable_unless_it_is_asked_for(bundle: Bundle) -> None:
    """CVE-2022-29162: an inheritable set that is not empty gives files' capabilities to users who should not have them."""
    assert bundle.says("grep CapInh /proc/self/status").split()[1] == "0" * 16
    bundle.up()
    assert bundle.inside("grep CapInh /proc/self/status", "--cap", "CAP_NET_ADMIN").split()[1] == "0" * 16


def test_the_roots_of_the_cgroup_hierarchies_are_not_shown(bundle: Bundle) -> None:
    """CVE-2022-0492: release_agent, run by the host's kernel as root, is a file of a hierarchy's root alone."""
    next(one for one in bundle.config["mounts"] if one["type"] == "cgroup")["options"] = ["rw"]
    bundle.process["capabilities"] = {kind: ["CAP_SYS_ADMIN"] for kind in ("bounding", "permitted", "effective")}
    assert bundle.says("find /sys/fs/cgroup -name release_agent -o -name 'cgroup.sane*' | wc -l") == "0\n"


def test_nothing_is_loaded_after_the_containers_root_is_entered(bundle: Bundle, tmp_path: Path) -> None:
    """CVE-2019-14271: a library or module of the container, loaded by the runtime, runs with the host's rights."""
    trace = tmp_path / "trace"
    bundle.process |= {"user": {"uid": 1000, "gid": 1000}}
    odd = bundle.rootfs / "bin" / "odd"
    odd.write_bytes(b"no program")
    odd.chmod(0o755)
    bundle.args("/bin/odd").write()  # refused by execve, after everything else
    words = (STRACE, "-f", "-q", "-e", "trace=open,openat,openat2,pivot_root,execve", "-o", str(trace), RUNC)
    assert Bundle(**{**vars(bundle), "runtime": words}).call("run", "-b", str(bundle.path), bundle.name).returncode == 1
    lines = trace.read_text().splitlines()
    (entered,) = (index for index, line in enumerate(lines) if "pivot_root(" in line)
    child = lines[entered].split()[0]
    inside = [line for line in lines[entered:] if line.startswith(child + " ")]
    assert not [line for line in inside if re.search(r"\.so|\.py|nsswitch|gconv|locale", line)], inside
    assert any("/etc/passwd" in line for line in inside), "the trace sees what the child opens"


def test_the_runtimes_memory_cannot_be_read_from_inside(bundle: Bundle) -> None:
    """Until execve the child holds the host's memory: what is dumpable belongs, in /proc, to the container's root."""
    with_user_namespace(bundle).script("sleep 100").create()
    pid = bundle.state()["pid"]
    assert "Uid:\t200000" in Path(f"/proc/{pid}/status").read_text()
    assert os.stat(f"/proc/{pid}/environ").st_uid == 0


def test_an_import_inside_is_refused() -> None:
    from nacre.runc.init import _Refuse

    with pytest.raises(ImportError, match="before the container was entered"):
        _Refuse().find_spec("anything", None)
