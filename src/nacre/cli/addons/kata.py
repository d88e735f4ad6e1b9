"""The add-on `kata`: the appliance built, a trial VM booted, its overhead measured, the RuntimeClass written, a pod run to prove it."""

from __future__ import annotations

import json
from typing import Any

from nacre.cli import cluster, output
from nacre.cli.addons import LABEL
from nacre.config import Config
from nacre.oci.errors import Failure
from nacre.wire.kube import ApiError, Kube, Object

APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
CLASS_PATH = "/apis/node.k8s.io/v1/runtimeclasses"
PODS_PATH = "/api/v1/namespaces/default/pods"
PROOF = "nacre-kata-proof"
PROOF_LIMIT_S = 120.0


class ProofFailed(Failure):
    """The add-on's proof pod did not run."""


def enable(config: Config) -> None:
    """Everything that `runtimeClassName: kata` needs; may be repeated, and then takes only the proof's time."""
    from nacre.kata import enable as kata

    cluster.get(config, CLASS_PATH)  # the node that it is for: without one, nothing is built in vain
    prepared = kata.prepare(config, progress=lambda text: output.say(f"  {text}"))
    for line in prepared.findings:
        output.say(f"  {line}")
    write_class(config, prepared.overhead)
    output.say(f"  RuntimeClass kata, overhead {_shown(prepared.overhead)} a pod", "ok")
    try:
        with output.step("a pod in a virtual machine says its kernel"):
            kernel = prove(config)
    except Failure:
        disable(config)  # what is not proven is not on
        raise
    output.say(f"  it ran under Linux {kernel}", "ok")
    output.say("kata is on: runtimeClassName: kata")


def _shown(overhead: dict[str, str]) -> str:
    return ", ".join(f"{name} {amount}" for name, amount in overhead.items())


def disable(config: Config) -> None:
    async def work(kube: Kube) -> None:
        try:
            await kube.delete(f"{CLASS_PATH}/kata")
        except ApiError as error:
            if error.code != 404:
                raise

    cluster.call(config, "delete RuntimeClass kata", work)


def runtime_class(overhead: dict[str, str]) -> Object:
    """The object; `overhead` is what one VM costs beyond its containers, as Kubernetes quantities.

    Manifests that name RuntimeClass kata bring one along without overhead (examples/nginx-kata.yaml). To `kubectl apply` this one says
    that it came of such a manifest, so that applying one leaves the overhead, which cannot be changed, as it is.
    """
    plain = {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"annotations": {}, "name": "kata"},
        "handler": "kata",
    }
    applied = {APPLIED: json.dumps(plain, sort_keys=True, separators=(",", ":")) + "\n"}
    metadata = {"name": "kata", "labels": {LABEL: "kata"}, "annotations": applied}
    return plain | {"metadata": metadata, "overhead": {"podFixed": overhead}}


def write_class(config: Config, overhead: dict[str, str]) -> None:
    """Create the RuntimeClass; an older one with another overhead is replaced (the field is immutable)."""
    wanted = runtime_class(overhead)

    async def work(kube: Kube) -> None:
        try:
            there = await kube.get(f"{CLASS_PATH}/kata")
            if (there.get("overhead") or {}).get("podFixed") == overhead:
                return
            await kube.delete(f"{CLASS_PATH}/kata")
        except ApiError as error:
            if error.code != 404:
                raise
        await kube.create(CLASS_PATH, wanted, fieldManager="nacre")

    cluster.call(config, "write RuntimeClass kata", work)


def proof_pod(image: str) -> Object:
    """A pod that says the kernel it runs under through its termination message."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": PROOF, "labels": {LABEL: "kata"}},
        "spec": {
            "runtimeClassName": "kata",
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "containers": [
                {
                    "name": "proof",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["/bin/sh", "-c", "read _ _ release _ < /proc/version; echo $release > /dev/termination-log"],
                }
            ],
        },
    }


def prove(config: Config) -> str:
    """Run the proof pod, answer the kernel release it saw, leave nothing of it. Raises ProofFailed with the first cause."""
    from nacre.cli import proof_image

    pod = proof_pod(proof_image.ensure(config))

    async def begin(kube: Kube) -> Any:
        return await kube.create(PODS_PATH, pod, fieldManager="nacre")

    forget(config)
    cluster.call(config, "create the proof pod", begin)
    try:
        ended = cluster.wait_pod(config, "default", PROOF, _ended, PROOF_LIMIT_S * config.patience)
        return _kernel(config, ended)
    finally:
        forget(config)


def _ended(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed") or cluster.is_stuck(pod)


def _kernel(config: Config, pod: Object | None) -> str:
    from nacre.cli import explain

    states = (pod or {}).get("status", {}).get("containerStatuses") or [{}]
    message = ((states[0].get("state") or {}).get("terminated") or {}).get("message", "").strip()
    if pod and message and pod["status"]["phase"] == "Succeeded":
        return str(message)
    if pod is None:
        raise ProofFailed(what="run the proof pod", cause="the API never showed it", remedy="nacre logs api")
    verdict = explain.examine(config, pod, cluster.events_of(config, pod))
    if verdict.failure:
        raise verdict.failure
    raise ProofFailed(what="run the proof pod", cause=verdict.headline, remedy=f"nacre trace {PROOF}")


def forget(config: Config) -> None:
    """Delete the proof pod and wait until it is gone."""

    async def work(kube: Kube) -> None:
        try:
            await kube.delete(f"{PODS_PATH}/{PROOF}", {"gracePeriodSeconds": 0})
            listed = await kube.get(PODS_PATH, fieldSelector=f"metadata.name={PROOF}")
            version = listed["metadata"]["resourceVersion"]
            if not listed["items"]:
                return
            async for event in kube.watch(PODS_PATH, version, fieldSelector=f"metadata.name={PROOF}", timeoutSeconds=30):
                if event["type"] == "DELETED":
                    return
        except ApiError as error:
            if error.code != 404:
                raise

    cluster.call(config, "delete the proof pod", work)
