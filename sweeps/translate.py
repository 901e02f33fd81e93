"""A calculator: one training run written with another alpha, lr or init scale. No GPU, no spec, no training.

    written     what a trainer is told: rank, alpha and how it is read, lr of A, lr_ratio, the optimizer's constants
    point       what training sees of that (gauge.py): scaling in place of alpha, constants for A and B apart
    (a, b)      the gauge from the given run to the same run

    given run -> its point -> the point in another gauge -> written again

A gauge that treats A and B alike keeps lr_ratio. A new alpha *and* a new init scale need one that does not; then
lr_ratio moves, and eps and weight decay are each two numbers, one for A and one for B.

Pure rules, as in gauge.py; the law itself is there and in laws.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from lora_core.gauge import AlphaRule, FactorSettings, Gauge, Point, gauge_to, regauge, scaling_of
from lora_core.laws import Constant, NoLawError, OptimizerLaw, law_of
from lora_core.presets import Preset
from sweeps.errors import InputError

T = TypeVar("T")

NO_OTHER_RANK = (
    "the rank must stay as it is, for no gauge changes it: products B A of another rank are another class of "
    "functions, with an A of another shape and other initial draws, so training them is another run at every alpha; "
    "to compare ranks, sweep over them (parameters: {rank: {values: [...]}} in a spec)"
)
_MAX_RANK = 2**31


@dataclass(frozen=True, slots=True)
class Written:
    """A training run as far as its user wrote it down; None where nothing was written.

    Attributes:
        optimizer: its name in laws.LAWS; else the preset's, else adamw.
        rank: r.
        alpha: a number or a rule such as "2*rank".
        lr: of A.
        lr_ratio: lr of B / lr of A.
        init_scale: c.
        weight_decay: of the optimizer's kind; else the preset's, else 0.
        constants: absolute constants of the optimizer by keyword; else the preset's eps and the optimizer's defaults.
        clip_norm: else the preset's, else not clipped.
        rslora: whether the scaling is alpha / sqrt(rank).
        preset: a recipe for what is not written.
    """

    optimizer: str | None = None
    rank: int | None = None
    alpha: float | str | None = None
    lr: float | None = None
    lr_ratio: float = 1.0
    init_scale: float = 1.0
    weight_decay: float | None = None
    constants: Mapping[str, Constant] = field(default_factory=dict)
    clip_norm: float | None = None
    rslora: bool = False
    preset: Preset | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A training run as its trainer is told of it.

    Attributes:
        law: its optimizer's.
        alpha: alpha.
        rslora: whether the scaling is alpha / sqrt(rank).
        lr_ratio: lr of B / lr of A.
        point: the rest. Its scaling and its lr of B are what alpha and lr_ratio come to in floating point.
    """

    law: OptimizerLaw
    alpha: float
    rslora: bool
    lr_ratio: float
    point: Point

    @classmethod
    def of(cls, written: Written) -> Run:
        """Reads a run.

        Raises:
            InputError: rank, alpha or lr is neither written nor in a preset; the optimizer has no law; or a number is
                not one that it takes.
        """
        if written.preset is not None:
            written = _filled(written, written.preset)
        rank, rule, lr = written.rank, written.alpha, written.lr
        if rank is None or rule is None or lr is None:
            missing = [name for name in ("rank", "alpha", "lr") if getattr(written, name) is None]
            raise InputError(f"a run must have rank, alpha and lr, or a preset; found no {' and no '.join(missing)}")
        law = _law(written.optimizer or "adamw")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= _MAX_RANK:
            raise InputError(f"rank must be a whole number from 1 to {_MAX_RANK:,}; found {rank!r}")
        alpha, lr = alpha_at(rule, rank), _positive("lr", lr)
        weight_decay, constants = _weight_decay(written, law), _constants(written, law)
        lr_ratio = _positive("lr_ratio", written.lr_ratio)
        point = Point(
            rank,
            scaling_of(alpha, rank, rslora=written.rslora),
            _positive("init_scale", written.init_scale),
            FactorSettings(lr, weight_decay, constants),
            FactorSettings(lr * lr_ratio, weight_decay, constants),
            None if written.clip_norm is None else _positive("clip_norm", written.clip_norm),
        )
        if not (_held(point.scaling) and _held(point.b.lr)):
            raise InputError(
                "scaling and lr of B must be numbers that a float holds; "
                f"found scaling {point.scaling!r} and lr of B {point.b.lr!r}"
            )
        return cls(law, alpha, written.rslora, lr_ratio, point)


@dataclass(frozen=True, slots=True)
class Target:
    """How the run shall be written instead; None where that does not matter.

    Attributes:
        alpha: a number or a rule such as "2*rank".
        scaling: s.
        lr: of A.
        init_scale: c.
        rslora: whether alpha shall be read as alpha / sqrt(rank).
    """

    alpha: float | str | None = None
    scaling: float | None = None
    lr: float | None = None
    init_scale: float | None = None
    rslora: bool | None = None

    def __post_init__(self) -> None:
        numbers = {"scaling": self.scaling, "lr": self.lr, "init_scale": self.init_scale}
        for name, value in numbers.items():
            if value is not None:
                _positive(f"the target {name}", value)
        if self.alpha is not None and self.scaling is not None:
            raise InputError("the target must be alpha or scaling, for each gives the other; found both: leave one out")
        others = {"alpha": self.alpha, "scaling": self.scaling, "init_scale": self.init_scale}
        beside = [name for name, value in others.items() if value is not None]
        if self.lr is not None and beside:
            raise InputError(
                "a target lr must be alone, for it settles alpha and the init scale; "
                f"found lr beside {' and '.join(beside)}: leave one out"
            )


@dataclass(frozen=True, slots=True)
class Translation:
    """Two ways to write one run.

    Attributes:
        given: as it was.
        run: as it was asked for. Where the gauge has a != b, constants of A and of B in its point differ.
        gauge: the gauge from the one to the other.
        bit_exact: whether both, each read by a trainer in floating point, are the same run bit for bit.
    """

    given: Run
    run: Run
    gauge: Gauge
    bit_exact: bool


def translate(given: Run, target: Target) -> Translation:
    """Writes a run another way.

    Raises:
        InputError: the run is clipped and the target treats A and B differently, or a number of the new run is one that
            no float holds.
    """
    rslora = given.rslora if target.rslora is None else target.rslora
    rank, law = given.point.rank, given.law
    alpha = None if target.alpha is None else alpha_at(target.alpha, rank)
    scaling = target.scaling if alpha is None else scaling_of(alpha, rank, rslora=rslora)
    try:
        gauge = _gauge(given, target, scaling)
    except (ArithmeticError, ValueError):
        raise _too_far("its gauge") from None
    try:
        exact = regauge(given.point, gauge, law)
    except ArithmeticError:
        raise _too_far("one of its constants") from None
    except ValueError as error:
        raise InputError(f"{error}; a target alpha or init scale alone scales them alike") from None
    if alpha is None:
        if scaling is None and rslora == given.rslora:
            alpha = given.alpha * gauge.k
        else:
            alpha = (exact.scaling if scaling is None else scaling) * (math.sqrt(rank) if rslora else rank)
    run = _written(given, exact, gauge, target, alpha, rslora)
    # What was asked for is written as it was asked for; where that is a rounding away from the law, the bits are not
    # the same. The way back tells of numbers so small that they lost digits.
    bit_exact = (
        gauge.exact_in_binary
        and run.point == exact
        and regauge(exact, Gauge(1 / gauge.a, 1 / gauge.b), law) == given.point
    )
    return Translation(given, run, gauge, bit_exact)


def alpha_at(alpha: float | str, rank: int) -> float:
    """Returns the alpha that is meant by a number or a rule.

    Raises:
        InputError: it is neither, or no float holds it.
    """
    try:
        value = AlphaRule.parse(alpha).at(rank)
    except (ValueError, OverflowError) as error:
        raise InputError(str(error)) from None
    if not _held(value):
        raise InputError(f"alpha must be a number that a float holds; found {alpha!r} at rank {rank}")
    return value


# -- reading what is given ---------------------------------------------------------------------------------------------


def _filled(written: Written, recipe: Preset) -> Written:
    def first(own: T | None, recipes: T) -> T:
        return recipes if own is None else own

    return replace(
        written,
        optimizer=first(written.optimizer, recipe.optimizer),
        rank=first(written.rank, recipe.rank),
        alpha=recipe.alpha if written.alpha is None else written.alpha,
        lr=first(written.lr, recipe.lr),
        clip_norm=first(written.clip_norm, recipe.clip_norm),
    )


def _law(optimizer: str) -> OptimizerLaw:
    try:
        return law_of(optimizer)
    except NoLawError as error:
        raise InputError(str(error)) from None


def _held(value: float) -> bool:
    return 0 < value < math.inf


def _positive(name: str, value: float) -> float:
    if not _held(value):
        raise InputError(f"{name} must be a number above 0; found {value!r}")
    return float(value)


def _weight_decay(written: Written, law: OptimizerLaw) -> float:
    value = written.weight_decay
    if value is None:
        return written.preset.weight_decay if written.preset and law.decay else 0.0
    if not 0 <= value < math.inf:
        raise InputError(f"weight_decay must be a number of at least 0; found {value!r}")
    if value and law.decay is None:
        raise InputError(f"weight_decay must be 0 or left out, for {law.name} has none; found {value!r}")
    return float(value)


def _constants(written: Written, law: OptimizerLaw) -> dict[str, Constant]:
    for name, value in written.constants.items():
        if name not in law.absolute:
            has = ", ".join(law.absolute) or "none"
            raise InputError(f"an absolute constant of {law.name} must be one that it has ({has}); found {name!r}")
        if not law.absolute[name].accepts(value):
            raise InputError(f"{name} of {law.name} must be {law.absolute[name].required}; found {value!r}")
    recipe = {"eps": written.preset.eps} if written.preset else {}
    return law.constants({**recipe, **written.constants})


# -- writing it another way --------------------------------------------------------------------------------------------


def _gauge(given: Run, target: Target, scaling: float | None) -> Gauge:
    point = given.point
    if target.lr is not None:
        # lr f**lr_power is the target.
        factor = (point.a.lr / target.lr) ** (1 / -given.law.lr_power)
        return Gauge(factor, factor)
    if scaling is not None:
        return gauge_to(point, scaling, target.init_scale)
    factor = 1.0 if target.init_scale is None else point.init_scale / target.init_scale
    return Gauge(factor, factor)


def _written(given: Run, exact: Point, gauge: Gauge, target: Target, alpha: float, rslora: bool) -> Run:
    """The point of the law as a trainer will read it: from alpha, lr and lr_ratio as they are written."""
    # lr of B / lr of A moves as a constant of that power under b / a.
    lr_ratio = float(given.lr_ratio * (gauge.b / gauge.a) ** given.law.lr_power)
    lr = exact.a.lr if target.lr is None else target.lr
    point = replace(
        exact,
        scaling=scaling_of(alpha, exact.rank, rslora=rslora),
        init_scale=exact.init_scale if target.init_scale is None else target.init_scale,
        a=replace(exact.a, lr=lr),
        b=replace(exact.b, lr=lr * lr_ratio),
    )
    before_after = zip(_numbers(given.point), _numbers(point), strict=True)
    if not _held(alpha) or any((old > 0) != (new > 0) or new == math.inf for old, new in before_after):
        raise _too_far("one of its numbers")
    return Run(given.law, alpha, rslora, lr_ratio, point)


def _too_far(what: str) -> InputError:
    return InputError(f"the same run must be one whose numbers a float holds; found {what} beyond that: aim nearer")


def _numbers(point: Point) -> Iterator[float]:
    yield from (point.scaling, point.init_scale, point.clip_norm or 0.0)
    for factor in (point.a, point.b):
        yield from (factor.lr, factor.weight_decay)
        for constant in factor.constants.values():
            yield from constant if isinstance(constant, tuple) else (constant,)
