"""nacre runs Kubernetes pods on one machine: as namespaced containers, or each pod in a virtual machine of its own.

Packages, lowest first, each importing downwards only: linux, oci, runc, agent, kata, shim, network, images, and then cri, kubelet,
controllers and api, which never import one another and meet on sockets, under cli. `wire` holds what travels between them.
"""

__version__ = "0.1.0"
