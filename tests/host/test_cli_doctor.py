"""The doctor's findings, each staged on a machine of the test's own: what is wrong is named, with evidence and a remedy that works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from machine import BIN, Machine, machine

import nacre

LISTEN = (
    "import socket, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); print('on', flush=True); sys.stdin.read()"
)


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    place = tmp_path_factory.mktemp("doctor")
    (place / "mounts").mkdir()
    (place / "node/etc/nacre").mkdir(parents=True)
    with machine(place / "node", place / "mounts") as made:
        yield made


def configure(patient: Machine, text: str) -> None:
    (patient.prefix / "etc/nacre/config.toml").write_text(text)


def examine(patient: Machine, *wrapper: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """(exit code, findings); `wrapper` goes before the command."""
    words = (*wrapper, str(BIN / "nacre"), "--prefix", str(patient.prefix), "doctor", "-o", "json")
    done = patient.run(*words, check=False, **environment)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def found(findings: list[dict[str, Any]], title: str, verdict: str) -> list[dict[str, Any]]:
    return [one for one in findings if one["title"] == title and one["verdict"] == verdict]


@contextmanager
def staged(patient: Machine, act: str, undo: str) -> Iterator[None]:
    patient.run("sh", "-ec", act)
    try:
        yield
    finally:
        patient.run("sh", "-ec", undo)


def test_a_healthy_machine_has_nothing_bad_and_exit_code_0(patient: Machine) -> None:
    configure(patient, "")
    code, findings = examine(patient)
    assert code == 0 and not [one for one in findings if one["verdict"] == "bad"]
    assert {"cgroups", "kernel features", "seccomp", "pod network", "clock", "disk"} <= {one["title"] for one in findings}
    (network,) = found(findings, "pod network", "ok")
    assert "ip_forward is 0 now" in network["says"]
    assert patient.nacre("doctor").stdout.rstrip().endswith("Pods can run here.")


def test_a_taken_port_is_named_with_its_holder(patient: Machine) -> None:
    configure(patient, "api_port = 18443\n")
    command = ["nsenter", "-t", str(patient.pid), "-n", sys.executable, "-c", LISTEN, "18443"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None and holder.stdout is not None and holder.stdout.readline() == "on\n"
        code, findings = examine(patient)
        (bad,) = found(findings, "ports", "bad")
        assert code == 1 and f"127.0.0.1:18443 (api_port) is held by pid {holder.pid} (python" in bad["says"]
        assert bad["remedy"].startswith("set api_port in ")
        refused = patient.nacre("up", check=False)
        assert refused.returncode == 1 and f"held by pid {holder.pid} (python" in refused.stderr
        holder.stdin.close()


def test_a_taken_range_is_named_with_its_holder(patient: Machine) -> None:
    configure(patient, 'pod_cidr = "10.77.0.0/16"\n')
    with staged(
        patient, "ip link add other type bridge; ip addr add 10.77.3.1/24 dev other; ip link set other up", "ip link del other"
    ):
        code, findings = examine(patient)
        (bad,) = found(findings, "pod network", "bad")
        assert code == 1 and "10.77.3" in str(bad) and "other" in str(bad) and "pod_cidr" in bad["remedy"]
    assert examine(patient)[0] == 0


def test_a_forward_chain_that_drops_is_found_and_its_remedy_heals_it(patient: Machine) -> None:
    configure(patient, "")
    chain = "nft 'add table inet fw; add chain inet fw forward { type filter hook forward priority 0; policy drop; }'"
    with staged(patient, chain, "nft delete table inet fw"):
        code, findings = examine(patient)
        (warned,) = found(findings, "pod network", "warn")
        assert code == 0 and "chain inet fw forward has policy drop" in warned["says"]
        patient.run("sh", "-ec", warned["remedy"])
        assert not found(examine(patient)[1], "pod network", "warn")


def test_forwarding_that_cannot_be_switched_on_is_found(patient: Machine) -> None:
    configure(patient, "")
    with staged(patient, "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys", "umount /proc/sys"):
        (warned,) = found(examine(patient)[1], "pod network", "warn")
    assert "ip_forward is 0 and cannot be set" in warned["says"] and "Read-only file system" in warned["evidence"][0]


def test_a_machine_without_cgroups_hears_where_they_were_looked_for_and_what_to_do(patient: Machine) -> None:
    configure(patient, "")
    code, findings = examine(patient, "unshare", "--mount", "sh", "-ec", 'umount -R /sys/fs/cgroup; exec "$@"', "sh")
    (bad,) = found(findings, "cgroups", "bad")
    assert code == 1 and "memory" in bad["says"] and "mount" in bad["remedy"]
    assert "/proc" in str(bad) or "/sys/fs/cgroup" in str(bad)


def test_a_proxy_is_shown_without_its_password_and_asks_for_an_exception(patient: Machine) -> None:
    configure(patient, "")
    proxy = {"https_proxy": "http://me:hush@10.0.0.1:3128", "NO_PROXY": "", "no_proxy": ""}
    (warned,) = found(examine(patient, **proxy)[1], "proxy", "warn")
    assert "https_proxy=http://…@10.0.0.1:3128" in warned["evidence"] and "hush" not in str(warned)
    assert warned["remedy"].startswith("export NO_PROXY=")
    exempt = warned["remedy"].removeprefix("export NO_PROXY=")
    (noted,) = found(examine(patient, **proxy | {"NO_PROXY": exempt})[1], "proxy", "note")
    assert "pulls go through the proxy" in noted["says"]


def test_a_clock_before_the_installation_is_bad(patient: Machine, tmp_path: Path) -> None:
    configure(patient, "")
    package = tmp_path / "__init__.py"
    package.write_bytes(Path(nacre.__file__).read_bytes())
    os.utime(package, (time.time() + 400 * 86400,) * 2)
    with staged(patient, f"mount --bind {package} {nacre.__file__}", f"umount {nacre.__file__}"):
        code, findings = examine(patient)
    (bad,) = found(findings, "clock", "bad")
    assert code == 1 and "lies before nacre" in bad["says"] and "timedatectl" in bad["remedy"]


def test_a_full_disk_is_bad(patient: Machine) -> None:
    configure(patient, "")
    data = patient.prefix / "var/lib/nacre"
    data.mkdir(parents=True, exist_ok=True)
    with staged(patient, f"mount -t tmpfs -o size=1m small {data}", f"umount {data}"):
        code, findings = examine(patient)
    (bad,) = found(findings, "disk", "bad")
    assert code == 1 and "free for data" in bad["says"]


def test_a_missing_qemu_and_few_descriptors_are_warnings(patient: Machine) -> None:
    configure(patient, '[kata]\nqemu = "qemu-nowhere"\n')
    code, findings = examine(patient, "prlimit", "--nofile=1000:1000")
    (vms,) = found(findings, "virtual machines", "warn")
    assert code == 0 and "qemu-nowhere is not installed" in vms["says"] and "qemu-system-x86" in vms["remedy"]
    (limits,) = found(findings, "limits", "warn")
    assert "1000 open files" in limits["says"]


def test_an_accelerator_that_is_demanded_and_has_booted_nothing_is_found_with_what_to_change(patient: Machine) -> None:
    configure(patient, '[kata]\naccelerator = "kvm"\n')
    code, findings = examine(patient)
    (warned,) = found(findings, "accelerator", "warn")
    assert code == 0 and warned["says"] == "kvm is asked for, and no guest has booted under it"
    assert "/dev/kvm" in str(warned["evidence"]) and 'accelerator = "auto"' in warned["remedy"]


def test_root_without_a_needed_capability_hears_which(patient: Machine) -> None:
    configure(patient, "")
    code, findings = examine(patient, "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    (bad,) = found(findings, "privileges", "bad")
    assert code == 1 and "CAP_SYS_ADMIN" in bad["says"]
    (kernel,) = found(findings, "kernel features", "bad")
    assert "namespaces" in kernel["says"] and "not permitted" in kernel["says"]


def test_nothing_of_an_examination_stays(patient: Machine) -> None:
    configure(patient, "")
    before = patient.picture()
    examine(patient)
    assert patient.picture() == before


def test_up_without_root_is_one_sentence_and_the_sudo_line(patient: Machine) -> None:
    wrapper = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    done = patient.run(*wrapper, sys.executable, "-c", "import nacre.cli.main as m; m.main()", "up", check=False, HOME="/")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first == "error: start the node: user id 65534 is not root" and second.startswith("remedy: sudo ")
