"""Heavy work in processes of its own: what takes too long or too much dies there, and the service goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.planning import Planner, Room
from services.policy import Places
from sweeps.errors import InputError, SpecError
from sweeps.home import Home
from tests.services.service_support import TINY_SPEC

NOWHERE = Places(None, None, frozenset())
HOSTILE = TINY_SPEC.replace("[fc1, fc2]", f"'{'.*' * 400}X'")
"""Some 10**9 ways to match four letters before the X is missed."""


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planner]:
    one = Planner(Home(tmp_path_factory.mktemp("home")), processes=1, limit_s=60)
    yield one
    one.close()


def plan(planner: Planner, text: str, *, devices: int = 4, workers: int | None = None):
    return asyncio.run(planner.plan(text, "tiny.yaml", NOWHERE, Room(devices, workers)))


def test_workers_are_as_many_as_there_are_devices_unless_the_spec_or_the_service_says_fewer(planner: Planner):
    auto = TINY_SPEC.replace("workers: 1", "workers: auto").replace("trials: 4", "trials: 64")
    assert plan(planner, auto).plan["workers"] == 4
    assert plan(planner, auto).devices == 4
    assert plan(planner, auto, workers=2).plan["workers"] == 2
    assert plan(planner, TINY_SPEC).plan["workers"] == 1
    shared = auto.replace("workers: auto", "workers: auto, gpus_per_worker: 0.5")
    assert plan(planner, shared).plan["workers"] == 8
    assert plan(planner, shared).devices == 4


def test_what_can_never_run_is_refused_with_its_line(planner: Planner):
    with pytest.raises(SpecError, match=r"tiny.yaml:11: compute.workers: required at most 4, .*found 5; write fewer"):
        plan(planner, TINY_SPEC.replace("workers: 1", "workers: 5"))
    with pytest.raises(SpecError, match=r"compute.gpus_per_worker: required at most 4, as there are; found 8"):
        plan(planner, TINY_SPEC.replace("workers: 1", "gpus_per_worker: 8"))


def test_every_fault_of_a_spec_comes_back(planner: Planner):
    with pytest.raises(SpecError) as refused:
        plan(planner, TINY_SPEC.replace("steps: 4", "steps: 0").replace("trials: 4", "trials: -1"))
    assert [(fault.path, fault.line) for fault in refused.value.faults] == [("train.steps", 8), ("search.trials", 9)]


def test_what_takes_too_long_is_killed_and_the_next_is_planned(tmp_path: Path):
    hasty = Planner(Home(tmp_path), processes=1, limit_s=12)
    try:
        with pytest.raises(InputError, match="planning must be done within 12 s, and was not"):
            plan(hasty, HOSTILE)
        assert plan(hasty, TINY_SPEC).plan["trials"] == 4
    finally:
        hasty.close()


def test_a_process_that_dies_is_told_of_and_replaced(planner: Planner, monkeypatch: pytest.MonkeyPatch):
    import services.planning

    monkeypatch.setattr(services.planning, "_plan", _die)
    with pytest.raises(InputError, match=r"its process died \(exit code -9\)"):
        plan(planner, TINY_SPEC)
    monkeypatch.undo()
    assert plan(planner, TINY_SPEC).plan["trials"] == 4


def _die(*_arguments: object) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
