"""The demo's images as data: which packages, which files of our own, which configuration. `build_demo` turns them into images."""

from __future__ import annotations

from dataclasses import dataclass, field

SHARED = ("base-files", "bash", "coreutils", "dash", "findutils", "grep", "hostname", "libc6", "sed")
# Packages that others depend on for their maintainer scripts, for Perl, or for being a booted system: nothing of them runs here.
LEFT_OUT = (
    "adduser", "debconf", "debconf-2.0", "debianutils", "dpkg", "gcc-*-base", "init-system-helpers", "install-info", "libdb5*",
    "libfile-find-rule-perl", "libgdbm*", "libnumber-compare-perl", "libpam-modules*", "libpam-runtime", "libperl*",
    "libsemanage*", "libsepol*", "libtext-*-perl", "lsb-base", "mawk", "openssh-sftp-server", "passwd", "perl*", "runit-helper",
    "sensible-utils", "sysvinit-utils", "tar", "ucf", "usrmerge", "usr-is-merged", "util-linux-extra", "libbz2-1.0",
)  # fmt: skip

PASSWD = """root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
sshd:x:100:65534::/run/sshd:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
GROUP = "root:x:0:\ndaemon:x:1:\ntty:x:5:\nshadow:x:42:\nwww-data:x:33:\nnogroup:x:65534:\n"
SHADOW = "root:*:20000:0:99999:7:::\nsshd:*:20000::::::\nwww-data:*:20000::::::\n"
NSSWITCH = "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n"

NGINX_CONF = """user www-data;
worker_processes 1;
pid /run/nginx.pid;
error_log /dev/stderr notice;
events { worker_connections 512; }
http {
  include mime.types;
  access_log /dev/stdout combined;
  sendfile on;
  server {
    listen 80 default_server;
    root /usr/share/nginx/html;
    location / { index index.html; }
  }
}
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>nginx on nacre</title></head>
<body><h1>nginx on nacre</h1>
<p>This page is served by nginx from a pod. Whether the pod is a container or a virtual machine, the page is the same;
<code>uname -r</code> inside tells.</p></body></html>
"""
SSHD_CONFIG = """Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
# Keys come from a volume, whose directories are not owned and moded as StrictModes wants them.
StrictModes no
AuthorizedKeysFile .ssh/authorized_keys /etc/ssh/keys/authorized_keys /etc/ssh/authorized_keys /etc/ssh/authorized_keys/authorized_keys
PrintMotd no
PidFile none
AcceptEnv LANG LC_*
Subsystem sftp internal-sftp
"""
SSHD_START = """#!/bin/sh
# Host keys are made at the first start: in the image, they would be the same for every server made from it.
set -e
mkdir -p /run/sshd
[ -s /etc/ssh/ssh_host_ed25519_key ] || ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
exec /usr/sbin/sshd -D -e "$@"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """One entry of our own in a layer: a file, a link (`target`), or a directory (neither text nor target)."""

    path: str
    text: str | None = None
    target: str = ""
    mode: int = 0o644


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer: packages with all they depend on (less what `below` has), our own entries, what of the packages stays behind."""

    name: str
    packages: tuple[str, ...]
    below: str = ""
    extras: tuple[Extra, ...] = ()
    left_out: tuple[str, ...] = ()
    applets: str = ""  # path of a busybox whose applets are linked


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One image: its layers by name, bottom first, and `config` of the OCI image configuration."""

    name: str
    layers: tuple[str, ...]
    config: dict[str, object] = field(default_factory=dict)


_PATH = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
_MERGED = tuple(Extra(path=name, target=f"usr/{name}") for name in ("bin", "sbin", "lib", "lib64"))
_PLACES = tuple(
    Extra(path=path, mode=mode)
    for path, mode in (("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("run", 0o755), ("tmp", 0o1777), ("root", 0o700))
)
_ACCOUNTS = (
    Extra(path="etc/passwd", text=PASSWD),
    Extra(path="etc/group", text=GROUP),
    Extra(path="etc/shadow", text=SHADOW, mode=0o640),
    Extra(path="etc/nsswitch.conf", text=NSSWITCH),
)
LAYERS = (
    Layer(
        name="base",
        packages=SHARED,
        extras=(*_MERGED, *_PLACES, *_ACCOUNTS, Extra(path="usr/bin/sh", target="dash")),
    ),
    Layer(
        name="nginx",
        packages=("nginx",),
        below="base",
        # iproute2 is asked for by a start script of Debian's; the rest is iproute2's
        left_out=("iproute2", "libbpf1", "libelf1*", "libmnl0", "libxtables12", "libtirpc*", "libgssapi*", "libkrb5*", "libk5*",
                  "libkeyutils1", "libcom-err2", "libcap2-bin", "libbsd0", "libmd0", "libcap2"),
        extras=(
            Extra(path="etc/nginx/nginx.conf", text=NGINX_CONF),
            Extra(path="usr/share/nginx/html/index.html", text=PAGE),
            Extra(path="var/log/nginx/access.log", target="/dev/stdout"),
            Extra(path="var/log/nginx/error.log", target="/dev/stderr"),
        ),
    ),
    Layer(
        name="openssh",
        packages=("openssh-server", "openssh-client", "procps", "iproute2", "mount", "util-linux"),
        below="base",
        extras=(
            Extra(path="etc/ssh/sshd_config", text=SSHD_CONFIG),
            Extra(path="usr/local/sbin/start-sshd", text=SSHD_START, mode=0o755),
        ),
    ),
    Layer(
        name="busybox",
        packages=("busybox-static",),
        extras=(*_MERGED, *_PLACES, *_ACCOUNTS),
        left_out=("libc6", "libgcc*", "gcc-*-base", "libcrypt1"),
        applets="usr/bin/busybox",
    ),
)  # fmt: skip
RECIPES = (
    Recipe(
        name="nacre.local/nginx:demo",
        layers=("base", "nginx"),
        config={
            "Env": _PATH,
            "Cmd": ["nginx", "-g", "daemon off;"],
            "ExposedPorts": {"80/tcp": {}},
            "StopSignal": "SIGQUIT",
            "WorkingDir": "/",
        },
    ),
    Recipe(
        name="nacre.local/openssh:demo",
        layers=("base", "openssh"),
        config={"Env": _PATH, "Cmd": ["/usr/local/sbin/start-sshd"], "ExposedPorts": {"22/tcp": {}}, "WorkingDir": "/root"},
    ),
    Recipe(name="nacre.local/busybox:demo", layers=("busybox",), config={"Env": _PATH, "Cmd": ["sh"], "WorkingDir": "/"}),
)
