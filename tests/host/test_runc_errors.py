"""Some sixty ways in which a container fails to start: each message names the step, the object and, where one is known, the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from runc_faults import FAULTS, Fault, break_bundle
from runc_support import leftovers, made


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_start_that_fails_says_what_where_and_how_to_mend_it(tmp_path: Path, fault: Fault) -> None:
    with made(tmp_path) as bundle:
        break_bundle(bundle, fault)
        said = bundle.fails("run", "--bundle", str(bundle.path), bundle.name)
        for word in fault.words:
            assert word in said
        what, colon, _cause = said.removeprefix("nacre-runc: ").partition(": ")
        assert colon and len(what.split()) >= 2, "the step comes first"
        assert not fault.remedy or len(said.strip().split(". ")) >= 2, f"no remedy in {said}"
        assert leftovers(bundle) == []


def test_there_are_at_least_forty_of_them_and_no_name_twice() -> None:
    assert len(FAULTS) >= 40 and len({fault.name for fault in FAULTS}) == len(FAULTS)
