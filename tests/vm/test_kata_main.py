"""`nacre-kata`, the OCI runtime: a bundle's life by the command line, as an engine drives it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kata_support import guest_into, support

from nacre import config
from nacre.cli.bench.engine import find_busybox
from nacre.kata import template
from nacre.runc import templates


@dataclass
class Runtime:
    root: Path
    bundle: Path
    prefix: Path

    def __call__(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from nacre.kata.main import main; sys.exit(main())",
                "--root",
                str(self.root),
                *words,
            ],
            **{"capture_output": True, "text": True, "check": False, "timeout": 120} | options,
            cwd=self.bundle,
            env=os.environ | {"NACRE_PREFIX": str(self.prefix)},
        )

    def command(self, *args: str) -> None:
        document = templates.spec(rootless=False)
        document["process"] |= {"terminal": False, "args": list(args)}
        document["root"]["readonly"] = False
        (self.bundle / "config.json").write_text(json.dumps(document))

    def status(self, name: str) -> str:
        return str(json.loads(self("state", name).stdout)["status"])


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    base = tmp_path_factory.mktemp("runtime")
    made = Runtime(base / "root", base / "bundle", base / "node")
    binaries = made.bundle / "rootfs/bin"
    binaries.mkdir(parents=True)
    for name in ("proc", "dev", "sys", "tmp"):
        (made.bundle / "rootfs" / name).mkdir()
    shutil.copy(find_busybox(), binaries / "busybox")
    for name in ("sh", "cat", "sleep", "uname", "echo"):
        (binaries / name).symlink_to("busybox")
    guest_into(made.prefix)
    template.ensure(config.load(str(made.prefix)), print)
    yield made
    left = os.listdir(made.root)
    for name in left:
        made("delete", "--force", name)
    assert left == []
    assert "nacre-kata-" not in "".join(os.listdir("/sys/fs/cgroup"))


def test_run_gives_input_output_and_the_exit_code(runtime: Runtime) -> None:
    runtime.command("/bin/sh", "-c", "uname -r; read line; echo got $line; echo bad >&2; exit 4")
    done = runtime("run", "one", input="something\n")
    assert done.returncode == 4, done.stderr
    kernel, got = done.stdout.splitlines()
    assert kernel != os.uname().release and got == "got something"
    assert done.stderr == "bad\n"


def test_create_start_exec_kill_delete_as_an_engine_does(runtime: Runtime, tmp_path: Path) -> None:
    runtime.command("/bin/sleep", "1000")
    void = {"stdin": subprocess.DEVNULL}
    nowhere = void | {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "capture_output": False}  # the container's own
    assert runtime("create", "--pid-file", str(tmp_path / "pid"), "two", **nowhere).returncode == 0
    monitor = int((tmp_path / "pid").read_text())
    assert runtime.status("two") == "created"
    assert runtime("start", "two").returncode == 0
    assert runtime.status("two") == "running"
    executed = runtime("exec", "two", "/bin/sh", "-c", "echo inside; exit 9", **void)
    assert (executed.returncode, executed.stdout) == (9, "inside\n")
    refused = runtime("delete", "two")
    assert refused.returncode == 1 and "it is running" in refused.stderr
    assert runtime("kill", "two", "KILL").returncode == 0
    support.until(lambda: runtime.status("two") == "stopped", 20)
    support.until(lambda: not os.path.exists(f"/proc/{monitor}"))
    assert runtime("delete", "two").returncode == 0
    gone = runtime("state", "two")
    assert gone.returncode == 1 and "there is none" in gone.stderr


def test_a_command_that_does_not_exist_leaves_nothing(runtime: Runtime) -> None:
    runtime.command("/no/such/program")
    done = runtime("run", "three", stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and "/no/such/program" in done.stderr
    assert os.listdir(runtime.root) == []


def test_what_it_cannot_do_is_refused_in_words(runtime: Runtime) -> None:
    document = templates.spec(rootless=False)
    document["process"]["terminal"] = True
    (runtime.bundle / "config.json").write_text(json.dumps(document))
    assert "no terminals" in runtime("create", "four").stderr
    assert "cannot be asked for that" in runtime("checkpoint", "four").stderr + runtime("ps", "four").stderr
    assert json.loads(runtime("features").stdout)["hooks"] == []
    assert not runtime.root.exists() or os.listdir(runtime.root) == []
