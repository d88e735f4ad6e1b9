"""The loops that bring the cluster's state nearer to what its objects say: scheduler, namespaces, service accounts, collectors.

Called by `nacre.cli.node` through `service.Service`. Clients of the API and nothing else: they import `wire.kube`, `config` and
`oci.errors`, never `api`, `kubelet` or `cri`, and would work as well against any other API server. They own no files.
"""
