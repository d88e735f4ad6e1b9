"""The kernel's interface: system calls, mounts, namespaces, capabilities, seccomp, cgroups, netlink. The only place for ctypes.

Called by every package that touches the host (runc, shim, network, kata, agent). Imports the standard library and, for the shape of
what a user meets, `nacre.oci.errors`. Owns no files and no lasting state: every function takes what it acts on and returns what it
made; a descriptor that is returned belongs to the caller, and all of them are close-on-exec.

Modules: `libc` (prototypes, SyscallError, owned), `paths`, `mounts`, `namespaces`, `process`, `capabilities`, `memfd`, `seccomp`, `cgroups`
(with `cgroup_values` and `device_bpf` below it); `netlink`, `links`, `nftables`, `tap` for the network.
"""
