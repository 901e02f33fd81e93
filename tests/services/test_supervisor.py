"""What the supervisor does with drivers that start, run, end, die, or are already there; its runner is a simulation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from services.queue import Rules
from services.reading import Records
from services.runner import Ending
from services.store import AuditEntry, Store, Submission
from services.supervisor import Policy, Supervisor
from sweeps.errors import ClusterError, InputError, StateError
from sweeps.events import Delivered, DriverStarted, JobEnded, JobStarted, SweepCreated, SweepEnded, SweepState
from sweeps.ledger import Ledger
from sweeps.plan import make_plan
from sweeps.reduction import Reduction
from sweeps.spec import parse_spec
from tests.services.service_support import TINY_SPEC


@dataclass
class Drivers:
    """A runner whose drivers are entries of a dictionary."""

    alive: dict[str, str] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    interrupted: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    refusal: Exception | None = None
    mute: bool = False
    gpus: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def start(self, sweep: str, gpus: Sequence[str] = ()) -> str:
        if self.refusal is not None:
            raise self.refusal
        if sweep in self.alive:
            raise StateError("one process drives a sweep; another one drives it now")
        self.started.append(sweep)
        self.gpus[sweep] = tuple(gpus)
        self.alive[sweep] = str(len(self.started))
        return self.alive[sweep]

    def find(self, sweep: str, handle: str) -> str | None:
        self._speak()
        return self.alive.get(sweep)

    def ended(self, sweep: str, handle: str) -> Ending | None:
        self._speak()
        return None if self.alive.get(sweep) == handle else Ending("exit code 1")

    def interrupt(self, sweep: str, handle: str) -> None:
        self.interrupted.append(sweep)

    def kill(self, sweep: str, handle: str) -> None:
        self.killed.append(sweep)

    def _speak(self) -> None:
        if self.mute:
            raise ClusterError("the cluster does not answer")


class House:
    """A ledger, a store, a supervisor over simulated drivers, and a clock that is set by hand."""

    def __init__(self, directory: Path, **rules: Any) -> None:
        self.ledger = Ledger.in_directory(directory)
        self.store, self.records, self.drivers = Store(self.ledger), Records(self.ledger), Drivers()
        self.now_s = time.time()  # as the ledger has it, whose events are stamped with it
        self.rules = Rules(**({"devices": 2} | rules))
        self.gpus: tuple[str, ...] = ()
        self.supervisor = self.restarted()

    def restarted(self) -> Supervisor:
        """Another supervisor over the same database, as after a restart of the service."""
        policy = Policy(self.rules, window_s=3600, cancel_s=60, gpus=self.gpus)
        self.supervisor = Supervisor(
            self.store, self.ledger, self.records, self.drivers, policy, now=lambda: self.now_s
        )
        return self.supervisor

    def submit(self, sweep: str, **changes: Any) -> None:
        document = parse_spec(TINY_SPEC, "tiny.yaml")
        plan = make_plan(document.spec, Reduction.of(document.spec), workers=1, most_members=None)
        created = SweepCreated(
            name="tiny",
            spec=document.spec.model_dump(mode="json"),
            spec_text=TINY_SPEC,
            source="tiny.yaml",
            plan=plan.model_dump(mode="json"),
            tracking_uri="sqlite:///mlflow.db",
            experiment="tiny",
            lanes=2,
            pack=4,
        )
        row = Submission(sweep, "ann", "tiny", False, 0, 1.0, 4, submitted_at_s=self.now_s)
        self.store.submit(replace(row, **changes), created, AuditEntry("ann", "submit", sweep))

    def tick(self, *, after_s: float = 1.0) -> None:
        self.now_s += after_s
        self.supervisor.tick()

    def begin(self, sweep: str) -> None:
        """The driver says that it drives."""
        self.ledger.append(sweep, [DriverStarted(resumed=False)])

    def end(self, sweep: str, state: SweepState | None, reason: str = "", *, delivered: bool = True) -> None:
        """The driver ends; without a state it dies without a word."""
        if state is not None:
            self.ledger.append(sweep, [SweepEnded(state=state, reason=reason)])
        if delivered:
            self.ledger.append(sweep, [Delivered(up_to=2**40, experiment_id="1", parent_run_id="r")])
        self.drivers.alive.pop(sweep, None)

    def state(self, sweep: str) -> tuple[str, str]:
        row = self.store.get(sweep)
        return row.state, row.reason

    def want(self, sweep: str, wanted: str) -> None:
        row = self.store.get(sweep)
        assert self.store.note(row, wanted=wanted, wanted_by="ann", wanted_at_s=self.now_s)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    one = House(tmp_path)
    yield one
    one.ledger.close()


def running(house: House, sweep: str = "s") -> None:
    house.submit(sweep)
    house.tick()
    house.begin(sweep)
    house.tick()
    assert house.state(sweep) == ("running", "")


def test_a_sweep_is_started_runs_and_finishes(house: House):
    house.submit("s")
    house.tick()
    assert house.state("s") == ("starting", "")
    house.begin("s")
    house.tick()
    assert house.state("s") == ("running", "")
    house.end("s", "finished")
    house.tick()
    assert house.state("s") == ("finished", "")
    house.tick()
    assert house.drivers.started == ["s"]


@pytest.mark.parametrize(("state", "reason"), [("paused", "the first 5 trials failed alike"), ("failed", "a fault")])
def test_a_sweep_that_pauses_or_fails_says_why(house: House, state: SweepState, reason: str):
    running(house)
    house.end("s", state, reason)
    house.tick()
    assert house.state("s") == (state, reason)


def test_a_driver_that_dies_is_started_again_after_a_while(house: House):
    running(house)
    house.end("s", None)
    house.tick()
    assert house.state("s") == ("queued", "its driver died (exit code 1) and is started again")
    house.tick(after_s=1)
    assert house.drivers.started == ["s"]
    house.tick(after_s=10)
    assert house.drivers.started == ["s", "s"]


def test_a_driver_that_dies_three_times_without_a_job_done_fails_the_sweep(house: House):
    house.submit("s")
    for _ in range(3):
        house.tick(after_s=100)
        house.end("s", None)
        house.tick()
    state, reason = house.state("s")
    assert state == "failed"
    assert "died 3 times in a row" in reason
    with house.records.reading("s") as record:
        assert record.state == "failed"
    house.tick(after_s=1000)
    assert len(house.drivers.started) == 3


def test_a_driver_that_gets_somewhere_may_die_any_number_of_times(house: House):
    house.submit("s")
    for job in range(6):
        house.tick(after_s=100)
        house.begin("s")
        house.ledger.append("s", [JobStarted(job=job, trials=(), start=0, stop=1), JobEnded(job=job)])
        house.end("s", None)
        house.tick()
    assert house.state("s")[0] == "queued"


def test_a_service_that_restarts_takes_over_its_drivers(house: House):
    running(house)
    house.restarted()
    house.tick()
    assert house.state("s") == ("running", "")
    assert house.drivers.started == ["s"]
    house.end("s", "finished")
    house.restarted()
    house.tick()
    assert house.state("s") == ("finished", "")


def test_a_service_killed_between_starting_a_driver_and_noting_it_finds_it(house: House):
    house.submit("s")
    row = house.store.get("s")
    house.store.move(row, "starting")
    house.drivers.alive["s"] = "77"
    house.restarted()
    house.tick()
    assert house.store.get("s").handle == "77"
    assert house.drivers.started == []


def test_a_service_killed_before_it_started_a_driver_starts_one(house: House):
    house.submit("s")
    house.store.move(house.store.get("s"), "starting")
    house.restarted()
    house.tick()
    house.tick()
    assert house.drivers.started == ["s"]


def test_a_sweep_that_is_driven_by_hand_is_adopted(house: House):
    house.submit("s")
    house.drivers.alive["s"] = "by hand"
    house.tick()
    house.tick()
    assert house.store.get("s").handle == "by hand"
    assert house.drivers.started == []


def test_a_cancelled_sweep_is_asked_once_and_killed_in_the_end(house: House):
    running(house)
    house.want("s", "cancel")
    house.tick()
    house.tick()
    assert house.drivers.interrupted == ["s"]
    assert house.drivers.killed == []
    house.tick(after_s=60)
    assert house.drivers.killed == ["s"]
    house.end("s", None)
    house.tick()
    assert house.state("s") == ("cancelled", "")
    with house.records.reading("s") as record:
        assert record.state == "interrupted"


def test_a_sweep_that_finished_before_it_could_be_cancelled_has_finished(house: House):
    running(house)
    house.want("s", "cancel")
    house.end("s", "finished")
    house.tick()
    assert house.state("s") == ("finished", "")


def test_an_interrupted_driver_that_nobody_asked_to_end_goes_on(house: House):
    running(house)
    house.end("s", "interrupted", "SIGTERM")
    house.tick()
    assert house.state("s")[0] == "queued"
    house.tick(after_s=60)
    assert house.drivers.started == ["s", "s"]


def test_a_cluster_that_does_not_answer_changes_nothing(house: House):
    running(house)
    house.drivers.mute = True
    house.tick()
    assert house.state("s") == ("running", "")
    assert house.supervisor.trouble == "s: the cluster does not answer"
    house.drivers.mute = False
    house.tick()
    assert house.supervisor.trouble == ""


def test_a_driver_that_cannot_be_started_pauses_and_a_cluster_that_is_away_is_tried_again(house: House):
    house.submit("s")
    house.drivers.refusal = ClusterError("the head is away")
    house.tick()
    assert house.state("s") == ("starting", "the head is away")
    house.tick()
    assert house.state("s") == ("queued", "the head is away")
    house.drivers.refusal = InputError("no such program")
    house.tick(after_s=100)
    assert house.state("s") == ("paused", "no such program")


def test_a_driver_that_was_started_although_the_answer_was_lost_is_found(house: House):
    house.submit("s")
    house.drivers.refusal = ClusterError("the answer was lost")
    house.tick()
    house.drivers.alive["s"] = "lost"
    house.want("s", "cancel")
    house.tick()
    house.tick()
    assert house.drivers.interrupted == ["s"]


def test_a_driver_that_the_system_cannot_start_is_tried_later_and_others_start_meanwhile(house: House):
    house.submit("s")
    house.drivers.refusal = OSError(24, "Too many open files")
    house.tick()
    assert house.state("s") == ("queued", "its driver could not be started: Too many open files")
    house.drivers.refusal = None
    house.submit("t")
    house.tick()
    assert house.drivers.started == ["t"]
    house.tick(after_s=60)
    assert house.drivers.started == ["t", "s"]


def test_a_sweep_that_cannot_be_read_keeps_no_other_waiting(house: House):
    house.submit("broken", priority=1)
    house.submit("s")
    with house.ledger.database.writing() as connection:
        connection.execute(sa.text("UPDATE events SET payload = 'no event' WHERE sweep = 'broken'"))
    house.tick()
    assert house.drivers.started == ["s"]
    assert house.supervisor.trouble.startswith("broken: the ledger must hold events")


def test_a_driver_that_says_nothing_for_long_is_told_of(house: House):
    running(house)
    house.tick(after_s=3600)
    assert house.state("s")[0] == "degraded"
    house.submit("t")
    house.tick()
    house.tick(after_s=3600)
    assert house.state("t") == ("starting", "its driver has said nothing for 30 minutes; see its logs")


def test_each_sweep_is_given_gpus_of_its_own_and_keeps_them_over_a_restart(tmp_path: Path):
    house = House(tmp_path, devices=4)
    house.gpus = ("0", "1", "4", "5")
    house.restarted()
    house.submit("s", devices=2.0)
    house.submit("t", devices=1.5)
    house.tick()
    assert house.drivers.gpus == {"s": ("0", "1"), "t": ("4", "5")}
    house.begin("s")
    house.end("s", "finished")
    house.restarted()
    house.tick()
    house.submit("u", devices=1.0)
    house.tick()
    assert house.drivers.gpus["u"] == ("0",)
    house.ledger.close()


def test_what_mlflow_lacks_is_delivered_later(house: House):
    running(house)
    house.end("s", "finished", delivered=False)
    house.tick()
    state, reason = house.state("s")
    assert state == "degraded"
    assert "MLflow has not got everything" in reason
    house.tick(after_s=60)
    assert house.drivers.started == ["s", "s"]
    assert house.state("s")[0] == "degraded"
    house.end("s", None, delivered=True)
    house.tick()
    assert house.state("s") == ("finished", "")


def test_a_running_sweep_is_degraded_while_mlflow_takes_nothing(house: House):
    running(house)
    house.tick(after_s=200)
    assert house.state("s") == ("degraded", "MLflow takes nothing; what it lacks waits in the ledger")
    house.ledger.append("s", [Delivered(up_to=2**40, experiment_id="1", parent_run_id="r")])
    house.tick()
    assert house.state("s") == ("running", "")


def test_a_running_sweep_is_degraded_while_its_jobs_fail(house: House):
    running(house)
    for job in range(3):
        house.ledger.append(
            "s", [JobStarted(job=job, trials=(), start=0, stop=1), JobEnded(job=job, error="worker_died")]
        )
    house.tick()
    assert house.state("s") == ("degraded", "3 of the last 3 jobs failed: worker_died")


def test_device_time_is_counted_while_a_sweep_runs_and_not_while_it_waits(house: House):
    house.submit("s", devices=2.0)
    house.tick(after_s=500)
    house.begin("s")
    house.tick(after_s=30)
    house.end("s", None)
    house.tick(after_s=0)
    assert house.store.get("s").used_device_s == pytest.approx(60)
    house.tick(after_s=0)
    assert house.store.get("s").used_device_s == pytest.approx(60)


def test_a_user_beyond_their_device_hours_is_paused_and_goes_on_by_resume(tmp_path: Path):
    house = House(tmp_path, user_device_hours=0.01)
    running(house)
    house.tick(after_s=40)
    house.tick()
    house.tick()
    assert house.drivers.interrupted == ["s"]
    house.end("s", "interrupted", "SIGTERM")
    house.tick()
    state, reason = house.state("s")
    assert state == "paused"
    assert reason == "ann has used 0.0 of 0.01 device-hours; older ones stop counting in time; `resume` goes on then"

    # Two hours later the hour that it had used no longer counts, and it goes on as far as the limit again.
    house.store.move(house.store.get("s"), "queued")
    house.tick()
    assert house.state("s")[0] == "queued"
    house.tick(after_s=7200)
    assert house.supervisor.used_hours() == {}
    assert house.state("s") == ("starting", "")
    house.begin("s")
    house.tick(after_s=1)
    house.tick(after_s=1)
    assert house.store.get("s").wanted == ""
    assert house.drivers.interrupted == ["s"]
    house.ledger.close()


def test_a_cancelled_sweep_whose_driver_was_never_there_is_cancelled(house: House):
    house.submit("s")
    house.store.move(house.store.get("s"), "starting")
    house.want("s", "cancel")
    house.tick()
    assert house.state("s") == ("cancelled", "")
    assert house.drivers.started == []


def test_no_more_sweeps_start_than_there_are_devices_for(house: House):
    for i in range(5):
        house.submit(f"s{i}")
    house.tick()
    assert house.drivers.started == ["s0", "s1"]
    house.begin("s0")
    house.end("s0", "finished")
    house.tick()
    house.tick()
    assert house.drivers.started == ["s0", "s1", "s2"]
