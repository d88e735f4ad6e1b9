"""What only a whole node can show: its memory when idle, and the time from `kubectl apply` to Ready."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from nacre import config as configuration
from nacre.cli import cluster, host, kubectl, lifecycle, reset
from nacre.cli.bench import account, drive, engine
from nacre.cli.bench.report import Results
from nacre.config import Config

READY_LIMIT_S = 60.0


def measure(results: Results, rounds: int) -> None:
    """A node under a prefix of its own, taken away afterwards."""
    with engine.workplace() as place:
        config = configuration.load(f"{place}/node")
        lifecycle.start(config, say=_quiet)
        try:
            archive = engine.build_image(place)
            engine.command(
                [
                    sys.executable,
                    "-c",
                    "from nacre.cli.main import main; main()",
                    "--prefix",
                    config.prefix,
                    "image",
                    "import",
                    archive,
                ]
            )
            lifecycle.wait_until_ready(config, READY_LIMIT_S)
            drive.pause(3.0)
            results.put("idle node, PSS MiB", "nacre", idle_mib(config))
            for number in range(rounds):
                total, own = apply_to_ready(config, place, f"bench-{number}")
                results.add("kubectl apply to Ready, ms", "nacre", total)
                results.add("  of it kubectl itself, ms", "nacre", own)
        finally:
            lifecycle.stop(config, grace_s=0, say=_quiet)
            reset.remove(config, reset.paths(config))


def _quiet(_text: str = "", _style: str = "") -> None:
    return


def idle_mib(config: Config) -> float:
    """PSS of everything that belongs to the node."""
    return sum(account.rollup(process.pid, "Pss") for process in host.processes(config)) / 1024


def apply_to_ready(config: Config, place: str, name: str) -> tuple[float, float]:
    """(ms from starting kubectl to the Ready condition, ms that kubectl ran) of a new pod, deleted again."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "main", "image": engine.IMAGE, "command": list(drive.IDLE_COMMAND)}],
        },
    }
    path = f"{place}/{name}.json"
    with open(path, "w") as file:
        json.dump(pod, file)
    binary, environment = kubectl.find(), os.environ | {"KUBECONFIG": config.admin_conf}
    began = time.perf_counter()
    process = subprocess.Popen([binary, "apply", "-f", path], env=environment, stdout=subprocess.DEVNULL)
    cluster.wait_pod(config, "default", name, cluster.is_ready, READY_LIMIT_S)
    ready = time.perf_counter()
    process.wait()
    ended = time.perf_counter()
    subprocess.run([binary, "delete", "pod", name, "--now"], env=environment, stdout=subprocess.DEVNULL, check=True)
    return (ready - began) * 1000, (min(ended, ready) - began) * 1000
