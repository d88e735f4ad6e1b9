"""Kubeconfig files (client-go, clientcmd/v1) with certificates inside; standard library only."""

from __future__ import annotations

import base64
import json
import os


def write(path: str, *, server: str, pki: str, user: str, cluster: str = "nacre") -> None:
    """Write to `path` (mode 0600, atomically) how `user`, whose files lie in directory `pki`, reaches `server` (URL).

    A file that says the same already is left alone.
    """
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": cluster, "cluster": {"server": server, "certificate-authority-data": _inline(f"{pki}/ca.crt")}}],
        "users": [
            {
                "name": f"{cluster}-{user}",
                "user": {
                    "client-certificate-data": _inline(f"{pki}/{user}.crt"),
                    "client-key-data": _inline(f"{pki}/{user}.key"),
                },
            }
        ],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": f"{cluster}-{user}"}}],
        "current-context": cluster,
    }
    write_atomic(path, json.dumps(document, indent=2).encode() + b"\n")  # JSON is YAML


def write_atomic(path: str, data: bytes, mode: int = 0o600) -> None:
    """Give `path` the content `data`: written aside, synced, renamed; a kill leaves the old file or the new one."""
    try:
        with open(path, "rb") as file:
            if file.read() == data:
                return
    except FileNotFoundError:
        pass
    os.makedirs(os.path.dirname(path), exist_ok=True)
    aside = f"{path}.{os.getpid()}.tmp"
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.rename(aside, path)


def _inline(path: str) -> str:
    with open(path, "rb") as file:
        return base64.b64encode(file.read()).decode()
