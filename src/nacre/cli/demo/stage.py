"""One run of the demo: the node it runs on, the commands it shows, what it deletes afterwards."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field

from nacre.cli import addons, cluster, control, kubectl, lifecycle, output
from nacre.cli.demo import proof
from nacre.config import Config
from nacre.oci.errors import Failure, NotFound
from nacre.wire.kube import Object

READY_LIMIT_S = 120.0
NAMESPACE = "nacre-demo"  # of the demo alone: a pod called nginx may be somebody's
IMAGES = ("nacre.local/nginx:demo", "nacre.local/openssh:demo")


class CommandFailed(Failure):
    """A command of the demo ended with an error."""


class PodNotReady(Failure):
    """A pod of the demo did not become Ready in time."""


def manifest(name: str) -> str:
    """The path of an example manifest: beside the package in a wheel, in the checkout's examples/ otherwise."""
    import nacre

    package = os.path.dirname(os.path.abspath(nacre.__file__))
    for directory in (f"{package}/examples", os.path.normpath(f"{package}/../../examples")):
        if os.path.exists(f"{directory}/{name}"):
            return f"{directory}/{name}"
    raise NotFound(what=f"find example {name}", cause=f"neither in {package}/examples nor in the checkout")


@dataclass(slots=True)
class Stage:
    """`owns_node`: this run started the node and takes it down; `pods` are those that were applied."""

    config: Config
    vms: bool = True
    owns_node: bool = False
    pods: list[str] = field(default_factory=list)
    place: str = ""
    held: frozenset[str] = frozenset()  # the node's own on this host, before it is taken down

    def open(self) -> None:
        """The node up and Ready, the demo's images there, kata enabled; each step says what it does."""
        self.place = tempfile.mkdtemp(prefix="nacre-demo-")
        heading("The node")
        self.owns_node = control.running(self.config) is None
        lifecycle.start(self.config)
        ready, message = lifecycle.wait_until_ready(self.config, READY_LIMIT_S)
        if not ready:
            raise lifecycle.NotReady(what="start the node", cause=message, remedy="nacre logs kubelet")
        from nacre.cli import image

        image.ensure_demo(self.config, IMAGES)
        if self.vms and not addons.is_enabled(self.config, addons.ADDONS[0]):
            heading("nacre enable kata")
            from nacre.cli.addons import kata as addon

            addon.enable(self.config)
        self._forget()
        self.kubectl("create", "namespace", NAMESPACE, quiet=True)

    def close(self) -> None:
        """Delete the demo's objects and, if it was ours, take the node down; never raises what would hide the first error."""
        heading("Taking everything down")
        self.held = proof.held(self.config)
        try:
            if control.running(self.config):
                self._forget(quiet=False)
        except Failure as failure:
            output.failure(failure)
        if self.owns_node:
            lifecycle.stop(self.config, grace_s=1)
        if self.place:
            shutil.rmtree(self.place)

    def _forget(self, *, quiet: bool = True) -> None:
        """The namespace away with all that is in it, also what a killed demo left."""
        self.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", quiet=quiet)

    def kubectl(self, *words: str, quiet: bool = False) -> str:
        """Run the real kubectl, shown as a user would type it; answers its output. Raises CommandFailed with what it said."""
        if "namespace" not in words:
            words = ("-n", NAMESPACE, *words)
        if not quiet:
            output.say(f"$ nacre kubectl {shlex.join(words)}", "bold")
        environment = os.environ | {"KUBECONFIG": self.config.admin_conf}
        done = subprocess.run([kubectl.find(), *words], capture_output=True, text=True, env=environment, check=False)
        if not quiet:
            for line in (done.stdout + done.stderr).splitlines():
                output.say(f"  {line}")
        if done.returncode:
            said = tuple((done.stdout + done.stderr).splitlines())
            raise CommandFailed(what=f"kubectl {shlex.join(words)}", cause=f"exit code {done.returncode}", evidence=said)
        return done.stdout

    def apply(self, path: str, name: str) -> tuple[Object, float]:
        """Apply a manifest and wait until its pod is Ready: (pod, seconds from starting kubectl). Raises PodNotReady, explained."""
        self.pods.append(name)
        began = time.monotonic()
        self.kubectl("apply", "-f", path)
        pod = cluster.wait_pod(self.config, NAMESPACE, name, _settled, READY_LIMIT_S)
        if pod is None or not cluster.is_ready(pod):
            raise self._not_ready(name, pod)
        return pod, time.monotonic() - began

    def _not_ready(self, name: str, pod: Object | None) -> Failure:
        from nacre.cli import explain

        if pod is None:
            return PodNotReady(what=f"run pod {name}", cause="the API never showed it", remedy="nacre logs api")
        verdict = explain.examine(self.config, pod, cluster.events_of(self.config, pod))
        return verdict.failure or PodNotReady(
            what=f"run pod {name}", cause=verdict.headline, remedy=f"nacre trace {NAMESPACE}/{name}"
        )


def heading(text: str) -> None:
    output.say()
    output.say(f"── {text} " + "─" * max(0, 100 - len(text)), "bold")


def address(pod: Object) -> str:
    return str(pod["status"]["podIP"])


def _settled(pod: Object) -> bool:
    return cluster.is_ready(pod) or cluster.has_failed(pod)
