"""(a) The same nginx as a container and in a virtual machine: kernel inside, HTTP from the pod's address, time, memory."""

from __future__ import annotations

import urllib.request

from nacre.cli import host, output
from nacre.cli.demo.stage import Stage, address, heading, manifest
from nacre.config import Config
from nacre.linux import cgroups
from nacre.oci.errors import Failure
from nacre.wire.kube import Object

PODS = (("nginx", "nginx.yaml", "container"), ("nginx-kata", "nginx-kata.yaml", "virtual machine"))


class WrongAnswer(Failure):
    """A pod answered something else than it should."""


def show(stage: Stage) -> None:
    """Both pods side by side, then what they show."""
    heading("nginx, as a container and in a virtual machine" if stage.vms else "nginx, as a container")
    pods, rows = [], []
    for name, file, kind in PODS if stage.vms else PODS[:1]:
        pod, ready_s = stage.apply(manifest(file), name)
        pods.append((name, kind, pod, ready_s))
    for name, kind, pod, ready_s in pods:
        kernel = stage.kubectl("exec", name, "--", "uname", "-r").strip()
        code, server = fetch(address(pod))
        rows.append(
            (name, kind, address(pod), f"HTTP {code} ({server})", kernel, output.seconds(ready_s), memory(stage.config, pod))
        )
    output.say()
    output.table(("pod", "is a", "address", "answer", "kernel inside", "apply to Ready", "memory, host's account"), rows)
    kernels = {row[4] for row in rows}
    if len(kernels) != len(rows):
        raise WrongAnswer(what="compare the pods' kernels", cause=f"both say {', '.join(kernels)}")


def fetch(pod_address: str) -> tuple[int, str]:
    """(status, Server header) of GET / at the pod's own address."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://{pod_address}/", timeout=10) as answer:
        if answer.status != 200:
            raise WrongAnswer(what=f"get http://{pod_address}/", cause=f"HTTP {answer.status}")
        return answer.status, answer.headers.get("Server", "")


def memory(config: Config, pod: Object) -> str:
    """What the host charges to the pod's cgroup; of a VM everything, QEMU and guest."""
    uid = pod["metadata"]["uid"]
    layout = cgroups.discover()
    for directory in host.cgroup_directories(config):
        name = directory.rsplit("/", 1)[1]
        if uid in name or uid.replace("-", "_") in name:
            hierarchy = layout.find("memory")
            if hierarchy and directory.startswith(hierarchy.mount + "/"):
                return output.size(cgroups.Cgroup(layout, directory.removeprefix(hierarchy.mount)).stats()["memory_bytes"])
    return "not counted here"
