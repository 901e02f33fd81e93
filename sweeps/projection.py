"""What MLflow is told of a sweep: a pure function of its events, without MLflow.

    event                        becomes
    SweepCreated                 the parent run: params, tags, description; spec and plan as artifacts
    SweepExtended                on the parent: how many trials, which is a tag because params never change; the plan
    JobStarted                   a child run for each trial that has none; RUNNING again for one that was stopped
    RungReported, MemberDiverged `train/loss` at its steps, the task's metrics at the rung
    JobEnded                     on the parent, of a task of sequences: `train/tokens_per_s` of the job, at its number
    TrialTold                    the child's end: FINISHED, KILLED (pruned), FAILED (diverged, failed)
    Certified                    a child run a twin
    SweepEnded                   the parent's end, the best trial, the description; no child is left RUNNING
    ReportWritten                the report as artifacts

The same events give the same writes, event times included, and MLflow keeps one copy of a metric that it is told twice.
So a delivery that was cut short is simply made again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sweeps.collapse import Certificate
from sweeps.events import (
    Certified,
    DriverStarted,
    JobEnded,
    JobStarted,
    MemberDiverged,
    Record,
    ReportWritten,
    RungReported,
    SweepCreated,
    SweepEnded,
    SweepExtended,
    TrialAsked,
    TrialTold,
)
from sweeps.records import SweepRecord, fold, fold_into
from sweeps.reduction import Reduction
from sweeps.secrecy import hide_passwords
from sweeps.spec import SweepSpec
from sweeps.tracking_fields import (
    alpha_family,
    best_tags,
    description,
    metric_key,
    sweep_params,
    tag,
    trial_params,
    twin_tags,
)

RunStatus = Literal["RUNNING", "FINISHED", "KILLED", "FAILED"]

SWEEP_TAG, ROLE_TAG, NAME_TAG = "lora_sweeps.sweep_id", "lora_sweeps.role", "lora_sweeps.run"

TRIALS_TAG = "lora_sweeps.trials"
"""On the parent: how many trials the sweep trains in all."""

ARTIFACTS_TAG, ARTIFACTS_WAIT, ARTIFACTS_DELIVERED = "lora_sweeps.artifacts", "waiting", "delivered"
"""On the parent: whether the sweep's files are there. Anything but `delivered` makes the next writer try again."""

_STATUS_OF_TRIAL: dict[str, RunStatus] = {
    "finished": "FINISHED",
    "pruned": "KILLED",
    "diverged": "FAILED",
    "failed": "FAILED",
}
_STATUS_OF_SWEEP: dict[str, RunStatus] = {
    "finished": "FINISHED",
    "paused": "KILLED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}


@dataclass(frozen=True, slots=True)
class RunKey:
    """What a run stands for, by which it is found again.

    Attributes:
        role: `sweep` for the parent, `trial` or `twin` for its children.
        name: a trial's number; for a twin the ledger's number of its certificate and its place there; else empty.
    """

    role: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One value of a metric."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass(slots=True)
class RunWrite:
    """What one run is told at once.

    Attributes:
        key: which run.
        run_name, start_ms: what it is made with, if it has to be made.
        params, metrics, tags: what is added.
        status: the status that it has after this; None where that does not change.
        end_ms: when it came to that status.
        artifacts: by path: a text, or a directory whose files go there.
    """

    key: RunKey
    run_name: str
    start_ms: int
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[MetricPoint] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    status: RunStatus | None = None
    end_ms: int = 0
    artifacts: dict[str, str | Path] = field(default_factory=dict)

    def add(self, key: str, points: Iterable[tuple[int, float]], at_ms: int) -> None:
        """Adds (step, value) points of a metric; infinities become a tag, because MLflow would store 1.8e308."""
        key = metric_key(key)
        for step, value in points:
            if math.isinf(value):
                self.tags[f"lora_sweeps.infinite.{key}"] = f"{value} at step {step}"
            else:
                self.metrics.append(MetricPoint(key, float(value), at_ms, step))


@dataclass(slots=True)
class _Child:
    asked: TrialAsked
    asked_ms: int
    started: bool = False
    running: bool = False
    step: int = 0


class Projection:
    """Turns a sweep's events, a batch at a time, into writes."""

    def __init__(self, sweep: str) -> None:
        self._sweep = sweep
        self._record: SweepRecord | None = None
        self._children: dict[int, _Child] = {}
        self._writes: dict[RunKey, RunWrite] = {}
        self._reduction: Reduction | None = None

    def project(self, records: Iterable[Record]) -> list[RunWrite]:
        """The writes that a batch of events asks for, the parent's last; the batches must come in order."""
        self._writes = {}
        for record in records:
            if self._record is None:
                self._record = fold(self._sweep, [record])
            else:
                fold_into(self._record, [record])
            self._apply(record)
        return sorted(self._writes.values(), key=lambda write: write.key.role == "sweep")

    def _apply(self, record: Record) -> None:
        at_ms = _ms(record.at_s)
        match record.event:
            case SweepCreated() as created:
                self._create(created)
            case SweepExtended() as extended:
                self._extend(extended)
            case DriverStarted(resumed=True):
                self._parent().status = "RUNNING"
                self._parent().tags |= {"lora_sweeps.state": "running", "lora_sweeps.reason": ""}
            case TrialAsked() as asked if asked.duplicate_of is None:
                self._children[asked.trial] = _Child(asked, at_ms)
            case JobStarted() as started if started.work == "train":
                for trial in started.trials:
                    self._start(trial)
            case RungReported() | MemberDiverged() as reported:
                self._report(reported, at_ms)
            case JobEnded() as job if job.tokens and job.train_s:
                self._parent().add("train/tokens_per_s", [(job.job, job.tokens / job.train_s)], at_ms)
            case TrialTold() as told if told.trial in self._children:
                self._tell(told, at_ms)
            case Certified() as certified:
                self._certify(Certificate.model_validate(certified.certificate), record.seq, at_ms)
            case SweepEnded() as ended:
                self._end(ended, at_ms)
            case ReportWritten() as written:
                self._parent().artifacts["report"] = Path(written.directory)
                self._parent().tags[ARTIFACTS_TAG] = ARTIFACTS_WAIT

    # -- the parent

    def _parent(self) -> RunWrite:
        return self._write(RunKey("sweep"), self._sweep, _ms(self._known.created_at_s))

    def _create(self, created: SweepCreated) -> None:
        spec = SweepSpec.model_validate(created.spec)
        self._reduction = Reduction.of(spec)
        write = self._parent()
        write.status = "RUNNING"
        write.params |= sweep_params(spec, self._reduction, created)
        write.tags |= {
            "lora_sweeps.state": "running",
            TRIALS_TAG: str(created.plan["trials"]),
            ARTIFACTS_TAG: ARTIFACTS_WAIT,
            "mlflow.note.content": description(self._known),
        }
        write.artifacts |= {
            "spec.yaml": hide_passwords(created.spec_text),
            "spec.resolved.json": hide_passwords(json.dumps(created.spec, indent=2)),
            "plan.json": hide_passwords(json.dumps(created.plan, indent=2)),
        }

    def _extend(self, extended: SweepExtended) -> None:
        plan = self._known.plan
        write = self._parent()
        write.tags |= {TRIALS_TAG: str(extended.trials), ARTIFACTS_TAG: ARTIFACTS_WAIT}
        write.artifacts["plan.json"] = hide_passwords(json.dumps(plan.model_dump(mode="json"), indent=2))

    def _end(self, ended: SweepEnded, at_ms: int) -> None:
        for trial, child in self._children.items():
            if child.running:
                child.running = False
                write = self._child(trial)
                write.status, write.end_ms = "KILLED", at_ms
                write.tags |= {"lora_sweeps.state": ended.state, "lora_sweeps.reason": f"the sweep was {ended.state}"}
        record = self._known
        write = self._parent()
        write.status, write.end_ms = _STATUS_OF_SWEEP[ended.state], at_ms
        write.tags |= {"lora_sweeps.state": ended.state, "mlflow.note.content": description(record)}
        if ended.reason:
            write.tags["lora_sweeps.reason"] = tag(ended.reason)
        if record.best is not None:
            write.tags |= best_tags(record.best, self._reduced)
            write.add("best_value", [(record.best.step, record.best.value or 0.0)], at_ms)
        for state, count in record.counts().items():
            write.add(f"trials/{state}", [(0, count)], at_ms)

    # -- trials

    def _child(self, trial: int) -> RunWrite:
        child = self._children[trial]
        write = self._write(RunKey("trial", str(trial)), child.asked.configuration.label(), child.asked_ms)
        if not child.started:
            child.started = True
            write.params |= trial_params(child.asked.configuration, self._reduced.law.name) | {
                "trial": str(trial),
                "class_id": child.asked.class_id,
            }
            write.tags |= {"lora_sweeps.trial": str(trial), "lora_sweeps.class_id": child.asked.class_id}
            write.tags |= alpha_family(self._reduced, child.asked.configuration)
        return write

    def _start(self, trial: int) -> None:
        child = self._children[trial]
        if child.running:
            return
        again, child.running = child.started, True
        write = self._child(trial)
        write.status = "RUNNING"
        write.tags |= {"lora_sweeps.state": "running"} | ({"lora_sweeps.reason": ""} if again else {})

    def _report(self, reported: RungReported | MemberDiverged, at_ms: int) -> None:
        child, write = self._children[reported.trial], self._child(reported.trial)
        child.step = reported.step
        write.add("train/loss", reported.train_losses, at_ms)
        if isinstance(reported, RungReported):
            for key, value in reported.metrics.items():
                write.add(key, [(reported.step, value)], at_ms)

    def _tell(self, told: TrialTold, at_ms: int) -> None:
        child, write = self._children[told.trial], self._child(told.trial)
        child.running = False
        write.status, write.end_ms = _STATUS_OF_TRIAL[told.state], at_ms
        write.tags["lora_sweeps.state"] = told.state
        if told.reason:
            write.tags["lora_sweeps.reason"] = tag(told.reason)
        if told.value is not None:
            write.add("objective", [(child.step, told.value)], at_ms)

    # -- twins

    def _certify(self, certificate: Certificate, seq: int, at_ms: int) -> None:
        for place, twin in enumerate(certificate.twins):
            configuration = twin.configuration
            write = self._write(
                RunKey("twin", f"{seq}.{place}"),
                f"twin of {certificate.representative.label()} at alpha={configuration.alpha:g}",
                at_ms,
            )
            write.status, write.end_ms = "FINISHED", at_ms
            write.params |= trial_params(configuration, self._reduced.law.name) | {"class_id": certificate.class_id}
            write.tags |= twin_tags(certificate, twin)
            # Losses of a certificate are one a step, counted from 1 as in every other report.
            write.add("train/loss", enumerate(twin.losses, start=1), at_ms)

    # -- shared

    @property
    def _known(self) -> SweepRecord:
        """All that was projected so far, and the event that is being projected."""
        assert self._record is not None, "an event comes first"
        return self._record

    @property
    def _reduced(self) -> Reduction:
        assert self._reduction is not None, "a sweep's first event says that it was created"
        return self._reduction

    def _write(self, key: RunKey, run_name: str, start_ms: int) -> RunWrite:
        if key not in self._writes:
            self._writes[key] = RunWrite(key, run_name, start_ms)
        return self._writes[key]


def _ms(at_s: float) -> int:
    return int(at_s * 1000)
