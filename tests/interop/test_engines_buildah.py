"""Debian's buildah with nacre-runc: each RUN of a build is a container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines_support import IMAGE, Engine, engine, group

OCI = ("--isolation", "oci", "--network", "none")


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with engine(tmp_path_factory.mktemp("buildah")) as podman:
        one = Engine(podman.place, "buildah")
        yield one
        one("rm", "-a")


def run(buildah: Engine, container: str, *words: str) -> str:
    return buildah("run", "--runtime", str(buildah.place / "runtime"), *OCI, container, "--", *words)


def test_a_run_changes_the_working_container(buildah: Engine) -> None:
    container = buildah("from", "--pull-never", IMAGE)
    assert run(buildah, container, "sh", "-c", "id -u; echo made > /made") == "0"
    done = buildah.call("run", "--runtime", str(buildah.place / "runtime"), *OCI, container, "--", "cat", "/made")
    assert (done.returncode, done.stdout, done.stderr) == (0, "made\n", ""), "no word but the command's own"


@pytest.mark.slow
def test_a_build_runs_its_steps_and_a_failing_one_says_which(buildah: Engine, tmp_path: Path) -> None:
    (tmp_path / "Containerfile").write_text(
        f"FROM {IMAGE}\nRUN echo built > /built\nRUN test -s /built && chmod 666 /built\nUSER 1000\nRUN id -u >> /built\n"
    )
    words = ("bud", "--runtime", str(buildah.place / "runtime"), *OCI, "--pull-never", "-t", "nacre.test/built")
    words = (*words, "--cgroup-parent", f"{group(buildah.place)}/build", str(tmp_path))
    buildah(*words)
    container = buildah("from", "--pull-never", "nacre.test/built")
    assert run(buildah, container, "cat", "/built").split() == ["built", "1000"]
    (tmp_path / "Containerfile").write_text(f"FROM {IMAGE}\nRUN exit 9\n")
    done = buildah.call(*words)
    assert done.returncode == 9 and "exit status 9" in done.stderr
