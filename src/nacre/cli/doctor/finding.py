"""One finding of the doctor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    OK = "ok"
    NOTE = "note"  # worth knowing, nothing to do
    WARN = "warn"  # something will be missing or slow
    BAD = "bad"  # pods cannot run


@dataclass(frozen=True, slots=True)
class Finding:
    title: str
    verdict: Verdict
    says: str  # one clause for a person
    evidence: tuple[str, ...] = ()
    remedy: str = ""


def document(found: Finding) -> dict[str, Any]:
    """JSON-ready form."""
    return asdict(found)
