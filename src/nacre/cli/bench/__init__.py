"""`nacre bench`: nacre's CRI beside Debian's containerd+runc, driven by the same calls in the same, interleaved run.

    engine   one CRI endpoint with everything it needs, set up and taken down    drive    the calls, timed
    peer     containerd under directories of its own                             account  CPU, memory and syncs of an engine
    oci      nacre-runc beside runc and crun, without any engine          inprocess its forked half
    report   medians and ratios, as text and JSON                                node     what only a whole node can show

Each engine and all its pods live below one cgroup, so that what a pod costs is read from one counter, short-lived processes
included. Nothing is measured while something else of ours runs.
"""

from __future__ import annotations

import json
from contextlib import ExitStack

import click
import grpc

from nacre.cli import output
from nacre.cli.bench import drive, engine, node, oci, peer, report
from nacre.cli.privilege import require_root
from nacre.oci.errors import Failure


class CallFailed(Failure):
    """A CRI call of the benchmark was refused."""


@click.group(invoke_without_command=True)
@click.option("--rounds", default=15, show_default=True, help="Pods of each engine, one by one.")
@click.option("--idle", "idle_pods", default=50, show_default=True, help="Pods held for the memory figure; 0 leaves it out.")
@click.option("--vm/--no-vm", default=True, help="VM pods as well.")
@click.option("--peer/--no-peer", "with_peer", default=True, help="containerd+runc as well.")
@click.option("--whole/--no-whole", default=True, help="The whole node as well: idle memory, kubectl apply to Ready.")
@click.option("-o", "target", metavar="FILE", help="Write the figures as JSON.")
@click.pass_context
def bench(
    context: click.Context, rounds: int, idle_pods: int, vm: bool, with_peer: bool, whole: bool, target: str | None
) -> None:
    """nacre beside containerd+runc: pod up, exec, pod down, throughput, CPU, memory, syncs; as ratios."""
    if context.invoked_subcommand is not None:
        return
    require_root("run the benchmarks")
    results = report.Results()
    try:
        _run(results, rounds, idle_pods, vm=vm, with_peer=with_peer)
    except grpc.RpcError as error:
        raise CallFailed(what="drive an engine", cause=f"{error.code().name}: {error.details()}") from error
    if whole:
        with output.step("a whole node: idle memory, kubectl apply to Ready"):
            node.measure(results, rounds=min(rounds, 10))
    report.show(results)
    if target:
        with open(target, "w") as file:
            json.dump(report.document(results), file, indent=1)


bench.add_command(oci.oci)


def _run(results: report.Results, rounds: int, idle_pods: int, *, vm: bool, with_peer: bool) -> None:
    with ExitStack() as stack:
        place = stack.enter_context(engine.workplace())
        archive = engine.build_image(place)
        with output.step("nacre's CRI in a prefix of its own"):
            ours = stack.enter_context(engine.nacre(place, archive))
        engines = [ours]
        if with_peer:
            with output.step("containerd and runc under directories of their own"):
                engines.append(stack.enter_context(peer.containerd(place, archive)))
        results.versions = {each.name: each.version() for each in engines}
        _containers(engines, rounds, idle_pods, results)
        if vm:
            _machines(ours, engines, rounds, results)


def _containers(engines: list[engine.Engine], rounds: int, idle_pods: int, results: report.Results) -> None:
    with output.step(f"{rounds} pods of each engine, in turn"):
        drive.interleaved(engines, "", rounds, results)
    with output.step("4 pods in parallel"):
        for each in engines:
            results.put("pods/s at 4 in parallel", each.name, drive.throughput(each, total=max(8, rounds)), better="more")
    with output.step("CPU time per pod"):
        for each in engines:
            results.put("CPU ms per pod", each.name, drive.cpu_per_pod(each, pods=rounds))
    with output.step("syncs per pod"):
        for each in engines:
            count = drive.syncs_per_pod(each, pods=4)
            if count is not None:
                results.put("fdatasync and fsync per pod", each.name, count)
    if idle_pods:
        with output.step(f"{idle_pods} idle pods"):
            for each in engines:
                results.put("private KiB per idle pod", each.name, drive.memory_per_pod(each, idle_pods))


def _machines(ours: engine.Engine, engines: list[engine.Engine], rounds: int, results: report.Results) -> None:
    """VM pods from the pool (waiting for its refill between rounds), then with a pool of none, beside the peer's container pods."""
    peers = [each for each in engines if each is not ours]
    with output.step("VM pods from a warm pool"):
        ours.prepare_vm()
        drive.machines(ours, peers, "VM pod up, warm pool", max(5, rounds // 2), results)
    with output.step("VM pods without a pool"):
        ours.restart(pool=0)
        drive.machines(ours, peers, "VM pod up, no pool", max(3, rounds // 3), results)
