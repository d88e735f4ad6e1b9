"""What a container finds around it: namespaces, files, rights, limits, signals, exit codes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from pathlib import Path

import grpc
import pytest
from cri_support import FOREVER, Cri, free_port, refused, until

from nacre.wire import cri_pb2 as cri

CATCH = "trap 'echo got it; exit 3' {signal}; echo ready; while :; do sleep 0.05; done"


def test_an_ordinary_container_is_confined_as_kubernetes_expects(service: Cri) -> None:
    with service.pod(
        "confined", dns_config=cri.DNSConfig(servers=["192.0.2.1"], searches=["a.test"], options=["ndots:5"])
    ) as pod:
        seccomp = cri.SecurityProfile(profile_type=cri.SecurityProfile.RuntimeDefault)
        made = pod.start(*FOREVER, security={"seccomp": seccomp, "no_new_privs": True})
        sh = lambda script: service.sh(made, script)  # noqa: E731  # read as a prompt
        status = dict(re.findall(r"(\w+):\s+(.*)", sh("cat /proc/1/status")))
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0xA80425FB
        assert sh("hostname").strip() == "confined" == sh("cat /etc/hostname").strip()
        assert sh("cat /etc/resolv.conf").split() == ["search", "a.test", "nameserver", "192.0.2.1", "options", "ndots:5"]
        assert f"{pod.status().network.ip}\tconfined\n" in sh("cat /etc/hosts")
        assert sh("df -k /dev/shm | tail -n 1").split()[1] == "65536"
        assert (
            "ro," in sh("grep ' /proc/sys ' /proc/mounts")
            and sh("ls /proc/acpi /sys/firmware 2>/dev/null | grep -v :").strip() == ""
        )
        assert sh("ps | grep -c '[s]leep'").strip() == "1" and sh("echo $$").strip() != "1"
        assert sorted(sh("ls /sys/class/net").split()) == ["eth0", "lo"]
        assert service.exec(made, "mount", "-t", "tmpfs", "x", "/tmp").exit_code != 0


def test_capabilities_are_added_dropped_and_all_of_them_given_to_the_privileged(service: Cri) -> None:
    with service.pod() as pod:
        bare = cri.Capability(drop_capabilities=["ALL"], add_capabilities=["NET_ADMIN"])
        made = pod.start(*FOREVER, security={"capabilities": bare})
        assert int(service.sh(made, "grep CapEff /proc/1/status").split()[1], 16) == 1 << 12
        made = pod.start(*FOREVER, security={"privileged": True})
        held = int(service.sh(made, "grep CapEff /proc/1/status").split()[1], 16)
        assert held == int(re.findall(r"CapBnd:\s+(\w+)", Path("/proc/self/status").read_text())[0], 16)
        assert service.exec(made, "sh", "-c", "mkdir -p /mnt; mount -t tmpfs x /mnt && ls /dev/null").exit_code == 0


def test_user_groups_and_a_read_only_root_are_as_asked(service: Cri) -> None:
    with service.pod() as pod:
        assert pod.run("id", security={"run_as_username": "web"}) == "uid=101(web) gid=102(web) groups=102(web),300(extra)\n"
        ids = {"run_as_user": cri.Int64Value(value=7), "run_as_group": cri.Int64Value(value=8), "supplemental_groups": [9, 10]}
        assert pod.run("id", security=ids) == "uid=7 gid=8 groups=8,9,10\n"
        strict = {"run_as_username": "web", "supplemental_groups_policy": cri.Strict, "supplemental_groups": [11]}
        assert pod.run("id", security=strict) == "uid=101(web) gid=102(web) groups=11,102(web)\n"
        assert "Read-only" in pod.run("touch /x 2>&1; touch /dev/shm/y && echo fine", security={"readonly_rootfs": True})
        code, failure = refused(lambda: pod.create("id", security={"run_as_username": "nobody-here"}))
        assert code == grpc.StatusCode.UNKNOWN and "no matching entries in passwd" in failure.cause


def test_command_arguments_environment_directory_and_mounts_reach_the_process(service: Cri, tmp_path: os.PathLike[str]) -> None:
    (tmp_path / "file").write_text("from the host\n")  # type: ignore[operator]  # a Path
    with service.pod() as pod:
        made = pod.create(
            "sh", "-c", 'echo "$0 $1 $WORD"; pwd; cat /data/file; echo x 2>/dev/null > /data/file || echo refused',
            args=["zero", "one"],
            envs=[cri.KeyValue(key="WORD", value=b"hello world")],
            working_dir="/tmp/deep/down",
            mounts=[cri.Mount(container_path="/data", host_path=str(tmp_path), readonly=True)],
        )  # fmt: skip
        service.runtime.StartContainer(cri.StartContainerRequest(container_id=made))
        service.ended(made)
        assert pod.text("c1") == "zero one hello world\n/tmp/deep/down\nfrom the host\nrefused\n"


def test_exit_codes_are_true_and_say_completed_or_error(service: Cri) -> None:
    with service.pod() as pod:
        for script, code, reason in (
            ("exit 0", 0, "Completed"),
            ("exit 42", 42, "Error"),
            ("sh -c 'kill -SEGV $$'; exit $?", 139, "Error"),
        ):
            status = service.ended(pod.start("sh", "-c", script))
            assert (status.exit_code, status.reason) == (code, reason)


@pytest.mark.parametrize(("wanted", "signal"), [("", "TERM"), ("SIGUSR1", "USR1"), ("SIGRTMINPLUS3", "RTMIN+3")])
def test_stop_sends_the_stop_signal_and_the_process_may_end_by_itself(service: Cri, wanted: str, signal: str) -> None:
    number = {"TERM": "TERM", "USR1": "USR1", "RTMIN+3": "37"}[signal]
    with service.pod() as pod:
        fields = {"stop_signal": cri.Signal.Value(wanted)} if wanted else {}
        made = pod.start("sh", "-c", CATCH.format(signal=number), name="trap", **fields)
        until(lambda: "ready" in pod.text("trap"))
        service.stop_container(made, 20)
        status = service.status(made)
        assert (status.exit_code, pod.text("trap")) == (3, "ready\ngot it\n")


def test_stop_kills_what_outlives_its_grace(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done", name="deaf")
        until(lambda: "ready" in pod.text("deaf"))
        began = time.monotonic()
        service.stop_container(made, 1)
        assert 1.0 <= time.monotonic() - began < 3.0
        assert (service.status(made).exit_code, service.status(made).reason) == (137, "Error")


def test_an_unknown_stop_signal_is_refused_before_anything_is_made(service: Cri) -> None:
    from nacre.cri.containers import signal_number
    from nacre.oci.errors import Invalid

    assert (signal_number("TERM"), signal_number("sigkill"), signal_number("15"), signal_number("SIGRTMAX-1")) == (15, 9, 15, 63)
    assert (signal_number("SIGRTMINPLUS3"), signal_number("RTMIN+15"), signal_number("SIGRTMAXMINUS14")) == (37, 49, 50)
    for name in ("SIGNONSENSE", "SIGRTMIN+99", "RTMAX-64", "0", "65", "-1", "\u00b2", "9" * 5000, "", "SIG_DFL", "RTMIN+"):
        with pytest.raises(Invalid, match="no signal of that name"):
            signal_number(name)


def test_oom_killed_is_said_of_the_exit_that_it_caused_and_of_no_other(service: Cri) -> None:
    hog = "dd if=/dev/zero of=/dev/shm/hog bs=1M count=64 2>/dev/null"
    with service.pod() as pod:
        limit = {"memory_limit_in_bytes": 24 << 20}
        killed = service.ended(pod.start("sh", "-c", f"exec {hog}", resources=limit))
        assert (killed.exit_code, killed.reason) == (137, "OOMKilled")
        script = f"({hog}) ; echo survived; rm /dev/shm/hog; sleep 1000"
        made = pod.start("sh", "-c", script, name="parent", resources=limit)
        until(lambda: "survived" in pod.text("parent"))
        service.stop_container(made, 0)
        assert (service.status(made).exit_code, service.status(made).reason) == (137, "Error")


def test_a_shared_pid_namespace_shows_the_pods_processes_and_reaps_orphans(service: Cri) -> None:
    with service.pod(namespaces=cri.NamespaceOption(pid=cri.POD)) as pod:
        first, second = pod.start(*FOREVER), pod.start(*FOREVER)
        assert service.sh(second, "ps -o comm | grep -c sleep").strip() == "2"
        service.sh(first, "sh -c 'sleep 0.05 &' ; true")
        until(lambda: service.sh(second, "ps -o stat,comm | grep -c Z; true").strip() == "0")
        assert service.sh(second, "grep Cap[EP] /proc/1/status").split()[1::2] == ["0" * 16] * 2
        left = pod.start("sh", "-c", "setsid sleep 2000 & exit 5")
        assert service.ended(left).exit_code == 5
        until(lambda: service.sh(first, "ps -o args | grep -c '[s]leep 2000'; true").strip() == "0")


def test_the_end_of_a_shared_pid_namespaces_init_ends_the_pod_and_says_so(service: Cri) -> None:
    with service.pod(namespaces=cri.NamespaceOption(pid=cri.POD)) as pod:
        made = pod.start(*FOREVER)
        (reaper,) = [
            int(pid)
            for pid in Path(f"/proc/{service.shim(pod.id)}/task/{service.shim(pod.id)}/children").read_text().split()
            if Path(f"/proc/{pid}/comm").read_text() == "nacre-reaper\n"
        ]
        os.kill(reaper, 9)
        assert service.ended(made).exit_code == 137
        until(lambda: pod.status().state == cri.SANDBOX_NOTREADY)


def test_a_container_can_join_anothers_processes(service: Cri) -> None:
    with service.pod() as pod:
        target = pod.start("sleep", "4321")
        options = cri.NamespaceOption(pid=cri.TARGET, target_id=target)
        assert "sleep 4321" in pod.run("ps -o args", namespaces=options)


def test_a_pod_with_the_hosts_network_has_the_hosts_links_and_name(service: Cri) -> None:
    host = socket.gethostname()
    with service.pod("hostly", namespaces=cri.NamespaceOption(network=cri.NODE, pid=cri.CONTAINER)) as pod:
        assert pod.status().network.ip == ""
        seen = pod.run(
            "hostname; ls /sys/class/net; cat /etc/hosts", namespaces=pod.config.linux.security_context.namespace_options
        )
        assert seen.splitlines()[0] == host == socket.gethostname()
        assert sorted(os.listdir("/sys/class/net")) == sorted(seen.splitlines()[1 : 1 + len(os.listdir("/sys/class/net"))])
        with open("/etc/hosts") as file:
            assert file.read() in seen


def test_a_host_port_leads_into_the_pod(service: Cri) -> None:
    port = free_port()
    mapping = cri.PortMapping(protocol=cri.TCP, container_port=8080, host_port=port)
    with service.pod(port_mappings=[mapping]) as pod:
        pod.start("sh", "-c", "echo listening; nc -l -p 8080 -e echo from the pod", name="server")
        until(lambda: "listening" in pod.text("server"))

        def ask(address: str, number: int) -> bytes:
            try:
                with socket.create_connection((address, number), timeout=2) as client:
                    return client.recv(100)
            except OSError:
                return b""

        address = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]
        assert until(lambda: ask(address, port)) == b"from the pod\n"


def test_sysctls_of_the_pods_own_namespaces_are_set_and_others_refused(service: Cri) -> None:
    sysctls = {
        "net.ipv4.conf.eth0.accept_redirects": "1",
        "net.ipv4.ip_unprivileged_port_start": "81",
        "kernel.shm_rmid_forced": "1",
    }
    with service.pod(linux={"sysctls": sysctls}) as pod:
        paths = " ".join("/proc/sys/" + key.replace(".", "/") for key in sysctls)
        assert pod.run(f"cat {paths}").split() == ["1", "81", "1"]
    code, failure = refused(lambda: service.run_pod(linux={"sysctls": {"vm.swappiness": "1"}}))
    assert code == grpc.StatusCode.INVALID_ARGUMENT and "whole host" in failure.cause
    _code, failure = refused(lambda: service.run_pod(linux={"sysctls": {"net.ipv4.nonsense": "1"}}))
    assert "/proc/sys/net/ipv4/nonsense: No such file" in failure.cause


def test_limits_are_in_the_containers_cgroup(service: Cri) -> None:
    parent = service.config.cgroup_root + "/parent"
    with service.pod(linux={"cgroup_parent": parent}) as pod:
        limits = {"memory_limit_in_bytes": 32 << 20, "cpu_quota": 20000, "cpu_period": 100000, "cpu_shares": 256}
        made = pod.start(*FOREVER, resources=limits)
        base = "/sys/fs/cgroup"
        if not os.path.isdir(f"{base}/memory"):
            pytest.skip("open(/sys/fs/cgroup/memory): no v1 memory controller here; tests/vm has the other layouts")
        assert Path(f"{base}/memory{parent}/{made}/memory.limit_in_bytes").read_text().strip() == str(32 << 20)
        assert Path(f"{base}/cpu{parent}/{made}/cpu.cfs_quota_us").read_text().strip() == "20000"
        assert Path(f"{base}/cpu{parent}/{made}/cpu.shares").read_text().strip() == "256"
    for hierarchy in os.listdir(base):  # a caller's own group stays, and is the caller's to remove
        if os.path.isdir(f"{base}/{hierarchy}{parent}"):
            os.rmdir(f"{base}/{hierarchy}{parent}")
