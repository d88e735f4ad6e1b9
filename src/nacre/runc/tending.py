"""The commands on what is there: a container, all of them, or the runtime itself."""

from __future__ import annotations

import os
import sys

from nacre import runc
from nacre.oci import state as store
from nacre.oci.errors import Failure, Invalid
from nacre.oci.jsontext import dumps
from nacre.runc import options as words_of

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from nacre.runc.call import Call


def _start(call: Call) -> int:
    runc.start(call.root, call.id, call.warn)
    return 0


def _state(call: Call) -> int:
    print(dumps(runc.state(call.root, call.id), indent=2))
    return 0


def _kill(call: Call) -> int:
    number = words_of.signal_number(call.plain[1] if len(call.plain) > 1 else "TERM")
    for identifier in call.ids():
        runc.kill(call.root, identifier, number, everyone=call.options.get("all", False))
    return 0


def _delete(call: Call) -> int:
    for identifier in call.ids():
        runc.delete(call.root, identifier, force=call.options.get("force", False), warn=call.warn)
    return 0


def _pause(call: Call) -> int:
    runc.pause(call.root, call.id)
    return 0


def _resume(call: Call) -> int:
    runc.resume(call.root, call.id)
    return 0


def _list(call: Call) -> int:
    states = runc.list_states(call.root, lambda failure: print(f"nacre-runc: {failure.sentence()}", file=sys.stderr))
    if call.options.get("quiet"):
        print(*(one["id"] for one in states), sep="\n", end="\n" if states else "")
    elif call.options.get("format") == "json":
        print(dumps(states))
    else:
        rows = [("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")]
        rows += [(one["id"], str(one["pid"]), one["status"], one["bundle"], one["created"], one["owner"]) for one in states]
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        for row in rows:
            print("   ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _ps(call: Call) -> int:
    pids = runc.processes(call.root, call.id)
    if call.options.get("format") == "json":
        print(dumps(pids))
        return 0
    import subprocess

    listing = subprocess.run(["ps", *(call.plain[1:] or ["-ef"])], capture_output=True, text=True, check=False)
    lines = listing.stdout.splitlines()
    column = lines[0].split().index("PID") if lines and "PID" in lines[0].split() else -1
    if column < 0:
        raise Failure(what=f"list the processes of {call.id}", cause=f"ps(1) shows no PID column: {listing.stderr.strip()}")
    wanted = {str(pid) for pid in pids}
    print(lines[0], *(line for line in lines[1:] if line.split()[column] in wanted), sep="\n")
    return 0


def _events(call: Call) -> int:
    from nacre.linux.pids import signals
    from nacre.runc import events

    signals.signal(signals.SIGINT, signals.SIG_DFL)  # how a user ends it

    def tell(event: Mapping[str, Any]) -> None:
        print(dumps(event), flush=True)

    if call.options.get("stats"):
        tell(events.once(call.root, call.id))
    else:
        events.follow(call.root, call.id, words_of.seconds(call.options.get("interval", "5s")), tell)
    return 0


def _update(call: Call) -> int:
    from nacre.oci.spec import parse

    chosen = call.options
    if "resources" in chosen:
        source = chosen["resources"]
        if source == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(source, "rb") as file:
                data = file.read()
        for words in runc.update(call.root, call.id, parse(data, f"read {source}")):
            call.warn(words)
        return 0
    names = {
        "memory": ("memory", "limit"),
        "memory-reservation": ("memory", "reservation"),
        "memory-swap": ("memory", "swap"),
        "kernel-memory": ("memory", "kernel"),
        "kernel-memory-tcp": ("memory", "kernelTCP"),
        "cpu-share": ("cpu", "shares"),
        "cpu-quota": ("cpu", "quota"),
        "cpu-burst": ("cpu", "burst"),
        "cpu-period": ("cpu", "period"),
        "cpu-rt-period": ("cpu", "realtimePeriod"),
        "cpu-rt-runtime": ("cpu", "realtimeRuntime"),
        "cpu-idle": ("cpu", "idle"),
        "cpuset-cpus": ("cpu", "cpus"),
        "cpuset-mems": ("cpu", "mems"),
        "pids-limit": ("pids", "limit"),
        "blkio-weight": ("blockIO", "weight"),
    }
    resources: dict[str, Any] = {}
    for option, (group, key) in names.items():
        if option in chosen:
            value = chosen[option]
            resources.setdefault(group, {})[key] = words_of.size(value) if group == "memory" else value
    options = {"l3-cache-schema": "l3CacheSchema", "mem-bw-schema": "memBwSchema"}
    schemata = {key: chosen[option] for option, key in options.items() if option in chosen}
    if schemata:
        from nacre.runc import resctrl

        resctrl.check(schemata)
        resctrl.update(store.read(call.root, call.id).resctrl, schemata)
    for words in runc.update(call.root, call.id, resources):
        call.warn(words)
    return 0


def _checkpoint(call: Call) -> int:
    from nacre.runc import checkpoint

    checkpoint.checkpoint(call.root, call.id, {"criu": call.shared.get("criu", ""), **call.options})
    return 0


def _features(call: Call) -> int:
    from nacre.runc import templates

    print(dumps(templates.features(), indent=2))
    return 0


def _spec(call: Call) -> int:
    from nacre.runc import templates

    path = os.path.join(call.options.get("bundle", "."), "config.json")
    document = templates.spec(rootless=call.options.get("rootless", False))
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(dumps(document, indent=2) + "\n")
    except FileExistsError:
        raise Invalid(what=f"write {path}", cause="it exists", remedy="remove it first") from None
    return 0


HANDLERS: dict[str, Callable[[Call], int]] = {
    "start": _start,
    "state": _state,
    "kill": _kill,
    "delete": _delete,
    "pause": _pause,
    "resume": _resume,
    "list": _list,
    "ps": _ps,
    "events": _events,
    "update": _update,
    "checkpoint": _checkpoint,
    "features": _features,
    "spec": _spec,
}
