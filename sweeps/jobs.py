"""What the driver orders from a worker, and what comes back. A result is a pure function of its order."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sweeps.space import Configuration

JobErrorKind = Literal["error", "oom", "worker_died", "node_lost"]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class MemberOrder(_Message):
    """One trial to train."""

    trial: int
    configuration: Configuration
    class_id: str
    checkpoint: str | None = None
    """Where its state at the job's first step lies, relative to `JobOrder.checkpoints`; None: at the beginning."""


class JobOrder(_Message):
    """Train these members from step `start` to step `stop`; or, for `certify`, one representative beside its twins."""

    job: int
    work: Literal["train", "certify"]
    spec: dict[str, Any]
    cache: str | None
    """Directory for what tasks keep, which all nodes see; None: each node has one of its own."""
    checkpoints: str
    """Place of this sweep's checkpoints (`sweeps/storage.py`)."""
    members: tuple[MemberOrder, ...]
    twins: tuple[Configuration, ...] = ()
    """For `certify`: other configurations of the one member's class."""
    start: int
    stop: int


class MemberResult(_Message):
    """What became of one trial."""

    trial: int
    diverged_at: int | None = None
    """The step at which its loss or gradient stopped being finite."""
    metrics: dict[str, float] = {}
    train_losses: tuple[tuple[int, float], ...] = ()
    checkpoint: str | None = None


class JobResult(_Message):
    """What became of a job."""

    job: int
    error: JobErrorKind | None = None
    detail: str = ""
    """A traceback, where there is an error."""
    members: tuple[MemberResult, ...] = ()
    certificate: dict[str, Any] | None = None
    setup_s: float = 0.0
    train_s: float = 0.0
    tokens: int | None = None
    """Tokens that its members were trained on in `train_s`, padding not counted; None where the task has none."""
    eval_s: float = 0.0
    node: str = ""
    """Address of the node that did it; empty where it was lost with its node, or nobody said."""
