"""nacre-runc on every cgroup layout and under systemd: its limits in the gate, all of its own tests in the long run.

On one processor: with two, emulated machines have hung, busy on both. The limits take some ten seconds longer so.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from machine_support import REPOSITORY, Outcome, run

PROBE = REPOSITORY / "tests" / "vm" / "limits_probe.py"
PROVEN = (
    "SEEN memory pids cpu",
    "FELT pids devices cpu",
    "GONE after kill",
    "FELT memory",
    "GONE out of memory",
    "RUN by nacre-runc",
)
WHOLE = "[!f]*"  # all but the fuzzing, which asks about bytes, not about the kernel
ABOUT_CGROUPS = ("borrowed", "cgroups", "commands", "crashes")


def suite(layout: str, *names: str) -> str:
    """The job that runs nacre-runc's own tests of these files, with systemd's driver where that is the init."""
    driver = "export NACRE_TEST_CGROUPS=systemd\n" if layout.startswith("systemd") else ""
    files = " ".join(f"tests/host/test_runc_{name}.py" for name in names)
    options = "-v --color=no -p no:cacheprovider -p no:xdist -m 'not slow' --tb=short"
    return f"{driver}cd {REPOSITORY}\nexport NACRE_TEST_CALL_S=300\npython -m pytest {options} {files}\n"


def went_through(layout: str, workdir: Path, *names: str) -> Outcome:
    return run(suite(layout, *names), layout, [], workdir, timeout_s=14_400, memory_mib=2048, processors=1)


def passed(outcome: Outcome, at_least: int) -> None:
    assert outcome.code == 0, outcome.output
    counted = re.search(r"(\d+) passed", outcome.output)
    assert counted and int(counted[1]) >= at_least, outcome.output


def proven(outcome: Outcome, *lines: str) -> None:
    assert outcome.code == 0, outcome.output
    for line in lines:
        assert line in outcome.output, outcome.output


@pytest.mark.parametrize(
    "layout", [pytest.param("v2", marks=pytest.mark.slow), "v1", pytest.param("hybrid", marks=pytest.mark.slow)]
)
def test_limits_are_set_and_felt_on_cgroup_layout(layout: str, tmp_path: Path) -> None:
    outcome = run(f"python {PROBE}", layout, [], tmp_path, timeout_s=240, processors=1)
    proven(outcome, f"LAYOUT {layout} cgroupfs", *PROVEN)


@pytest.mark.parametrize("layout", ["systemd", pytest.param("systemd-v1", marks=pytest.mark.slow)])
def test_limits_are_set_by_systemd_and_felt_where_it_is_the_init(layout: str, tmp_path: Path) -> None:
    outcome = run(f"python {PROBE} --systemd-cgroup", layout, [], tmp_path, timeout_s=240, processors=1)
    proven(outcome, " systemd", *PROVEN, "SHOWN by systemctl")


@pytest.mark.slow
def test_systemd_is_spoken_to_over_the_bus_where_its_own_socket_is_not_there(tmp_path: Path) -> None:
    """What a confined caller sees: the bus daemon in between, which wants a greeting and rules."""
    hidden = "mount --bind /dev/null /run/systemd/private || exit 9\n"
    proven(run(f"{hidden}python {PROBE} --systemd-cgroup", "systemd", [], tmp_path, timeout_s=240), " systemd", *PROVEN)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["v2", "systemd"])
def test_all_of_the_runtimes_tests_pass_on_cgroup_layout(layout: str, tmp_path: Path) -> None:
    """The most of an hour each under emulation."""
    passed(went_through(layout, tmp_path, WHOLE), 410)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["v1", "hybrid", "systemd-v1"])
def test_the_runtimes_tests_of_cgroups_and_commands_pass_on_cgroup_layout(layout: str, tmp_path: Path) -> None:
    """Beyond them the kernel and its mounts are those of `v2` and `systemd`, where the rest is tried."""
    passed(went_through(layout, tmp_path, *ABOUT_CGROUPS), 100)
