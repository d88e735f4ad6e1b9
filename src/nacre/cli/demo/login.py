"""(b) The login server: a privileged pod in a virtual machine, entered with a real ssh client, and what root meets in there.

The proof compares, it does not assume: a process of ours on the host carries a random word in its command line, which is looked for
inside; the first MiB of each of the host's block devices is hashed, and so is that of every block device inside.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nacre.cli import output
from nacre.cli.demo.stage import CommandFailed, Stage, address, heading, manifest
from nacre.oci.errors import Failure, NotFound
from nacre.wire.kube import Object

LOOK_LIMIT_S = 120.0
HEAD = 1 << 20  # bytes of a device that are compared
BLANK = hashlib.sha256(bytes(HEAD)).hexdigest()  # nothing to recognise: an empty slot, a new disk
OPTIONS = (
    "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectTimeout=20 "
    "-o PasswordAuthentication=no -o IdentitiesOnly=yes -F none"
)
LOOK = """echo "user $(id -un) on $(hostname)"
echo "kernel $(uname -r)"
mkdir -p /tmp/mine && mount -t tmpfs mine /tmp/mine && echo "mounted $(grep ' /tmp/mine ' /proc/mounts | cut -d ' ' -f 1-3)" && umount /tmp/mine
echo "processes $(ls -d /proc/[0-9]* | wc -l)"
echo WORD | grep -slF -f /dev/stdin /proc/[0-9]*/cmdline /proc/[0-9]*/environ | sed 's/^/found /'
echo "boot $(cat /proc/sys/kernel/random/boot_id)"
cd /sys/class/block && for d in *; do
  [ -e /dev/$d ] || mknod /tmp/node-$d b $(tr : ' ' < $d/dev) 2>/dev/null
  f=/dev/$d; [ -e $f ] || f=/tmp/node-$d
  [ "$(cat $d/size)" = 0 ] || echo "disk $d $(cat $d/size) $(head -c 1048576 $f 2>/dev/null | sha256sum | cut -d ' ' -f 1)"
  rm -f /tmp/node-$d
done"""


class MetTheHost(Failure):
    """From inside the virtual machine something of the host was met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a login found: `lines` for people; `found` host processes; `disks` name → hash of the first MiB."""

    lines: tuple[str, ...]
    found: tuple[str, ...]
    disks: dict[str, str]
    boot: str


def show(stage: Stage, *, compare: bool) -> None:
    """The login into the VM, checked; then, if wanted, the same pod under runc."""
    heading("A privileged login server, in a virtual machine")
    key = _fresh_key(stage)
    pod, ready_s = stage.apply(manifest("login-server.yaml"), "login")
    output.say(f"  Ready after {output.seconds(ready_s)}")
    with _marked_process() as word:
        seen = _login(stage, pod, key, word)
        hosts, closed = host_disks()
        _require_apart(seen, hosts)
        compared = f"{len(hosts)} compared" + (f", {', '.join(closed)} cannot be opened even on the host" if closed else "")
        output.say(
            f"  root inside met no process of the host, none of its disks ({compared}), another boot of another kernel.", "ok"
        )
        if compare:
            heading("The same pod without the virtual machine (runc), read-only")
            plain, _ready_s = stage.apply(_under_runc(stage), "login-runc")
            shared = _login(stage, plain, key, word)
            same = sorted({name for name, digest in hosts.items() if digest in shared.disks.values()})
            output.say(f"  the host's kernel; of its disks it could read {', '.join(same) or 'none here'}.", "warn")


def _fresh_key(stage: Stage) -> str:
    """A new key pair, its public half in the Secret that the pod mounts."""
    for tool in ("ssh", "ssh-keygen"):
        if not shutil.which(tool):
            raise NotFound(
                what="log in", cause=f"no {tool} in PATH", remedy="./run demo fetches it; or apt-get install openssh-client"
            )
    key = f"{stage.place}/key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "nacre-demo", "-f", key], check=True)
    stage.kubectl("create", "secret", "generic", "login-keys", f"--from-file=authorized_keys={key}.pub")
    return key


def _under_runc(stage: Stage) -> str:
    """The login server's manifest without its runtimeClassName, under another name."""
    with open(manifest("login-server.yaml")) as file:
        text = file.read()
    text = re.sub(r"^\s*runtimeClassName:.*\n", "", text, flags=re.MULTILINE).replace("name: login\n", "name: login-runc\n", 1)
    path = f"{stage.place}/login-runc.yaml"
    with open(path, "w") as file:
        file.write(text)
    return path


@contextmanager
def _marked_process() -> Iterator[str]:
    """A process on the host with a random word in its command line, for the time of the block."""
    word = f"nacre-demo-{secrets.token_hex(8)}"
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()", word])
    try:
        yield word
    finally:
        process.kill()
        process.wait()


def look_for(word: str) -> str:
    """The script that looks round. The word is split in it, and comes to grep by a pipe, so that neither finds itself."""
    half = len(word) // 2
    return LOOK.replace("WORD", f'"{word[:half]}""{word[half:]}"')


def _login(stage: Stage, pod: Object, key: str, word: str) -> Seen:
    """Log in as root and look round; shows what was seen."""
    target = f"root@{address(pod)}"
    output.say(f"$ ssh -i {os.path.basename(key)} {target}", "bold")
    words = ["ssh", "-i", key, *shlex.split(OPTIONS), target, look_for(word)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LOOK_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        said = tuple(part.decode(errors="replace") for part in (error.stdout or b"", error.stderr or b""))
        seen = tuple(line for part in said for line in part.splitlines())
        raise CommandFailed(what=f"ssh {target}", cause=f"it did not end within {LOOK_LIMIT_S:.0f} s", evidence=seen) from error
    if done.returncode:
        raise CommandFailed(
            what=f"ssh {target}", cause=f"exit code {done.returncode}", evidence=tuple((done.stdout + done.stderr).splitlines())
        )
    lines = tuple(done.stdout.splitlines())
    blank = [line for line in lines if line.endswith(BLANK)]
    for line in lines:
        if line not in blank:
            output.say(f"  {line}")
    if blank:
        output.say(f"  and {len(blank)} blank ones: slots for further images")
    disks = dict(line.split()[1:4:2] for line in lines if line.startswith("disk ") and len(line.split()) == 4)
    boot = next((line.split()[1] for line in lines if line.startswith("boot ")), "")
    return Seen(lines=lines, found=tuple(line for line in lines if line.startswith("found ")), disks=disks, boot=boot)


def host_disks() -> tuple[dict[str, str], list[str]]:
    """The host's block devices that hold something: (name → hash of the first MiB, names of those that could not be opened)."""
    disks, closed = {}, []
    for name in sorted(os.listdir("/sys/class/block")):
        try:
            with open(f"/sys/class/block/{name}/size") as file:
                if file.read().strip() == "0":
                    continue
            with open(f"/dev/{name}", "rb") as device:
                digest = hashlib.sha256(device.read(HEAD)).hexdigest()
        except OSError:
            closed.append(name)
            continue
        if digest != BLANK:
            disks[name] = digest
    return disks, closed


def _require_apart(seen: Seen, hosts: dict[str, str]) -> None:
    with open("/proc/sys/kernel/random/boot_id") as file:
        own_boot = file.read().strip()
    shared = sorted(name for name, digest in seen.disks.items() if digest in hosts.values())
    met = [*seen.found, *(f"disk {name} is one of the host's" for name in shared)]
    if seen.boot == own_boot:
        met.append(f"boot id {own_boot} is the host's")
    if met:
        raise MetTheHost(what="look round inside the login server", cause="; ".join(met), evidence=seen.lines)
