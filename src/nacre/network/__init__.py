"""Pod networks: nacre's own bridge over netlink, or a chain of CNI plugins when the node is given a CNI configuration directory.

For: the CRI service, which calls `Network.attach` and `detach` in threads, once a pod, and gives pods the lines of `resolv_conf`; the
command line, which calls `findings` (doctor) and `Network.stop` (down, reset). May import `nacre.linux`, `nacre.oci.errors`,
`nacre.config` and the standard library.

Owns on the host: the bridge `config.bridge` with its pods' veth links, the nftables table `ip INSTANCE`, the setting
net.ipv4.ip_forward while a node is up (its former value is kept in the bridge's alias, so that it survives a kill), and

    DATA/network/leases/ADDRESS     one file an address in use: which sandbox, its host ports (see leases.py)
    DATA/network/cni/SANDBOX.json   one file a pod attached by CNI: what DEL has to be given (see cni.py)
"""

from nacre.network.findings import findings
from nacre.network.network import Network
from nacre.network.resolvers import resolv_conf
from nacre.network.types import (
    Attachment,
    HostPortTaken,
    NetworkFailure,
    NetworkNotReady,
    NetworkStatus,
    PodNetwork,
    PortMapping,
)

__all__ = [
    "Attachment",
    "HostPortTaken",
    "Network",
    "NetworkFailure",
    "NetworkNotReady",
    "NetworkStatus",
    "PodNetwork",
    "PortMapping",
    "findings",
    "resolv_conf",
]
