"""The command line's words, without argparse (its import alone costs a third of a `state` call): tables in, values out."""

from __future__ import annotations

from nacre.oci.errors import Invalid

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Table = Mapping[str, str]

# A table has "--name" or "-n": "flag", "value", "number" or "list"; a second word after a blank is the canonical name.

HELP: Table = {"--help": "flag", "-h": "flag help"}
GLOBAL: Table = {
    "--root": "value",
    "--log": "value",
    "--log-format": "value",
    "--debug": "flag",
    "--systemd-cgroup": "flag",
    "--rootless": "value",
    "--criu": "value",
    "--cgroup-manager": "value",
    "--version": "flag",
    "-v": "flag version",
    **HELP,
}
_CREATE: Table = {
    "--bundle": "value",
    "-b": "value bundle",
    "--config": "value",
    "-f": "value config",
    "--pid-file": "value",
    "--console-socket": "value",
    "--pidfd-socket": "value",
    "--preserve-fds": "number",
    "--no-pivot": "flag",
    "--no-new-keyring": "flag",
    "--no-subreaper": "flag",
}
_UPDATE_VALUES = (
    "cpuset-cpus",
    "cpuset-mems",
    "memory",
    "memory-reservation",
    "memory-swap",
    "kernel-memory",
    "kernel-memory-tcp",
    "l3-cache-schema",
    "mem-bw-schema",
)
_UPDATE_NUMBERS = (
    "blkio-weight",
    "cpu-period",
    "cpu-quota",
    "cpu-burst",
    "cpu-share",
    "cpu-rt-period",
    "cpu-rt-runtime",
    "cpu-idle",
)
_CRIU: Table = {
    **{f"--{name}": "value" for name in ("image-path", "work-path", "manage-cgroups-mode")},
    **{f"--{name}": "flag" for name in ("tcp-established", "ext-unix-sk", "shell-job", "file-locks", "auto-dedup", "lazy-pages")},
    "--empty-ns": "list",
}
COMMANDS: Mapping[str, Table] = {
    "create": _CREATE,
    "run": {**_CREATE, "--detach": "flag", "-d": "flag detach", "--keep": "flag"},
    "start": {},
    "state": {},
    "kill": {"--all": "flag", "-a": "flag all", "--regex": "flag", "-r": "flag regex"},
    "delete": {"--force": "flag", "-f": "flag force", "--regex": "flag", "-r": "flag regex"},
    "exec": {
        "--process": "value",
        "-p": "value process",
        "--env": "list",
        "-e": "list env",
        "--user": "value",
        "-u": "value user",
        "--cap": "list",
        "-c": "list cap",
        "--cgroup": "list",
        "--cwd": "value",
        "--no-new-privs": "flag",
        "--additional-gids": "list",
        "-g": "list additional-gids",
        "--ignore-paused": "flag",
        "--tty": "flag",
        "-t": "flag tty",
        "--detach": "flag",
        "-d": "flag detach",
        "--pid-file": "value",
        "--console-socket": "value",
        "--pidfd-socket": "value",
        "--preserve-fds": "number",
        "--process-label": "value",
        "--apparmor": "value",
    },
    "ps": {"--format": "value", "-f": "value format"},
    "list": {"--quiet": "flag", "-q": "flag quiet", "--format": "value", "-f": "value format"},
    "features": {},
    "spec": {"--bundle": "value", "-b": "value bundle", "--rootless": "flag"},
    "pause": {},
    "resume": {},
    "update": {
        "--resources": "value",
        "-r": "value resources",
        "--pids-limit": "number",
        **{f"--{name}": "value" for name in _UPDATE_VALUES},
        **{f"--{name}": "number" for name in _UPDATE_NUMBERS},
    },
    "checkpoint": {
        **_CRIU,
        **{f"--{name}": "value" for name in ("parent-path", "page-server")},
        **{f"--{name}": "flag" for name in ("leave-running", "link-remap", "pre-dump", "tcp-skip-in-flight")},
        "--status-fd": "number",
    },
    "restore": {
        **_CRIU,
        "--bundle": "value",
        "-b": "value bundle",
        "--detach": "flag",
        "-d": "flag detach",
        **{f"--{name}": "value" for name in ("pid-file", "console-socket", "lsm-profile", "lsm-mount-context")},
        **{f"--{name}": "flag" for name in ("no-pivot", "no-subreaper")},
    },
    "events": {"--stats": "flag", "--interval": "value"},
}
_NO_MORE = frozenset({"exec", "ps", ""})  # after the first plain word the rest is somebody else's


def usage(command: str) -> str:
    """What `command` takes."""
    names = (name if kind.startswith("flag") else f"{name} VALUE" for name, kind in COMMANDS[command].items())
    return f"usage: nacre-runc {command} [OPTIONS] ID …\noptions: " + " ".join(f"[{name}]" for name in names)


def parse(words: Sequence[str], table: Table, command: str = "") -> tuple[dict[str, Any], list[str]]:
    """(options by canonical name, plain words). Takes `--name value`, `--name=value`, `-name`. Raises Invalid."""
    options: dict[str, Any] = {}
    rest = list(words)
    plain: list[str] = []
    while rest:
        word = rest.pop(0)
        if word == "--" or not word.startswith("-") or word == "-":
            if word != "--":
                plain.append(word)
            if command in _NO_MORE or word == "--":
                plain += rest
                break
            continue
        name, equals, value = word.partition("=")
        entry = table.get(name) or table.get("-" + name)
        if entry is None:
            raise Invalid(what=f"read the options of {command or 'nacre-runc'}", cause=f"there is no option {name}")
        kind, _, canonical = entry.partition(" ")
        canonical = canonical or name.lstrip("-")
        if kind == "flag":
            options[canonical] = value.lower() not in ("false", "0") if equals else True
            continue
        if not equals:
            if not rest:
                raise Invalid(what=f"read the options of {command or 'nacre-runc'}", cause=f"{name} needs a value")
            value = rest.pop(0)
        _store(options, canonical, kind, value)
    return options, plain


def _store(options: dict[str, Any], name: str, kind: str, value: str) -> None:
    if kind == "list":
        options.setdefault(name, []).append(value)
    elif kind == "number":
        try:
            options[name] = int(value)
        except ValueError:
            raise Invalid(what="read the options", cause=f"--{name} is {value!r}, not a number") from None
    else:
        options[name] = value


def signal_number(word: str) -> int:
    """`KILL`, `SIGKILL`, `9`, `RTMIN+3` as a number; 0 asks whether it can be sent. Raises Invalid."""
    from nacre.linux.pids import signals

    if not word.isascii():
        word = ""
    if word.isdigit() and int(word) < signals.NSIG:
        return int(word)
    name, plus, offset = word.upper().removeprefix("SIG").partition("+")
    found = getattr(signals, f"SIG{name}", 0) if name.isalnum() else 0  # SIG_IGN is no signal
    if found and (not plus or offset.isdigit()) and found + int(offset or 0) < signals.NSIG:
        return int(found) + int(offset or 0)
    raise Invalid(what=f"send signal {word!r}", cause="there is no such signal", remedy="use a name such as TERM, or a number")


def size(word: str) -> int:
    """`512M`, `1g`, `-1` in bytes. Raises Invalid."""
    units = {"k": 10, "m": 20, "g": 30, "t": 40}
    text = word.lower().removesuffix("b").removesuffix("i")
    shift = units.get(text[-1:], 0)
    try:
        return int(text[:-1] if shift else text) << shift
    except ValueError:
        raise Invalid(
            what="read the options", cause=f"{word!r} is no size", remedy="use a number of bytes, or one with k, m or g"
        ) from None


def seconds(word: str) -> float:
    """`5s`, `500ms`, `1m30s`, as Go writes a duration. Raises Invalid, also for no time at all."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
    total, digits, unit = 0.0, "", ""
    for sign in word + "0":
        if unit and not sign.isalpha():
            if unit not in units or not (digits.isascii() and digits.replace(".", "", 1).isdecimal()):
                break
            total, digits, unit = total + float(digits) * units[unit], "", ""
        if sign.isalpha():
            unit += sign
        else:
            digits += sign
    if digits != "0" or not total:
        raise Invalid(what="read the options", cause=f"{word!r} is no duration", remedy="use one such as 5s, 500ms or 1m30s")
    return total
