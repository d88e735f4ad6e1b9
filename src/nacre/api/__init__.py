"""The Kubernetes API server of a node: kinds, storage by revisions, watches, admission, streams to the kubelet.

Called by `nacre.cli.node`, which runs `service.Service`; everyone else meets it on its TLS port. May import `wire`, `config` and
`oci.errors`; never `controllers`, `kubelet` or `cri`. Owns `DATA/api.db`, `DATA/pki` and the admin kubeconfig.

How a request travels: `server` (TLS, identity, path) → `access` (may they) → `verbs` (get, list, write, delete) with
`decode` (JSON, YAML, protobuf into a tree), `kinds` (a table per kind: defaults, checks, columns), `managed` (who owns which
field) → `store` (SQLite, one revision for all). `schema` holds the structure extracted from Kubernetes' definitions.
"""
