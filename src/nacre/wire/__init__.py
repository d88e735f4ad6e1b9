"""What travels on the joints: CRI messages and methods, and the Kubernetes API client that kubelet and controllers share.

Called by cri, kubelet, controllers and cli; imports nothing of nacre but `oci` (errors). It owns no state.
"""
