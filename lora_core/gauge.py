"""The law: alpha is a gauge, and this is how everything else moves when it changes.

    symbol      meaning
    r           rank
    s           scaling, the factor on the low-rank update: alpha / r, or alpha / sqrt(r) under rsLoRA
    A, B        adapter factors [r, d_in] and [d_out, r]; the layer computes x W^T + s (x A^T) B^T
    c           init scale: multiplies the standard deviation of A's base initialisation (B starts at 0)
    p           gradient degree of the optimizer: its update scales as g**p
    (a, b)      a gauge: A -> A / a, B -> B / b, s -> a b s
    k           a b, the factor on alpha; with one learning rate for both factors a = b = sqrt(k)

The product s B A, and so the model, does not notice a gauge. The gradients do: g_A -> a g_A and g_B -> b g_B.
Training is unchanged step by step when the optimizer's constants absorb that:

    lr of A, lr of B              lr_A a**-(1+p),   lr_B b**-(1+p)
    eps of A, B (p = 0)           eps a,            eps b
    decoupled weight decay        wd a**(1+p),      wd b**(1+p)        (lr x wd is invariant)
    L2 weight decay               wd a**2,          wd b**2
    gradient clip norm            clip a, only where a == b

    other absolute constants      each by its own power (laws.py)

When a and b are powers of two every one of these factors is exact in binary floating point, and so the two runs are the
same bit for bit.

Everything here is arithmetic on floats and fractions: no torch, no I/O.

Sources: abc-parametrisation symmetry (Yang & Hu, Tensor Programs IV); microsoft/LoRA `layers.py` (`lora_alpha / r`);
rsLoRA (Kalajdzievski 2023) for `alpha / sqrt(r)`; LoRA+ (Hayou et al. 2024) for a learning rate each for A and B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal, Protocol

from lora_core.laws import Constant

VerdictKind = Literal["bit-identical", "identical up to rounding", "different"]
"""What a comparison of two twins that were really trained finds; `trajectory.py` says how."""


class Powers(Protocol):
    """How an optimizer's constants move: a factor f on A or B multiplies each by f**power (`laws.OptimizerLaw`)."""

    @property
    def lr_power(self) -> int:
        """Of lr."""

    @property
    def decay_power(self) -> int:
        """Of weight decay."""

    @property
    def powers(self) -> Mapping[str, int]:
        """Of the other absolute constants, by keyword."""


@dataclass(frozen=True, slots=True)
class FactorSettings:
    """The optimizer's constants for one adapter factor (A or B).

    Attributes:
        lr: learning rate.
        weight_decay: of the kind that the optimizer has.
        constants: all of the optimizer's absolute constants, by keyword; what it does not have is never read.
    """

    lr: float
    weight_decay: float = 0.0
    constants: Mapping[str, Constant] = field(default_factory=dict)

    @property
    def eps(self) -> float | None:
        """The constant of that name, None where there is none."""
        value = self.constants.get("eps")
        return None if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True)
class Point:
    """A configuration as training sees it: scaling in place of alpha, constants for A and B apart.

    Attributes:
        rank: r.
        scaling: s.
        init_scale: c.
        a: constants of factor A.
        b: constants of factor B.
        clip_norm: L2 norm over A and B of all layers to which the gradient is clipped; None for no clipping.
        magnitude: constants of DoRA's magnitude vectors, None without DoRA. A magnitude multiplies the whole weight
            and not the product B A, so no gauge moves it: it needs an lr of its own and stays outside the clip.
        head: constants of what is trained whole beside the adapters, such as a classifier; None without one. No gauge
            moves it either.
        dropout: probability with which an element of the adapter's input is dropped.
    """

    rank: int
    scaling: float
    init_scale: float
    a: FactorSettings
    b: FactorSettings
    clip_norm: float | None = None
    magnitude: FactorSettings | None = None
    dropout: float = 0.0
    head: FactorSettings | None = None


@dataclass(frozen=True, slots=True)
class Gauge:
    """A -> A / a, B -> B / b, s -> a b s."""

    a: float
    b: float

    def __post_init__(self) -> None:
        if not (0 < self.a < math.inf and 0 < self.b < math.inf):
            raise ValueError(f"a gauge takes two positive finite factors; found a={self.a!r}, b={self.b!r}")

    @classmethod
    def of_alpha(cls, k: float) -> Gauge:
        """The gauge that multiplies alpha by k under one learning rate for both factors."""
        return cls(math.sqrt(k), math.sqrt(k))

    @property
    def k(self) -> float:
        """The factor on alpha."""
        return self.a * self.b

    @property
    def exact_in_binary(self) -> bool:
        """Whether both factors are powers of two, so that floating point loses nothing."""
        return all(math.frexp(factor)[0] == 0.5 for factor in (self.a, self.b))


def regauge(point: Point, gauge: Gauge, law: Powers) -> Point:
    """Returns the twin of `point` in another gauge: another alpha, the same training run.

    Raises:
        ValueError: the point clips its gradient norm and the gauge treats A and B differently; the norm is taken over
            both factors together, so no clip norm reproduces it.
    """
    if point.clip_norm is not None and gauge.a != gauge.b:
        raise ValueError(
            "a clipped run keeps its trajectory only where A and B are scaled alike; "
            f"found a={gauge.a!r}, b={gauge.b!r}: use a == b, or no clip_norm"
        )
    return replace(
        point,
        scaling=point.scaling * gauge.k,
        init_scale=point.init_scale / gauge.a,
        a=_regauge_factor(point.a, gauge.a, law),
        b=_regauge_factor(point.b, gauge.b, law),
        clip_norm=None if point.clip_norm is None else point.clip_norm * gauge.a,
    )


def _regauge_factor(settings: FactorSettings, factor: float, law: Powers) -> FactorSettings:
    powers = law.powers
    return FactorSettings(
        lr=_moved(settings.lr, factor, law.lr_power),
        weight_decay=_moved(settings.weight_decay, factor, law.decay_power),
        constants={name: moved(value, factor, powers.get(name, 0)) for name, value in settings.constants.items()},
    )


def moved(constant: Constant, factor: float, power: int) -> Constant:
    """Returns constant x factor**power."""
    if isinstance(constant, tuple):
        return tuple(_moved(value, factor, power) for value in constant)
    return _moved(constant, factor, power)


def _moved(value: float, factor: float, power: int) -> float:
    # Divided rather than multiplied by an inverse, which would be rounded once more.
    return float(value * factor**power if power >= 0 else value / factor**-power)


def gauge_to(point: Point, scaling: float, init_scale: float | None = None) -> Gauge:
    """Returns the gauge that brings a point to another scaling and, if given, to another init scale.

    With a scaling alone it is the one-parameter gauge a = b = sqrt(k), which keeps the ratio of the learning rates.
    With an init scale too it is the two-parameter gauge, which changes that ratio.
    """
    k = scaling / point.scaling
    if init_scale is None:
        return Gauge.of_alpha(k)
    a = point.init_scale / init_scale
    return Gauge(a, k / a)


def canonical(point: Point, law: Powers, *, scaling: float, init_scale: float | None = None) -> Point:
    """Returns the member of a point's class that has the reference scaling (and init scale).

    `lift` is the same motion to an arbitrary alpha, so each undoes the other: exactly where the factors are powers of
    two, up to rounding elsewhere.
    """
    return regauge(point, gauge_to(point, scaling, init_scale), law)


lift = canonical


def default_init(point: Point, law: Powers) -> Point:
    """Returns the twin whose init scale is 1: it runs in a trainer that knows nothing of init scales."""
    return replace(regauge(point, Gauge(point.init_scale, point.init_scale), law), init_scale=1.0)


# -- exact invariants --------------------------------------------------------------------------------------------------


def exact(value: float | int | str) -> Fraction:
    """Returns a number as the decimal its user wrote, not as the binary float nearest to it."""
    return Fraction(str(value))


# What a gauge cannot change, as exact rationals: equal invariants and equal rank mean twins. Each is the square of the
# textbook invariant (lr**2 s, c**2 s and so on), because the square of rsLoRA's scaling alpha / sqrt(r) is rational
# where the scaling is not. Every quantity is positive, so squaring loses nothing.


def shared_invariant(value: Fraction, power: int, scaling_squared: Fraction) -> Fraction:
    """Returns (value**2 / s**power)**2, or its root where the power is even: the same in every gauge with a == b.

    Args:
        value: a constant that becomes value x a**power: lr, weight decay, eps, clip norm (1), init scale (-1).
        power: that power.
        scaling_squared: s**2, which becomes s**2 a**4.
    """
    root = 2 if power % 2 == 0 else 4
    return Fraction(value**root / scaling_squared ** (power * root // 4))


def invariant_of_a(value: Fraction, power: int, init_scale: Fraction) -> Fraction:
    """Returns (value c**power)**2, for a constant of A in the two-parameter gauge, where c becomes c / a."""
    return Fraction(value**2 * init_scale ** (2 * power))


def invariant_of_b(value: Fraction, power: int, init_scale: Fraction, scaling_squared: Fraction) -> Fraction:
    """Returns (value / (c s)**power)**2, for a constant of B in the two-parameter gauge, where c s becomes b c s."""
    return Fraction(value**2 / (init_scale**2 * scaling_squared) ** power)


# -- alpha as people write it ------------------------------------------------------------------------------------------

ALPHA_RULE_PATTERN = r"^\s*(?:(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*\*\s*)?(rank|r|sqrt\(\s*(?:rank|r)\s*\))\s*$"
"""A rule for alpha: its factor and its term; written so that a JSON schema can hold it too."""

_RULE = re.compile(ALPHA_RULE_PATTERN)


@dataclass(frozen=True, slots=True)
class AlphaRule:
    """alpha as a function of the rank: a constant, a multiple of the rank, or a multiple of its square root.

    Attributes:
        factor: the positive number in front.
        half_powers: 0 for a constant, 1 for sqrt(rank), 2 for rank.
    """

    factor: Fraction
    half_powers: Literal[0, 1, 2] = 0

    @classmethod
    def parse(cls, text: float | int | str) -> AlphaRule:
        """Reads `16`, `"2*rank"`, `"rank"`, `"sqrt(rank)"` or `"8*sqrt(rank)"`.

        A factor of more digits than a float holds is the float nearest to it, as lr and all others are: two rules
        that are different give different alphas.

        Raises:
            ValueError: anything else, or a factor that is not positive.
        """
        match = _RULE.match(text) if isinstance(text, str) else None
        number = (match[1] or "1") if match else str(text)
        try:
            # As a float first: a Fraction of "1e999999999" would fill the memory with its digits.
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not 0 < factor < math.inf:
            requirement = 'alpha must be a positive number, or a rule such as "2*rank" or "8*sqrt(rank)"'
            raise ValueError(f"{requirement}; found {text!r}")
        half_powers: Literal[0, 1, 2] = 0 if match is None else 1 if match[2].startswith("sqrt") else 2
        return cls(exact(factor), half_powers)

    def at(self, rank: int) -> float:
        """alpha at a rank."""
        return float(self.factor) * (1.0, math.sqrt(rank), float(rank))[self.half_powers]

    def squared_at(self, rank: int) -> Fraction:
        """alpha**2 at a rank, exactly."""
        return self.factor**2 * Fraction(rank**self.half_powers)

    def __str__(self) -> str:
        factor = repr(float(self.factor)).removesuffix(".0")  # the shortest text that reads back as the same number
        term = ("", "sqrt(rank)", "rank")[self.half_powers]
        if not term:
            return factor
        return term if self.factor == 1 else f"{factor}*{term}"


def scaling_of(alpha: float, rank: int, *, rslora: bool = False) -> float:
    """s = alpha / r, or alpha / sqrt(r) under rsLoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def scaling_squared_of(alpha: AlphaRule, rank: int, *, rslora: bool = False) -> Fraction:
    """s**2, exactly."""
    return alpha.squared_at(rank) / (rank if rslora else rank * rank)
