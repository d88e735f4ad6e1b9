"""The CRI service: pod sandboxes and containers over gRPC, images, exec and attach streams, statistics.

Called by the kubelet (or crictl, or a real kubelet) over `config.cri_socket`; imports images, network, shim's messages, oci, linux, wire. It
owns DATA/cri.db (what callers were told), the zygote, and STATE/pods/SANDBOX together with that pod's shim.

Modules: `service` starts and stops it all; `runtime` and `image_service` answer the two gRPC services; `sandboxes` and `containers` do
the work; `spec` turns pod configuration into an OCI specification; `shims` speaks to zygote and shims; `store` is the database;
`recover` finds what lives after a restart; `streaming` serves exec and attach URLs; `answers` makes protobuf of records.
"""
