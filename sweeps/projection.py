"""What MLflow is told of a sweep: a pure function of its events, without MLflow.

    event                        becomes
    SweepCreated                 the parent run: params, tags, description; spec and plan as artifacts
    JobStarted                   a child run for each trial that has none; RUNNING again for one that was stopped
    RungReported, MemberDiverged `train/loss` at its steps, the task's metrics at the rung
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
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from sweeps.collapse import Certificate, TwinVerdict
from sweeps.events import (
    Certified,
    DriverStarted,
    JobStarted,
    MemberDiverged,
    ReportWritten,
    RungReported,
    SweepCreated,
    SweepEnded,
    TrialAsked,
    TrialTold,
)
from sweeps.ledger import Record
from sweeps.records import SweepRecord, TrialRecord, fold
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SweepSpec

RunStatus = Literal["RUNNING", "FINISHED", "KILLED", "FAILED"]

SWEEP_TAG, ROLE_TAG, NAME_TAG = "lora_sweeps.sweep_id", "lora_sweeps.role", "lora_sweeps.run"

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

_LONGEST_TAG = 4900
"""Characters; MLflow's servers cut or refuse tags above 5000 or 8000, by version."""

_SHOWN = 5
"""Trials in the description's table."""


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
        texts: artifacts by path.
        directories: whose files become artifacts under `report`.
    """

    key: RunKey
    run_name: str
    start_ms: int
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[MetricPoint] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    status: RunStatus | None = None
    end_ms: int = 0
    texts: dict[str, str] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)

    def add(self, key: str, points: Iterable[tuple[int, float]], at_ms: int) -> None:
        """Adds (step, value) points of a metric; infinities become a tag, because MLflow would store 1.8e308."""
        key = _metric_key(key)
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
        self._seen: list[Record] = []
        self._children: dict[int, _Child] = {}
        self._writes: dict[RunKey, RunWrite] = {}
        self._reduction: Reduction | None = None

    def project(self, records: Iterable[Record]) -> list[RunWrite]:
        """The writes that a batch of events asks for, the parent's last; the batches must come in order."""
        self._writes = {}
        for record in records:
            self._seen.append(record)
            self._apply(record)
        return sorted(self._writes.values(), key=lambda write: write.key.role == "sweep")

    def _apply(self, record: Record) -> None:
        at_ms = _ms(record.at_s)
        match record.event:
            case SweepCreated() as created:
                self._create(created)
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
            case TrialTold() as told if told.trial in self._children:
                self._tell(told, at_ms)
            case Certified() as certified:
                self._certify(Certificate.model_validate(certified.certificate), record.seq, at_ms)
            case SweepEnded() as ended:
                self._end(ended, at_ms)
            case ReportWritten() as written:
                self._parent().directories.append(written.directory)

    # -- the parent

    def _parent(self) -> RunWrite:
        return self._write(RunKey("sweep"), self._sweep, _ms(self._seen[0].at_s))

    def _create(self, created: SweepCreated) -> None:
        spec = SweepSpec.model_validate(created.spec)
        self._reduction = Reduction.of(spec)
        write = self._parent()
        write.status = "RUNNING"
        write.params |= _sweep_params(spec, self._reduction, created)
        write.tags |= {
            "lora_sweeps.state": "running",
            "mlflow.note.content": _description(fold(self._sweep, self._seen)),
        }
        write.texts |= {
            "spec.yaml": hide_passwords(created.spec_text),
            "spec.resolved.json": hide_passwords(json.dumps(created.spec, indent=2)),
            "plan.json": hide_passwords(json.dumps(created.plan, indent=2)),
        }

    def _end(self, ended: SweepEnded, at_ms: int) -> None:
        for trial, child in self._children.items():
            if child.running:
                child.running = False
                write = self._child(trial)
                write.status, write.end_ms = "KILLED", at_ms
                write.tags |= {"lora_sweeps.state": ended.state, "lora_sweeps.reason": f"the sweep was {ended.state}"}
        record = fold(self._sweep, self._seen)
        write = self._parent()
        write.status, write.end_ms = _STATUS_OF_SWEEP[ended.state], at_ms
        write.tags |= {"lora_sweeps.state": ended.state, "mlflow.note.content": _description(record)}
        if ended.reason:
            write.tags["lora_sweeps.reason"] = _tag(ended.reason)
        if record.best is not None:
            write.tags |= _best_tags(record.best)
            write.add("best_value", [(record.best.step, record.best.value or 0.0)], at_ms)
        for state, count in record.counts().items():
            write.add(f"trials/{state}", [(0, count)], at_ms)

    # -- trials

    def _child(self, trial: int) -> RunWrite:
        child = self._children[trial]
        write = self._write(RunKey("trial", str(trial)), child.asked.configuration.label(), child.asked_ms)
        if not child.started:
            child.started = True
            write.params |= _params(child.asked.configuration, self._law) | {
                "trial": str(trial),
                "class_id": child.asked.class_id,
            }
            write.tags |= {"lora_sweeps.trial": str(trial), "lora_sweeps.class_id": child.asked.class_id}
            write.tags |= self._alpha_family(child.asked.configuration)
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
            write.tags["lora_sweeps.reason"] = _tag(told.reason)
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
            write.params |= _params(configuration, self._law) | {"class_id": certificate.class_id}
            write.tags |= _twin_tags(certificate, twin)
            # Losses of a certificate are one a step, counted from 1 as in every other report.
            write.add("train/loss", enumerate(twin.losses, start=1), at_ms)

    # -- shared

    @property
    def _law(self) -> str:
        assert self._reduction is not None, "a sweep's first event says that it was created"
        return self._reduction.law.name

    def _write(self, key: RunKey, run_name: str, start_ms: int) -> RunWrite:
        if key not in self._writes:
            self._writes[key] = RunWrite(key, run_name, start_ms)
        return self._writes[key]

    def _alpha_family(self, configuration: Configuration) -> dict[str, str]:
        assert self._reduction is not None, "a sweep's first event says that it was created"
        lines = [
            f"alpha={twin.alpha:g}: lr={twin.lr:.6g}, init_scale={twin.init_scale:.6g}"
            + (f", lr_ratio={twin.lr_ratio:.6g}" if twin.lr_ratio != 1 else "")
            for twin in self._reduction.twins(configuration)
        ]
        return {"lora_sweeps.same_training_as": _tag("\n".join(lines))} if lines else {}


# -- what runs are given -----------------------------------------------------------------------------------------------


def _sweep_params(spec: SweepSpec, reduction: Reduction, created: SweepCreated) -> dict[str, str]:
    values = {
        "task": spec.task.type,
        "optimizer": spec.train.optimizer,
        "steps": spec.train.steps,
        "batch_size": spec.train.batch_size,
        "schedule": spec.train.schedule,
        "seed": spec.train.seed,
        "metric": spec.metric.name,
        "goal": spec.metric.goal,
        "method": spec.search.method,
        "trials": spec.search.trials,
        "search_seed": spec.search.seed,
        "pruner": spec.search.pruner.type,
        "searched": ", ".join(reduction.space.searched),
        "alpha_reference": reduction.reference,
        "eliminated": ", ".join(reduction.eliminated) or "nothing",
        "pack": created.pack,
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def _params(configuration: Configuration, optimizer: str) -> dict[str, str]:
    values = {
        "rank": configuration.rank,
        "alpha": configuration.alpha,
        "lr": configuration.lr,
        "init_scale": configuration.init_scale,
        "lr_ratio": configuration.lr_ratio,
        "weight_decay": configuration.weight_decay,
        "optimizer": optimizer,
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def _twin_tags(certificate: Certificate, twin: TwinVerdict) -> dict[str, str]:
    tags = {
        "lora_sweeps.twin_of_trial": str(certificate.trial),
        "lora_sweeps.class_id": certificate.class_id,
        "lora_sweeps.verdict": twin.verdict,
        "lora_sweeps.exact_in_binary": str(twin.exact_in_binary).lower(),
        "lora_sweeps.max_ratio": f"{twin.max_ratio:g}",
    }
    return tags if twin.first_step is None else tags | {"lora_sweeps.first_step": str(twin.first_step)}


def _best_tags(best: TrialRecord) -> dict[str, str]:
    # Tags, because a resumed sweep may find a better one and MLflow refuses to change a param.
    configuration = best.configuration
    return {
        "lora_sweeps.best_trial": str(best.number),
        "lora_sweeps.best_rank": str(configuration.rank),
        "lora_sweeps.best_alpha": str(configuration.alpha),
        "lora_sweeps.best_lr": str(configuration.lr),
        "lora_sweeps.best_init_scale": str(configuration.init_scale),
    }


def _description(record: SweepRecord) -> str:
    """What the parent's page says, in Markdown."""
    spec, reduction = record.spec, Reduction.of(record.spec)
    counts = ", ".join(f"{count} {state}" for state, count in record.counts().items() if count)
    parts = [
        f"**{spec.name}**: LoRA sweep over {', '.join(reduction.space.searched)} with {spec.train.optimizer} "
        f"({spec.task.type}, {spec.train.steps} steps).",
        _reduction_sentence(reduction),
        f"Trials: {counts or 'none yet'}.",
    ]
    if record.ended is not None and record.ended.state != "finished":
        parts.append(
            f"The sweep was {record.ended.state}" + (f": {record.ended.reason}" if record.ended.reason else ".")
        )
    if ranked := record.ranked()[:_SHOWN]:
        parts.append("\n".join(_table(ranked, spec)))
    return hide_passwords(_tag("\n\n".join(parts)))


def _reduction_sentence(reduction: Reduction) -> str:
    if reduction.stuck is not None:
        return f"alpha was not eliminated: {reduction.stuck}."
    if not reduction.eliminated:
        return "Nothing was eliminated: alpha is a constant of this sweep."
    return (
        f"Eliminated: {' and '.join(reduction.eliminated)}, because alpha is a gauge ({reduction.law.describe()}); "
        f"every trial is written at alpha = {reduction.reference}."
    )


def _table(ranked: list[TrialRecord], spec: SweepSpec) -> Iterator[str]:
    metric = spec.metric.name
    unit = " (nats)" if metric.endswith("loss") else ""
    with_accuracy = metric != "eval/accuracy" and any("eval/accuracy" in trial.metrics for trial in ranked)
    columns = ["trial", "rank", "alpha", "lr", "init_scale", metric + unit] + ["eval/accuracy"] * with_accuracy
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---:|" * len(columns)
    for trial in ranked:
        at = trial.configuration
        cells = [str(trial.number), str(at.rank), f"{at.alpha:g}", f"{at.lr:.3g}", f"{at.init_scale:.3g}"]
        cells += [f"{trial.value:.4g}"] + [f"{trial.metrics.get('eval/accuracy', math.nan):.4g}"] * with_accuracy
        yield f"| {' | '.join(cells)} |"


def _metric_key(key: str) -> str:
    """MLflow's metric keys have letters, digits, and `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", key)


def _tag(text: str) -> str:
    return text if len(text) <= _LONGEST_TAG else text[: _LONGEST_TAG - 2] + " …"


def _ms(at_s: float) -> int:
    return int(at_s * 1000)


def hide_passwords(text: str) -> str:
    """The text with `***` for the password in every URL with one."""
    return re.sub(r"""(\w://[^\s/:@"'<>]*):[^\s"'<>]*@""", r"\1:***@", text)
