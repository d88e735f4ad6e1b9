"""The joint between a shim and its runtime, under the name that its users above know; it lies in `oci` so that runtimes below can see it."""

from nacre.oci.handler import Exit, Handler, Host, Rootfs, Sandbox, Stdio

__all__ = ["Exit", "Handler", "Host", "Rootfs", "Sandbox", "Stdio"]
