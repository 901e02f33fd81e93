import math

import pytest

from sweeps.events import (
    Certified,
    Delivered,
    DriverStarted,
    JobEnded,
    JobStarted,
    MemberDiverged,
    ReportWritten,
    RungReported,
    SweepEnded,
    TrialAsked,
    TrialTold,
)
from sweeps.ledger import Ledger
from sweeps.records import SweepRecord, fold, read_sweep
from sweeps.space import Configuration
from tests.sweeps.support import as_records, make_created, make_spec


def asked(trial: int, duplicate_of: int | None = None) -> TrialAsked:
    configuration = Configuration(rank=4, alpha=16.0, lr=0.01 * (trial + 1))
    return TrialAsked(
        trial=trial,
        values={"lr": configuration.lr},
        configuration=configuration,
        class_id=f"c-{trial}",
        duplicate_of=duplicate_of,
    )


def told(trial: int, state: str, value: float | None = None, reason: str = "") -> TrialTold:
    return TrialTold(trial=trial, state=state, value=value, reason=reason)


def rung(trial: int, step: int, loss: float) -> RungReported:
    return RungReported(trial=trial, job=0, step=step, metrics={"eval/loss": loss}, checkpoint=f"{trial}/{step}")


def record_of(*events, **sections: str) -> SweepRecord:
    return fold("s", as_records([make_created(make_spec(**sections)), *events]))


def test_a_trial_is_what_its_events_say():
    record = record_of(asked(0), rung(0, 50, 2.0), rung(0, 100, 1.5), told(0, "pruned", 1.5, "at step 100"))
    trial = record.trials[0]
    assert (trial.number, trial.class_id, trial.values) == (0, "c-0", {"lr": 0.01})
    assert trial.configuration == Configuration(rank=4, alpha=16.0, lr=0.01)
    assert (trial.state, trial.value, trial.reason) == ("pruned", 1.5, "at step 100")
    assert (trial.step, trial.metrics) == (100, {"eval/loss": 1.5})
    assert (trial.asked_at_s, trial.told_at_s) == (2.0, 5.0)


def test_a_trial_waits_until_it_is_told():
    trial = record_of(asked(0), MemberDiverged(trial=0, job=0, step=3)).trials[0]
    assert (trial.state, trial.step, trial.metrics, trial.told_at_s) == ("waiting", 0, {}, None)


def test_duplicates_are_kept_and_not_counted():
    record = record_of(asked(0), asked(1, duplicate_of=0), asked(2), told(0, "finished", 1.0), told(2, "diverged"))
    assert [trial.number for trial in record.trained] == [0, 2]
    assert record.trials[1].duplicate_of == 0
    assert record.counts() == {"finished": 1, "pruned": 0, "diverged": 1, "failed": 0, "waiting": 0}


@pytest.mark.parametrize(("goal", "order"), [("minimize", [3, 0, 1]), ("maximize", [1, 0, 3])])
def test_the_best_is_the_best_finished_trial(goal, order):
    events = [asked(n) for n in range(6)]
    events += [told(0, "finished", 2.0), told(1, "finished", 3.0), told(2, "pruned", -9.0), told(3, "finished", 0.0)]
    events += [told(4, "failed", 99.0), told(5, "diverged")]
    record = record_of(*events, metric=f"goal: {goal}")
    assert [trial.number for trial in record.ranked()] == order
    assert record.best.number == order[0]


def test_equal_values_go_to_the_first_asked():
    record = record_of(asked(0), asked(1), told(1, "finished", 1.0), told(0, "finished", 1.0))
    assert [trial.number for trial in record.ranked()] == [0, 1]


def test_without_a_finished_trial_there_is_no_best():
    assert record_of(asked(0), told(0, "pruned", 1.0)).best is None


def test_a_sweep_runs_until_it_ends_and_again_when_it_is_resumed():
    events = [DriverStarted(resumed=False)]
    assert record_of(*events).state == "running"
    events.append(SweepEnded(state="paused", reason="all alike", seconds={"trials": 2.0}))
    assert record_of(*events).state == "paused"
    events.append(DriverStarted(resumed=True))
    assert record_of(*events).state == "running"
    events.append(SweepEnded(state="finished", seconds={"trials": 3.0, "report": 1.0}))
    record = record_of(*events)
    assert record.state == "finished"
    assert record.seconds == {"trials": 5.0, "report": 1.0}


def test_jobs_that_were_lost_with_their_driver_are_those_that_did_not_end():
    starts = [JobStarted(job=n, trials=(n,), start=0, stop=50) for n in range(3)]
    ends = [JobEnded(job=0), JobEnded(job=2, error="oom", detail="too large")]
    record = record_of(*starts, *ends, starts[1])
    assert set(record.jobs_started) - set(record.jobs_ended) == {1}
    assert record.jobs_ended[2].error == "oom"


def test_what_was_delivered_adds_up():
    first = Delivered(up_to=5, experiment_id="1", parent_run_id="p", trial_run_ids={0: "a"})
    second = Delivered(up_to=9, experiment_id="1", parent_run_id="p", trial_run_ids={1: "b"})
    record = record_of(first, second, Certified(certificate={"max_ratio": math.inf}), ReportWritten(directory="/r"))
    assert (record.delivered, record.experiment_id, record.parent_run_id) == (9, "1", "p")
    assert record.trial_run_ids == {0: "a", 1: "b"}
    assert record.certificates == [{"max_ratio": math.inf}]
    assert record.report_directory == "/r"
    assert record.last_seq == 5


def test_the_ledger_tells_the_same_as_the_events(tmp_path):
    ledger = Ledger.in_directory(tmp_path)
    ledger.create("s", make_created(make_spec()))
    ledger.append("s", [asked(0), rung(0, 50, math.nan), told(0, "diverged", None, "at step 50")])
    record = read_sweep(ledger, "s")
    assert record.spec == make_spec()
    assert math.isnan(record.trials[0].metrics["eval/loss"])
    assert record.counts()["diverged"] == 1
    ledger.close()
