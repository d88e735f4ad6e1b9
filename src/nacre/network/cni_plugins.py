"""CNI: reading configuration and executing plugins (CNI specification 1.0.0, sections 1, 2, 4). No policy: `cni` decides what is asked.

A configuration directory's first file by name counts (.conflist, .conf, .json). A plugin is an executable looked up in the node's plugin
directories; its command stands in CNI_ variables, its configuration on stdin, its answer on stdout as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nacre.network.types import NetworkNotReady, PluginFailed
from nacre.oci.errors import Invalid, Unsupported

EXTENSIONS = (".conflist", ".conf", ".json")
VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
STDERR_LINES = 15
_NEVER_READY_HINTS = {  # a file that a plugin's own daemon writes: told so that people look there
    "/run/flannel/subnet.env": "flannel's daemon has not written it yet: look at the kube-flannel pod",
    "/var/lib/calico/nodename": "calico's daemon has not written it yet: look at the calico-node pod",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkList:
    """One network configuration list."""

    path: str
    name: str
    version: str
    plugins: tuple[dict[str, Any], ...]
    disable_check: bool = False


def load(directory: str) -> NetworkList:
    """The configuration to use. Raises NetworkNotReady (nothing there yet, with what was seen), Invalid, Unsupported."""
    try:
        seen = sorted(os.listdir(directory))
    except FileNotFoundError:
        seen = None
    names = [name for name in seen or () if name.endswith(EXTENSIONS) and not name.startswith(".")]
    if not names:
        there = "does not exist" if seen is None else f"holds {', '.join(seen) or 'nothing'}"
        raise NetworkNotReady(
            what="find a CNI configuration",
            cause=f"no file with {', '.join(EXTENSIONS)} in {directory}: it {there}",
            remedy="install a network (it writes that file), or set cni_dir to its directory",
        )
    path = f"{directory}/{names[0]}"
    try:
        with open(path, "rb") as file:
            document = json.load(file)
    except ValueError as error:
        raise Invalid(what=f"read {path}", cause=str(error)) from error
    return parse(path, document)


def parse(path: str, document: Any) -> NetworkList:
    """The list in a .conflist, or the single plugin of a .conf as a list of one."""
    if not isinstance(document, dict):
        raise Invalid(what=f"read {path}", cause="the top is not an object")
    plugins = document.get("plugins") if "plugins" in document else [document]
    if not isinstance(plugins, list) or not plugins:
        raise Invalid(what=f"read {path}", cause="plugins is not a list with an element")
    for index, plugin in enumerate(plugins):
        if not isinstance(plugin, dict) or not isinstance(plugin.get("type"), str) or not plugin["type"]:
            raise Invalid(what=f"read {path}", cause=f"plugins[{index}].type is missing")
        if "/" in plugin["type"]:
            raise Invalid(what=f"read {path}", cause=f"plugins[{index}].type {plugin['type']!r} is a path, not a name")
    name, version = document.get("name"), document.get("cniVersion", "0.2.0")
    if not isinstance(name, str) or not name:
        raise Invalid(what=f"read {path}", cause="name is missing")
    if version not in VERSIONS:
        raise Unsupported(what=f"read {path}", cause=f"cniVersion {version!r}", remedy=f"use one of {', '.join(VERSIONS)}")
    check = document.get("disableCheck", False)
    return NetworkList(path=path, name=name, version=version, plugins=tuple(plugins), disable_check=check in (True, "true"))


def find_plugin(kind: str, directories: Sequence[str]) -> str:
    """The executable of plugin type `kind`. Raises PluginFailed naming the directories."""
    for directory in directories:
        path = f"{directory}/{kind}"
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise PluginFailed(
        what=f"find the CNI plugin {kind}",
        cause=f"no executable of that name in {', '.join(directories)}",
        evidence=tuple(f"{directory}: {_listing(directory)}" for directory in directories),
        remedy="apt-get install containernetworking-plugins, or name the right directory in cni_bin_dirs",
    )


def _listing(directory: str) -> str:
    try:
        return ", ".join(sorted(os.listdir(directory))) or "empty"
    except OSError as error:
        return str(error.strerror)


def invoke(
    path: str, command: str, stdin: Mapping[str, Any], environment: Mapping[str, str], deadline_s: float
) -> dict[str, Any]:
    """Run one plugin to its end; its answer, {} when it has none. At the deadline it is killed with all that it started.

    Raises PluginFailed with the plugin's own error, its stderr as evidence, and how long it ran.
    """
    kind = os.path.basename(path)
    what = f"CNI plugin {kind}: {command}"
    started = time.monotonic()
    environ = {"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), **environment, "CNI_COMMAND": command}
    try:
        process = subprocess.Popen(
            [path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, start_new_session=True
        )
    except OSError as error:
        raise PluginFailed(what=what, cause=f"execve(2) {path}: {error.strerror} (errno {error.errno})") from error
    with process:
        try:
            out, err = process.communicate(json.dumps(stdin).encode(), timeout=max(deadline_s, 0.1))
        except subprocess.TimeoutExpired as expired:
            err = _killed(process)
            raise PluginFailed(
                what=what,
                cause=f"no answer within {deadline_s:.0f} s, so it was killed",
                evidence=_lines(err),
                remedy=f"look at what {kind} waits for (its daemon, a lock, the API server)",
            ) from expired
    took = time.monotonic() - started
    answer = _answer(out)
    if process.returncode == 0:
        if answer is None:
            raise PluginFailed(what=what, cause="its answer is no JSON object", evidence=_lines(out) + _lines(err))
        return answer
    raise _failed(what, process.returncode, answer, out, err, took)


def _killed(process: subprocess.Popen[bytes]) -> bytes:
    """End the plugin and what it started; its stderr so far."""
    os.killpg(process.pid, signal.SIGKILL)
    try:
        return process.communicate(timeout=1)[1]
    except subprocess.TimeoutExpired as held:  # something in a session of its own still has the pipe
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()
        return held.stderr or b""


def _answer(out: bytes) -> dict[str, Any] | None:
    if not out.strip():
        return {}
    try:
        answer = json.loads(out)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _failed(what: str, code: int, answer: dict[str, Any] | None, out: bytes, err: bytes, took_s: float) -> PluginFailed:
    """The plugin's own words first (section 5, "Error"); else how it ended."""
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    words = str(answer.get("msg", "")) if answer else ""
    details = str(answer.get("details", "")) if answer else ""
    cause = ": ".join(part for part in (words, details) if part) or f"no error message, {how} after {took_s:.1f} s"
    evidence = _lines(err) + (() if answer else _lines(out))
    remedy = next((hint for path, hint in _NEVER_READY_HINTS.items() if path in cause), "")
    return PluginFailed(what=what, cause=cause, evidence=evidence, remedy=remedy)


def _lines(data: bytes) -> tuple[str, ...]:
    return tuple(data.decode(errors="replace").splitlines()[-STDERR_LINES:])
