"""What a pod needs next, from what it asks for and what the runtime has of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nacre.kubelet.plan import BACKOFF_RESET_S, LAST_BACKOFF_S, SANDBOX, Action, Seen, View, next_backoff, plan

NOW = 1_000_000.0
RUNNING, DONE, BROKEN = Seen(state="running"), Seen(state="exited"), Seen(state="exited", exit_code=3)


def pod(
    *, main: tuple[str, ...] = ("main",), init: tuple[str, ...] = (), sidecars: tuple[str, ...] = (), **spec: Any
) -> dict[str, Any]:
    first = [{"name": name, "image": "i"} | ({"restartPolicy": "Always"} if name in sidecars else {}) for name in init]
    body = {"containers": [{"name": name, "image": "i"} for name in main], "initContainers": first} | spec
    return {"metadata": {"name": "p"}, "spec": body, "status": {"startTime": "1970-01-12T13:46:40Z"}}


def decided(thing: dict[str, Any], ready: bool = True, waits: dict[str, float] | None = None, **seen: Seen) -> Action:
    return plan(thing, View(sandbox_ready=ready, containers=seen), waits or {}, NOW)


def test_a_new_pod_gets_its_sandbox_first() -> None:
    assert decided(pod(), ready=False) == Action(make_sandbox=True)


def test_containers_of_a_ready_sandbox_start_together() -> None:
    assert decided(pod(main=("a", "b"))).start == ("a", "b")


def test_a_running_pod_needs_nothing() -> None:
    assert decided(pod(), main=RUNNING) == Action()


@pytest.mark.parametrize(
    ("policy", "ended", "again"),
    [
        ("Always", DONE, True),
        ("Always", BROKEN, True),
        ("OnFailure", DONE, False),
        ("OnFailure", BROKEN, True),
        ("Never", BROKEN, False),
    ],
)
def test_the_restart_policy_decides_about_ended_containers(policy: str, ended: Seen, again: bool) -> None:
    action = decided(pod(restartPolicy=policy), main=ended)
    assert (action.start == ("main",)) == again and action.finished == (not again)


def test_a_container_in_back_off_waits_and_the_worker_wakes_when_it_is_over() -> None:
    action = decided(pod(), waits={"main": NOW + 7}, main=BROKEN)
    assert (action.start, action.waiting, action.wake_s) == ((), ("main",), 7)


def test_a_sandbox_that_failed_is_tried_again_after_its_time() -> None:
    assert decided(pod(), ready=False, waits={SANDBOX: NOW + 5}) == Action(wake_s=5)
    assert decided(pod(), ready=False, waits={SANDBOX: NOW - 1}).make_sandbox


def test_init_containers_run_one_after_the_other_before_the_others() -> None:
    thing = pod(init=("one", "two"))
    assert decided(thing).start == ("one",)
    assert decided(thing, one=RUNNING).start == ()
    assert decided(thing, one=DONE).start == ("two",)
    assert decided(thing, one=DONE, two=DONE).start == ("main",)


def test_a_failed_init_container_ends_a_pod_that_is_never_restarted() -> None:
    assert decided(pod(init=("one",), restartPolicy="Never"), one=BROKEN).finished
    assert decided(pod(init=("one",), restartPolicy="OnFailure"), one=BROKEN).start == ("one",)


def test_init_containers_run_again_in_a_new_sandbox() -> None:
    old = Seen(state="exited", current=False)
    lost = Seen(state="exited", exit_code=137, current=False)
    assert decided(pod(init=("one",)), one=old, main=lost).start == ("one",)


def test_init_containers_are_left_alone_once_the_pod_runs() -> None:
    assert decided(pod(init=("one",)), main=RUNNING) == Action()


def test_a_sidecar_runs_before_what_follows_and_is_always_restarted() -> None:
    thing = pod(init=("side", "one"), sidecars=("side",), restartPolicy="Never")
    assert decided(thing).start == ("side",)
    assert decided(thing, side=Seen(state="running", started_ok=False)).start == ()
    assert decided(thing, side=RUNNING).start == ("one",)
    assert decided(thing, side=BROKEN, one=DONE, main=RUNNING).start == ("side",)


def test_a_pod_whose_containers_are_done_ends_though_its_sidecar_runs() -> None:
    assert decided(pod(init=("side",), sidecars=("side",), restartPolicy="Never"), side=RUNNING, main=DONE).finished


def test_a_container_that_was_made_and_never_started_is_started() -> None:
    assert decided(pod(), main=Seen(state="created")).start == ("main",)


def test_a_lost_sandbox_is_made_anew_for_what_ran_in_it() -> None:
    assert decided(pod(restartPolicy="Never"), ready=False, main=RUNNING).make_sandbox


def test_another_image_replaces_a_running_container() -> None:
    assert decided(pod(), main=Seen(state="running", image="other")).replace == ("main",)


def test_a_deleted_pod_only_ends() -> None:
    thing = pod()
    thing["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert decided(thing, main=RUNNING) == Action(stop_all="deleted")


def test_an_ended_pod_does_not_come_back_when_the_runtime_has_forgotten_it() -> None:
    thing = pod()
    thing["status"]["phase"] = "Succeeded"
    assert decided(thing, ready=False) == Action(finished=True)


def test_the_deadline_counts_from_the_start_of_the_pod() -> None:
    assert decided(pod(activeDeadlineSeconds=30), main=RUNNING).wake_s == 30
    thing = pod(activeDeadlineSeconds=30)
    assert plan(thing, View(sandbox_ready=True), {}, NOW + 30).stop_all == "DeadlineExceeded"


@given(st.lists(st.floats(min_value=0, max_value=BACKOFF_RESET_S * 2), max_size=20))
def test_back_off_grows_to_its_limit_and_a_long_run_ends_it(runs: list[float]) -> None:
    wait = 0.0
    for ran in runs:
        before, wait = wait, next_backoff(wait, ran)
        assert wait == 0 if ran >= BACKOFF_RESET_S else before < wait <= LAST_BACKOFF_S or wait == before == LAST_BACKOFF_S
