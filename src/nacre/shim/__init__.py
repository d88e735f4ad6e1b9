"""One supervisor per pod: it owns the pod's processes, their stdio, logs and exit codes, and outlives the daemon. A shim has several.

Called by cri (over the zygote's socket and each shim's own); imports runc, kata, oci, linux, and the standard library alone. It owns
STATE/pods/SANDBOX: the socket, shim.json, the pinned namespaces, and below containers/ each bundle, root and exit.json.

Modules: `zygote` forks shims; `shared` is a shim's process, `supervisor` one pod in it; `messages` what travels; `processes` children
and their ends; `streams` logs and terminals; `handler` the joint to a runtime,
`runc_handler` and `foreign_handler` two of them (`kata.handler` is the third).
"""
