"""What engines rely on beyond the specification's words."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from runc_support import Bundle, leftovers, made


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with made(tmp_path) as bundle:
        yield bundle


def test_exec_takes_the_process_as_it_was_at_create(bundle: Bundle) -> None:
    bundle.process["env"] = ["PATH=/bin", "WHEN=create"]
    bundle.up()
    bundle.process["env"] = ["PATH=/bin", "WHEN=later"]
    bundle.write()
    assert bundle.inside("echo $WHEN").strip() == "create"
    (bundle.path / "config.json").unlink()
    done = bundle.exec(bundle.name, "true")
    assert (done.returncode, subprocess.list2cmdline([done.stderr])) == (0, '""')


@pytest.mark.parametrize("name", ["no-such-command", "/bin/no-such-command"])
def test_a_program_that_is_nowhere_fails_create_with_the_words_that_engines_look_for(bundle: Bundle, name: str) -> None:
    bundle.args(name).write()
    said = bundle.fails("create", "--bundle", str(bundle.path), bundle.name)
    assert ("executable file not found in $PATH" if "/" not in name else "no such file or directory") in said and name in said
    assert leftovers(bundle) == []


def test_a_container_that_was_never_started_is_deleted_without_force(bundle: Bundle) -> None:
    """buildah does so when it could not set the network up, and looks no further."""
    bundle.script("sleep 100").create()
    bundle.ok("delete", bundle.name)
    assert leftovers(bundle) == []


@pytest.mark.parametrize("name", ["/etc", "/etc/passwd", "/mnt/busybox"])
def test_a_program_that_nobody_may_execute_fails_create_with_the_words_that_mean_126(bundle: Bundle, name: str) -> None:
    bundle.mount("/mnt", "bind", str(bundle.rootfs / "bin"), "bind", "noexec").args(name).write()
    said = bundle.fails("create", "--bundle", str(bundle.path), bundle.name)
    assert f'exec: "{name}": permission denied' in said
    assert leftovers(bundle) == []


def test_a_program_relative_to_the_working_directory_is_found_there(bundle: Bundle) -> None:
    tool = bundle.rootfs / "mnt" / "tool"
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)
    for name, path in (("./tool", "/bin"), ("tool", ".:/bin")):
        bundle.process |= {"cwd": "/mnt", "args": [name], "env": [f"PATH={path}"]}
        done = bundle.run()
        assert done.stdout == "found\n", done.stderr
