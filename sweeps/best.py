"""The best point of a sweep, with every number that a trainer asks for, and how numbers of sweeps are put into words.

Light: whoever answers for many sweeps, such as a service, needs this and not the report around it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from lora_core.laws import Constant
from sweeps.export.point import ExportPoint
from sweeps.records import SweepRecord
from sweeps.reduction import Reduction


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class DefaultInit(_Part):
    """The best point for a trainer that knows no init scale."""

    alpha: float
    lr: float
    weight_decay: float
    eps: float | None
    clip_norm: float | None
    constants: dict[str, Constant]


class Best(_Part):
    """The best point, as `lora-sweeps best --json` prints it."""

    sweep: str
    trial: int
    value: float
    metric: str
    rank: int
    alpha: float
    lr: float
    lr_ratio: float
    init_scale: float
    weight_decay: float
    head_lr: float
    """Learning rate of what is trained whole beside the adapters, in every gauge; 0 where nothing is."""
    eps: float | None
    clip_norm: float | None
    optimizer: str
    metrics: dict[str, float]
    class_id: str
    mlflow_run_id: str | None
    constants: dict[str, Constant]
    """The optimizer's absolute constants, eps among them, at this alpha."""
    default_init: DefaultInit


def best_point(record: SweepRecord) -> Best | None:
    """The best finished trial with its constants; None where none has finished."""
    trial = record.best
    if trial is None or trial.value is None:
        return None
    spec, configuration = record.spec, trial.configuration
    point = Reduction.of(spec).point(configuration)
    moved = ExportPoint.of(record, trial)
    return Best(
        sweep=record.id,
        trial=trial.number,
        value=trial.value,
        metric=spec.metric.name,
        rank=configuration.rank,
        alpha=configuration.alpha,
        lr=configuration.lr,
        lr_ratio=configuration.lr_ratio,
        init_scale=configuration.init_scale,
        weight_decay=point.a.weight_decay,
        head_lr=configuration.head_lr,
        eps=point.a.eps,
        clip_norm=point.clip_norm,
        optimizer=spec.train.optimizer,
        metrics=trial.metrics,
        class_id=trial.class_id,
        mlflow_run_id=record.trial_run_ids.get(trial.number),
        constants=dict(point.a.constants),
        default_init=DefaultInit(
            alpha=moved.alpha,
            lr=moved.point.a.lr,
            weight_decay=moved.point.a.weight_decay,
            eps=moved.point.a.eps,
            clip_norm=moved.point.clip_norm,
            constants=dict(moved.point.a.constants),
        ),
    )


def unit_of(metric: str) -> str:
    """The unit of a metric, with a space before it; empty for a pure number."""
    return " nats" if metric.endswith("loss") else ""


def counts_in_words(counts: dict[str, int]) -> str:
    """`24 finished, 39 pruned, 1 diverged`: states that no trial is in are left out."""
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none"
