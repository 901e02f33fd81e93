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

When a and b are powers of two every one of these factors is exact in binary floating point, and so the two runs are the
same bit for bit.

Everything here is arithmetic on floats and fractions: no torch, no I/O.

Sources: abc-parametrisation symmetry (Yang & Hu, Tensor Programs IV); microsoft/LoRA `layers.py` (`lora_alpha / r`);
rsLoRA (Kalajdzievski 2023) for `alpha / sqrt(r)`; LoRA+ (Hayou et al. 2024) for a learning rate each for A and B.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

Decay = Literal["l2", "decoupled"]

VerdictKind = Literal["bit-identical", "identical up to rounding", "different"]
"""What a comparison of two twins that were really trained finds; `trajectory.py` says how."""


class NoLawError(ValueError):
    """An optimizer for which no equivalence between values of alpha is known; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class OptimizerLaw:
    """What the law needs to know of one optimizer.

    Attributes:
        name: the optimizer's name in a spec.
        degree: p, the degree of its update in the gradient.
        decay: how weight decay enters: added to the gradient (`l2`) or applied beside it (`decoupled`).
        has_eps: whether a constant is added to the gradient's magnitude before dividing by it.
    """

    name: str
    degree: int
    decay: Decay
    has_eps: bool

    def describe(self) -> str:
        """One line: what "alpha x k" is the same as, with one learning rate for A and B."""
        sqrt, linear = "sqrt(k)", "k"
        parts = [
            f"lr / {linear if self.degree == 1 else sqrt}",
            f"init_scale / {sqrt}",
        ]
        if self.has_eps:
            parts.append(f"eps x {sqrt}")
        decoupled = self.decay == "decoupled" and self.degree == 0
        parts.append(f"weight_decay x {sqrt if decoupled else linear}")
        parts.append(f"clip_norm x {sqrt}")
        return f"{self.name}: alpha x k is the same training run as " + ", ".join(parts)


LAWS: dict[str, OptimizerLaw] = {
    law.name: law
    for law in (
        OptimizerLaw("sgd", degree=1, decay="l2", has_eps=False),
        OptimizerLaw("adam", degree=0, decay="l2", has_eps=True),
        OptimizerLaw("adamw", degree=0, decay="decoupled", has_eps=True),
    )
}

WITHOUT_LAW: dict[str, str] = {
    "radam": "its warm-up phase takes steps of degree 1 in the gradient and its later phase of degree 0, so no one "
    "power of k compensates alpha",
    "adadelta": "its absolute eps sets the size of the first steps, so lr and init scale cannot compensate alpha",
    "adafactor": "its steps are relative to the weights' own size with an absolute floor, so lr and init scale cannot "
    "compensate alpha",
}


def law_of(optimizer: str) -> OptimizerLaw:
    """Returns the law of an optimizer.

    Raises:
        NoLawError: the optimizer has no law (the reason is named), or is not known.
    """
    if optimizer in LAWS:
        return LAWS[optimizer]
    if optimizer in WITHOUT_LAW:
        raise NoLawError(
            f"{optimizer} has no alpha equivalence: {WITHOUT_LAW[optimizer]}; use one of {', '.join(LAWS)}"
        )
    raise NoLawError(f"no law is known for the optimizer {optimizer!r}; use one of {', '.join(LAWS)}")


@dataclass(frozen=True, slots=True)
class FactorSettings:
    """The optimizer's constants for one adapter factor (A or B); `eps` is unused where the optimizer has none."""

    lr: float
    eps: float
    weight_decay: float


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


def regauge(point: Point, gauge: Gauge, law: OptimizerLaw) -> Point:
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


def _regauge_factor(settings: FactorSettings, factor: float, law: OptimizerLaw) -> FactorSettings:
    step = factor ** (1 + law.degree)
    return FactorSettings(
        lr=settings.lr / step,
        eps=settings.eps * factor if law.has_eps else settings.eps,
        weight_decay=settings.weight_decay * (step if law.decay == "decoupled" else factor**2),
    )


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


def canonical(point: Point, law: OptimizerLaw, *, scaling: float, init_scale: float | None = None) -> Point:
    """Returns the member of a point's class that has the reference scaling (and init scale).

    `lift` is the same motion to an arbitrary alpha, so each undoes the other: exactly where the factors are powers of
    two, up to rounding elsewhere.
    """
    return regauge(point, gauge_to(point, scaling, init_scale), law)


lift = canonical


def default_init(point: Point, law: OptimizerLaw) -> Point:
    """Returns the twin whose init scale is 1: it runs in a trainer that knows nothing of init scales."""
    return replace(regauge(point, Gauge(point.init_scale, point.init_scale), law), init_scale=1.0)


# -- exact invariants --------------------------------------------------------------------------------------------------


def exact(value: float | int | str) -> Fraction:
    """Returns a number as the decimal its user wrote, not as the binary float nearest to it."""
    return Fraction(str(value))


@dataclass(frozen=True, slots=True)
class ExactInvariants:
    """What a gauge cannot change, as exact rationals; equal invariants and equal rank mean twins.

    Every entry is the square of the textbook invariant (lr**2 s, c**2 s and so on), because the square of rsLoRA's
    scaling alpha / sqrt(r) is rational where the scaling is not. All quantities are positive, so squaring loses
    nothing.
    """

    law: OptimizerLaw

    def lr(self, lr: Fraction, scaling_squared: Fraction) -> Fraction:
        """(lr**(2 / (1+p)) s)**2, with one learning rate for both factors."""
        return Fraction(lr ** (4 // (1 + self.law.degree))) * scaling_squared

    def init_scale(self, init_scale: Fraction, scaling_squared: Fraction) -> Fraction:
        """(c**2 s)**2."""
        return Fraction(init_scale**4) * scaling_squared

    def eps(self, eps: Fraction, scaling_squared: Fraction) -> Fraction:
        """(eps**2 / s)**2; an optimizer without eps gives 0."""
        return Fraction(eps**4) / scaling_squared if self.law.has_eps else Fraction(0)

    def clip_norm(self, clip_norm: Fraction, scaling_squared: Fraction) -> Fraction:
        """(clip**2 / s)**2."""
        return Fraction(clip_norm**4) / scaling_squared

    def weight_decay(self, weight_decay: Fraction, scaling_squared: Fraction) -> Fraction:
        """(wd / s)**2 for L2, (wd**(2 / (1+p)) / s)**2 for decoupled decay."""
        power = 2 if self.law.decay == "l2" else 4 // (1 + self.law.degree)
        return Fraction(weight_decay**power) / scaling_squared

    def lr_a(self, lr: Fraction, init_scale: Fraction) -> Fraction:
        """(lr_A / c**(1+p))**2, for the two-parameter gauge."""
        return Fraction((lr / init_scale ** (1 + self.law.degree)) ** 2)

    def lr_b(self, lr: Fraction, init_scale: Fraction, scaling_squared: Fraction) -> Fraction:
        """(lr_B (c s)**(1+p))**2, for the two-parameter gauge."""
        return Fraction(lr**2 * (init_scale**2 * scaling_squared) ** (1 + self.law.degree))

    def constants_of_both_factors(
        self, eps: Fraction, weight_decay: Fraction, init_scale: Fraction, scaling_squared: Fraction
    ) -> tuple[Fraction, ...]:
        """Squares of eps_A c, eps_B / (c s), wd_A c**q and wd_B / (c s)**q, for the two-parameter gauge.

        q is 2 for L2 decay and 1 + p for decoupled decay, as in the law.
        """
        q = 2 if self.law.decay == "l2" else 1 + self.law.degree
        c_squared, cs_squared = init_scale**2, init_scale**2 * scaling_squared
        eps_pair = (eps**2 * c_squared, eps**2 / cs_squared) if self.law.has_eps else ()
        return (*eps_pair, weight_decay**2 * c_squared**q, weight_decay**2 / cs_squared**q)


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
