"""A sweep that is given more trials than it was created with: the same search, whoever interrupts it and where."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from sweeps.events import (
    DriverStarted,
    JobEnded,
    JobStarted,
    QueueMoved,
    RungReported,
    SweepEnded,
    SweepExtended,
    TrialAsked,
    TrialTold,
)
from sweeps.ledger import Ledger
from sweeps.tracking import default_uri
from tests.conftest import FinishedSweep
from tests.support import record_of, run_cli, run_json, trajectory_of
from tests.sweeps.mlflow_support import runs_of
from tests.sweeps.support import SWEPT, FakeWorker, Simulation, make_spec

ALPHAS = "alpha: {values: [4, 16, 64]}"
FINITE = (
    "rank: {values: [2, 4]}, lr: {values: [1e-3, 4e-3, 1.6e-2]}, init_scale: {values: [1, 2]}, "
    "alpha: {values: [4, 16, 64]}"
)
"""12 different runs."""


def spec_of(order="reproducible", method="random", parameters=f"{SWEPT}, {ALPHAS}", certify="classes: 2"):
    return make_spec(parameters, search=f"method: {method}, order: {order}", certify=certify)


def outcome(simulation: Simulation) -> dict[int, tuple]:
    """How every trial came out."""
    trials = simulation.record.trials.values()
    return {t.number: (t.state, t.value, t.reason, t.class_id, t.configuration, t.duplicate_of, t.step) for t in trials}


def certified(simulation: Simulation) -> list[str]:
    return sorted(json.dumps(certificate, sort_keys=True) for certificate in simulation.record.certificates)


def assert_whole(simulation: Simulation, trials: int) -> None:
    """Every trial came to its end, and nothing was done twice."""
    record = simulation.record
    counts = record.counts()
    assert counts.pop("waiting") == 0
    assert sum(counts.values()) == len(record.trained) == trials == record.extended_to
    assert max(Counter(event.trial for event in simulation.of(TrialAsked)).values()) == 1
    assert Counter(event.trial for event in simulation.of(TrialTold)) == Counter(t.number for t in record.trained)
    assert max(Counter(event.job for event in simulation.of(JobEnded)).values()) == 1
    assert max(Counter((e.trial, e.step) for e in simulation.of(RungReported)).values(), default=1) == 1
    classes = [record.trials[certificate["trial"]].class_id for certificate in record.certificates]
    assert len(set(classes)) == len(classes) <= simulation.spec.certify.classes


few_faults = st.builds(
    dict,
    diverging=st.frozensets(st.integers(0, 19), max_size=3),
    failing=st.frozensets(st.integers(0, 19), max_size=2),
    oom_above=st.sampled_from([2, 100]),
    dying=st.frozensets(st.integers(0, 12), max_size=3),
)
timings = st.none() | st.integers(0, 2**32)
orders = st.sampled_from(["reproducible", "asynchronous"])
methods = st.sampled_from(["random", "random", "tpe"])


# -- what an extension does --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["reproducible", "asynchronous"])
@pytest.mark.parametrize("method", ["random", "tpe", "gp", "cmaes"])
def test_a_finished_sweep_goes_on_to_more_trials_and_leaves_the_first_as_they_were(order, method):
    simulation, worker = Simulation(spec_of(order, method), trials=10), FakeWorker()
    simulation.run(worker, timing=0)
    first = outcome(simulation)
    simulation.run(worker, timing=0, resumed=True, extend_to=18)
    assert_whole(simulation, 18)
    found = outcome(simulation)
    assert {number: found[number] for number in first} == first
    assert max(worker.trained.values()) == 1


def test_what_a_finished_sweep_had_learned_is_known_to_its_next_trial():
    simulation = Simulation(spec_of(method="tpe", certify="classes: 0"), trials=12, pack=4, lanes=4)
    simulation.run(FakeWorker())
    searcher = simulation.searcher(resumed=True, extend_to=16)
    assert {trial.state for trial in searcher._trials.values()} == {"finished", "pruned"}
    assert searcher._study._open == {}
    assert len(searcher.suggest().members) == 4


@pytest.mark.parametrize("jobs", range(4))
def test_a_sweep_that_had_trials_left_to_begin_goes_on_as_if_it_had_always_had_more(jobs):
    larger = Simulation(spec_of(method="tpe"), trials=32)
    larger.run(FakeWorker())
    simulation = Simulation(spec_of(method="tpe"), trials=28)
    simulation.run(FakeWorker(), jobs=jobs, timing=3)
    assert len(simulation.record.trained) < 28
    simulation.run(FakeWorker(), resumed=True, extend_to=32)
    assert_whole(simulation, 32)
    assert outcome(simulation) == outcome(larger)
    assert certified(simulation) == certified(larger)


def test_a_sweep_killed_while_nothing_was_under_way_goes_on_as_if_it_had_always_had_more():
    larger = Simulation(spec_of(method="tpe"), trials=32)
    larger.run(FakeWorker())
    simulation = Simulation(spec_of(method="tpe"), trials=28)
    searcher = simulation.searcher()
    for order in [searcher.suggest() for _ in range(simulation.lanes)]:
        searcher.complete(FakeWorker()(order))
    simulation.run(FakeWorker(), resumed=True, extend_to=32)
    assert outcome(simulation) == outcome(larger)


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_what_is_searched_does_not_depend_on_which_worker_came_first(method):
    found = []
    for timing in (None, 1, 2):
        simulation = Simulation(spec_of(method=method), trials=14, lanes=4)
        simulation.run(FakeWorker(), timing=timing)
        simulation.run(FakeWorker(), timing=timing, resumed=True, extend_to=30)
        found.append((outcome(simulation), certified(simulation), simulation.of(TrialAsked), simulation.of(TrialTold)))
    assert found[0] == found[1] == found[2]


def test_certificates_are_chosen_anew_and_none_is_made_twice():
    values = [float(10 - number) for number in range(12)]  # every trial is better than those before it
    worker = FakeWorker(value=lambda member, step: values[member.trial])
    simulation = Simulation(spec_of(certify="classes: 3"), trials=2, rungs=(16,))
    simulation.run(worker)
    assert [certificate["trial"] for certificate in simulation.record.certificates] == [1, 0]
    simulation.run(worker, resumed=True, extend_to=8)
    assert [certificate["trial"] for certificate in simulation.record.certificates] == [1, 0, 7]
    simulation.run(worker, resumed=True, extend_to=12)
    assert len(simulation.record.certificates) == 3
    works = [job.work for job in simulation.of(JobStarted)]
    assert works == ["train", "certify", "certify", "train", "train", "certify", "train"]


def test_a_certificate_that_failed_is_tried_again_after_an_extension():
    simulation = Simulation(spec_of(certify="classes: 1"), trials=4, rungs=(16,), lanes=1)
    simulation.run(FakeWorker(dying=frozenset({1, 2, 3})))
    assert simulation.record.certificates == []
    simulation.run(FakeWorker(), resumed=True, extend_to=8)
    assert [certificate["trial"] for certificate in simulation.record.certificates] == [simulation.record.best.number]


def test_packs_stay_as_small_as_memory_had_made_them():
    simulation = Simulation(spec_of(certify="classes: 0"), trials=8, rungs=(16,), pack=8, lanes=1)
    simulation.run(FakeWorker(oom_above=3))
    worker = FakeWorker(oom_above=3)
    simulation.run(worker, resumed=True, extend_to=16)
    assert worker.sizes == [2, 2, 2, 2]


def test_a_grid_goes_on_with_the_classes_it_had_left():
    simulation = Simulation(spec_of(method="grid", parameters=FINITE), trials=5)
    classes = len(simulation.searcher()._reduction.classes)
    simulation = Simulation(spec_of(method="grid", parameters=FINITE), trials=5)
    simulation.run(FakeWorker())
    simulation.run(FakeWorker(), resumed=True, extend_to=classes)
    assert_whole(simulation, classes)


@pytest.mark.parametrize("order", ["reproducible", "asynchronous"])
@pytest.mark.parametrize("method", ["random", "tpe"])
def test_a_finite_space_is_filled_by_extensions(order, method):
    simulation, worker = Simulation(spec_of(order, method, parameters=FINITE), trials=5, pack=3), FakeWorker()
    simulation.run(worker, timing=0)
    for trials in (9, 11, 12):
        simulation.run(worker, timing=0, resumed=True, extend_to=trials)
        assert_whole(simulation, trials)
    assert max(worker.trained.values()) == 1


@pytest.mark.parametrize("order", ["reproducible", "asynchronous"])
def test_a_paused_sweep_that_is_extended_goes_on_and_pauses_again_where_nothing_was_mended(order):
    simulation = Simulation(spec_of(order), trials=40, pack=2, lanes=2)
    paused = simulation.run(FakeWorker(broken=True)).paused
    assert paused is not None
    simulation.transactions.append([SweepEnded(state="paused", reason=paused)])
    again = simulation.run(FakeWorker(broken=True), resumed=True, extend_to=50)
    assert again.paused == paused
    simulation.transactions.append([SweepEnded(state="paused", reason=paused)])
    assert simulation.run(FakeWorker(), resumed=True).paused is None
    assert_whole(simulation, 50)


def test_added_trials_that_all_fail_alike_pause_a_sweep_whose_first_trials_had_succeeded():
    simulation = Simulation(spec_of(), trials=8, pack=2, lanes=2)
    simulation.run(FakeWorker())
    broken = simulation.run(FakeWorker(broken=True), resumed=True, extend_to=60)
    assert broken.paused == "the first 5 trials failed alike: error: RuntimeError: no such file"
    assert simulation.record.counts()["failed"] < 52
    assert simulation.run(FakeWorker(), resumed=True).paused is None
    assert_whole(simulation, 60)


def test_a_sweep_is_extended_before_its_first_driver():
    larger = Simulation(spec_of(), trials=16)
    larger.run(FakeWorker())
    simulation = Simulation(spec_of(), trials=8)
    simulation.run(FakeWorker(), extend_to=16)
    assert_whole(simulation, 16)
    assert outcome(simulation) == outcome(larger)


# -- interrupted -------------------------------------------------------------------------------------------------------


def twice_extended(order: str, method: str, parameters: str = f"{SWEPT}, {ALPHAS}", **fault) -> Simulation:
    """Run to its end, extended, run to its end, and again."""
    simulation = Simulation(spec_of(order, method, parameters, certify="classes: 4"), trials=5, lanes=3)
    simulation.run(FakeWorker(**fault), timing=1)
    simulation.transactions.append([SweepEnded(state="finished")])
    for trials in (9, 12):
        simulation.run(FakeWorker(**fault), timing=trials, resumed=True, extend_to=trials)
        simulation.transactions.append([SweepEnded(state="finished")])
    return simulation


def resumed_at(whole: Simulation, cut: int, worker: FakeWorker, timing: int | None) -> Simulation:
    """The sweep of `whole`, killed after so many transactions, resumed, and given what it has not been given yet."""
    found = whole.cut(cut)
    asked_for = [event.trials for event in whole.of(SweepExtended)]
    given = len(found.of(SweepExtended))
    found.run(worker, timing=timing, resumed=True)
    for trials in asked_for[given:]:
        found.run(worker, timing=timing, resumed=True, extend_to=trials)
    return found


@pytest.mark.parametrize("order", ["reproducible", "asynchronous"])
@pytest.mark.parametrize("parameters", [f"{SWEPT}, {ALPHAS}", FINITE])
def test_an_extended_sweep_killed_at_any_moment_ends_as_if_it_had_not_been(order, parameters):
    fault = {"diverging": frozenset({3, 7}), "failing": frozenset({6}), "dying": frozenset({2, 9})}
    whole = twice_extended(order, "random", parameters, **fault)
    assert_whole(whole, 12)
    for cut in range(1, len(whole.transactions) + 1):
        # In the order in which they began, results come back as they did only where that does not decide the search.
        found = resumed_at(whole, cut, FakeWorker(**fault), None if order == "reproducible" else 5)
        assert_whole(found, 12)
        if order == "reproducible":
            assert outcome(found) == outcome(whole)
            assert certified(found) == certified(whole)


@settings(max_examples=40, deadline=None)
@given(methods, timings, timings, few_faults, st.integers(0, 1_000), st.integers(1, 4), st.booleans(), st.booleans())
def test_whatever_goes_wrong_an_extended_sweep_ends_the_same(method, timing, later, fault, cut, lanes, finite, early):
    spec = spec_of(method=method, parameters=FINITE if finite else f"{SWEPT}, {ALPHAS}")
    whole = Simulation(spec, trials=7, lanes=lanes)
    whole.run(FakeWorker(**fault), timing=timing, jobs=3 if early else 1_000)
    extended_at = len(whole.transactions) + 1
    whole.run(FakeWorker(**fault), timing=timing, resumed=True, extend_to=12)
    found = whole.cut(extended_at + cut % (len(whole.transactions) - extended_at + 1))
    found.run(FakeWorker(**fault), timing=later, resumed=True)
    for simulation in (found, whole):
        assert_whole(simulation, 12)
    assert outcome(found) == outcome(whole)
    assert certified(found) == certified(whole)


@settings(max_examples=40, deadline=None)
@given(orders, timings, few_faults, st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 4))
def test_a_sweep_extended_while_jobs_were_under_way_trains_every_trial_once(order, timing, fault, kills, lanes):
    simulation, trials = Simulation(spec_of(order), trials=6, lanes=lanes), 6
    worker = FakeWorker(**fault)
    simulation.run(worker, timing=timing, jobs=4)
    for jobs in kills:
        trials += 3
        simulation.run(worker, timing=timing, resumed=True, jobs=jobs, extend_to=trials)
    again = simulation.cut(len(simulation.transactions))
    for found in (simulation, again):
        found.run(FakeWorker(**fault), timing=timing, resumed=True)
        assert_whole(found, trials)
    assert outcome(again) == outcome(simulation)
    assert certified(again) == certified(simulation)


@pytest.mark.parametrize("method", ["gp", "cmaes"])
def test_samplers_that_learn_go_on_as_they_would_have(method):
    whole = Simulation(spec_of(method=method, certify="classes: 0"), trials=10, pack=4, lanes=2)
    whole.run(FakeWorker())
    extended_at = len(whole.transactions) + 1
    whole.run(FakeWorker(), resumed=True, extend_to=18)
    found = whole.cut((extended_at + len(whole.transactions)) // 2)
    found.run(FakeWorker(), resumed=True)
    assert outcome(found) == outcome(whole)


def test_replaying_an_extension_appends_nothing():
    simulation = Simulation(spec_of())
    simulation.run(FakeWorker())
    simulation.run(FakeWorker(), resumed=True, extend_to=20, jobs=3)
    before = simulation.events
    simulation.searcher(resumed=True)
    assert simulation.events == [*before, DriverStarted(resumed=True)]


def test_results_that_were_not_applied_when_a_spent_sweep_was_killed_are_told_with_the_extension():
    simulation = Simulation(spec_of(certify="classes: 0"), trials=8, rungs=(16,), pack=4, lanes=2)
    searcher = simulation.searcher()
    for order in reversed([searcher.suggest(), searcher.suggest()]):
        searcher.complete(FakeWorker()(order))
    simulation.searcher(resumed=True, extend_to=12)
    first, *told, last = simulation.transactions[-1]
    assert (first, last) == (SweepExtended(trials=12), DriverStarted(resumed=True))
    assert [event.trial for event in told] == list(range(8))  # in the order of the jobs, not of their results
    simulation.run(FakeWorker(), resumed=True)
    assert_whole(simulation, 12)


# -- for real ----------------------------------------------------------------------------------------------------------


def moved(finished: FinishedSweep, cwd: Path) -> Path:
    """A finished sweep's working directory, with all that it says of itself, elsewhere: other tests count there."""
    shutil.copytree(finished.cwd, cwd)
    places = [("events", "payload"), ("experiments", "artifact_location"), ("runs", "artifact_uri")]
    for database, (table, column) in zip((".lora-sweeps/ledger.db", "mlflow.db", "mlflow.db"), places, strict=True):
        with closing(sqlite3.connect(cwd / database)) as connection, connection:
            connection.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(finished.cwd), str(cwd)))
    return cwd


def children_of(cwd: Path, sweep: str) -> Counter[str]:
    """MLflow's runs of a sweep, by role; there is one parent, and it has them all."""
    client = MlflowClient(tracking_uri=default_uri(cwd))
    runs = runs_of(client, "small", sweep)
    (parent,) = [run for run in runs if run.data.tags["lora_sweeps.role"] == "sweep"]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["lora_sweeps.trials"] == str(len(record_of(cwd, sweep).trained))
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert "RUNNING" not in {run.info.status for run in children}
    return Counter(run.data.tags["lora_sweeps.role"] for run in children)


def test_a_finished_sweep_trains_the_trials_that_were_added_and_no_others(finished: FinishedSweep, tmp_path: Path):
    cwd = moved(finished, tmp_path / "copy")
    before = record_of(cwd)
    twins = children_of(cwd, before.id)["twin"]
    assert children_of(cwd, before.id) == {"trial": 24, "twin": twins}

    refused = run_cli("run", "--resume", "last", "--trials", "24", cwd=cwd)
    assert refused.returncode == 2
    assert "there must be more than the 24 that the sweep has already; found 24" in refused.stderr
    assert record_of(cwd).last_seq == before.last_seq

    output = run_json("run", "--resume", "last", "--trials", "32", "--json", cwd=cwd)
    after = record_of(cwd)
    assert (output["sweep"], output["state"]) == (before.id, "finished")
    assert sum(output["trials"].values()) == len(after.trained) == 32
    assert {n: trial for n, trial in trajectory_of(after).items() if n < 24} == trajectory_of(before)
    assert {n: job for n, job in after.jobs_ended.items() if n in before.jobs_ended} == before.jobs_ended
    added = [job for n, job in after.jobs_started.items() if n not in before.jobs_started]
    assert {trial for job in added for trial in job.trials} == set(range(24, 32))
    assert after.certificates == before.certificates
    report = run_json("report", "last", "--format", "json", cwd=cwd)
    assert (report["plan"]["trials"], len(report["trials"]), sum(report["counts"].values())) == (32, 32, 32)
    assert children_of(cwd, before.id) == {"trial": 32, "twin": twins}


def test_a_sweep_that_was_created_and_never_driven_begins_when_it_is_resumed(finished: FinishedSweep, tmp_path: Path):
    created = record_of(finished.cwd).created.model_copy(update={"tracking_uri": default_uri(tmp_path)})
    (tmp_path / ".lora-sweeps").mkdir(mode=0o700)
    with Ledger.in_directory(tmp_path / ".lora-sweeps") as ledger:
        ledger.create("waiting", created)
        ledger.append("waiting", [QueueMoved(state="queued")])
    assert record_of(tmp_path).state == "queued"
    output = run_json("run", "--resume", "waiting", "--json", cwd=tmp_path)
    assert output["state"] == "finished"
    assert output["best"]["value"] == finished.output["best"]["value"]
    assert trajectory_of(record_of(tmp_path)) == trajectory_of(record_of(finished.cwd))
    with Ledger.in_directory(tmp_path / ".lora-sweeps") as ledger:
        events = [record.event for record in ledger.read("waiting")]
    assert [event.resumed for event in events if isinstance(event, DriverStarted)] == [False]
    assert children_of(tmp_path, "waiting")["trial"] == 24
