"""`./run conformance runc CHECKOUT`: runc's own integration suite against nacre-runc and, as control, the runc of the same checkout.

    CHECKOUT    a checkout of opencontainers/runc at the release that is meant; a clone of it is built and run under .cache/conformance,
                with Go from PyPI, bats, jq and gawk from apt
    each file   has PID, mount and network namespaces of its own, a terminal, and a process 1 that reaps; `--only FILE` runs some

It fails when nacre-runc fails what runc passes and docs/conformance.md has no row for that test.

The suite downloads two images; here Debian's static busybox stands for one, laid out alike, and a Debian made by mmdebstrap for the other.
Both runtimes write in /sys/fs/cgroup/*/runc-cgroups-integration-test, which is removed afterwards.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from oci import CACHE, REPOSITORY, built_place, go

PEERS = REPOSITORY / ".cache/peers"
LIBRARIES = PEERS / f"usr/lib/{os.uname().machine}-linux-gnu"
CGROUPS = Path("/sys/fs/cgroup")
GROUP = "runc-cgroups-integration-test"
TEST_S = 180
LEFT_S = 10  # for what bats says after its last test
PLAN = re.compile(r"^1\.\.(\d+)$", re.MULTILINE)
LINE = re.compile(r"^(not )?ok \d+ (.*?)(# skip.*)?$", re.MULTILINE)
PASSWD = {"root": (0, "/root", "/bin/sh"), "daemon": (1, "/usr/sbin", "/bin/false"), "nobody": (65534, "/home", "/bin/false")}
GROUPS = {"root": 0, "daemon": 1, "tty": 5, "mail": 8, "users": 100, "nogroup": 65534}


def main() -> None:
    if sys.argv[1:2] == ["--on-a-terminal"]:
        sys.exit(on_a_terminal(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="./run conformance runc")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", action="append", default=[], metavar="FILE", help="such as exec, for exec.bats")
    parser.add_argument("--output", type=Path, default=CACHE / "runc-output", help="each file's TAP goes here, RUNTIME-FILE.tap")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    suite = built(options.checkout.resolve())
    files = options.only or sorted(path.stem for path in (suite / "tests/integration").glob("*.bats"))
    runtimes = {"nacre-runc": REPOSITORY / ".venv/bin/nacre-runc", "runc": suite / "runc"}
    table = {
        name: {file: judged(suite, path, file, options.output / f"{name}-{file}.tap") for file in files}
        for name, path in runtimes.items()
    }
    show(files, table)
    if unknown := unexplained(table["nacre-runc"], table["runc"]):
        sys.exit("nacre-runc fails what runc passes, for no reason that docs/conformance.md gives:\n" + "\n".join(unknown))


def built(checkout: Path) -> Path:
    """A clone with runc, its helper programs and the images, made once a commit."""
    target = built_place("runc", checkout)
    if not target.is_dir():
        making = target.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        subprocess.run(["git", "clone", "--quiet", "--shared", checkout, making], check=True)
        libraries = f"-L{LIBRARIES} -l:libseccomp.so.2"
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "libseccomp.pc").write_text(
                f"Name: libseccomp\nDescription: seccomp\nVersion: 2.5.4\nCflags: -I{PEERS}/usr/include\nLibs: {libraries}\n"
            )
            settings = {
                "PKG_CONFIG_PATH": place,
                "GOTOOLCHAIN": "local",
                "GOFLAGS": "-mod=vendor",
                "PATH": f"{go().parent}:{os.environ['PATH']}",
            }
            subprocess.run(["make", "runc", "test-binaries"], cwd=making, env=os.environ | settings, check=True)
        images(making / "tests/integration/testdata")
        making.rename(target)
    return target


def images(target: Path) -> None:
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        root.chmod(0o755)
        for name in ("bin", "dev/pts", "etc", "home", "lib", "root", "usr/bin", "usr/sbin", "var/spool/mail"):
            (root / name).mkdir(parents=True)
        for name in ("tmp", "var/tmp"):
            (root / name).mkdir()
            (root / name).chmod(0o1777)
        busybox = root / "bin/busybox"
        shutil.copy(shutil.which("busybox", path=f"{PEERS}/bin:{os.environ['PATH']}") or "busybox", busybox)
        for applet in subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split():
            if applet != "busybox":
                os.link(busybox, root / "bin" / applet)
        (root / "usr/bin/env").symlink_to("../../bin/env")
        (root / "etc/passwd").write_text(
            "".join(f"{name}:x:{uid}:{uid}:{name}:{home}:{shell}\n" for name, (uid, home, shell) in PASSWD.items())
        )
        (root / "etc/group").write_text("".join(f"{name}:x:{gid}:\n" for name, gid in GROUPS.items()))
        subprocess.run(["tar", "-C", root, "-cJf", target / f"busybox-{machine}.tar.xz", "."], check=True)
    # every test that wants it unpacks it: tar knows by the content that it is not packed
    debian = target / "debian.tar"
    unwanted = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "info", "locale", "man")]
    subprocess.run(["mmdebstrap", "--variant=essential", *unwanted, "bookworm", debian], check=True)
    debian.rename(target / f"debian-{machine}.tar.xz")


def judged(suite: Path, runtime: Path, file: str, output: Path) -> dict[str, str]:
    """Test to "pass", "fail" or "skip"."""
    print(f"{runtime.name}: {file} ", end="", flush=True)
    with groups_removed(), tempfile.TemporaryDirectory(prefix="nacre-conformance-") as place:
        os.chmod(place, 0o755)
        words = [
            "unshare",
            "-m",
            "-n",
            "-p",
            "--fork",
            "--kill-child",
            "--mount-proc",
            sys.executable,
            __file__,
            "--on-a-terminal",
        ]
        command = 'ip link set lo up; exec bats --tap --print-output-on-failure "$1" >&"$2" 2>&1'
        settings = {
            "RUNC": str(runtime),
            "BATS_ROOT": f"{PEERS}/usr",
            "TMPDIR": place,
            "BATS_TMPDIR": place,
            "PATH": f"{go().parent}:{os.environ['PATH']}:{PEERS}/usr/bin",
        }
        hears, says = os.pipe()
        words += ["bash", "-c", command, "bash", f"tests/integration/{file}.bats", str(says)]
        options = {"cwd": suite, "env": os.environ | settings, "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        with open(hears, "rb", buffering=0) as pipe, output.open("wb", buffering=0) as kept:
            with subprocess.Popen(words, pass_fds=[says], **options) as running:
                os.close(says)
                keep(pipe, kept)
                running.kill()  # and with its process 1 all that a test has left behind
    found = {
        name.strip(): "skip" if skipped else "fail" if wrong else "pass"
        for wrong, name, skipped in LINE.findall(output.read_text(errors="replace"))
    }
    print(", ".join(f"{count} {word}" for word, count in sorted(Counter(found.values()).items())))
    return found


@contextmanager
def groups_removed() -> Iterator[None]:
    """The suite's cgroups, and the directory that it makes for each controller, mounted or not."""
    there = {*CGROUPS.iterdir()}
    try:
        yield
    finally:
        for group in CGROUPS.glob(f"*/{GROUP}"):
            for below in sorted(group.rglob("*/"), reverse=True):
                below.rmdir()
            group.rmdir()
        for made in {*CGROUPS.iterdir()} - there:
            made.rmdir()


def keep(pipe: FileIO, kept: FileIO) -> None:
    """What bats says, until it ends or one test takes too long; a process that a test left behind keeps it from ending after the last.

    Its own BATS_TEST_TIMEOUT will not do: that is a child of the test's shell, and some tests wait for all of these.
    """
    text, patience = "", TEST_S
    while select.select([pipe], [], [], patience)[0] and (piece := pipe.read(1 << 16)):
        kept.write(piece)
        text += piece.decode(errors="replace")
        planned = PLAN.search(text)
        if planned and len(LINE.findall(text)) == int(planned[1]):
            patience = LEFT_S


def on_a_terminal(words: list[str]) -> int:
    """Process 1 of the namespaces: the words on a terminal of their own, whose output nobody wants; reaps whoever is left behind."""
    pid, master = pty.fork()
    if pid == 0:
        os.execvp(words[0], words)
    threading.Thread(target=drained, args=(master,), daemon=True).start()
    while True:
        ended, status = os.wait()
        if ended == pid:
            return os.waitstatus_to_exitcode(status)


def drained(master: int) -> None:
    try:
        while os.read(master, 1 << 16):
            pass
    except OSError:
        return  # its last holder is gone


def show(files: list[str], table: dict[str, dict[str, dict[str, str]]]) -> None:
    ours, theirs = table["nacre-runc"], table["runc"]
    print("\n| test | nacre-runc | runc |\n|-|-|-|")
    for file in files:
        for test in sorted({*ours[file], *theirs[file]}):
            pair = ours[file].get(test, "–"), theirs[file].get(test, "–")
            if "fail" in pair or "–" in pair:
                print(f"| {file}: {test} | {pair[0]} | {pair[1]} |")
    for name in table:
        counts = Counter(word for file in files for word in table[name][file].values())
        print(f"{name}: {counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped")


def unexplained(ours: dict[str, dict[str, str]], theirs: dict[str, dict[str, str]]) -> list[str]:
    """What runc passes and nacre-runc does not, with no line in docs/conformance.md that says why."""
    page = (REPOSITORY / "docs/conformance.md").read_text()
    worse = [
        f"{file}: {test}" for file in theirs for test, word in theirs[file].items() if word == "pass" != ours[file].get(test)
    ]
    return [test for test in worse if f"\n| {test} |" not in page]


if __name__ == "__main__":
    main()
