"""A sweep's record, and its place in the queue, as they are shown."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from services.schemas import MlflowLink, Progress, State, SweepStatus, SweepSummary
from sweeps.best import Best, best_point
from sweeps.plan import Plan
from sweeps.records import SweepRecord
from sweeps.tracking_address import run_url

if TYPE_CHECKING:
    from services.store import Submission

_DRIVEN = ("running", "degraded")


def summary(record: SweepRecord, row: Submission | None, state: State) -> SweepSummary:
    """A sweep in a list.

    Args:
        record: what the ledger has of it.
        row: its place in the queue; None where it was run by hand.
        state: as it is to be shown.
    """
    best = record.best
    return SweepSummary(
        sweep=record.id,
        name=record.created.name,
        owner=row.owner if row else "",
        state=state,
        reason=row.reason if row else _reason(record),
        created=utc(record.created_at_s),
        trials=record.counts(),
        trials_planned=plan_of(record, row).trials,
        metric=record.spec.metric.name,
        best=None if best is None else best.value,
    )


def status(
    record: SweepRecord,
    row: Submission | None,
    state: State,
    *,
    mlflow_url: str | None = None,
    ray_url: str | None = None,
) -> SweepStatus:
    """A sweep by itself.

    Args:
        record: what the ledger has of it.
        row: its place in the queue; None where it was run by hand.
        state: as it is to be shown.
        mlflow_url: where people reach MLflow, if not at the tracking URI.
        ray_url: the cluster's dashboard.
    """
    counts, plan = record.counts(), plan_of(record, row)
    return SweepStatus(
        **dict(summary(record, row, state)),
        priority=row.priority if row else 0,
        shared=row.shared if row else False,
        progress=Progress(
            trials_ended=sum(counts.values()) - counts["waiting"],
            trials_planned=plan.trials,
            jobs_ended=len(record.jobs_ended),
            # What was lost with a driver is under way again once the next one drives.
            jobs_under_way=len(record.jobs_started) - len(record.jobs_ended) if state in _DRIVEN else 0,
            certificates=len(record.certificates),
            certificates_planned=plan.certificates,
            tokens_per_s=record.tokens_per_s,
        ),
        best_point=finite(best_point(record)),
        mlflow=_mlflow(record, mlflow_url),
        ray_url=ray_url,
        seconds=record.seconds,
        device_hours=row.used_device_s / 3600 if row else 0.0,
        plan=plan,
    )


def plan_of(record: SweepRecord, row: Submission | None) -> Plan:
    """What would run, with the trials that the sweep is to be given once it is driven again."""
    plan = record.plan
    return plan if row is None or row.trials == plan.trials else plan.with_trials(record.spec, row.trials)


def finite(best: Best | None) -> Best | None:
    """The point without metrics that are no numbers, which JSON has no word for."""
    if best is None:
        return None
    return best.model_copy(update={"metrics": {k: v for k, v in best.metrics.items() if math.isfinite(v)}})


def utc(at_s: float) -> str:
    """A time in UTC, to the second."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")


def _reason(record: SweepRecord) -> str:
    return record.ended.reason if record.ended else ""


def _mlflow(record: SweepRecord, mlflow_url: str | None) -> MlflowLink:
    uri, experiment, run = record.created.tracking_uri, record.experiment_id, record.parent_run_id
    return MlflowLink(
        tracking_uri=uri,
        experiment=record.created.experiment,
        experiment_id=experiment,
        parent_run_id=run,
        url=run_url(mlflow_url or uri, experiment, run) if experiment and run else None,
        delivered=record.behind_since_s is None,
    )
