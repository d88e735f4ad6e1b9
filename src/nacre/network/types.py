"""What crosses the network's joint: a pod's wish, what it got, and the ways it can fail."""

from __future__ import annotations

from dataclasses import dataclass, field

from nacre.oci.errors import AlreadyExists, Failure, Invalid

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
INTERFACE = "eth0"


@dataclass(frozen=True, slots=True, kw_only=True)
class PortMapping:
    """A port of the pod that the host forwards; `host_port` 0 means none."""

    container_port: int
    host_port: int = 0
    protocol: str = "tcp"  # tcp, udp, sctp, in any case
    host_ip: str = ""  # empty or 0.0.0.0: every address of the host

    def __post_init__(self) -> None:
        object.__setattr__(self, "protocol", self.protocol.lower())
        if self.protocol not in PROTOCOLS:
            raise Invalid(what="forward a host port", cause=f"protocol {self.protocol!r}", remedy="use TCP, UDP or SCTP")
        if not (0 < self.container_port < 65536 and 0 <= self.host_port < 65536):
            raise Invalid(what="forward a host port", cause=f"port {self.host_port} to {self.container_port} is out of range")

    @property
    def any_address(self) -> bool:
        return self.host_ip in ("", "0.0.0.0")

    def __str__(self) -> str:
        return f"{self.host_ip or '0.0.0.0'}:{self.host_port}/{self.protocol}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PodNetwork:
    """A pod as its network needs it."""

    sandbox_id: str
    name: str = ""
    namespace: str = ""
    uid: str = ""
    ports: tuple[PortMapping, ...] = ()
    hostname: str = ""
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.namespace}/{self.name}" if self.name else self.sandbox_id[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """What a pod got; a VM is given the same inside the guest."""

    interface: str = INTERFACE
    mac: str = ""
    addresses: list[str] = field(default_factory=list)  # "10.118.0.7/16"
    gateway: str = ""
    routes: list[tuple[str, str]] = field(default_factory=list)  # (destination, gateway or ""), the default one among them
    mtu: int = 1500
    dns: list[str] = field(default_factory=list)  # lines of resolv.conf that the network asks for; empty: the node's


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkStatus:
    """The CRI's NetworkReady condition."""

    ready: bool
    reason: str = ""
    message: str = ""


class NetworkFailure(Failure):
    """A pod's network could not be made, checked or taken away."""


class NetworkNotReady(Failure):
    """The node has no network to attach pods to yet."""


class RangeTaken(AlreadyExists):
    """The pods' address range is routed elsewhere on this host."""


class RangeFull(Failure):
    """Every address of the range is leased."""


class HostPortTaken(AlreadyExists):
    """A host port is forwarded to another pod, or a process of the host listens on it."""


class PluginFailed(NetworkFailure):
    """A CNI plugin reported an error, was killed at its deadline, or is not installed."""
