"""The guest: PID 1 of a pod's virtual machine, which creates containers there with the very `nacre.runc` that the host uses.

`frames` and `protocol` are what the agent and the host's half (`nacre.kata`) agree on; `kata` imports nothing else of this package.
The rest runs inside the guest alone: `boot` (mounts, modules), `main` (the loop), `calls` (a request, an act), `containers`, `volumes`,
`machine`, `relay` (stdio). Imports `runc`, `oci`, `linux`; standard library only. Owns the guest; nothing of the host.
"""
