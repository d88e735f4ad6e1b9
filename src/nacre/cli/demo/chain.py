"""(c) One pod's trace, the seed's picture of the chain with the real documents; (d) a pod that cannot start, explained."""

from __future__ import annotations

from nacre.cli import cluster, explain, output, trace
from nacre.cli.demo.stage import NAMESPACE, Stage, heading, manifest
from nacre.oci import trace as recorder

BROKEN_LIMIT_S = 30.0


def show(stage: Stage) -> None:
    """The VM pod's chain if it ran, then the failure."""
    name = "nginx-kata" if "nginx-kata" in stage.pods else "nginx"
    if name not in stage.pods:
        stage.apply(manifest("nginx.yaml"), name)
    heading(f"nacre trace {NAMESPACE}/{name}")
    pod = cluster.find_pod(stage.config, name, NAMESPACE)
    records = list(recorder.records(stage.config.trace_dir, explain.trace_uid(pod)))
    for line in trace.render(list(trace.crossings(records)), limit=8):
        output.say(line)
    heading(f"A pod that cannot start: nacre explain {NAMESPACE}/broken")
    stage.pods.append("broken")
    stage.kubectl("apply", "-f", manifest("broken.yaml"))
    cluster.wait_pod(stage.config, NAMESPACE, "broken", cluster.has_failed, BROKEN_LIMIT_S)
    pod = cluster.find_pod(stage.config, "broken", NAMESPACE)
    explain.show(stage.config, pod)
