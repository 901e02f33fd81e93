"""What the pages show, gathered from a sweep's record: frozen, so that a template can be filled in at leisure."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from services.curve import Curve, curve
from services.schemas import SweepStatus, SweepSummary
from services.service import Service
from services.store import OPEN, Submission
from services.words import plan_lines
from sweeps.best import Best, DefaultInit
from sweeps.collapse import Certificate
from sweeps.events import QueueState
from sweeps.records import SweepRecord, TrialRecord
from sweeps.tracking_address import open_command

_MOST_TRIALS = 200
"""Trials in the page's table; the report has all of them."""

_BEST_FIRST = ("finished", "pruned", "waiting", "diverged", "failed")

_QUEUE: tuple[QueueState, ...] = ("running", "degraded", "starting", "queued")
"""Open states as the queue lists them."""


@dataclass(frozen=True, slots=True)
class TrialLine:
    """A trial in the table.

    Attributes:
        number: its number.
        state: `waiting` until it has come to its end.
        reason: why it was pruned, diverged or failed.
        value: the metric at its end.
        step: steps of training behind it.
        point: its numbers, in the order of `SweepView.columns`.
    """

    number: int
    state: str
    reason: str
    value: float | None
    step: int
    point: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class CertificateLine:
    """A certificate in the table."""

    class_id: str
    trial: int | None
    steps: int
    verdicts: dict[str, int]
    """Twins by verdict."""
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SweepView:
    """A sweep's page.

    Attributes:
        status: as the API gives it.
        seq: number of the last event that it was made of.
        wanted: `cancel` or `pause` once somebody asked for it; else empty.
        wanted_by: who.
        is_open: whether more can happen to it by itself.
        columns: numbers of a trial, as they are headed.
        best_columns: the same of the best point, which has more.
        best: the best point as it was trained, and for a trainer with its own default init.
        trials: best first.
        trials_left_out: how many more there are.
        duplicates: proposals that repeated a known point.
        certificates: in the order they were made.
        curve: how the search got better; None until two trials have finished.
        mlflow_command: what shows MLflow, where nobody serves it; else empty.
        plan: in words.
        source, spec_text: what was submitted.
    """

    status: SweepStatus
    seq: int
    wanted: str
    wanted_by: str
    is_open: bool
    columns: tuple[str, ...]
    best_columns: tuple[str, ...]
    best: tuple[tuple[str, tuple[float | None, ...]], ...]
    trials: tuple[TrialLine, ...]
    trials_left_out: int
    duplicates: int
    certificates: tuple[CertificateLine, ...]
    curve: Curve | None
    mlflow_command: str
    plan: tuple[tuple[str, tuple[str, ...]], ...]
    source: str
    spec_text: str

    @property
    def reasons(self) -> bool:
        """Whether any trial has one."""
        return any(trial.reason for trial in self.trials)

    @property
    def said(self) -> str:
        """Where it stands, in a line."""
        progress = self.status.progress
        wanted = f", asked to {self.wanted}" if self.wanted else ""
        return f"{self.status.state}{wanted}: {progress.trials_ended} of {progress.trials_planned} trials ended"


_COLUMNS = {
    "rank": "rank",
    "alpha": "alpha",
    "lr": "lr",
    "init_scale": "init scale",
    "lr_ratio": "lr ratio",
    "weight_decay": "weight decay",
    "head_lr": "head lr",
}
"""A configuration's numbers, as they are headed."""

_USUAL = {"lr_ratio": 1.0, "weight_decay": 0.0, "head_lr": 0.0}
"""Left out where no trial has anything else."""


def sweep_view(service: Service, row: Submission) -> SweepView:
    """Gathers a sweep's page."""
    with service.record(row) as record:
        seq, trained = record.last_seq, record.trained
        names = _names(trained)
        sign = record.spec.metric.sign
        ranked = sorted(trained, key=lambda trial: _rank(trial, sign))
        lines = tuple(_line(trial, names) for trial in ranked[:_MOST_TRIALS])
        drawn = _curve(record)
        duplicates = len(record.trials) - len(trained)
        certificates = tuple(_certificate(Certificate.model_validate(one)) for one in record.certificates)
        source, spec_text = record.created.source, record.created.spec_text
    status = service.status(row)
    best_columns, best = _best(status.best_point, names)
    uri = status.mlflow.tracking_uri
    served = service.settings.mlflow_url is not None or uri.startswith(("http://", "https://"))
    return SweepView(
        status=status,
        seq=seq,
        wanted=row.wanted,
        wanted_by=row.wanted_by,
        is_open=row.state in OPEN,
        columns=tuple(_COLUMNS[name] for name in names),
        best_columns=best_columns,
        best=best,
        trials=lines,
        trials_left_out=len(trained) - len(lines),
        duplicates=duplicates,
        certificates=certificates,
        curve=drawn,
        mlflow_command="" if served else open_command(uri),
        plan=tuple((label, tuple(texts)) for label, texts in plan_lines(status.plan)),
        source=source,
        spec_text=spec_text,
    )


def _curve(record: SweepRecord) -> Curve | None:
    """How the search got better, by the trials that have ended."""
    spec = record.spec
    told = sorted((t for t in record.trained if t.told_at_s is not None), key=lambda t: (t.told_at_s or 0.0, t.number))
    finished = [(i, t.value) for i, t in enumerate(told, start=1) if t.state == "finished" and t.value is not None]
    return curve(finished, len(told), sign=spec.metric.sign, log=spec.metric.name in spec.task.log_metrics)


def _names(trained: list[TrialRecord]) -> tuple[str, ...]:
    """The numbers that are worth a column."""
    usual = {
        name for name, value in _USUAL.items() if all(getattr(one.configuration, name) == value for one in trained)
    }
    return tuple(name for name in _COLUMNS if name not in usual)


def _rank(trial: TrialRecord, sign: float) -> tuple[int, float, int]:
    value = trial.value
    good = math.inf if value is None or not math.isfinite(value) else sign * value
    return _BEST_FIRST.index(trial.state), good, trial.number


def _line(trial: TrialRecord, names: tuple[str, ...]) -> TrialLine:
    point = tuple(getattr(trial.configuration, name) for name in names)
    return TrialLine(trial.number, trial.state, trial.reason, trial.value, trial.step, point)


def _best(
    best: Best | None, names: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[float | None, ...]], ...]]:
    """The best point's columns, and its two rows: in the gauge it was trained in, and in an unmodified trainer's."""
    if best is None:
        return (), ()
    moved: DefaultInit = best.default_init
    own = {name: getattr(best, name) for name in names}
    default = own | {"alpha": moved.alpha, "lr": moved.lr, "init_scale": 1.0}
    if "weight_decay" in names:
        default["weight_decay"] = moved.weight_decay
    for name in ("eps", "clip_norm"):
        if getattr(best, name) is not None:
            own[name], default[name] = getattr(best, name), getattr(moved, name)
    rows = (("as it was trained", tuple(own.values())), ("with default init", tuple(default.values())))
    return tuple(_COLUMNS.get(name, name.replace("_", " ")) for name in own), rows


def _certificate(certificate: Certificate) -> CertificateLine:
    return CertificateLine(
        class_id=certificate.class_id,
        trial=certificate.trial,
        steps=certificate.steps,
        verdicts=dict(Counter(str(twin.verdict) for twin in certificate.twins)),
        faults=certificate.faults,
    )


def in_queue_order(sweeps: tuple[SweepSummary, ...], places: dict[str, str]) -> list[SweepSummary]:
    """Open sweeps, what runs first, then what waits, oldest first; and why it waits.

    Args:
        sweeps: latest first.
        places: why queued ones wait.
    """
    oldest_first = sweeps[::-1]
    ranked = sorted(oldest_first, key=lambda one: _QUEUE.index(one.state) if one.state in _QUEUE else len(_QUEUE))
    return [
        one.model_copy(update={"reason": places.get(one.sweep, "starts now")})
        if one.state == "queued" and not one.reason
        else one
        for one in ranked
    ]
