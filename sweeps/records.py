"""Folds a sweep's events into what is known of it now: its trials, its jobs, its certificates, its state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sweeps.events import (
    Certified,
    Delivered,
    DriverStarted,
    JobEnded,
    JobStarted,
    MemberDiverged,
    QueueMoved,
    Record,
    ReportWritten,
    RungReported,
    SweepCreated,
    SweepEnded,
    SweepExtended,
    SweepState,
    TrialAsked,
    TrialState,
    TrialTold,
)
from sweeps.plan import Plan
from sweeps.space import Configuration
from sweeps.spec import SweepSpec

if TYPE_CHECKING:  # a database is not needed to fold what a service sends
    from sweeps.ledger import Ledger


@dataclass(slots=True)
class TrialRecord:
    """One canonical point, and how far its training has come.

    Attributes:
        number: its number in the study.
        values: what the sampler chose.
        configuration: the canonical point.
        class_id: its class.
        duplicate_of: the trial that is trained in its place; None for a trial of its own.
        state: `waiting` until it has come to its end.
        value: the objective at its end; None where it never reported a finite one.
        reason: why it was pruned, diverged or failed.
        rungs: what it reported, oldest first; training losses are left out, for they would fill the memory.
        asked_at_s, told_at_s: seconds since the epoch.
    """

    number: int
    values: dict[str, float]
    configuration: Configuration
    class_id: str
    duplicate_of: int | None
    asked_at_s: float
    state: TrialState | Literal["waiting"] = "waiting"
    value: float | None = None
    reason: str = ""
    told_at_s: float | None = None
    rungs: list[RungReported] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps of training behind it."""
        return self.rungs[-1].step if self.rungs else 0

    @property
    def metrics(self) -> dict[str, float]:
        """What the task measured at the last rung."""
        return self.rungs[-1].metrics if self.rungs else {}


@dataclass(slots=True)
class SweepRecord:
    """All that the ledger says of one sweep.

    Attributes:
        id: the sweep's id.
        created: its first event.
        created_at_s: seconds since the epoch.
        trials: by number.
        jobs_started, jobs_ended: by number; a job that was started and not ended was lost with its driver.
        certificates: in the order they were made.
        begun_seq, ended_seq, progress_seq: numbers of the last events that say that a driver began, that it ended, and
            that a job came back; 0 where there is none.
        ended_at_s: when it ended, in seconds since the epoch.
        place: where the last driver that began holds its lock; empty where none has, or it did not say.
        in_queue: whether a service looks after it.
        behind_since_s: since when MLflow lacks something; None where it has everything.
        ended: the last word of the last driver; None while one drives, or after one was killed.
        extended_to: trials in all, where the sweep was given more than it was created with.
        seconds: where the drivers' time went, by stage, summed over them.
        report_directory: where the latest report lies.
        delivered: MLflow has every event up to this one.
        experiment_id, parent_run_id: the sweep's in MLflow, once it is there.
        trial_run_ids: the trials' runs in MLflow.
        last_seq, last_at_s: number and time of the last event.
        tellable_seq: number of the last one that MLflow is told of.
    """

    id: str
    created: SweepCreated
    created_at_s: float
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    jobs_started: dict[int, JobStarted] = field(default_factory=dict)
    jobs_ended: dict[int, JobEnded] = field(default_factory=dict)
    certificates: list[dict[str, Any]] = field(default_factory=list)
    begun_seq: int = 0
    ended_seq: int = 0
    ended_at_s: float = 0.0
    progress_seq: int = 0
    behind_since_s: float | None = None
    place: str = ""
    in_queue: bool = False
    ended: SweepEnded | None = None
    extended_to: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    report_directory: str | None = None
    delivered: int = 0
    experiment_id: str | None = None
    parent_run_id: str | None = None
    trial_run_ids: dict[int, str] = field(default_factory=dict)
    last_seq: int = 0
    last_at_s: float = 0.0
    tellable_seq: int = 0

    @property
    def spec(self) -> SweepSpec:
        """The resolved spec."""
        return SweepSpec.model_validate(self.created.spec)

    @property
    def driven(self) -> bool:
        """Whether a driver has ever begun."""
        return self.begun_seq > 0

    @property
    def plan(self) -> Plan:
        """What was planned, with the trials that it was given later."""
        plan = Plan.model_validate(self.created.plan)
        return plan if self.extended_to is None else plan.with_trials(self.spec, self.extended_to)

    @property
    def state(self) -> SweepState | Literal["queued", "running"]:
        """`running` also where the driver was killed before it could say otherwise; `queued` before the first one."""
        if self.ended:
            return self.ended.state
        return "running" if self.driven else "queued"

    @property
    def trained(self) -> list[TrialRecord]:
        """The trials that are trained themselves: all but duplicates."""
        return [trial for trial in self.trials.values() if trial.duplicate_of is None]

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens trained a second of one worker's training, over all jobs whose task counts them; else None."""
        counted = [job for job in self.jobs_ended.values() if job.tokens]
        train_s = sum(job.train_s for job in counted)
        return sum(job.tokens or 0 for job in counted) / train_s if train_s else None

    def counts(self) -> dict[str, int]:
        """Trials by state."""
        states = [trial.state for trial in self.trained]
        return {state: states.count(state) for state in ("finished", "pruned", "diverged", "failed", "waiting")}

    def ranked(self) -> list[TrialRecord]:
        """Finished trials, best first; equal values in the order they were asked."""
        sign = self.spec.metric.sign
        finished = [trial for trial in self.trained if trial.state == "finished" and trial.value is not None]
        return sorted(finished, key=lambda trial: (sign * (trial.value or 0.0), trial.number))

    @property
    def best(self) -> TrialRecord | None:
        """The best finished trial."""
        ranked = self.ranked()
        return ranked[0] if ranked else None


def read_sweep(ledger: Ledger, sweep: str) -> SweepRecord:
    """Reads a sweep from the ledger by its id."""
    return fold(sweep, ledger.stream(sweep))


def fold(sweep: str, records: Iterable[Record]) -> SweepRecord:
    """Folds events, in order, into a record."""
    iterator = iter(records)
    first = next(iterator)
    assert isinstance(first.event, SweepCreated), "a sweep's first event says that it was created"
    state = SweepRecord(sweep, first.event, first.at_s)
    state.last_seq = state.tellable_seq = first.seq
    state.behind_since_s = first.at_s
    fold_into(state, iterator)
    return state


def fold_into(state: SweepRecord, records: Iterable[Record]) -> None:
    """Folds the events that came after those a record was made of into it."""
    for record in records:
        _apply(state, record)
        state.last_seq, state.last_at_s = record.seq, record.at_s
        if not isinstance(record.event, Delivered | QueueMoved):
            state.tellable_seq = record.seq
            if state.behind_since_s is None:
                state.behind_since_s = record.at_s


def _apply(state: SweepRecord, record: Record) -> None:
    match record.event:
        case TrialAsked() as asked:
            state.trials[asked.trial] = TrialRecord(
                number=asked.trial,
                values=asked.values,
                configuration=asked.configuration,
                class_id=asked.class_id,
                duplicate_of=asked.duplicate_of,
                asked_at_s=record.at_s,
            )
        case JobStarted() as started:
            state.jobs_started[started.job] = started
            state.jobs_ended.pop(started.job, None)  # one whose node vanished is started again
        case RungReported() as reported:
            # Without its losses, which are nearly all that a sweep's events hold; they are read from these.
            state.trials[reported.trial].rungs.append(reported.model_copy(update={"train_losses": ()}))
        case JobEnded() as ended:
            state.jobs_ended[ended.job] = ended
            state.progress_seq = record.seq
        case TrialTold() as told:
            trial = state.trials[told.trial]
            trial.state, trial.value, trial.reason, trial.told_at_s = told.state, told.value, told.reason, record.at_s
        case Certified() as certified:
            state.certificates.append(certified.certificate)
        case DriverStarted() as begun:
            state.begun_seq, state.ended, state.place = record.seq, None, begun.place
        case SweepExtended() as extended:
            state.extended_to = extended.trials
        case SweepEnded() as ended_sweep:
            state.ended, state.ended_seq, state.ended_at_s = ended_sweep, record.seq, record.at_s
            for stage, seconds in ended_sweep.seconds.items():
                state.seconds[stage] = state.seconds.get(stage, 0.0) + seconds
        case ReportWritten() as written:
            state.report_directory = written.directory
        case Delivered() as delivered:
            state.delivered = delivered.up_to
            if delivered.up_to >= state.tellable_seq:
                state.behind_since_s = None
            elif state.behind_since_s is not None:
                state.behind_since_s = record.at_s  # it takes things, and has only not got to the end
            state.experiment_id, state.parent_run_id = delivered.experiment_id, delivered.parent_run_id
            state.trial_run_ids.update(delivered.trial_run_ids)
        case MemberDiverged():
            pass  # told as an ending of its own
        case QueueMoved():
            state.in_queue = True  # where it stands there is the queue's to say
        case SweepCreated():
            raise AssertionError("a sweep is created once")
