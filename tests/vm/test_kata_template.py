"""The template and the pool through a service's life: what waits for a pod, and what happens to a template that no longer fits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from kata_support import Cri, build_image, enabled, qemus, support

READY = "a virtual machine is ready for the next pod"


def templates(service: Cri) -> list[Path]:
    return sorted((service.prefix / "var/lib/nacre/kata/template").iterdir())


def waiting(service: Cri) -> None:
    """Until the pool is full again."""
    count = service.log().count(READY)
    support.until(lambda: service.log().count(READY) > count, 120)


@pytest.fixture
def pooled(tmp_path: Path) -> Cri:
    service = enabled(tmp_path / "node", build_image(tmp_path / "test.tar"), "[kata]\npool = 1\n")
    yield service
    service.reset()
    assert qemus(service.prefix) == []


def test_a_pod_takes_the_machine_that_waits_and_a_broken_template_is_made_anew(pooled: Cri) -> None:
    support.until(lambda: READY in pooled.log(), 180)
    (member,) = qemus(pooled.prefix)
    there = os.listdir(pooled.state / "pods")
    with pooled.pod(handler="kata") as pod:
        assert pod.id in there and member in qemus(pooled.prefix)
        assert pod.id in Path(f"/proc/{member}/cgroup").read_text(), "it is charged to its pod from now on"
        assert pod.run("echo warm") == "warm\n"
        support.until(lambda: len(qemus(pooled.prefix)) == 2, 60)
    support.until(lambda: pooled.log().count(READY) == 2, 60)
    (member,) = qemus(pooled.prefix)
    (template,) = templates(pooled)
    shutil.copy(template, f"{template}.copy")  # as `nacre enable kata` in another process makes a new one
    os.rename(f"{template}.copy", template)
    with pooled.pod(handler="kata") as pod:
        assert pod.run("echo new") == "new\n"
        assert member not in qemus(pooled.prefix), "no pod gets a clone of a template that was replaced"
    pooled.end()
    assert qemus(pooled.prefix) == [], "pool members go with the daemon"

    (template,) = templates(pooled)
    with open(template, "r+b") as file:
        file.seek(1 << 20)
        byte = file.read(1)
        file.seek(1 << 20)
        file.write(bytes([byte[0] ^ 255]))
    pooled.start()
    with pooled.pod(handler="kata") as pod:
        assert pod.run("echo again") == "again\n"
    assert "its bytes have changed since it was made" in pooled.log()


@pytest.mark.slow
def test_another_shape_makes_another_template_and_the_old_one_goes(pooled: Cri) -> None:
    support.until(lambda: READY in pooled.log(), 180)
    before = templates(pooled)
    pooled.end()
    pooled.settings = "[kata]\npool = 0\nmemory_mib = 160\n"
    pooled.start()
    with pooled.pod(handler="kata") as pod:
        assert pod.run("echo larger") == "larger\n"
    assert len(templates(pooled)) == 1 and templates(pooled) != before
    assert "building the template: there is none for this kernel, QEMU and guest" in pooled.log()


@pytest.mark.slow
def test_without_a_template_each_pod_boots_cold_and_says_so(tmp_path: Path) -> None:
    service = enabled(tmp_path / "node", build_image(tmp_path / "test.tar"), "[kata]\npool = 0\ntemplate = false\n")
    try:
        with service.pod(handler="kata") as pod:
            assert pod.run("echo cold") == "cold\n"
            assert "cold start because template = false" in (service.state / "pods" / pod.id / "shim.log").read_text()
        assert not (service.prefix / "var/lib/nacre/kata/template").exists()
    finally:
        service.reset()


@pytest.mark.slow
def test_a_killed_daemon_leaves_no_pool_member_to_the_next(pooled: Cri) -> None:
    support.until(lambda: READY in pooled.log(), 180)
    (member,) = qemus(pooled.prefix)
    pooled.kill()
    pooled.start()
    support.until(lambda: member not in qemus(pooled.prefix), 30)


def test_qemu_missing_is_said_before_anything_is_made(tmp_path: Path) -> None:
    service = enabled(tmp_path / "node", build_image(tmp_path / "test.tar"), '[kata]\npool = 0\nqemu = "qemu-of-nobody"\n')
    try:
        _code, failure = support.refused(lambda: service.run_pod(handler="kata"))
        assert failure.code == "QemuMissing" and "qemu-of-nobody is not installed" in failure.sentence()
        assert os.listdir(service.state / "pods") == []
    finally:
        service.reset()
