"""`nacre doctor`: what this host can do, each finding with its evidence and its remedy; nothing is left changed.

Called by people and by `nacre up` when it fails. A check is a function `(Config) -> Iterator[Finding]`; what it tells about the
kernel it has tried (a mount made and taken away in a namespace of its own), not guessed from versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import click

from nacre.cli import output
from nacre.cli.doctor import finding, hardware, kernel, machine, netcheck
from nacre.cli.doctor.finding import Finding, Verdict
from nacre.config import Config
from nacre.oci.errors import from_exception

CHECKS: tuple[tuple[str, Callable[[Config], Iterator[Finding]]], ...] = (
    ("privileges", machine.privileges),
    ("cgroups", kernel.control_groups),
    ("kernel features", kernel.features),
    ("seccomp", kernel.seccomp),
    ("ports", netcheck.ports),
    ("pod network", netcheck.pods),
    ("proxy", netcheck.proxy),
    ("virtual machines", hardware.qemu),
    ("accelerator", hardware.accelerator),
    ("clock", machine.clock),
    ("disk", machine.disk),
    ("limits", machine.limits),
    ("kubectl", machine.kubectl),
)
MARKS = {Verdict.OK: ("✓", "ok"), Verdict.NOTE: ("·", "dim"), Verdict.WARN: ("!", "warn"), Verdict.BAD: ("✗", "bad")}


@click.command()
@click.option("-o", "form", type=click.Choice(["text", "json"]), default="text")
@click.pass_obj
def doctor(config: Config, form: str) -> int:
    """What this host can do, with evidence and remedies; exit 1 if pods cannot run."""
    findings = list(examine(config))
    if form == "json":
        print(json.dumps([finding.document(found) for found in findings]))
    else:
        for found in findings:
            _show(found)
    bad = [found for found in findings if found.verdict is Verdict.BAD]
    if form == "text":
        output.say()
        output.say(
            f"Pods cannot run: {', '.join(f.title for f in bad)}." if bad else "Pods can run here.", "bad" if bad else "ok"
        )
    return 1 if bad else 0


def examine(config: Config) -> Iterator[Finding]:
    """Every check's findings; a check that itself breaks is a finding too, and the others go on."""
    for title, check in CHECKS:
        try:
            yield from check(config)
        except Exception as error:
            failure = from_exception(f"examine {title}", error)
            yield Finding(title, Verdict.WARN, "could not be examined", (str(failure), *failure.evidence), failure.remedy)


def _show(found: Finding) -> None:
    mark, style = MARKS[found.verdict]
    output.say(f"{output.paint(mark, style)} {output.paint(found.title.ljust(17), 'bold')} {found.says}")
    for line in found.evidence:
        output.say(f"    | {line}", "dim")
    if found.remedy:
        output.say(f"    remedy: {found.remedy}")
