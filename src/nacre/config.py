"""What a node is told: paths, ports, pod range, handlers. Read once from `config.toml`, passed on, never global.

`--prefix DIR` goes before every path and gives the node an instance name of its own, from which bridge, nftables table and
cgroup take theirs, so that nodes and tests live side by side. Standard library only: every process may read it.
"""

from __future__ import annotations

import hashlib
import os
import socket
import tomllib
from dataclasses import dataclass, field, fields
from typing import Any

from nacre.linux.cgroup_names import slice_path
from nacre.oci.errors import Invalid


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerConfig:
    """One runtime handler: `runc` and `kata` are nacre's own, any other names an OCI runtime binary."""

    binary: str = ""  # path of a foreign OCI runtime; empty for nacre's own
    root: str = ""  # its --root; empty: STATE/NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class KataConfig:
    accelerator: str = "auto"  # auto (by trial), kvm, tcg
    template: bool = True  # off: every pod cold boots
    pool: int = 1  # warm clones kept; 0: cloned inside the pod's own cgroup, exact accounting
    memory_mib: int = 96  # guest RAM before the pod's own limits are added
    qemu: str = "qemu-system-x86_64"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole wish; `load` is the way to make one."""

    prefix: str = ""
    node_name: str = ""
    listen: str = "127.0.0.1"
    api_port: int = 17443  # 0: a free one, kept in the state directory
    kubelet_port: int = 17250
    pod_cidr: str = "10.118.0.0/16"
    cni_dir: str = ""  # a CNI configuration directory replaces the built-in bridge
    cni_bin_dirs: tuple[str, ...] = ("/opt/cni/bin", "/usr/lib/cni")
    insecure_registries: tuple[str, ...] = ()  # host:port spoken to in plain http; loopback ones always may be tried so
    cgroup_driver: str = "cgroupfs"  # or systemd, where it is the init
    patience: int = 1  # how many times as long as usual shims and virtual machines are waited for: for a slow or emulated host
    handlers: dict[str, HandlerConfig] = field(default_factory=dict)
    kata: KataConfig = field(default_factory=KataConfig)
    pods_per_shim: int = 16  # of handler runc; what one killed shim takes with it. 1: each pod has its own, of 4 MB

    @property
    def data(self) -> str:
        """What survives a reboot: databases, images, keys."""
        return f"{self.prefix}/var/lib/nacre"

    @property
    def state(self) -> str:
        """What does not: sockets, namespaces, bundles, shims' files."""
        return f"{self.prefix}/run/nacre"

    @property
    def etc(self) -> str:
        return f"{self.prefix}/etc/nacre"

    @property
    def log_dir(self) -> str:
        """Container logs, `POD_NAMESPACE_NAME_UID/CONTAINER/ATTEMPT.log` as every kubelet lays them out."""
        return f"{self.prefix}/var/log/nacre/pods"

    @property
    def kubelet_dir(self) -> str:
        return f"{self.data}/kubelet"

    @property
    def trace_dir(self) -> str:
        return f"{self.state}/trace"

    @property
    def admin_conf(self) -> str:
        return f"{self.etc}/admin.conf"

    @property
    def cri_socket(self) -> str:
        return f"{self.state}/cri.sock"

    @property
    def instance(self) -> str:
        """ "nacre", or "nacre-" and six hex digits of the prefix: what kernel objects of this node are called."""
        return "nacre" if not self.prefix else "nacre-" + hashlib.sha256(self.prefix.encode()).hexdigest()[:6]

    @property
    def bridge(self) -> str:
        return "nacre0" if not self.prefix else self.instance  # 12 characters: within IFNAMSIZ

    @property
    def cgroup_root(self) -> str:
        """Every cgroup of this node lies under this path of each hierarchy; systemd's driver makes it a slice."""
        return slice_path(f"{self.instance}.slice") if self.cgroup_driver == "systemd" else f"/{self.instance}"


def node_address(config: Config) -> str:
    """Where this node is reached: what it listens on; for a wildcard, the address that this machine has towards the world."""
    if config.listen not in ("0.0.0.0", "::"):
        return config.listen
    family, far, own = (
        (socket.AF_INET, "192.0.2.1", "127.0.0.1") if config.listen == "0.0.0.0" else (socket.AF_INET6, "2001:db8::1", "::1")
    )
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((far, 9))  # sends nothing: asks the routing table
        except OSError:
            return own
        return str(probe.getsockname()[0])


def load(prefix: str | None = None) -> Config:
    """The node's configuration under `prefix` (else NACRE_PREFIX, else none); a missing file is an empty one.

    Raises Invalid naming the file and the key for anything unknown or of the wrong type.
    """
    chosen = os.environ.get("NACRE_PREFIX", "") if prefix is None else prefix
    if chosen:
        chosen = os.path.realpath(chosen)
    path = f"{chosen}/etc/nacre/config.toml"
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except FileNotFoundError:
        document = {}
    except tomllib.TOMLDecodeError as error:
        raise Invalid(what=f"read {path}", cause=str(error), remedy=f"mend {path}") from error
    defaults: dict[str, Any] = {"prefix": chosen, "node_name": socket.gethostname().lower()}
    if chosen:
        defaults |= {"api_port": 0, "kubelet_port": 0, "pod_cidr": "auto"}
    handlers = {
        name: _typed(HandlerConfig, table, f"handlers.{name}", path) for name, table in document.pop("handlers", {}).items()
    }
    kata = _typed(KataConfig, document.pop("kata", {}), "kata", path)
    config: Config = _typed(Config, defaults | document | {"handlers": handlers, "kata": kata}, "", path)
    if config.cgroup_driver not in ("cgroupfs", "systemd"):
        raise Invalid(what=f"read {path}", cause=f"cgroup_driver is {config.cgroup_driver!r}", remedy="use cgroupfs or systemd")
    if config.pods_per_shim < 1:
        raise Invalid(what=f"read {path}", cause=f"pods_per_shim is {config.pods_per_shim}", remedy="1 gives each pod its own")
    if config.patience < 1:
        raise Invalid(what=f"read {path}", cause=f"patience is {config.patience}", remedy="1 is the usual one")
    return config


def _typed(kind: type, table: dict[str, Any], where: str, path: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    dotted = f"{where}." if where else ""
    for key, value in table.items():
        if key not in known:
            raise Invalid(what=f"read {path}", cause=f"unknown key {dotted}{key}", remedy=f"keys: {', '.join(sorted(known))}")
        default = getattr(kind(), key)
        if isinstance(default, tuple):
            table[key] = tuple(value)
        elif not isinstance(value, type(default)) or (isinstance(value, bool) != isinstance(default, bool)):
            raise Invalid(what=f"read {path}", cause=f"{dotted}{key} = {value!r} is not of type {type(default).__name__}")
    return kind(**table)
