"""What the service answers, and the command line prints: one model for both, wherever a sweep runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sweeps.best import Best
from sweeps.events import QueueState
from sweeps.plan import Plan

State = QueueState | Literal["interrupted"]
"""`interrupted` is a sweep that was run by hand and stopped, or whose driver was killed."""

ENDED: frozenset[State] = frozenset({"paused", "finished", "failed", "cancelled", "interrupted"})
"""States of a sweep that nobody goes on with unless somebody asks for it."""


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SweepSummary(_Answer):
    """A sweep in a list."""

    sweep: str
    name: str
    owner: str
    """The user who submitted it; empty for one that was run by hand."""
    state: State
    reason: str
    """Why it is in that state; empty where that needs no words."""
    created: str
    """When, in UTC (ISO 8601)."""
    trials: dict[str, int]
    """Trials by state: finished, pruned, diverged, failed, waiting."""
    trials_planned: int
    """How many are trained in all."""
    metric: str
    best: float | None
    """The best finished trial's value of the metric."""


class Progress(_Answer):
    """How far a sweep has come."""

    trials_ended: int
    trials_planned: int
    jobs_ended: int
    jobs_under_way: int
    certificates: int
    certificates_planned: int
    tokens_per_s: float | None
    """Tokens trained a second by one worker; None where the task has none."""


class MlflowLink(_Answer):
    """Where a sweep is in MLflow."""

    tracking_uri: str
    experiment: str
    experiment_id: str | None
    parent_run_id: str | None
    url: str | None
    """The sweep's page; None until it is there."""
    delivered: bool
    """Whether MLflow has everything."""


class SweepStatus(SweepSummary):
    """A sweep by itself."""

    priority: int
    shared: bool
    """Whether all users may see it."""
    progress: Progress
    best_point: Best | None
    mlflow: MlflowLink
    ray_url: str | None
    """The cluster's dashboard; None where the sweep runs on a Ray of its own."""
    seconds: dict[str, float]
    """Where its drivers' time went, by stage."""
    device_hours: float
    """Used so far."""
    plan: Plan


class SweepPage(_Answer):
    """A page of a list, latest first."""

    sweeps: tuple[SweepSummary, ...]
    next: str | None
    """What to ask for as `after` for the next page; None where this is the last."""


class Accepted(_Answer):
    """A sweep was accepted."""

    sweep: str
    state: State
    reason: str
    plan: Plan


class Leftover(_Answer):
    """What a trainer's config cannot say, and somebody must set by hand."""

    name: str
    value: Any
    warns: bool
    text: str


class Export(_Answer):
    """A point in a trainer's config format."""

    sweep: str
    trial: int
    format: str
    alpha: float
    init_scale: float
    leftovers: tuple[Leftover, ...]
    files: dict[str, str]
    """Text of each file by its name."""


class LogPart(_Answer):
    """A stretch of what a sweep's drivers wrote."""

    text: str
    offset: int
    """Byte at which the text begins."""
    next: int
    """What to ask for as `offset` to go on."""


class AuditLine(_Answer):
    """Who did what."""

    seq: int
    at: str
    user: str
    token: str
    address: str
    action: str
    sweep: str
    detail: str


class AuditPage(_Answer):
    """A page of the audit log, latest first."""

    entries: tuple[AuditLine, ...]
    next: int | None


class FaultModel(_Answer):
    """One thing wrong with a spec."""

    path: str
    line: int | None
    required: str
    found: str
    hint: str | None


class Problem(_Answer):
    """What went wrong (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    faults: tuple[FaultModel, ...] = ()
    """What is wrong with the spec, all of it at once."""


class Extension(_Answer):
    """More trials for a sweep."""

    trials: int
    """How many it trains in all."""


class Health(_Answer):
    """Whether the service is alive, or ready."""

    status: Literal["ok", "not ready"]
    reason: str = ""


class Translate(_Answer):
    """A training run, and the alpha, scaling, lr or init scale that it is to be written with."""

    optimizer: str | None = None
    rank: int | None = None
    alpha: str | float | None = None
    lr: float | None = None
    lr_ratio: float = 1.0
    init_scale: float = 1.0
    weight_decay: float | None = None
    clip_norm: float | None = None
    rslora: bool = False
    constants: dict[str, float | tuple[float, ...]] = {}
    preset: str | None = None
    to_alpha: str | float | None = None
    to_scaling: float | None = None
    to_lr: float | None = None
    to_init_scale: float | None = None
    to_rslora: bool | None = None
