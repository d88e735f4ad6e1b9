"""What manifests ask of a pod beyond running: names, hooks, grace, messages, logs that are rotated, and plain words for what is not there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from node_support import Node, pod

NGINX = "nacre.local/nginx:demo"
BUSYBOX = "nacre.local/busybox:demo"
ALIASES = [{"ip": "10.1.2.3", "hostnames": ["db", "db.example"]}]
LINES = 260_000  # more than a log file takes before it is rotated, each with its time and stream


def test_a_pod_has_the_names_that_it_asks_for_and_the_hosts_resolvers_beside_its_own(node: Node, handler: str) -> None:
    name = f"names-{handler or 'runc'}"
    asked = {"nameservers": ["192.0.2.53"], "searches": ["corp.example"], "options": [{"name": "ndots", "value": "3"}]}
    names = {"hostname": "web", "subdomain": "team", "setHostnameAsFQDN": bool(handler)}
    node.apply(pod(name, BUSYBOX, "sleep", "1000", handler=handler, hostAliases=ALIASES, dnsConfig=asked, **names))
    node.ready(name)
    full = "web.team.default.svc.cluster.local"
    hosts = node.kubectl("exec", name, "--", "cat", "/etc/hosts").splitlines()
    assert f"{node.address(name)}\t{full}\tweb" in hosts and "10.1.2.3\tdb\tdb.example" in hosts
    assert node.kubectl("exec", name, "--", "hostname").strip() == (full if handler else "web")
    told = node.kubectl("exec", name, "--", "cat", "/etc/resolv.conf").splitlines()
    servers = [line.split()[1] for line in told if line.startswith("nameserver")]
    assert servers[-1] == "192.0.2.53" and len(servers) > 1, "the host's come first"
    assert any(line.startswith("search") and line.endswith("corp.example") for line in told)
    assert any(line.startswith("options") and "ndots:3" in line.split() for line in told)
    node.kubectl("delete", "pod", name, "--now")


def test_policy_none_leaves_the_hosts_resolvers_out(node: Node) -> None:
    node.apply(pod("own-dns", BUSYBOX, "sleep", "1000", dnsPolicy="None", dnsConfig={"nameservers": ["192.0.2.53"]}))
    node.ready("own-dns")
    assert node.kubectl("exec", "own-dns", "--", "cat", "/etc/resolv.conf") == "nameserver 192.0.2.53\n"
    node.kubectl("delete", "pod", "own-dns", "--now")


def test_a_pod_on_the_hosts_network_has_the_hosts_names_and_its_own_aliases(node: Node) -> None:
    node.apply(pod("on-host", BUSYBOX, "sleep", "1000", hostNetwork=True, hostAliases=ALIASES))
    node.ready("on-host")
    links = node.kubectl("exec", "on-host", "--", "ls", "/sys/class/net").split()
    assert set(links) == set(os.listdir("/sys/class/net")) and node.instance in links
    assert node.kubectl("exec", "on-host", "--", "hostname").strip() == os.uname().nodename
    hosts = node.kubectl("exec", "on-host", "--", "cat", "/etc/hosts")
    assert Path("/etc/hosts").read_text().strip() in hosts and hosts.endswith("10.1.2.3\tdb\tdb.example\n")
    status = node.pod("on-host")["status"]
    assert status["podIP"] == status["hostIP"]  # type: ignore[index]
    node.kubectl("delete", "pod", "on-host", "--now")


def test_pre_stop_hooks_run_before_the_signal_by_command_by_http_and_by_sleep(node: Node, tmp_path: Path) -> None:
    shared = {"volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}
    serve = "trap 'echo signal >> /shared/order; exit 0' TERM; while :; do sleep 0.05; done"

    def hook(**action: object) -> dict[str, object]:
        return {"lifecycle": {"preStop": action}, "imagePullPolicy": "IfNotPresent"}

    manifest = pod(
        "hooked", BUSYBOX, "sh", "-c", serve, terminationGracePeriodSeconds=20,
        container=shared | hook(exec={"command": ["sh", "-c", "echo hook >> /shared/order; sleep 1"]}),
        volumes=[{"name": "shared", "hostPath": {"path": str(tmp_path)}}],
    )  # fmt: skip
    manifest["spec"]["containers"] += [  # type: ignore[index]
        {"name": "web", "image": NGINX, "readinessProbe": {"tcpSocket": {"port": 80}, "periodSeconds": 1}}
        | hook(httpGet={"path": "/farewell", "port": 80}),
        {"name": "sleeper", "image": BUSYBOX, "command": ["sh", "-c", "trap 'exit 0' TERM; sleep 1000 & wait"]}
        | hook(sleep={"seconds": 2}),
    ]
    node.apply(manifest)
    node.ready("hooked")
    with node.kubectl_stream("logs", "-f", "hooked", "-c", "web") as lines:
        began = time.monotonic()
        node.kubectl("delete", "pod", "hooked", "--wait=false")
        assert any("GET /farewell" in line for line in lines)
    node.kubectl("wait", "--for=delete", "pod/hooked", "--timeout=30s")
    assert (tmp_path / "order").read_text().split() == ["hook", "signal"]
    assert 2 <= time.monotonic() - began < 18, "the sleep was waited for, the rest of the grace was not"


def test_a_pre_stop_hook_has_no_more_time_than_the_grace(node: Node) -> None:
    hook = {"lifecycle": {"preStop": {"exec": {"command": ["sleep", "60"]}}}}
    node.apply(pod("dawdler", BUSYBOX, "sleep", "1000", terminationGracePeriodSeconds=2, container=hook))
    node.ready("dawdler")
    began = time.monotonic()
    node.kubectl("delete", "pod", "dawdler", "--timeout=40s")
    assert time.monotonic() - began < 20, "2 s of grace, and 2 s that every container has after its hook"


def test_a_probe_may_give_a_shorter_grace_than_the_pod(node: Node) -> None:
    probe = {"exec": {"command": ["false"]}, "periodSeconds": 1, "failureThreshold": 1, "terminationGracePeriodSeconds": 1}
    node.apply(pod("ailing", BUSYBOX, "sleep", "1000", terminationGracePeriodSeconds=60, container={"livenessProbe": probe}))
    path = "{.status.containerStatuses[0].restartCount}"
    node.kubectl("wait", "pod/ailing", f"--for=jsonpath={path}=1", "--timeout=30s")
    (status,) = node.pod("ailing")["status"]["containerStatuses"]  # type: ignore[index]
    assert status["lastState"]["terminated"]["exitCode"] == 137
    node.kubectl("delete", "pod", "ailing", "--now")


def test_a_post_start_hook_that_fails_ends_its_container_and_says_why(node: Node) -> None:
    hook = {"lifecycle": {"postStart": {"exec": {"command": ["sh", "-c", "echo not today; exit 3"]}}}}
    node.apply(pod("unlucky", BUSYBOX, "sleep", "1000", container=hook, restartPolicy="Never"))
    node.kubectl("wait", "pod/unlucky", "--for=jsonpath={.status.phase}=Failed", "--timeout=30s")
    assert "PostStartHook failed: not today" in node.kubectl("describe", "pod", "unlucky")
    node.kubectl("delete", "pod", "unlucky")


def test_a_pod_whose_post_start_hook_hangs_can_be_deleted(node: Node) -> None:
    hook = {"lifecycle": {"postStart": {"exec": {"command": ["sleep", "1000"]}}}}
    node.apply(pod("stuck", BUSYBOX, "sleep", "1000", container=hook))
    with node.kubectl_stream(
        "get", "events", "-w", "--field-selector=involvedObject.name=stuck,reason=Started", "-o", "name"
    ) as lines:
        next(lines)
    node.kubectl("delete", "pod", "stuck", "--timeout=20s")


def test_a_daemon_killed_within_a_grace_goes_on_with_what_is_left_of_it(node: Node) -> None:
    grace_s = 14
    script = "trap 'echo asked' TERM; while :; do sleep 0.1; done"
    node.apply(pod("stubborn", BUSYBOX, "sh", "-c", script, terminationGracePeriodSeconds=grace_s))
    node.ready("stubborn")
    with node.kubectl_stream("logs", "-f", "stubborn") as lines:
        node.kubectl("delete", "pod", "stubborn", "--wait=false")
        began = time.monotonic()
        assert next(lines) == "asked\n"
    os.kill(node.daemon, signal.SIGKILL)
    time.sleep(grace_s / 2)  # a new grace would end so much later than the rest of this one
    node.nacre("up")
    restarted = time.monotonic()
    node.kubectl("wait", "--for=delete", "pod/stubborn", "--timeout=60s")
    ended = time.monotonic()
    assert ended - began >= grace_s - 2, "it had its grace"
    assert ended - began < max(grace_s, restarted - began) + 6, "and no second one"


def test_last_words_are_taken_from_where_the_container_puts_them(node: Node) -> None:
    spoken = {"terminationMessagePath": "/tmp/why"}
    node.apply(pod("spoken", BUSYBOX, "sh", "-c", "echo because > /tmp/why; exit 1", container=spoken, restartPolicy="Never"))
    logged = {"terminationMessagePolicy": "FallbackToLogsOnError"}
    node.apply(pod("logged", BUSYBOX, "sh", "-c", "echo in the log; exit 1", container=logged, restartPolicy="Never"))
    for name, words in (("spoken", "because\n"), ("logged", "in the log\n")):
        node.kubectl("wait", f"pod/{name}", "--for=jsonpath={.status.phase}=Failed", "--timeout=30s")
        (status,) = node.pod(name)["status"]["containerStatuses"]  # type: ignore[index]
        assert status["state"]["terminated"]["message"] == words
    node.kubectl("delete", "pod", "spoken", "logged")


def test_an_init_container_that_fails_is_tried_again_with_back_off_and_keeps_the_others_waiting(node: Node) -> None:
    first = {"name": "first", "image": BUSYBOX, "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", "echo tried; exit 4"]}
    node.apply(pod("uninitialised", BUSYBOX, "sleep", "1000", initContainers=[first]))
    path = "{.status.initContainerStatuses[0].state.waiting.reason}"
    node.kubectl("wait", "pod/uninitialised", f"--for=jsonpath={path}=CrashLoopBackOff", "--timeout=30s")
    assert "Init:CrashLoopBackOff" in node.kubectl("get", "pod", "uninitialised")
    assert node.kubectl("logs", "uninitialised", "-c", "first", "--previous") == "tried\n"
    assert "waiting to start: PodInitializing" in node.kubectl("logs", "uninitialised", "-c", "main", check=False)
    (main,) = node.pod("uninitialised")["status"]["containerStatuses"]  # type: ignore[index]
    assert main["state"] == {"waiting": {"reason": "PodInitializing"}}
    node.kubectl("delete", "pod", "uninitialised", "--now")
    node.apply(pod("hopeless", BUSYBOX, "true", initContainers=[first], restartPolicy="Never"))
    node.kubectl("wait", "pod/hopeless", "--for=jsonpath={.status.phase}=Failed", "--timeout=30s")
    assert "Init:Error" in node.kubectl("get", "pod", "hopeless")
    node.kubectl("delete", "pod", "hopeless")


def test_a_log_is_followed_across_its_rotation_and_no_line_is_lost(node: Node) -> None:
    script = f"seq 1 {LINES}; while [ ! -e /tmp/go ]; do sleep 0.1; done; seq {LINES + 1} {LINES + 5}; echo over"
    node.apply(pod("verbose", BUSYBOX, "sh", "-c", script, restartPolicy="Never"))
    node.ready("verbose")
    with node.kubectl_stream("logs", "-f", "verbose") as lines:
        for number in range(1, LINES + 1):
            assert int(next(lines)) == number
        deadline = time.monotonic() + 60
        while not list(node.prefix.glob("var/log/nacre/pods/default_verbose_*/main/0.log.*")):
            assert time.monotonic() < deadline, "the log was not rotated"
            time.sleep(0.2)  # the kubelet tells nobody
        node.kubectl("exec", "verbose", "--", "touch", "/tmp/go")
        assert [next(lines).strip() for _ in range(6)] == [*(str(LINES + more) for more in range(1, 6)), "over"]
        assert next(lines, None) is None
    node.kubectl("delete", "pod", "verbose")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("debug", "bare", f"--image={BUSYBOX}"), "pods/ephemeralcontainers is not supported"),
        (("port-forward", "pod/bare", "0:80"), "pods/portforward is not supported"),
        (("logs", "bare", "--previous"), 'previous terminated container "main" in pod "bare" not found'),
        (("logs", "bare", "-c", "nonesuch"), "container nonesuch is not valid for pod bare"),
        (("exec", "bare", "-c", "nonesuch", "--", "true"), "container nonesuch is not valid for pod bare"),
    ],
    ids=lambda words: words[0] + words[-1].rpartition(" ")[2] if isinstance(words, tuple) else "",
)
def test_what_cannot_be_had_of_a_pod_is_refused_in_words(node: Node, bare: str, words: tuple[str, ...], said: str) -> None:
    done = node.nacre("kubectl", *words, check=False, timeout_s=60)
    assert done.returncode and said in done.stdout + done.stderr, done.stdout + done.stderr


@pytest.fixture(scope="module")
def bare(node: Node) -> object:
    node.apply(pod("bare", BUSYBOX, "sleep", "1000"))
    node.ready("bare")
    yield "bare"
    node.kubectl("delete", "pod", "bare", "--now")
