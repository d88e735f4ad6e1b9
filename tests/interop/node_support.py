"""A whole node under a prefix of its own, driven as a user would: `nacre` and kubectl, nothing imported from nacre.

`Traces` is what a node can leave on a host. It is read from the kernel, not from nacre's records, and counts only what carries
the node's prefix or instance name, so that several nodes and tests side by side do not disturb one another.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
POOL = "/kata-pool"  # warm virtual machines wait for pods that are still to come: they belong to the node, and change when one is taken
BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """Everything of one node that the kernel knows of; two are equal when nothing came or went."""

    mounts: tuple[str, ...]
    cgroups: tuple[str, ...]
    links: tuple[str, ...]
    rules: tuple[str, ...]
    processes: tuple[str, ...]
    files: tuple[str, ...]


class Node:
    """One node under `prefix`, of the nacre in `bin`. `config` is written to its config.toml before the first start."""

    def __init__(self, prefix: Path, config: str = "", bin: Path = BIN) -> None:
        self.prefix, self._bin = prefix, bin
        (prefix / "etc/nacre").mkdir(parents=True, exist_ok=True)
        (prefix / "etc/nacre/config.toml").write_text(config)
        self.instance = "nacre-" + hashlib.sha256(str(prefix.resolve()).encode()).hexdigest()[:6]

    def nacre(self, *arguments: str, check: bool = True, timeout_s: int = 180) -> subprocess.CompletedProcess[str]:
        command = [str(self._bin / "nacre"), "--prefix", str(self.prefix), *arguments]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True, timeout_s: int = 120) -> str:
        command = [str(self._bin / "nacre"), "--prefix", str(self.prefix), "kubectl", *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(arguments)} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout + done.stderr

    @contextmanager
    def kubectl_stream(self, *arguments: str) -> Iterator[Iterator[str]]:
        """The lines of a kubectl that does not end by itself; it is ended with the block, and after two minutes at the latest."""
        command = [str(self._bin / "nacre"), "--prefix", str(self.prefix), "kubectl", "--request-timeout=120s", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                yield iter(process.stdout)
            finally:
                process.terminate()

    def apply(self, manifest: Mapping[str, object]) -> str:
        return self.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))

    def pod(self, name: str) -> dict[str, object]:
        document: dict[str, object] = json.loads(self.kubectl("get", "pod", name, "-o", "json"))
        return document

    def ready(self, name: str, timeout_s: int = 60) -> None:
        done = self.kubectl("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={timeout_s}s", check=False)
        if "condition met" not in done:
            raise AssertionError(f"{done}\n{self.kubectl('describe', 'pod', name)}\n{self.log_tail()}")

    def address(self, name: str) -> str:
        return self.kubectl("get", "pod", name, "-o", "jsonpath={.status.podIP}").strip()

    def log_tail(self, lines: int = 60) -> str:
        texts = (
            path.read_text(errors="replace").splitlines()[-lines:]
            for path in sorted(self.prefix.rglob("*.log"))
            if "pods" not in path.parts
        )
        return "\n".join("\n".join(text) for text in texts)

    @property
    def daemon(self) -> int:
        document = json.loads((self.prefix / "run/nacre/node.json").read_text())
        return int(document["pid"])

    def traces(self) -> Traces:
        return Traces(
            mounts=_mounts(str(self.prefix)),
            cgroups=_cgroups(self.instance),
            links=_links(self.instance),
            rules=_rules(self.instance),
            processes=_processes(str(self.prefix)),
            files=_files(self.prefix),
        )


def pod(name: str, image: str, *command: str, handler: str = "", **spec: object) -> dict[str, object]:
    """A one-container Pod manifest; `spec` overrides fields of the spec, `container` those of the container."""
    extra = spec.pop("container", {})
    assert isinstance(extra, dict)
    container = {"name": "main", "image": image, "imagePullPolicy": "IfNotPresent"} | extra
    if command:
        container["command"] = list(command)
    body: dict[str, object] = {"containers": [container], "terminationGracePeriodSeconds": 1} | spec
    if handler:
        body["runtimeClassName"] = handler
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": body}


def http_get(address: str, port: int = 80, timeout_s: float = 10) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _waiting(prefix: Path) -> tuple[str, ...]:
    """Directories of the warm pool's shims: they live, and have been given no sandbox yet."""
    found = prefix.glob("run/nacre/pods/*/shim.sock")
    return tuple(str(path.parent) for path in found if not (path.parent / "sandbox.json").exists())


def _mounts(prefix: str) -> tuple[str, ...]:
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        points = (line.split()[4] for line in file)
        waiting = _waiting(Path(prefix))
        return tuple(sorted(point for point in points if point.startswith(prefix + "/") and not point.startswith(waiting)))


def _cgroups(instance: str) -> tuple[str, ...]:
    found = []
    for directory, names, _files in os.walk("/sys/fs/cgroup"):
        for name in names:
            path = f"{directory}/{name}"
            if f"/{instance}" in path and POOL not in path:
                found.append(path)
    return tuple(sorted(found))


def _links(instance: str) -> tuple[str, ...]:
    """The node's bridge and whatever is plugged into it."""
    links = json.loads(subprocess.run(["ip", "-json", "link"], check=True, capture_output=True, text=True).stdout)
    return tuple(sorted(link["ifname"] for link in links if instance in (link["ifname"], link.get("master"))))


def _rules(instance: str) -> tuple[str, ...]:
    done = subprocess.run(["nft", "list", "ruleset"], check=True, capture_output=True, text=True)
    wanted, inside = [], False
    for line in done.stdout.splitlines():
        inside = (instance.replace("-", "_") in line or instance in line) if line.startswith("table") else inside
        wanted += [line] if inside else []
    return tuple(wanted)


def _processes(prefix: str) -> tuple[str, ...]:
    """Command lines of the processes that were told this prefix, on their command line or in their environment."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            if POOL in Path(f"/proc/{entry}/cgroup").read_text():
                continue
            command = Path(f"/proc/{entry}/cmdline").read_bytes()
            told = command + Path(f"/proc/{entry}/environ").read_bytes() + os.fsencode(os.readlink(f"/proc/{entry}/cwd"))
        except OSError:
            continue
        if prefix.encode() + b"\0" in told or prefix.encode() + b"/" in told:
            found.append(command.replace(b"\0", b" ").decode(errors="replace").strip())
    return tuple(sorted(found))


# Kept on purpose: images, keys, logs, records, compiled seccomp filters; and what a node's first pod makes for all that follow.
KEPT = (
    "var/lib/nacre/images",
    "var/lib/nacre/pki",
    "var/lib/nacre/kata",
    "var/log",
    "run/nacre/trace",
    "run/nacre/log",
    "run/nacre/kata",
)
KEPT += ("run/nacre/runc/.seccomp",)
STANDING = ("run/nacre/runc", "var/lib/nacre/snapshots", "var/lib/nacre/kubelet", "var/lib/nacre/kubelet/pods")


def _files(prefix: Path) -> tuple[str, ...]:
    """What a pod could leave under the prefix."""
    found: list[str] = []
    waiting = _waiting(prefix)
    for directory, names, files in os.walk(prefix):
        names[:] = [name for name in names if f"{directory}/{name}" not in waiting]
        relative = os.path.relpath(directory, prefix)
        names[:] = [name for name in names if os.path.normpath(f"{relative}/{name}") not in KEPT]
        found += [os.path.normpath(f"{relative}/{name}") for name in (*names, *files)]
    return tuple(sorted(path for path in found if path not in STANDING and not re.search(r"/(api|cri)\.db", path)))
