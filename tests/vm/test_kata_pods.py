"""Pods in virtual machines, asked for by CRI calls as a kubelet makes them."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kata_support import Cri, assert_settled, build_image, enabled, look, qemus, support

from nacre.kata.process import UID_BASE
from nacre.oci import trace
from nacre.wire import cri_pb2 as cri

FOREVER = support.FOREVER


@pytest.fixture(scope="module")
def shared_kata(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cri]:
    base = tmp_path_factory.mktemp("kata")
    service = None
    try:
        service = enabled(base / "node", build_image(base / "test.tar"))
        with service.pod(handler="kata") as pod:
            pod.start("true")  # the first VM pod has the template made and the image turned into a drive
        yield service
        log = service.log()
        service.end()
        assert "Traceback" not in log, log
    finally:
        if service is not None:
            service.reset()


@pytest.fixture
def kata(shared_kata: Cri) -> Iterator[Cri]:
    """A test must leave nothing behind, no VM either."""
    before = look(shared_kata.prefix)
    yield shared_kata
    assert_settled(shared_kata.prefix, before)
    assert qemus(shared_kata.prefix) == []


def test_a_container_runs_under_the_vms_own_kernel_and_says_so_in_its_log(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        made = pod.start("sh", "-c", "cat /proc/sys/kernel/osrelease; hostname; echo bad >&2; exit 7")
        status = kata.ended(made)
        assert (status.exit_code, status.reason) == (7, "Error")
        kernel, hostname = pod.text("c1").split()
        assert kernel.endswith("cloud-amd64") and kernel != os.uname().release
        assert hostname == pod.config.hostname
        assert pod.text("c1", "stderr") == "bad\n"


def test_exec_brings_output_exit_codes_and_input(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        made = pod.start(*FOREVER)
        answer = kata.exec(made, "sh", "-c", "echo out; echo err >&2; exit 3")
        assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out\n", b"err\n", 3)
        request = cri.ExecRequest(container_id=made, cmd=["wc", "-c"], stdin=True, stdout=True, stderr=True)
        sent = os.urandom(300_000)  # more than a stream's window
        streamed = support.stream(kata.runtime.Exec(request).url, stdin=sent)
        assert streamed.out.strip() == b"300000" and streamed.status["status"] == "Success"


def test_what_a_command_prints_comes_whole_however_much_it_is(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        made = pod.start(*FOREVER)
        answer = kata.exec(made, "sh", "-c", "seq 100000")
        assert answer.stdout == b"".join(b"%d\n" % number for number in range(1, 100_001))


def test_a_terminal_is_one_and_takes_its_size(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        made = pod.start(*FOREVER)
        request = cri.ExecRequest(
            container_id=made, cmd=["sh", "-c", "test -t 0 && test -t 1 && echo terminal"], tty=True, stdout=True
        )
        streamed = support.stream(kata.runtime.Exec(request).url)
        assert streamed.out == b"terminal\r\n"


def test_stop_sends_the_signal_and_waits_for_the_grace(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        polite = pod.start("sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done")
        stubborn = pod.start("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done")
        support.until(lambda: pod.text("c1") and pod.text("c2"))
        kata.stop_container(polite, 20)
        kata.stop_container(stubborn, 1)
        assert kata.status(polite).exit_code == 5
        assert kata.status(stubborn).exit_code == 137


def test_the_host_reaches_the_pods_address_and_containers_share_localhost(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        pod.start("sh", "-c", "while :; do echo hello from the machine | nc -l -p 8080; done")
        other = pod.start(*FOREVER)
        address = pod.status().network.ip
        support.until(lambda: _read(address, 8080) == b"hello from the machine\n", 20)
        assert "hello from the machine" in kata.sh(other, "nc 127.0.0.1 8080 </dev/null")


def _read(address: str, port: int) -> bytes:
    try:
        with socket.create_connection((address, port), timeout=5) as sock:
            return sock.makefile("rb").read()
    except OSError:
        return b""


def test_limits_make_the_machine_larger(kata: Cri) -> None:
    limits = {"memory_limit_in_bytes": 1 << 30, "cpu_quota": 150_000, "cpu_period": 100_000}
    with kata.pod(handler="kata", linux={"resources": cri.LinuxContainerResources(**limits)}) as pod:
        made = pod.start(*FOREVER, resources=limits)
        total_kib = int(kata.sh(made, "grep MemTotal /proc/meminfo").split()[1])
        assert total_kib > 1 << 20
        assert kata.sh(made, "nproc").strip() == str(min(2, os.cpu_count() or 1))


def test_a_container_over_its_memory_limit_is_oom_killed_inside_and_the_machine_lives(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        hog = pod.start("sh", "-c", "x=$(cat /dev/zero | tr '\\0' a)", resources={"memory_limit_in_bytes": 24 << 20})
        status = kata.ended(hog, 60)
        assert (status.exit_code, status.reason) == (137, "OOMKilled")
        assert pod.run("echo alive") == "alive\n"
        assert pod.status().state == cri.SANDBOX_READY


def test_a_configmap_is_copied_in_with_its_switch(kata: Cri, tmp_path: Path) -> None:
    volume = tmp_path / "pods/uid-cm/volumes/kubernetes.io~configmap/settings"
    (volume / "..2026").mkdir(parents=True)
    (volume / "..2026/key").write_text("value")
    (volume / "..data").symlink_to("..2026")
    (volume / "key").symlink_to("..data/key")
    mounts = [cri.Mount(container_path="/etc/settings", host_path=str(volume), readonly=True)]
    with kata.pod("cm", handler="kata") as pod:
        assert pod.run("cat /etc/settings/key; readlink /etc/settings/key", mounts=mounts) == "value..data/key\n"


def test_an_empty_dir_is_shared_by_the_pods_containers_and_stays_in_the_vm(kata: Cri, tmp_path: Path) -> None:
    volume = tmp_path / "pods/uid-ed/volumes/kubernetes.io~empty-dir/cache"
    volume.mkdir(parents=True)
    mounts = [cri.Mount(container_path="/cache", host_path=str(volume))]
    with kata.pod("ed", handler="kata") as pod:
        assert pod.run("echo kept > /cache/file", mounts=mounts) == ""
        assert pod.run("cat /cache/file", mounts=mounts) == "kept\n"
    assert list(volume.iterdir()) == []


def test_a_host_path_is_a_directory_of_the_vm(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        mounts = [cri.Mount(container_path="/host", host_path="/etc")]
        assert pod.run("ls /host; touch /host/mine; ls /host", mounts=mounts) == "mine\n"
        assert not os.path.exists("/etc/mine")


def test_the_termination_log_comes_back_to_the_kubelets_file(kata: Cri, tmp_path: Path) -> None:
    file = tmp_path / "pods/uid-tl/containers/c1/0"
    file.parent.mkdir(parents=True)
    file.touch()
    said = [{"destination": "/dev/termination-log", "type": "file", "name": "termination-log"}]
    with kata.pod("tl", handler="kata") as pod:
        mounts = [cri.Mount(container_path="/dev/termination-log", host_path=str(file))]
        pod.run("echo last words > /dev/termination-log", mounts=mounts, annotations={"nacre.dev/mounts": json.dumps(said)})
        assert file.read_text() == "last words\n"


def test_a_privileged_container_meets_nothing_of_the_host(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        made = pod.start(*FOREVER, security={"privileged": True})
        disks = kata.sh(made, "cat /proc/partitions").split()
        assert not {"sda", "nvme0n1"} & set(disks) and "vda" in disks
        commands = kata.sh(made, "cat /proc/[0-9]*/comm")
        assert "qemu" not in commands and "pytest" not in commands


def test_clones_differ_in_what_must_not_be_shared(kata: Cri) -> None:
    def facts() -> dict[str, str]:
        with kata.pod(handler="kata") as pod:
            text = pod.run(
                "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; hostname; ip link show eth0 | grep ether"
            )
            return dict(zip(("boot_id", "uuid", "hostname", "mac"), text.splitlines(), strict=True))

    one, other = facts(), facts()
    assert {name for name in one if one[name] == other[name]} == set()


def test_nothing_of_the_rehearsal_is_left_in_a_pods_machine(kata: Cri) -> None:
    """The template was asked for a link with an address, files and a container before it was saved."""
    with kata.pod(handler="kata") as pod:
        text = pod.run("ip -4 addr show eth0; ip route; cat /etc/resolv.conf; mount; ls -l /dev/shm")
        addresses = [line.split()[1].split("/")[0] for line in text.splitlines() if line.strip().startswith("inet ")]
        assert addresses == [pod.status().network.ip]
        assert "192.0.2." not in text and "rehearsal" not in text and "nacre-warm" not in text


def test_qemu_runs_as_a_user_of_its_own_in_the_pods_cgroup_without_a_network(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        (qemu,) = qemus(kata.prefix)
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{qemu}/status").read_text().splitlines() if ":\t" in line)
        uids = {int(uid) for uid in status["Uid"].split()}
        assert len(uids) == 1 and min(uids) >= UID_BASE
        assert int(status["CapEff"], 16) == 0 and status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
        assert pod.id in Path(f"/proc/{qemu}/cgroup").read_text()
        assert os.stat(f"/proc/{qemu}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
        links = Path(f"/proc/{qemu}/net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in links] == ["lo"], "the tap has left for the pod's namespace"


def test_a_killed_qemu_ends_the_pod_with_the_reason(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        made = pod.start(*FOREVER)
        (qemu,) = qemus(kata.prefix)
        support.killed(qemu)
        status = kata.ended(made)
        assert (status.exit_code, status.reason) == (137, "VMCrashed")
        assert "killed by signal 9" in status.message
        support.until(lambda: pod.status().state == cri.SANDBOX_NOTREADY)


def test_a_guest_kernel_that_gives_up_is_told_with_its_own_words(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        made = pod.start(*FOREVER, security={"privileged": True})
        asked = kata.runtime.ExecSync.future(
            cri.ExecSyncRequest(container_id=made, cmd=["sh", "-c", "echo c > /proc/sysrq-trigger"], timeout=60)
        )
        status = kata.ended(made)
        assert asked.exception(timeout=20) is not None or asked.result().exit_code == 137
        assert status.reason == "GuestPanic" and "sysrq triggered crash" in status.message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (cri.NamespaceOption(network=cri.NODE), "hostNetwork"),
        (cri.NamespaceOption(ipc=cri.NODE), "hostIPC"),
    ],
)
def test_what_a_vm_cannot_share_is_refused_before_anything_is_made(kata: Cri, options: Any, words: str) -> None:
    _code, failure = support.refused(lambda: kata.run_pod(handler="kata", namespaces=options))
    assert failure.code == "Unsupported" and words in failure.cause


def test_a_command_that_does_not_exist_is_said_as_outside(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        _code, failure = support.refused(lambda: pod.start("/no/such/program"))
        assert "/no/such/program" in failure.sentence()


def test_the_recorder_has_the_machines_line_and_the_agents_calls(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        pod.start("true")
        kept = list(trace.records(kata.config.trace_dir, pod.config.metadata.uid))
    joints = {one["joint"] for one in kept}
    assert {"cri", "oci", "vm", "agent"} <= joints
    line = next(one for one in kept if one["joint"] == "vm")["document"]
    assert line["start"] == "clone" and "-sandbox" in line["line"]
    assert {"identify", "network", "create", "start"} <= {one["what"] for one in kept if one["joint"] == "agent"}


def test_a_vm_pod_outlives_its_daemon(kata: Cri) -> None:
    with kata.pod(handler="kata") as pod:
        made = pod.start("sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done")
        support.until(lambda: pod.text("c1").count("\n") > 3)
        kata.kill()
        time_of_death = time.monotonic()
        kata.start()
        assert kata.sh(made, "echo still here") == "still here\n"
        support.until(lambda: pod.text("c1").count("\n") > 20)
        numbers = [int(word) for word in pod.text("c1").split()]
        assert numbers == list(range(len(numbers))), f"lines lost across a restart of {time.monotonic() - time_of_death:.1f} s"
