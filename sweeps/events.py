"""What can happen to a sweep: the events that the ledger keeps, and that everything else is derived from.

Events are facts in the past tense. They are never changed or deleted; a reader folds them (`sweeps/records.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sweeps.space import Configuration

TrialState = Literal["finished", "pruned", "diverged", "failed"]
SweepState = Literal["finished", "paused", "interrupted", "failed"]
QueueState = Literal["queued", "starting", "running", "paused", "degraded", "finished", "failed", "cancelled"]


class _Event(BaseModel):
    # NaN and infinity are results like others (a diverged loss) and must survive the round trip through JSON.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class SweepCreated(_Event):
    """A sweep was accepted."""

    kind: Literal["sweep_created"] = "sweep_created"
    name: str
    spec: dict[str, Any]
    """The resolved spec, every default filled in."""
    spec_text: str
    """The spec as the user wrote it."""
    source: str
    """The name of the file it came from."""
    plan: dict[str, Any]
    """The plan, as `lora-sweeps plan --json` prints it."""
    tracking_uri: str
    experiment: str
    lanes: int
    """How many jobs are composed ahead of their predecessors' results; part of what makes a search reproducible."""
    pack: int
    """Members to a pack."""
    checkpoints: str = ""
    """The place below which the members' states lie, without the sweep's id; empty for the state directory."""


class DriverStarted(_Event):
    """A process began, or went on, to drive the sweep."""

    kind: Literal["driver_started"] = "driver_started"
    resumed: bool
    place: str = ""
    """The machine and the state directory that it holds its lock in."""


class SweepExtended(_Event):
    """The sweep was given more trials than it was created with."""

    kind: Literal["sweep_extended"] = "sweep_extended"
    trials: int
    """How many it trains in all from now on, duplicates not counted."""


class QueueMoved(_Event):
    """A service moved the sweep in its queue."""

    kind: Literal["queue_moved"] = "queue_moved"
    state: QueueState
    reason: str = ""
    by: str = ""
    """The user who asked for it; empty where the service did it by itself."""


class TrialAsked(_Event):
    """The study proposed a point."""

    kind: Literal["trial_asked"] = "trial_asked"
    trial: int
    values: dict[str, float]
    """What the sampler chose, by dimension of the canonical space."""
    configuration: Configuration
    class_id: str
    duplicate_of: int | None = None
    """The earlier trial with the same canonical point, which is trained in its place."""
    by_sampler: bool = True
    """Whether the method itself chose the point; not so where it only repeated itself."""


class JobStarted(_Event):
    """A pack was composed and handed out."""

    kind: Literal["job_started"] = "job_started"
    job: int
    work: Literal["train", "certify"] = "train"
    trials: tuple[int, ...]
    start: int
    stop: int


class RungReported(_Event):
    """A trial reached a rung."""

    kind: Literal["rung_reported"] = "rung_reported"
    trial: int
    job: int
    step: int
    metrics: dict[str, float]
    train_losses: tuple[tuple[int, float], ...] = ()
    """(step, loss in the training batch before the update), thinned out for long jobs."""
    checkpoint: str | None = None
    """Where the member's state lies, relative to the sweep's checkpoint directory."""


class MemberDiverged(_Event):
    """A trial's loss or gradient stopped being finite."""

    kind: Literal["member_diverged"] = "member_diverged"
    trial: int
    job: int
    step: int
    train_losses: tuple[tuple[int, float], ...] = ()


class JobEnded(_Event):
    """A job came back, with results or without."""

    kind: Literal["job_ended"] = "job_ended"
    job: int
    error: str | None = None
    """`error`, `oom`, `worker_died` or `node_lost`; None where every member has a result."""
    detail: str = ""
    setup_s: float = 0.0
    train_s: float = 0.0
    tokens: int | None = None
    """Tokens that its members were trained on in `train_s`, padding not counted; None where nobody counted."""
    eval_s: float = 0.0
    wall_s: float = 0.0
    node: str = ""
    """Address of the node that did it; empty where it was lost with its node, or nobody said."""


class TrialTold(_Event):
    """A trial came to its end."""

    kind: Literal["trial_told"] = "trial_told"
    trial: int
    state: TrialState
    value: float | None = None
    """The objective at the last rung it reached; None where it never reported a finite one."""
    reason: str = ""


class Certified(_Event):
    """Twins of a class were trained beside its representative."""

    kind: Literal["certified"] = "certified"
    certificate: dict[str, Any]
    """As `sweeps.collapse.Certificate` writes itself."""


class SweepEnded(_Event):
    """The driver stopped driving the sweep; a sweep that is resumed has several of these."""

    kind: Literal["sweep_ended"] = "sweep_ended"
    state: SweepState
    reason: str = ""
    seconds: dict[str, float] = {}
    """Where this driver's time went, by stage."""


class ReportWritten(_Event):
    """The report and the export of the best point lie on disk."""

    kind: Literal["report_written"] = "report_written"
    directory: str


class Delivered(_Event):
    """MLflow has everything up to this event."""

    kind: Literal["delivered"] = "delivered"
    up_to: int
    experiment_id: str
    parent_run_id: str
    trial_run_ids: dict[int, str] = {}
    """Runs made for trials since the delivery before."""


Event = (
    SweepCreated
    | DriverStarted
    | SweepExtended
    | QueueMoved
    | TrialAsked
    | JobStarted
    | RungReported
    | MemberDiverged
    | JobEnded
    | TrialTold
    | Certified
    | SweepEnded
    | ReportWritten
    | Delivered
)

EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


@dataclass(frozen=True, slots=True)
class Record:
    """An event with its place.

    Attributes:
        seq: its number in the ledger; later events have larger ones.
        at_s: when it was appended, in seconds since the epoch.
        event: what happened.
    """

    seq: int
    at_s: float
    event: Event


def without_losses(record: Record) -> Record:
    """A record without training losses: most of what a sweep's events hold, and of use to MLflow alone."""
    event = record.event
    if isinstance(event, RungReported | MemberDiverged) and event.train_losses:
        return Record(record.seq, record.at_s, event.model_copy(update={"train_losses": ()}))
    return record
