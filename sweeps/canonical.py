"""What is searched once alpha is gone: the dimensions of the canonical space, and what part of the user's space they
leave out.

    k            alpha / reference alpha
    shift        factor between a configuration's value of a dimension and its canonical value: sqrt(k) for AdamW's lr
    keep, widen  whether the user's ranges stand at the reference alpha, or reach every corner that alpha did

The box is the same for every rank, so that samplers see a fixed space.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, product
from typing import Any, Protocol

from lora_core.gauge import AlphaRule
from sweeps.reduction import Reduction
from sweeps.space import DIMENSIONS, Configuration, SearchSpace, values_of
from sweeps.spec import Choice, Range, SweepSpec

_RANKS_TRIED = 64
_OTHER_RANKS = range(1, _RANKS_TRIED + 1)
"""Ranks at which alpha's rules are told apart: first the user's, then these."""

_NODES = 64
"""Points to a continuous dimension at which the share left outside is averaged."""


@dataclass(frozen=True, slots=True)
class Ordinal:
    """A dimension of listed values, searched by their place in ascending order."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Continuous:
    """A dimension between two bounds."""

    name: str
    low: float
    high: float
    log: bool


@dataclass(frozen=True, slots=True)
class Integer:
    """A dimension of all the whole numbers between two bounds, both included."""

    name: str
    low: int
    high: int
    log: bool

    @property
    def values(self) -> range:
        """All of them, ascending."""
        return range(self.low, self.high + 1)


Dimension = Ordinal | Integer | Continuous


class TrialSpace(Protocol):
    """Where trials come from: dimensions for a sampler, and what a point of them trains."""

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """What the sampler proposes values for."""

    def trial(self, values: Mapping[str, float]) -> tuple[Configuration, str]:
        """The canonical point at these values, and the id of its class."""


@dataclass(frozen=True)
class CanonicalSpace:
    """The canonical points that a sampler searches.

    Attributes:
        dimensions: what is searched, in `DIMENSIONS` order.
        constants: the other hyperparameters.
        reduction: the law behind it.
        widened: whether the ranges reach every corner of the user's space.
    """

    dimensions: tuple[Dimension, ...]
    constants: Mapping[str, float]
    reduction: Reduction
    widened: bool

    @classmethod
    def of(cls, spec: SweepSpec, reduction: Reduction) -> CanonicalSpace:
        """Derives the canonical space of a spec."""
        widened = spec.reduction.ranges == "widen"
        dimensions, constants = [], {}
        for name in DIMENSIONS:
            if name in reduction.eliminated:
                continue
            dimension = _canonical_dimension(name, reduction, widened)
            if isinstance(dimension, Ordinal) and len(dimension.values) == 1:
                constants[name] = dimension.values[0]
            else:
                dimensions.append(dimension)
        if reduction.reference_init_scale is not None:
            constants["init_scale"] = reduction.reference_init_scale
        return cls(tuple(dimensions), constants, reduction, widened)

    def trial(self, values: Mapping[str, float]) -> tuple[Configuration, str]:
        """The canonical point at these values, and the id of its class."""
        named: dict[str, Any] = {**self.constants, **values}
        rank = int(named.pop("rank"))
        named["alpha"] = self._alpha(values.get("alpha"), rank)
        configuration = Configuration(rank=rank, **named)
        return configuration, self.reduction.class_id(configuration)

    def _alpha(self, value: float | None, rank: int) -> float:
        if value is None:
            return self.reduction.reference.at(rank)
        space = self.reduction.space
        return _rules_by_alpha(space)[value].at(rank) if space.alpha_rules else value

    @property
    def size(self) -> int | None:
        """How many points it has; None where it is continuous."""
        sizes = [0 if isinstance(d, Continuous) else len(d.values) for d in self.dimensions]
        return math.prod(sizes) or None

    def share_outside(self) -> float:
        """The share of the user's space (log-uniform in its ranges) whose canonical points are not in this one."""
        if self.widened or not self.reduction.eliminated:
            return 0.0
        inside = [
            math.prod(_share_inside(getattr(self.reduction.space, name), shift) for name, shift in shifts.items())
            for shifts in _shifts(self.reduction)
        ]
        return max(0.0, 1.0 - sum(inside) / len(inside))


@dataclass(frozen=True)
class ClassGrid:
    """Every class of a finite space, once each: what `method: grid` trains."""

    reduction: Reduction

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """One: the number of the class."""
        return (Ordinal("class", tuple(map(float, range(len(self.reduction.classes or ()))))),)

    def trial(self, values: Mapping[str, float]) -> tuple[Configuration, str]:
        """The representative and id of a class."""
        found = (self.reduction.classes or ())[int(values["class"])]
        return found.representative, found.id


def _canonical_dimension(name: str, reduction: Reduction, widened: bool) -> Dimension:
    own: Choice | Range = getattr(reduction.space, name)
    induced = name == "init_scale" and own.constant and "alpha" in reduction.eliminated
    if induced and not reduction.two_parameter:
        # alpha was an init-scale knob: the dimension stays, under its right name.
        return _stretched(name, own, reduction)
    if widened and name in ("lr", "init_scale", "lr_ratio"):
        return _stretched(name, own, reduction)
    if name == "rank" and isinstance(own, Range):
        return Integer(name, int(own.min), int(own.max), log=own.distribution == "log_uniform")
    values = values_of(own)
    if name == "alpha" and values is not None:
        values = tuple(_rules_by_alpha(reduction.space))
    if values is not None:
        return Ordinal(name, tuple(sorted(values)))
    assert isinstance(own, Range)
    return Continuous(name, own.min, own.max, log=own.distribution == "log_uniform")


def _rules_by_alpha(space: SearchSpace) -> dict[float, AlphaRule]:
    """The user's rules for alpha, named by their alpha at the first rank at which no two of them meet.

    Where every rank has two that meet (out of the range of floats, or by so many rules that they take turns), they are
    named by their places in the spec.
    """
    rules = space.alpha_rules
    named = ({rule.at(rank): rule for rule in rules} for rank in chain(space.ranks[:_RANKS_TRIED], _OTHER_RANKS))
    by_place = {float(place): rule for place, rule in enumerate(rules)}
    return next((by_alpha for by_alpha in named if len(by_alpha) == len(rules)), by_place)


def _stretched(name: str, own: Choice | Range, reduction: Reduction) -> Dimension:
    """A dimension widened by every shift that the eliminated dimensions can give it, distributed as it was."""
    shifts = [shift[name] for shift in _shifts(reduction, ends=True) if name in shift] or [1.0]
    values, eliminated = values_of(own), [getattr(reduction.space, gone) for gone in reduction.eliminated]
    if values is not None and all(values_of(gone) is not None for gone in eliminated):
        # Rounded, because the same value reached by two ways differs in its last digits.
        return Ordinal(name, tuple(sorted({float(f"{value * shift:.12g}") for value in values for shift in shifts})))
    if isinstance(own, Range):
        low, high, log = own.min, own.max, own.distribution == "log_uniform"
    else:
        low, high, log = min(own.values), max(own.values), True
    return Continuous(name, low * min(shifts), high * max(shifts), log)


def _shifts(reduction: Reduction, *, ends: bool = False) -> Iterable[dict[str, float]]:
    """How far each dimension moves on the way to the reference, over the eliminated dimensions and the ranks.

    Args:
        reduction: the reduction.
        ends: only the ends of continuous dimensions, in place of points along them.
    """
    space, power = reduction.space, 1 + reduction.law.degree
    reference_c = reduction.reference_init_scale
    for rank in space.ranks:
        alphas = [rule.at(rank) for rule in space.alpha_rules] or _nodes(space.alpha, ends)
        init_scales = _nodes(space.init_scale, ends) if reference_c is not None else [None]
        for alpha, init_scale in product(alphas, init_scales):
            k = alpha / reduction.reference.at(rank)
            if not reduction.two_parameter:
                yield {"lr": k ** (power / 2), "init_scale": math.sqrt(k)}
                continue
            a = 1.0 if init_scale is None or reference_c is None else reference_c / init_scale
            yield {"lr": a**power, "lr_ratio": (k / a**2) ** power}


def _nodes(dimension: Choice | Range, ends: bool) -> list[float]:
    values = values_of(dimension)
    if values is not None:
        return [float(value) for value in values]
    assert isinstance(dimension, Range)
    if ends:
        return [dimension.min, dimension.max]
    ratio = dimension.max / dimension.min
    return [dimension.min * ratio ** ((i + 0.5) / _NODES) for i in range(_NODES)]


def _share_inside(dimension: Choice | Range, shift: float) -> float:
    """The share of a dimension's values that are still among its values after a shift."""
    values = values_of(dimension)
    if values is None:
        assert isinstance(dimension, Range)
        width = math.log(dimension.max / dimension.min)
        return max(0.0, 1.0 - abs(math.log(shift)) / width)
    if len(values) == 1:
        return 1.0  # a constant init scale became a dimension of its own, which holds every shift
    return sum(any(math.isclose(v * shift, w) for w in values) for v in values) / len(values)
