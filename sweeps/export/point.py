"""A point in the gauge where its init scale is 1: what every export format writes, each in its own words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_core.gauge import Point, default_init
from sweeps.records import SweepRecord, TrialRecord
from sweeps.reduction import Reduction
from sweeps.spec import SweepSpec


@dataclass(frozen=True, slots=True)
class ExportPoint:
    """The best point of a sweep, for a trainer that initialises adapters its own default way.

    B starts at zero, so the init scale c moves into alpha: alpha' = alpha c**2, and for AdamW lr' = lr / c, wd' = wd c,
    eps' = eps c, clip' = clip c (for SGD lr' = lr / c**2, wd' = wd c**2).

    Attributes:
        alpha: in this gauge.
        point: the optimizer's constants in this gauge; its init scale is 1.
        spec: what else training needs: schedule, steps, seed, target modules.
        sweep, trial, class_id: where it comes from.
        metrics: what the trial measured at its end.
    """

    alpha: float
    point: Point
    spec: SweepSpec
    sweep: str
    trial: int
    class_id: str
    metrics: dict[str, float]

    @classmethod
    def of(cls, record: SweepRecord, trial: TrialRecord) -> ExportPoint:
        """Moves a trial into the gauge of default initialisation."""
        spec = record.spec
        reduction = Reduction.of(spec)
        point = default_init(reduction.point(trial.configuration), reduction.law)
        divisor = math.sqrt(point.rank) if spec.lora.rslora else point.rank
        return cls(point.scaling * divisor, point, spec, record.id, trial.number, trial.class_id, trial.metrics)
