"""Debian's containerd with runc, under directories, socket, CNI network and cgroup of its own; the host's containerd is not touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from nacre.cli.bench import engine
from nacre.linux import links
from nacre.oci.errors import Failure, NotFound

BRIDGE = "nacrebench0"
SUBNET = "10.87.0.0/16"
PLUGIN_DIRS = ("/usr/lib/cni", "/opt/cni/bin", ".cache/peers/usr/lib/cni")

# What a kubelet's containerd is given, plus restrict_oom_score_adj, without which no pod starts where the limit cannot be lowered.
SETTINGS = """version = 2
root = "{place}/root"
state = "{place}/state"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{place}/containerd.sock"
[ttrpc]
  address = "{place}/containerd.sock.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_tcp_service = true
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{place}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "{runc}"
        SystemdCgroup = {systemd}
"""


@contextmanager
def containerd(place: str, archive: str, runtime: str = "", slice: str = "") -> Iterator[engine.Engine]:
    """A running containerd with the image imported; `runtime` is another OCI binary than runc, `slice` one of systemd's for the pods.

    Raises NotFound naming what is missing.
    """
    binary, runc = _need("containerd", "containerd"), runtime or _need("runc", "runc")
    plugins = next((path for path in map(os.path.abspath, PLUGIN_DIRS) if os.access(f"{path}/bridge", os.X_OK)), "")
    if not plugins:
        raise NotFound(what="set up containerd", cause=f"no CNI plugins in {', '.join(PLUGIN_DIRS)}", remedy="./run bench")
    own = f"{place}/containerd"
    os.makedirs(f"{own}/cni")
    with open(f"{own}/config.toml", "w") as file:
        file.write(SETTINGS.format(place=own, pause=engine.PAUSE, plugins=plugins, runc=runc, systemd=str(bool(slice)).lower()))
    with open(f"{own}/cni/10-bench.conflist", "w") as file:
        json.dump(_network(own), file)
    with engine.group("containerd") as group, open(f"{own}/log", "wb") as log:
        process = subprocess.Popen(
            [binary, "--config", f"{own}/config.toml"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: engine.enter("containerd"),
        )
        made = engine.Engine(
            "containerd", f"{own}/containerd.sock", group, f"{own}/logs", lambda: _version(binary, runc), slice=slice
        )
        try:
            _await_socket(made, process, f"{own}/log")
            ctr = shutil.which("ctr") or os.path.join(os.path.dirname(binary), "ctr")
            engine.command([ctr, "--address", made.socket, "--namespace", "k8s.io", "images", "import", archive])
            yield made
        finally:
            made.close()
            process.terminate()
            process.wait(timeout=30)
            _clean(own)


def _need(name: str, package: str) -> str:
    found = shutil.which(name)
    if not found:
        raise NotFound(what="compare with containerd+runc", cause=f"no {name} in PATH", remedy=f"./run bench unpacks {package}")
    return found


def _version(containerd_binary: str, runc_binary: str) -> str:
    engine_said = engine.command([containerd_binary, "--version"]).split()
    return f"containerd {engine_said[2]}, {engine.command([runc_binary, '--version']).splitlines()[0]}"


def _await_socket(made: engine.Engine, process: subprocess.Popen[bytes], log: str) -> None:
    import grpc

    try:
        made.connect()
    except grpc.FutureTimeoutError as error:
        with open(log, errors="replace") as file:
            said = tuple(file.read().splitlines())
        state = f"it ended with {process.returncode}" if process.poll() is not None else "no answer within 30 s"
        raise Failure(what="start containerd", cause=state, evidence=said) from error


def _network(place: str) -> dict[str, object]:
    """Bridge and local addresses; no masquerade, which would cost containerd iptables runs that nacre does not need either."""
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": True,
        "ipam": {
            "type": "host-local",
            "dataDir": f"{place}/ipam",
            "ranges": [[{"subnet": SUBNET}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return {"cniVersion": "0.4.0", "name": "nacre-bench", "plugins": [bridge]}


def _clean(place: str) -> None:
    """Its mounts and its bridge; the cgroup takes the processes, the workplace the files."""
    from nacre.linux import mounts

    with open("/proc/self/mountinfo") as file:
        points = [line.split()[4] for line in file]
    for point in sorted((p for p in points if p.startswith(place + "/")), key=len, reverse=True):
        mounts.umount2(point, mounts.UnmountFlag.DETACH)
    if os.path.isdir(f"/sys/class/net/{BRIDGE}"):
        links.delete(BRIDGE)
