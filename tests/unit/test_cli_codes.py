"""The registry of failures and its page."""

from __future__ import annotations

import re
from pathlib import Path

from nacre.cli import codes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


def test_every_failure_code_stands_on_the_page_with_its_meaning() -> None:
    listed = set(re.findall(r"^\| (\w+) \| \w+ \|", PAGE.read_text(), re.MULTILINE)) - {"code"}  # the heading
    known = {code for code, _package, _meaning in codes.codes()}
    assert known - listed == set(), "run python -m nacre.cli.codes docs/errors.md"
    assert listed - known == set(), "the page lists codes that no longer exist"


def test_every_failure_says_what_it_is() -> None:
    assert [code for code, _package, meaning in codes.codes() if not meaning or meaning.startswith(code + "(")] == []
