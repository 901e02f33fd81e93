"""A trial in the gauge that a trainer can be told of: what every export format writes, each in its own words.

c   init scale. B starts at zero, so c can move into alpha: alpha' = alpha c**2, and then c is 1, as every trainer
    has it
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_core.gauge import AlphaRule, FactorSettings, Gauge, Point, default_init, gauge_to, regauge, scaling_of
from lora_core.laws import OptimizerLaw, law_of
from sweeps.errors import InputError
from sweeps.records import SweepRecord, TrialRecord
from sweeps.reduction import Reduction
from sweeps.spec import SweepSpec


@dataclass(frozen=True, slots=True)
class ExportPoint:
    """A trial, for a trainer that initialises adapters its own default way.

    In the gauge of default initialisation alpha' = alpha c**2, and for AdamW lr' = lr / c, wd' = wd c, eps' = eps c,
    clip' = clip c (for SGD lr' = lr / c**2, wd' = wd c**2). At another alpha an init scale is left over, which no
    trainer has a key for.

    Attributes:
        alpha: in this gauge.
        point: the optimizer's constants in this gauge; its init scale is what is left over, 1 in default init.
        spec: what else training needs: schedule, steps, seed, target modules.
        sweep, trial, class_id: where it comes from.
        metrics: what the trial measured at its end.
        exact_alpha: alpha in default init, where `alpha` was rounded from it; else None.
        alpha_chosen: whether the user chose alpha.
    """

    alpha: float
    point: Point
    spec: SweepSpec
    sweep: str
    trial: int
    class_id: str
    metrics: dict[str, float]
    exact_alpha: float | None = None
    alpha_chosen: bool = False

    @classmethod
    def of(cls, record: SweepRecord, trial: TrialRecord, alpha: float | str | None = None) -> ExportPoint:
        """Moves a trial into the gauge of default initialisation, or to an alpha.

        Args:
            record: the sweep.
            trial: one of its trials.
            alpha: a number or a rule such as "2*rank"; None for default initialisation.

        Raises:
            InputError: alpha is neither, or so far away that a float does not hold the run's numbers.
        """
        spec = record.spec
        reduction = Reduction.of(spec)
        stated = reduction.point(trial.configuration)
        point = default_init(_alike(stated, reduction.law), reduction.law)
        # By the factor on it, which is exact where it is a power of two; scaling x rank would be rounded.
        moved = trial.configuration.alpha * (point.scaling / stated.scaling)
        point = replace(point, scaling=scaling_of(moved, point.rank, rslora=spec.lora.rslora))
        exported = cls(moved, point, spec, record.id, trial.number, trial.class_id, trial.metrics)
        if alpha is None:
            return exported
        return replace(exported._at(_alpha_at(alpha, point.rank)), alpha_chosen=True)

    @property
    def law(self) -> OptimizerLaw:
        """The optimizer's law."""
        return law_of(self.spec.train.optimizer)

    @property
    def lr_ratio(self) -> float:
        """lr of B / lr of A."""
        return self.point.b.lr / self.point.a.lr

    def with_whole_alpha(self, trainer: str) -> ExportPoint:
        """The nearest whole alpha, at least 1, with lr and the rest solved for it and an init scale left over.

        Raises:
            InputError: the user chose an alpha that is not whole.
        """
        whole = max(1, round(self.alpha))
        if math.isclose(whole, self.alpha, rel_tol=1e-12):
            return replace(self, alpha=float(whole))
        if self.alpha_chosen:
            below, above = max(1, math.floor(self.alpha)), math.ceil(self.alpha)
            raise InputError(
                f"{trainer} takes whole numbers as alpha; found {self.alpha!r}: choose {below} or {above}, or leave "
                "--alpha out"
            )
        return replace(self._at(float(whole)), exact_alpha=self.alpha)

    def _at(self, alpha: float) -> ExportPoint:
        scaling = scaling_of(alpha, self.point.rank, rslora=self.spec.lora.rslora)
        try:
            point = regauge(self.point, gauge_to(self.point, scaling), self.law)
        except (ArithmeticError, ValueError):
            point = None
        if point is None or not all(0 < number < math.inf for number in _numbers(point)):
            raise InputError(
                f"the same run must be one whose numbers a float holds; found one beyond that at alpha {alpha!r}: "
                "aim nearer"
            )
        return replace(self, alpha=alpha, point=replace(point, scaling=scaling))


def _numbers(point: Point) -> Iterator[float]:
    yield from (point.scaling, point.init_scale, point.a.lr, point.b.lr)


def _alpha_at(alpha: float | str, rank: int) -> float:
    try:
        value = AlphaRule.parse(alpha).at(rank)
    except (ValueError, OverflowError) as error:
        raise InputError(str(error)) from None
    if not 0 < value < math.inf:
        raise InputError(f"alpha must be a number that a float holds; found {alpha!r} at rank {rank}")
    return value


def _alike(point: Point, law: OptimizerLaw) -> Point:
    """The twin in which A and B have the same eps, decay and other constants, if there is one.

    Trainers take one value for both. Where lr_ratio is searched and nothing clips, B has a gauge of its own, and
    constants that were stated once came apart in it.
    """
    if point.clip_norm is not None:
        return point
    pairs = [(point.a.weight_decay, point.b.weight_decay, law.decay_power)]
    for name, power in law.powers.items():
        of_a, of_b = point.a.constants[name], point.b.constants[name]
        if isinstance(of_a, float) and isinstance(of_b, float):
            pairs.append((of_a, of_b, power))
    factors = [(a / b) ** (1 / power) for a, b, power in pairs if a and b and a != b]
    if not factors:
        return point
    moved = regauge(point, Gauge(1.0, factors[0]), law)
    # The law says that they are equal now; rounding may not.
    same = FactorSettings(moved.b.lr, moved.a.weight_decay, moved.a.constants)
    near = all(math.isclose(a, b, rel_tol=1e-9) for a, b in _beside(moved))
    return replace(moved, b=same) if near else point


def _beside(point: Point) -> Iterator[tuple[float, float]]:
    yield point.a.weight_decay, point.b.weight_decay
    for name, of_a in point.a.constants.items():
        of_b = point.b.constants[name]
        if isinstance(of_a, tuple) and isinstance(of_b, tuple):
            yield from zip(of_a, of_b, strict=True)
        elif isinstance(of_a, float) and isinstance(of_b, float):
            yield of_a, of_b
