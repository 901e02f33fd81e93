from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.errors import StateError
from sweeps.events import (
    Certified,
    DriverStarted,
    JobEnded,
    JobStarted,
    MemberDiverged,
    RungReported,
    SweepEnded,
    TrialAsked,
    TrialTold,
)
from sweeps.jobs import JobResult
from tests.sweeps.support import SWEPT, FakeWorker, Simulation, make_spec

ALPHAS = "alpha: {values: [4, 16, 64]}"
FINITE = (
    "rank: {values: [2, 4]}, lr: {values: [1e-3, 4e-3, 1.6e-2]}, init_scale: {values: [1, 2]}, "
    "alpha: {values: [4, 16, 64]}"
)

timings = st.integers(0, 2**32)
faults = st.builds(
    dict,
    diverging=st.frozensets(st.integers(0, 14), max_size=4),
    failing=st.frozensets(st.integers(0, 14), max_size=3),
    oom_above=st.sampled_from([1, 2, 3, 100]),
    dying=st.frozensets(st.integers(0, 12), max_size=4),
)
orders = st.sampled_from(["reproducible", "asynchronous"])
methods = st.sampled_from(["random", "random", "tpe"])


def spec_of(order="reproducible", method="random", parameters=f"{SWEPT}, {ALPHAS}", certify="classes: 2", **sections):
    return make_spec(parameters, search=f"method: {method}, order: {order}", certify=certify, **sections)


def outcome(simulation: Simulation) -> dict[int, tuple]:
    """How every trial came out."""
    trials = simulation.record.trials.values()
    return {t.number: (t.state, t.value, t.reason, t.class_id, t.configuration, t.duplicate_of, t.step) for t in trials}


def assert_accounted_for(simulation: Simulation, worker: FakeWorker, trials: int) -> None:
    record = simulation.record
    counts = record.counts()
    assert counts.pop("waiting") == 0
    assert sum(counts.values()) == len(record.trained) == trials
    assert len({trial.class_id for trial in record.trained}) == trials
    told = Counter(event.trial for event in simulation.of(TrialTold))
    assert told == Counter(trial.number for trial in record.trained)
    assert max(worker.trained.values(), default=1) == 1
    assert max(worker.sizes) <= simulation.pack
    for trial in record.trained:
        if trial.state == "diverged":
            assert trial.value is None
        if trial.state == "finished":
            assert [rung.step for rung in trial.rungs] == list(simulation.rungs)
            assert trial.value == trial.metrics["eval/loss"]
        if trial.state == "pruned":
            assert trial.value == trial.metrics["eval/loss"]
            assert trial.step in simulation.rungs[:-1]
    assert {event.job for event in simulation.of(JobStarted)} == {event.job for event in simulation.of(JobEnded)}


# -- a whole sweep -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(orders, methods, timings, faults, st.integers(1, 5), st.integers(1, 6))
def test_every_trial_is_accounted_for_whatever_happens(order, method, timing, fault, lanes, pack):
    simulation = Simulation(spec_of(order, method), trials=15, pack=pack, lanes=lanes)
    worker = FakeWorker(**fault)
    searcher = simulation.run(worker, timing=timing)
    assert searcher.finished
    if searcher.paused is None:
        assert_accounted_for(simulation, worker, 15)
    best = simulation.record.best
    assert best is None or best.number not in worker.diverging | worker.failing


@settings(max_examples=25, deadline=None)
@given(methods, timings, faults, st.integers(1, 5))
def test_what_is_searched_does_not_depend_on_which_worker_comes_first(method, timing, fault, lanes):
    in_turn, shuffled = (Simulation(spec_of(method=method), lanes=lanes) for _ in range(2))
    in_turn.run(FakeWorker(**fault))
    shuffled.run(FakeWorker(**fault), timing=timing)
    for kind in (TrialAsked, JobStarted, TrialTold):
        assert shuffled.of(kind) == in_turn.of(kind)
    for kind in (RungReported, MemberDiverged, JobEnded, Certified):
        assert sorted(shuffled.of(kind), key=repr) == sorted(in_turn.of(kind), key=repr)
    assert outcome(shuffled) == outcome(in_turn)
    assert shuffled.record.best == in_turn.record.best or shuffled.record.best.number == in_turn.record.best.number


def test_gp_searches_the_same_however_long_the_workers_take():
    results = []
    for timing in (None, 1):
        simulation = Simulation(spec_of(method="gp"), trials=14, pack=4, lanes=2)
        simulation.run(FakeWorker(), timing=timing)
        results.append(outcome(simulation))
    assert results[0] == results[1]


def test_packs_run_full_and_share_their_steps():
    simulation = Simulation(spec_of(), trials=32, pack=4, lanes=2)
    simulation.run(FakeWorker())
    jobs = [event for event in simulation.of(JobStarted) if event.work == "train"]
    assert {(job.start, job.stop) for job in jobs} == {(0, 4), (4, 8), (8, 16)}
    rung_of = {0: 0, 4: 0, 8: 0, 16: 0}
    for job in jobs:
        rung_of[job.start] += len(job.trials)
    assert [len(job.trials) for job in jobs if job.start == 0] == [4] * 8
    assert rung_of[0] == 32 > rung_of[4] > rung_of[8] > 0
    # Only what is left at the end of a rung may be less than full.
    assert sum(len(job.trials) < 4 for job in jobs) <= 3


def test_the_best_is_the_smallest_loss_or_the_largest():
    for goal, best in (("minimize", min), ("maximize", max)):
        simulation = Simulation(spec_of(metric=f"goal: {goal}"), rungs=(16,), trials=10)
        simulation.run(FakeWorker())
        record = simulation.record
        assert record.best.value == best(trial.value for trial in record.trained)


def test_certificates_come_last_and_are_no_more_than_asked():
    simulation = Simulation(spec_of(certify="classes: 3"))
    simulation.run(FakeWorker(), timing=3)
    events = simulation.of(JobStarted)
    works = [event.work for event in events]
    assert works == ["train"] * (len(works) - 3) + ["certify"] * 3
    assert len(simulation.record.certificates) == 3
    assert simulation.record.certificates[0]["trial"] == simulation.record.best.number
    assert all(certificate["twins"] == 2 for certificate in simulation.record.certificates)


@pytest.mark.parametrize("parameters", [SWEPT, f"{SWEPT}, {ALPHAS}"])
def test_nothing_is_certified_that_was_not_swept_or_not_asked_for(parameters):
    certify = "classes: 2" if parameters == SWEPT else "classes: 0"
    simulation = Simulation(spec_of(parameters=parameters, certify=certify))
    simulation.run(FakeWorker())
    assert {event.work for event in simulation.of(JobStarted)} == {"train"}


# -- finite spaces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["reproducible", "asynchronous"])
@pytest.mark.parametrize("method", ["random", "tpe", "cmaes"])
def test_a_finite_space_is_trained_once_each_and_its_repeats_are_told_the_known_value(method, order):
    simulation = Simulation(spec_of(order, method, parameters=FINITE), trials=12, pack=4, lanes=2)
    worker = FakeWorker()
    searcher = simulation.run(worker, timing=0)
    assert_accounted_for(simulation, worker, 12)
    assert searcher._study._open == {}
    told = {trial.number: trial.value for trial in searcher._study._study.get_trials(deepcopy=False)}
    repeats = [event for event in simulation.of(TrialAsked) if event.duplicate_of is not None]
    assert repeats
    for repeat in repeats:
        original = simulation.record.trials[repeat.duplicate_of]
        assert original.class_id == repeat.class_id
        if original.state == "finished":
            assert told[repeat.trial] == original.value
        assert (repeat.trial, simulation.rungs[0]) not in worker.trained


@pytest.mark.parametrize("order", ["reproducible", "asynchronous"])
def test_a_budget_larger_than_the_space_ends(order):
    simulation = Simulation(spec_of(order, parameters=FINITE), trials=100)
    worker = FakeWorker()
    searcher = simulation.run(worker, timing=0)
    assert searcher.exhausted
    assert_accounted_for(simulation, worker, 12)


def test_a_space_of_one_point_is_trained_once():
    simulation = Simulation(spec_of(parameters="rank: 4, lr: 0.01"), trials=1)
    worker = FakeWorker()
    simulation.run(worker)
    assert_accounted_for(simulation, worker, 1)


def test_a_grid_trains_every_class_once():
    simulation = Simulation(spec_of(method="grid", parameters=FINITE), trials=1_000)
    worker = FakeWorker()
    searcher = simulation.run(worker, timing=1)
    assert_accounted_for(simulation, worker, len(searcher._reduction.classes))
    assert {trial.class_id for trial in simulation.record.trained} == {c.id for c in searcher._reduction.classes}


# -- failures ----------------------------------------------------------------------------------------------------------


def states(simulation: Simulation) -> dict[int, str]:
    return {trial.number: trial.state for trial in simulation.record.trained}


def test_a_diverged_trial_is_told_so_and_its_pack_mates_go_on():
    simulation = Simulation(spec_of(), trials=8, rungs=(16,), pack=4)
    simulation.run(FakeWorker(diverging=frozenset({1, 6})))
    found = states(simulation)
    assert {number for number, state in found.items() if state == "diverged"} == {1, 6}
    assert {number for number, state in found.items() if state == "finished"} == {0, 2, 3, 4, 5, 7}
    assert simulation.record.trials[1].reason == "the loss was not finite at step 2"
    assert len(simulation.of(MemberDiverged)) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_a_metric_that_is_not_finite_is_never_best(value, goal):
    simulation = Simulation(spec_of(metric=f"goal: {goal}"), trials=4, rungs=(16,))
    simulation.run(FakeWorker(value=lambda member, _: value if member.trial == 2 else float(member.trial)))
    assert states(simulation)[2] == "diverged"
    assert simulation.record.best.number == (0 if goal == "minimize" else 3)


def test_a_sweep_whose_trials_all_diverge_ends_in_order():
    simulation = Simulation(spec_of(), trials=12)
    searcher = simulation.run(FakeWorker(diverging=frozenset(range(100))))
    assert searcher.finished
    assert searcher.paused is None
    assert set(states(simulation).values()) == {"diverged"}
    assert simulation.record.best is None
    assert simulation.record.certificates == []


def test_a_dead_worker_is_tried_again_twice_from_the_last_rung():
    simulation = Simulation(spec_of(certify="classes: 0"), trials=4, rungs=(4, 16), pack=4, lanes=1)
    worker = FakeWorker(dying=frozenset({1, 2}))
    simulation.run(worker)
    jobs = simulation.of(JobStarted)
    assert [(job.start, job.stop) for job in jobs] == [(0, 4), (4, 16), (4, 16), (4, 16)]
    assert len({job.trials for job in jobs[1:]}) == 1
    assert "failed" not in states(simulation).values()

    simulation = Simulation(spec_of(certify="classes: 0"), trials=8, rungs=(16,), pack=4, lanes=1)
    simulation.run(FakeWorker(dying=frozenset({0, 1, 2})))
    assert [job.trials for job in simulation.of(JobStarted)] == [(0, 1, 2, 3)] * 3 + [(4, 5, 6, 7)]
    assert [trial.state for trial in simulation.record.trained] == ["failed"] * 4 + ["finished"] * 4
    assert simulation.record.trials[0].reason == "worker_died: the worker is gone"


@pytest.mark.parametrize("order", ["reproducible", "asynchronous"])
def test_nodes_that_vanish_change_nothing_of_the_search(order):
    spec = spec_of(order, certify="classes: 2")
    calm = Simulation(spec, trials=24, rungs=(4, 16), pack=4, lanes=1)
    calm.run(FakeWorker())
    stormy = Simulation(spec, trials=24, rungs=(4, 16), pack=4, lanes=1)
    stormy.run(FakeWorker(vanishing=Counter({0: 1, 2: 3, 5: 1, len(calm.record.jobs_started) - 1: 2})))
    assert stormy.of(TrialTold) == calm.of(TrialTold)
    assert stormy.record.jobs_started == calm.record.jobs_started
    assert stormy.record.jobs_ended == calm.record.jobs_ended
    assert [job.job for job in stormy.of(JobStarted)].count(2) == 4
    assert len(stormy.record.certificates) == 2


@pytest.mark.parametrize("kept", range(1, 14))
def test_a_driver_that_takes_over_a_lost_job_hands_it_out_again(kept):
    spec = spec_of(certify="classes: 0")
    calm = Simulation(spec, trials=12, rungs=(4, 16), pack=4, lanes=2)
    calm.run(FakeWorker())
    worker = FakeWorker(vanishing=Counter({1: 2, 3: 1}))
    stormy = Simulation(spec, trials=12, rungs=(4, 16), pack=4, lanes=2)
    stormy.run(worker)
    cut = stormy.cut(min(kept, len(stormy.transactions)))
    cut.run(FakeWorker(), resumed=True)
    assert {trial.number: (trial.state, trial.value) for trial in cut.record.trained} == {
        trial.number: (trial.state, trial.value) for trial in calm.record.trained
    }
    assert cut.record.jobs_started == calm.record.jobs_started


def test_a_job_that_was_lost_with_its_node_is_under_way_again_once_it_was_handed_out():
    simulation = Simulation(spec_of(), trials=8, rungs=(4, 16), pack=4, lanes=1)
    searcher = simulation.searcher()
    order = searcher.suggest()
    searcher.complete(JobResult(job=order.job, error="node_lost"))
    assert order.job in simulation.record.jobs_ended
    assert searcher.suggest() == order
    assert simulation.record.jobs_started.keys() - simulation.record.jobs_ended.keys() == {order.job}


def test_a_job_that_takes_longer_than_nodes_live_fails_with_that_reason():
    simulation = Simulation(spec_of(certify="classes: 0"), trials=8, rungs=(16,), pack=4, lanes=1)
    simulation.run(FakeWorker(vanishing=Counter({0: 21})))
    assert [trial.state for trial in simulation.record.trained] == ["failed"] * 4 + ["finished"] * 4
    assert simulation.record.trials[0].reason == "node_lost: the node is gone"
    assert [job.job for job in simulation.of(JobStarted)] == [0] * 21 + [1]


def test_a_pack_that_does_not_fit_is_split_in_two():
    simulation = Simulation(spec_of(certify="classes: 0"), trials=7, rungs=(16,), pack=7, lanes=1)
    simulation.run(FakeWorker(oom_above=2))
    assert [len(job.trials) for job in simulation.of(JobStarted)] == [7, 3, 2, 2, 1, 2]
    assert set(states(simulation).values()) == {"finished"}


@pytest.mark.parametrize("order", ["reproducible", "asynchronous"])
def test_packs_after_one_that_did_not_fit_are_no_larger_than_its_parts(order):
    simulation = Simulation(spec_of(order, certify="classes: 0"), trials=40, rungs=(4, 16), pack=8, lanes=1)
    worker = FakeWorker(oom_above=3)
    searcher = simulation.run(worker)
    assert worker.sizes[:4] == [8, 4, 2, 2]
    assert max(worker.sizes[2:]) == 2
    assert_accounted_for(simulation, worker, 40)
    # A driver that takes the sweep up knows it too.
    again = simulation.cut(len(simulation.transactions) // 2).searcher(resumed=True)
    assert len(again.suggest().members) <= 2
    assert searcher.finished


def test_a_trial_that_does_not_fit_alone_fails():
    simulation = Simulation(spec_of(), trials=3, rungs=(16,), pack=2, lanes=1)
    simulation.run(FakeWorker(oom_above=0))
    assert set(states(simulation).values()) == {"failed"}
    assert simulation.record.trials[0].reason == "oom: OutOfMemoryError: too many"


def test_an_error_takes_the_pack_apart_and_only_the_bad_member_fails():
    simulation = Simulation(spec_of(certify="classes: 0"), trials=8, rungs=(16,), pack=4, lanes=1)
    simulation.run(FakeWorker(failing=frozenset({2})))
    assert [job.trials for job in simulation.of(JobStarted)] == [(0, 1, 2, 3), (0,), (1,), (2,), (3,), (4, 5, 6, 7)]
    assert [number for number, state in states(simulation).items() if state == "failed"] == [2]
    assert simulation.record.trials[2].reason == "error: ValueError: trial 2 is bad"


def test_a_certificate_whose_worker_died_is_made_again_and_one_that_fails_is_left_out():
    whole = Simulation(spec_of(), trials=4, rungs=(16,), pack=4, lanes=1)
    whole.run(FakeWorker())
    first = next(job.job for job in whole.of(JobStarted) if job.work == "certify")
    once = Simulation(spec_of(), trials=4, rungs=(16,), pack=4, lanes=1)
    once.run(FakeWorker(dying=frozenset({first})))
    assert once.record.certificates == whole.record.certificates
    always = Simulation(spec_of(), trials=4, rungs=(16,), pack=4, lanes=1)
    always.run(FakeWorker(dying=frozenset(range(first, first + 3))))
    assert always.record.certificates == whole.record.certificates[1:]
    assert outcome(always) == outcome(whole)


# -- the breaker -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["reproducible", "asynchronous"])
@pytest.mark.parametrize(("pack", "lanes"), [(1, 1), (4, 2), (8, 4), (2, 9)])
def test_five_trials_failing_alike_pause_the_sweep_and_resuming_goes_on(order, pack, lanes):
    simulation = Simulation(spec_of(order), trials=40, pack=pack, lanes=lanes)
    searcher = simulation.run(FakeWorker(broken=True), timing=0)
    assert searcher.paused == "the first 5 trials failed alike: error: RuntimeError: no such file"
    failed = simulation.record.counts()["failed"]
    assert 5 <= failed < 40
    simulation.transactions.append([SweepEnded(state="paused", reason=searcher.paused)])
    worker = FakeWorker()
    again = simulation.run(worker, timing=0, resumed=True)
    assert again.paused is None
    assert simulation.record.counts()["failed"] <= failed + lanes
    assert_accounted_for(simulation, worker, 40)


def test_a_sweep_that_is_resumed_unmended_pauses_again():
    simulation = Simulation(spec_of(), trials=40, pack=2, lanes=2)
    simulation.run(FakeWorker(broken=True))
    before = simulation.record.counts()["failed"]
    searcher = simulation.run(FakeWorker(broken=True), resumed=True)
    assert searcher.paused is not None
    assert 5 <= simulation.record.counts()["failed"] - before < 40 - before


def test_failures_of_different_kinds_or_after_a_success_do_not_pause():
    different = Simulation(spec_of(), trials=12, pack=4)
    assert different.run(FakeWorker(failing=frozenset(range(12)))).paused is None
    late = Simulation(spec_of(), trials=12, rungs=(16,), pack=1, lanes=1)
    assert late.run(FakeWorker(dying=frozenset(range(1, 100)))).paused is None


# -- replay ------------------------------------------------------------------------------------------------------------


def resumed_anywhere(whole: Simulation, cut: int, fault: dict, timing: int | None) -> Simulation:
    """The sweep of `whole`, killed after some of its transactions and resumed."""
    found = whole.cut(1 + cut % len(whole.transactions))
    found.run(FakeWorker(**fault), timing=timing, resumed=True)
    return found


def assert_same_end(found: Simulation, whole: Simulation) -> None:
    assert outcome(found) == outcome(whole)
    assert max(Counter(event.trial for event in found.of(TrialTold)).values(), default=1) == 1
    assert max(Counter(event.trial for event in found.of(TrialAsked)).values()) == 1
    assert max(Counter(event.job for event in found.of(JobEnded)).values()) == 1
    reports = Counter((event.trial, event.step) for event in found.of(RungReported))
    assert max(reports.values(), default=1) == 1
    best = found.record.best
    assert (best and best.number) == (whole.record.best and whole.record.best.number)
    by_class = [sorted(map(str, simulation.record.certificates)) for simulation in (found, whole)]
    assert by_class[0] == by_class[1]


few_faults = st.builds(
    dict,
    diverging=st.frozensets(st.integers(0, 11), max_size=3),
    failing=st.frozensets(st.integers(0, 11), max_size=2),
    oom_above=st.sampled_from([2, 100]),
    dying=st.frozensets(st.integers(0, 8), max_size=3),
)


@settings(max_examples=50, deadline=None)
@given(methods, st.none() | timings, timings, few_faults, st.integers(0, 1_000), st.integers(1, 4), st.booleans())
def test_a_sweep_killed_anywhere_ends_as_if_it_had_not_been(method, timing, later, fault, cut, lanes, finite):
    spec = spec_of(method=method, parameters=FINITE if finite else f"{SWEPT}, {ALPHAS}")
    whole = Simulation(spec, lanes=lanes)
    whole.run(FakeWorker(**fault), timing=timing)
    assert_same_end(resumed_anywhere(whole, cut, fault, later), whole)


@settings(max_examples=20, deadline=None)
@given(timings, few_faults, st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(0, 1_000))
def test_a_ledger_of_several_drivers_replays_like_that_of_one(timing, fault, kills, cut):
    whole = Simulation(spec_of())
    whole.run(FakeWorker(**fault))
    found = Simulation(spec_of())
    for number, jobs in enumerate(kills):
        found.run(FakeWorker(**fault), timing=timing, resumed=number > 0, jobs=jobs)
    again = found.cut(1 + cut % len(found.transactions))
    for simulation in (found, again):
        simulation.run(FakeWorker(**fault), timing=timing, resumed=True)
        assert_same_end(simulation, whole)


@settings(max_examples=20, deadline=None)
@given(timings, few_faults, st.integers(0, 1_000), st.integers(1, 4), st.booleans())
def test_an_asynchronous_sweep_killed_anywhere_ends_too(timing, fault, cut, lanes, finite):
    spec = spec_of("asynchronous", parameters=FINITE if finite else f"{SWEPT}, {ALPHAS}")
    whole = Simulation(spec, lanes=lanes)
    whole.run(FakeWorker(**fault), timing=timing)
    found = resumed_anywhere(whole, cut, fault, timing + 1)
    worker = FakeWorker()
    worker.sizes.append(0)
    assert_accounted_for(found, worker, 12)
    assert max(Counter((event.trial, event.step) for event in found.of(RungReported)).values(), default=1) == 1


@settings(max_examples=20, deadline=None)
@given(timings, st.integers(0, 1_000), orders)
def test_a_ledger_with_a_pause_in_it_replays(timing, cut, order):
    whole = Simulation(spec_of(order), trials=20, pack=4, lanes=3)
    paused = whole.run(FakeWorker(broken=True), timing=timing)
    assert paused.paused is not None
    whole.transactions.append([SweepEnded(state="paused", reason=paused.paused)])
    mended_at = len(whole.transactions)
    whole.run(FakeWorker(), timing=timing, resumed=True)
    found = whole.cut(mended_at + 1 + cut % (len(whole.transactions) - mended_at))
    found.run(FakeWorker(), timing=timing, resumed=True)
    if order == "reproducible":
        assert_same_end(found, whole)
    assert found.record.counts()["waiting"] == 0


@pytest.mark.parametrize("method", ["gp", "cmaes"])
def test_samplers_that_learn_go_on_as_they_would_have(method):
    spec = make_spec(f"{SWEPT}, {ALPHAS}", search=f"method: {method}", certify="classes: 0")
    whole = Simulation(spec, trials=16, pack=4, lanes=2)
    whole.run(FakeWorker())
    found = whole.cut(len(whole.transactions) // 2)
    found.run(FakeWorker(), resumed=True)
    assert_same_end(found, whole)


def test_jobs_under_way_are_handed_out_again_before_any_other():
    simulation = Simulation(spec_of(), pack=2, lanes=3)
    simulation.run(FakeWorker(), jobs=2)
    lost = [job for job in simulation.record.jobs_started if job not in simulation.record.jobs_ended]
    assert len(lost) >= 2
    searcher = simulation.searcher(resumed=True)
    orders = [searcher.suggest() for _ in lost]
    assert [order.job for order in orders] == lost
    started = {job.job: job for job in simulation.of(JobStarted)}
    for order in orders:
        assert tuple(member.trial for member in order.members) == started[order.job].trials


def test_a_sweep_that_was_finished_is_finished_when_it_is_resumed():
    simulation = Simulation(spec_of())
    simulation.run(FakeWorker())
    before = simulation.events
    searcher = simulation.run(FakeWorker(), resumed=True, jobs=0)
    assert searcher.finished
    assert simulation.events == [*before, DriverStarted(resumed=True)]


def test_replaying_alone_appends_nothing():
    simulation = Simulation(spec_of())
    simulation.run(FakeWorker(), jobs=4)
    before = simulation.events
    simulation.searcher(resumed=True)
    assert simulation.events == [*before, DriverStarted(resumed=True)]


def test_a_ledger_that_does_not_replay_is_refused():
    simulation = Simulation(spec_of(), pack=4, lanes=2)
    simulation.run(FakeWorker(), jobs=3)
    simulation.pack = 3
    with pytest.raises(StateError, match=r"job 0 was recorded with trials \(0, 1, 2, 3\) to step 4, this version"):
        simulation.searcher(resumed=True)


def test_a_ledger_that_cannot_be_written_stops_the_search():
    simulation = Simulation(spec_of())
    searcher = simulation.searcher()

    def full(events):
        raise StateError("the ledger must be writable")

    searcher._append = full
    with pytest.raises(StateError, match="the ledger must be writable"):
        searcher.suggest()
