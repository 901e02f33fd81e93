"""Whose sweep starts next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.queue import Busy, Rules, Waiting, decide


def waiting(sweep: str, owner: str = "ann", *, devices: float = 1, priority: int = 0, at_s: float = 0) -> Waiting:
    return Waiting(sweep, owner, priority, devices, at_s)


def test_the_first_come_is_the_first_served_within_a_user():
    found = decide([waiting("b", at_s=2), waiting("a", at_s=1)], [], {}, Rules(1))
    assert found.start == ("a",)
    assert found.reasons == {"b": "next; waits for devices: takes 1, of which 0 are free"}


def test_whoever_has_used_least_is_next():
    queue = [waiting("a", "ann", at_s=1), waiting("b", "bob", at_s=2)]
    assert decide(queue, [], {"ann": 3.0, "bob": 1.0}, Rules(1)).start == ("b",)


def test_a_weight_of_two_is_worth_twice_the_hours():
    queue = [waiting("a", "ann", at_s=1), waiting("b", "bob", at_s=2)]
    used = {"ann": 3.0, "bob": 2.0}
    assert decide(queue, [], used, Rules(1)).start == ("b",)
    assert decide(queue, [], used, Rules(1, weights={"ann": 2.0})).start == ("a",)


def test_users_who_have_used_nothing_take_turns():
    queue = [waiting(f"a{i}", "ann", at_s=i) for i in range(3)] + [
        waiting(f"b{i}", "bob", at_s=9 + i) for i in range(3)
    ]
    assert decide(queue, [], {}, Rules(4)).start == ("a0", "b0", "a1", "b1")


def test_a_priority_above_zero_is_before_everybody_and_below_zero_behind_ones_own():
    queue = [waiting("a", "ann", at_s=1), waiting("b", "bob", at_s=2, priority=1), waiting("c", "ann", priority=-1)]
    assert decide(queue, [], {"bob": 100.0}, Rules(3)).start == ("b", "a", "c")


def test_nobody_overtakes_a_sweep_that_waits_for_devices():
    found = decide([waiting("large", devices=4, at_s=1), waiting("small", at_s=2)], [Busy("x", "bob", 2)], {}, Rules(4))
    assert found.start == ()
    assert found.reasons == {
        "large": "next; waits for devices: takes 4, of which 2 are free",
        "small": "number 2 in the queue",
    }


def test_a_user_at_a_limit_is_passed_over():
    queue = [waiting("a", "ann", at_s=1), waiting("b", "bob", at_s=2)]
    found = decide(queue, [Busy("x", "ann", 1)], {}, Rules(4, user_running=1))
    assert found.start == ("b",)
    assert found.reasons == {"a": "ann has 1 running, of at most 1"}
    found = decide(queue, [], {"ann": 10.0}, Rules(4, user_device_hours=10))
    assert found.start == ("b",)
    assert found.reasons["a"].startswith("ann has used 10.0 of 10 device-hours")


def test_what_has_become_too_large_for_the_service_keeps_nobody_waiting():
    found = decide([waiting("large", devices=8, at_s=1), waiting("small", at_s=2)], [], {}, Rules(4))
    assert found.start == ("small",)
    assert found.reasons == {"large": "takes 8 devices, and the service has 4 now: cancel it, or give the service more"}


SWEEPS = st.lists(
    st.tuples(st.sampled_from(["ann", "bob", "cy"]), st.integers(-2, 2), st.integers(1, 5), st.floats(0, 9)), max_size=8
)


@given(SWEEPS, SWEEPS, st.integers(5, 12), st.none() | st.integers(1, 3))
def test_devices_and_limits_hold_and_everybody_who_waits_is_told_why(queue, running, devices, most):
    queued = [Waiting(f"q{i}", *one) for i, one in enumerate(queue)]
    busy = [Busy(f"r{i}", owner, count) for i, (owner, _, count, _) in enumerate(running)]
    found = decide(queued, busy, {}, Rules(devices, user_running=most))
    started = [one for one in queued if one.sweep in found.start]
    if started:
        assert sum(one.devices for one in (*busy, *started)) <= devices
    for owner in {one.owner for one in started}:
        assert most is None or sum(one.owner == owner for one in (*busy, *started)) <= most
    assert set(found.reasons) == {one.sweep for one in queued} - set(found.start)
    assert all(found.reasons.values())


@given(SWEEPS)
def test_with_nothing_running_somebody_always_starts(queue):
    queued = [Waiting(f"q{i}", *one) for i, one in enumerate(queue)]
    assert bool(decide(queued, [], {}, Rules(5)).start) == bool(queued)
