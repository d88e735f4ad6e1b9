"""Figures of a run: collected, reduced to medians, shown as ratios to the peer."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nacre.cli import output

PEER = "containerd"
# the project's targets, as ratio to the peer or as a figure of ours
TARGETS = {
    "pod up, ms": 0.2,
    "exec, ms": 0.2,
    "pod down, ms": 0.2,
    "private KiB per idle pod": 0.3,
    "VM pod up, warm pool, ms": 0.6,
    "VM pod up, no pool, ms": 1.5,
}
ABSOLUTE = {"idle node, PSS MiB": 120.0, "kubectl apply to Ready, ms": 450.0}


@dataclass(slots=True)
class Results:
    """figure → engine → values; `better` tells which direction is good, less unless said."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    more_is_better: set[str] = field(default_factory=set)

    def add(self, figure: str, engine: str, value: float) -> None:
        self.values.setdefault(figure, {}).setdefault(engine, []).append(value)

    def put(self, figure: str, engine: str, value: float, better: str = "less") -> None:
        self.add(figure, engine, value)
        if better == "more":
            self.more_is_better.add(figure)


def rows(results: Results) -> list[tuple[str, ...]]:
    """(figure, ours min/median, peer's min/median, ratio of medians, target)."""
    made: list[tuple[str, ...]] = []
    for figure, engines in results.values.items():
        ours, theirs = engines.get("nacre", []), engines.get(PEER, [])
        ratio = statistics.median(ours) / statistics.median(theirs) if ours and theirs and statistics.median(theirs) else None
        goal = TARGETS.get(figure)
        if goal is not None:
            shown = f"≤ {goal} {_met(ratio, goal)}"
        elif figure in ABSOLUTE:
            shown = f"≤ {ABSOLUTE[figure]:g} {_met(statistics.median(ours) if ours else None, ABSOLUTE[figure])}"
        else:
            shown = ""
        made.append((figure, _figure(ours), _figure(theirs), f"{ratio:.2f}" if ratio is not None else "", shown))
    return made


def _met(value: float | None, goal: float) -> str:
    return "" if value is None else "met" if value <= goal else "missed"


def _figure(values: list[float]) -> str:
    if not values:
        return ""
    middle = statistics.median(values)
    form = "{:.0f}" if middle >= 100 else "{:.1f}"
    return form.format(middle) if len(values) == 1 else f"{form.format(min(values))}/{form.format(middle)}"


def show(results: Results) -> None:
    output.say()
    for name, version in results.versions.items():
        output.say(f"{name}: {version}", "dim")
    output.say(f"{os.cpu_count()} CPUs, Linux {os.uname().release}, load {os.getloadavg()[0]:.1f}; min/median", "dim")
    output.table(("figure", "nacre", "containerd+runc", "ratio", "target"), rows(results))


def show_oci(results: Results, engines: Sequence[str], targets: Sequence[tuple[str, str, str, float]]) -> None:
    """Runtimes side by side; `targets` are (ours, whose, figure, the ratio of medians that it is to have)."""
    output.say()
    for name, version in results.versions.items():
        output.say(f"{name}: {version}", "dim")
    output.say(f"{os.cpu_count()} CPUs, Linux {os.uname().release}, load {os.getloadavg()[0]:.1f}; min/median", "dim")
    made = [
        (
            figure,
            *(_figure(found.get(name, [])) for name in engines),
            _ratio(found, "nacre-runc", "runc"),
            _ratio(found, "in process", "crun"),
        )
        for figure, found in results.values.items()
    ]
    output.table(("figure", *engines, "nacre-runc/runc", "in process/crun"), made)
    for ours, theirs, figure, goal in targets:
        ratio = _median(results, figure, ours) / _median(results, figure, theirs)
        output.say(f"{figure}: {ours} to {theirs} {ratio:.2f}, target ≤ {goal} {_met(ratio, goal)}")


def _ratio(found: Mapping[str, list[float]], ours: str, theirs: str) -> str:
    return (
        f"{statistics.median(found[ours]) / statistics.median(found[theirs]):.2f}"
        if found.get(ours) and found.get(theirs)
        else ""
    )


def _median(results: Results, figure: str, engine: str) -> float:
    return statistics.median(results.values[figure][engine])


def document(results: Results) -> dict[str, Any]:
    """JSON-ready: every value, not only medians."""
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": os.uname().release,
        "cpus": os.cpu_count(),
        "versions": results.versions,
        "values": results.values,
    }
