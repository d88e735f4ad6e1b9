"""The joint: one Network a node, which is the built-in bridge or a chain of CNI plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nacre.config import Config
from nacre.network.builtin import BuiltinNetwork
from nacre.network.types import Attachment, NetworkStatus, PodNetwork

if TYPE_CHECKING:
    from nacre.network.cni import CniNetwork


class Network:
    """Blocking; called in threads, several at once. `start` before anything but `stop`.

    `close` is for a daemon that ends while its pods go on, `stop` for a node that is to leave nothing behind.
    """

    def __init__(self, config: Config) -> None:
        self._part: BuiltinNetwork | CniNetwork
        if config.cni_dir:
            from nacre.network.cni import CniNetwork

            self._part = CniNetwork(config)
        else:
            self._part = BuiltinNetwork(config)

    def start(self) -> None:
        """Make the node's network, or find it again. Raises RangeTaken, NetworkFailure."""
        self._part.start()

    def close(self) -> None:
        self._part.close()

    def stop(self) -> list[str]:
        """Remove all that is the node's, also after a killed daemon and from another process; sentences about what stays and why."""
        return self._part.stop()

    def status(self) -> NetworkStatus:
        """The CRI's NetworkReady; with CNI the configuration directory is read again each time."""
        return self._part.status()

    @property
    def cidr(self) -> str:
        """The pods' range; empty when CNI plugins decide."""
        return self._part.cidr

    @property
    def gateway(self) -> str:
        """The host's address in that range; empty when CNI plugins decide."""
        return self._part.gateway

    def attach(self, pod: PodNetwork, netns: str) -> Attachment:
        """Connect the namespace at path `netns`; a failure leaves nothing behind. Raises Failure."""
        return self._part.attach(pod, netns)

    def detach(self, sandbox_id: str) -> None:
        """Take the pod off the network, also if its namespace is gone; not attached is fine."""
        self._part.detach(sandbox_id)

    def settle(self) -> None:
        """Wait until what was detached is gone from the host."""
        self._part.settle()

    def collect(self, live: set[str]) -> None:
        """Take away what belongs to no sandbox of `live`; for the daemon's start and once in a while."""
        self._part.collect(live)
