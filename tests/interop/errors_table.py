"""Writes the table "How a container fails to start" of docs/errors.md: what nacre-runc, runc and crun say to the same bundle, from real runs.

    PATH=…/.cache/peers/wrappers:$PATH .venv/bin/python tests/interop/errors_table.py [--print]

Needs root and both peers, as `./run test` unpacks them. crun refuses hybrid
hosts whatever it is asked: it is run where cgroup v2 is out of its sight.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from nacre.linux import cgroup_files, cgroups

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "host"))

from runc_faults import FAULTS, Fault, break_bundle  # noqa: E402
from runc_support import RUNC, Bundle, environment, made  # noqa: E402

from nacre.oci import spec  # noqa: E402

PAGE = REPOSITORY / "docs" / "errors.md"
BEGIN, END = "<!-- begin: errors_table.py -->", "<!-- end: errors_table.py -->"

WITHOUT_V2 = ("unshare", "-m", "sh", "-c", 'umount -l /sys/fs/cgroup/unified 2>/dev/null; exec "$@"', "sh")


def peer(name: str) -> str:
    found = shutil.which(name) or str(REPOSITORY / ".cache" / "peers" / "wrappers" / name)
    if not os.access(found, os.X_OK):
        sys.exit(f"{name} is not here: ./run test unpacks it")
    return found


def ask(bundle: Bundle, *runtime: str) -> str:
    """What the runtime says to create and start, as engines call them; then the container is taken away."""
    said = ""
    log = bundle.path / "said"
    for words in (["create", "--bundle", str(bundle.path), bundle.name], ["start", bundle.name]):
        with log.open("w") as out:
            done = subprocess.run(
                [*runtime, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment(), timeout=30, check=False
            )
        said = log.read_text()
        if done.returncode:
            break
    else:
        said = "(it starts) " + said
    subprocess.run([*runtime, "delete", "--force", bundle.name], capture_output=True, env=environment(), timeout=30, check=False)
    return said


def tidy(said: str, bundle: Bundle) -> str:
    """One line for a cell: paths and numbers of processes of this run, times and log decoration taken out, nothing else."""
    said = said.replace(str(bundle.path), "BUNDLE").replace(str(bundle.root), "ROOT").replace(bundle.name, "ID")
    said = re.sub(r'time="[^"]*" level=(\w+) msg="?', "", said)
    said = re.sub(r"(nsexec(?:-\d)?\[|/proc/)\d+", r"\1PID", said)
    said = re.sub(r"^\d{4}-\d\d-\d\dT\S+ ", "", said, flags=re.MULTILINE)
    said = " / ".join(line.strip().strip('"') for line in said.splitlines() if line.strip())
    said = said.removeprefix("nacre-runc: ").replace("|", "\\|").replace("`", "'")
    return f"`{said[:400]}`" if said else "(nothing)"


def row(fault: Fault, runc: str, crun: str) -> str:
    cells = []
    for runtime in ((RUNC,), (runc,), (*WITHOUT_V2, crun)):
        with tempfile.TemporaryDirectory(dir="/tmp") as place, made(Path(place)) as bundle:
            Path(place).chmod(0o755)
            break_bundle(bundle, fault)
            if runtime != (RUNC,):
                age(bundle)
            root = bundle.root if runtime == (RUNC,) else Path(place) / "peer"
            cells.append(tidy(ask(bundle, *runtime, "--root", str(root)), bundle))
            sweep(bundle)
    return f"| {fault.name} | {' | '.join(cells)} |"


def age(bundle: Bundle) -> None:
    """The peers are older than nacre's version of the specification, and crun says no more than that."""
    place = bundle.path / "config.json"
    if not place.exists() or place.read_text().startswith("{not"):
        return
    document = json.loads(place.read_text())
    if document.get("ociVersion") == spec.VERSION:
        document["ociVersion"] = "1.0.2"
    place.write_text(json.dumps(document))


def sweep(bundle: Bundle) -> None:
    """The cgroups that a peer leaves behind when it fails."""
    layout = cgroups.discover()
    cgroups.Cgroup(layout, bundle.cgroup).kill()
    for hierarchy in layout.hierarchies:
        cgroup_files.remove_tree(layout.directory(hierarchy, bundle.cgroup))


def version(command: str) -> str:
    text = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    return text.splitlines()[0].replace(" version", "")


def table() -> str:
    runc, crun = peer("runc"), peer("crun")
    head = f"{len(FAULTS)} faults, `create` and `start` of one bundle each, by {version(runc)} and {version(crun)}: `tests/interop/errors_table.py`."
    lines = [
        BEGIN,
        head,
        "",
        "| fault | nacre-runc | runc | crun |",
        "|-|-|-|-|",
        *(row(fault, runc, crun) for fault in FAULTS),
        END,
    ]
    return "\n".join(lines)


def main() -> None:
    text = table()
    if "--print" in sys.argv:
        print(text)
        return
    page = PAGE.read_text()
    if BEGIN not in page:
        page += f"\n## How a container fails to start, in three runtimes' words\n{BEGIN}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + text + rest.partition(END)[2])


if __name__ == "__main__":
    main()
