"""`nacre trace POD`: the chain as the seed drew it, with the document that really crossed each joint, and when."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click

from nacre.cli import cluster, output
from nacre.cli.explain import trace_uid
from nacre.config import Config
from nacre.oci import trace as recorder
from nacre.oci.errors import Failure, NotFound

# joint → what stands on its upper side, what on its lower, and the standard between them
CHAIN = {
    "api": ("kubectl → api", "kubelet", "Kubernetes API: the Pod as the kubelet read it"),
    "kubelet": ("kubelet", "kubelet", "what the kubelet decided"),
    "cri": ("kubelet", "cri", "Container Runtime Interface v1 (gRPC)"),
    "oci": ("cri", "shim", "OCI runtime specification: the config.json its handler runs"),
    "vm": ("kata", "QEMU", "the virtual machine: command line and QMP"),
    "agent": ("kata", "agent", "calls to the agent inside the virtual machine"),
    "failure": ("", "", "what failed"),
}
DOCUMENT_LINES = 14
WIDTH = 140  # of a line that is shown in short
NOISE = ("managedFields", "kubectl.kubernetes.io/last-applied-configuration")  # says the document again


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """One record, its time counted from the pod's first."""

    at_ns: int
    joint: str
    what: str
    document: Any
    after_ms: float
    took_ms: float | None


@click.command()
@click.option("-n", "--namespace", default="default", show_default=True)
@click.option("--full", is_flag=True, help="Whole documents.")
@click.option("--joint", type=click.Choice(list(CHAIN)), help="One joint only.")
@click.option("-o", "form", type=click.Choice(["text", "json"]), default="text")
@click.argument("pod")
@click.pass_obj
def trace(config: Config, namespace: str, full: bool, joint: str | None, form: str, pod: str) -> None:
    """What crossed each joint for POD (a name, NAMESPACE/NAME or a uid; a deleted pod's last record works too)."""
    uid = find_uid(config, pod, namespace)
    found = [line for line in recorder.records(config.trace_dir, uid) if joint in (None, line.get("joint"))]
    if not found:
        raise NotFound(
            what=f"trace pod {pod}",
            cause=f"the recorder has nothing under {config.trace_dir}/{uid}.jsonl",
            remedy="sudo, if you are not root; records end with `nacre reset`",
        )
    if form == "json":
        for line in found:
            print(json.dumps(line))
        return
    for text in render(list(crossings(found)), None if full else DOCUMENT_LINES):
        output.say(text)


def find_uid(config: Config, pod: str, namespace: str) -> str:
    """The recorder's key: asked of the API, else (node down, pod deleted) found in the records themselves, the newest first."""
    if os.path.exists(f"{config.trace_dir}/{os.path.basename(pod)}.jsonl"):
        return os.path.basename(pod)
    try:
        return trace_uid(cluster.find_pod(config, pod, namespace))
    except Failure as unfound:
        space, _, name = pod.rpartition("/")
        for uid in _recorded_newest_first(config):
            if _is_of(recorder.records(config.trace_dir, uid), space or namespace, name):
                return uid
        raise unfound


def _recorded_newest_first(config: Config) -> list[str]:
    try:
        with os.scandir(config.trace_dir) as entries:
            files = [(e.stat().st_mtime_ns, e.name.removesuffix(".jsonl").removesuffix(".1")) for e in entries]
    except (FileNotFoundError, PermissionError):
        return []
    return [uid for _when, uid in sorted(files, reverse=True)]


def _is_of(records: Iterator[dict[str, Any]], namespace: str, name: str) -> bool:
    for line in records:
        document = line.get("document")
        metadata = document.get("metadata") if isinstance(document, dict) else None
        if line.get("joint") == "api" and isinstance(metadata, dict):
            return metadata.get("name") == name and metadata.get("namespace") == namespace
    return False


def crossings(records: list[dict[str, Any]]) -> Iterator[Crossing]:
    """Records in the order of their times."""
    ordered = sorted(records, key=lambda line: int(line["at_ns"]))
    first = int(ordered[0]["at_ns"]) if ordered else 0
    for line in ordered:
        yield Crossing(
            at_ns=int(line["at_ns"]),
            joint=str(line.get("joint")),
            what=str(line.get("what")),
            document=line.get("document"),
            after_ms=(int(line["at_ns"]) - first) / 1e6,
            took_ms=int(line["took_ns"]) / 1e6 if "took_ns" in line else None,
        )


def render(chain: list[Crossing], limit: int | None) -> Iterator[str]:
    """The picture, top down: a heading whenever the joint changes, the document beneath it, at most `limit` lines of each."""
    if not chain:
        yield "nothing has crossed a joint yet"
        return
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(chain[0].at_ns / 1e9))
    yield f"the chain, times from the first crossing at {began}"
    joint = ""
    for crossing in chain:
        if crossing.joint != joint:
            joint = crossing.joint
            upper, lower, standard = CHAIN.get(joint, ("", "", joint))
            arrow = f"{upper} ──▶ {lower}   " if lower else ""
            yield ""
            yield output.paint(f"{arrow}{standard}", "bad" if joint == "failure" else "bold")
        took = f", {crossing.took_ms:.1f} ms" if crossing.took_ms is not None else ""
        yield f"  {output.paint(f'{crossing.after_ms:9.1f} ms', 'dim')}  {crossing.what}{took}"
        yield from _document(crossing.document, limit)


def _document(document: Any, limit: int | None) -> Iterator[str]:
    if document in (None, {}, [], ""):
        return
    if limit is not None:
        document = without_noise(document)
    lines = document.splitlines() if isinstance(document, str) else _tree(document)
    shown = lines if limit is None or len(lines) <= limit + 1 else lines[:limit]
    for line in shown:
        yield output.paint("                  │ ", "dim") + (
            line if limit is None or len(line) <= WIDTH else line[: WIDTH - 1] + "…"
        )
    if len(shown) < len(lines):
        yield output.paint(f"                  │ … {len(lines) - len(shown)} more lines (--full)", "dim")


def without_noise(document: Any) -> Any:
    """`document` without what only repeats it, for the short form."""
    if isinstance(document, dict):
        return {key: without_noise(value) for key, value in document.items() if key not in NOISE}
    if isinstance(document, list):
        return [without_noise(item) for item in document]
    return document


def _tree(document: Any) -> list[str]:
    """YAML reads better than JSON; libyaml's own emitter where it is there."""
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(document, Dumper=dumper, sort_keys=False, width=140, allow_unicode=True)
    return text.rstrip("\n").split("\n")
