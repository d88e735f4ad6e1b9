"""A pod in a virtual machine of its own: QEMU, its template and clones, the host's end of the agent channel.

Called by shim (`handler.KataHandler`, inside a pod's supervisor), by cri (`template.open_sealed`), by the command line (`enable`,
`accelerator`) and as the OCI runtime `nacre-kata`. Imports agent (the protocol's words), runc, oci, linux, and the standard library
alone. Owns DATA/kata/{appliance,template}; a running VM's files lie in its pod's directory and are its shim's.

Modules: `machine` is a VM's command line as data, `process` starts it confined, `qmp` and `channel` speak to QEMU and to the agent,
`vm` is one running machine, `template` the saved one that others are cloned from, `sizing` what a pod's limits come to, `volumes`
what its mounts mean, `handler` the joint to the shim, `appliance` the guest's kernel and root.
"""
