"""A machine within this one: network and mounts of its own, so that a whole node can be compared before and after, to the last route.

A holder process keeps the namespaces; commands enter them with nsenter. What a dead holder leaves the kernel takes back. Cgroups and
processes stay this machine's, and are counted by the node's prefix (see leftovers).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
HERE = Path(__file__).parent
# sysfs shows the links of the network namespace it was mounted in; the cgroup hierarchies below it are taken along
SET_UP = """set -e
mount -t tmpfs mine "$0" && mkdir "$0/sys" && mount -t sysfs mine "$0/sys" && mount --rbind /sys/fs/cgroup "$0/sys/fs/cgroup"
umount -R -l /sys && mount --rbind "$0/sys" /sys && umount -R "$0/sys" && umount "$0"
ip link set lo up
echo 0 > /proc/sys/net/ipv4/ip_forward
echo ready
read line || true"""
LOOK = """import json, sys
from dataclasses import asdict
from pathlib import Path
from leftovers import look
print(json.dumps(asdict(look(Path(sys.argv[1])))))"""
SYSCTLS = (
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/forwarding",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/conf/lo/route_localnet",
)


@dataclass(frozen=True)
class Machine:
    pid: int  # of the holder
    prefix: Path
    others: set[str] = field(default_factory=set)  # mounts copied from this machine, whose owners may take them away meanwhile

    def run(self, *words: str, check: bool = True, stdin: str = "", timeout_s: int = 120, **environment: str) -> Any:
        command = ["nsenter", "-t", str(self.pid), "-n", "-m", "--wd=/", *words]
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, timeout=timeout_s, env=os.environ | environment
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def nacre(self, *words: str, check: bool = True, stdin: str = "", **environment: str) -> Any:
        return self.run(str(BIN / "nacre"), "--prefix", str(self.prefix), *words, check=check, stdin=stdin, **environment)

    def ready(self, pod: str) -> None:
        self.nacre("kubectl", "wait", "--for=condition=Ready", f"pod/{pod}", "--timeout=30s")

    def _mounts(self) -> list[str]:
        return [line.split()[4] for line in self.run("cat", "/proc/self/mountinfo").stdout.splitlines()]

    def picture(self) -> dict[str, Any]:
        """Everything that a node may touch: the whole network and all mounts of these namespaces, and the node's own of the rest."""
        own: dict[str, Any] = json.loads(self.run(sys.executable, "-c", LOOK, str(self.prefix), PYTHONPATH=str(HERE)).stdout)
        sysctls = {name: self.run("cat", f"/proc/sys/{name}").stdout.strip() for name in SYSCTLS}
        return own | {
            "all mounts": sorted(set(self._mounts()) - self.others),
            "all addresses": [(one["ifname"], one["addr_info"]) for one in json.loads(self.run("ip", "-j", "addr").stdout)],
            "all routes": self.run("ip", "route", "show", "table", "all").stdout.split("\n"),
            "all rules": self.run("nft", "list", "ruleset").stdout,
            "sysctls": sysctls,
        }


@contextmanager
def machine(prefix: Path, place: Path) -> Iterator[Machine]:
    """`place`: an empty directory. The node under `prefix` is reset at the end."""
    holder = subprocess.Popen(
        ["unshare", "--net", "--mount", "bash", "-c", SET_UP, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == "ready\n"
        held = Machine(holder.pid, prefix)
        held.others.update(held._mounts())
        try:
            yield held
        finally:
            held.nacre("reset", "--yes")
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()
