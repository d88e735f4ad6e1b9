"""Documents with one element replaced by anything, through the real command: an exit code and words, and nothing left behind."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runc_support import Bundle, leftovers, made

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 1 << 64)
    | st.sampled_from(["", "x", "/", "..", "/proc/self", "/x/../..", "-1", "ro", "a" * 5000])
)
TREES = LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(st.sampled_from(["path", "type", "x"]), LEAVES, max_size=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    with made(tmp_path_factory.mktemp("fuzz")) as one:
        one.config["hooks"] = {"createRuntime": [{"path": "/bin/true", "timeout": 5}], "poststop": [{"path": "/bin/true"}]}
        one.linux["sysctl"] = {"net.ipv4.ip_forward": "1"}
        one.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]}
        one.linux["resources"] |= {"memory": {"limit": 64 << 20}, "cpu": {"shares": 100}, "pids": {"limit": 20}}
        one.linux["devices"] = [{"type": "c", "path": "/dev/tun", "major": 10, "minor": 200}]
        yield one


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every element but the root's path: with the host's own root as root filesystem its /dev would be furnished."""
    found = [path] if path and path[0] != "root" else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_document_ends_in_an_exit_code_with_words_and_nothing_is_left(bundle: Bundle, data: st.DataObject) -> None:
    document: Any = copy.deepcopy(bundle.config)
    place = document
    path = data.draw(st.sampled_from(places(bundle.config)))
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = data.draw(TREES)
    (bundle.path / "config.json").write_text(json.dumps(document))
    done = bundle.call("run", "--bundle", str(bundle.path), bundle.name)
    assert "Traceback" not in done.stderr, (path, done.stderr)
    assert done.returncode == 0 or done.stderr, (path, place)
    assert leftovers(bundle) == [], path
