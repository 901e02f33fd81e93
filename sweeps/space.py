"""The search space: the dimensions as the user wrote them, alpha included.

A *configuration* is one point of it. A finite space numbers its configurations in mixed radix over `DIMENSIONS`, so
that a grid of a million needs no list of a million objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from lora_core.gauge import AlphaRule
from sweeps.spec import Choice, Range, SweepSpec

DIMENSIONS = ("rank", "alpha", "lr", "init_scale", "lr_ratio", "weight_decay", "head_lr")


@dataclass(frozen=True, slots=True)
class Configuration:
    """One point as a spec names it.

    Attributes:
        rank: r.
        alpha: as the trainer would be given it; the scaling is alpha / rank, or alpha / sqrt(rank) under rsLoRA.
        lr: learning rate of A; of B too unless `lr_ratio` says otherwise.
        init_scale: c, the factor on the standard deviation of A's base initialisation.
        lr_ratio: lr of B / lr of A (LoRA+).
        weight_decay: as stated at the reference alpha (or literally, under `constants: fixed`).
        head_lr: learning rate of what is trained whole beside the adapters; 0 where there is nothing of that kind.
    """

    rank: int
    alpha: float
    lr: float
    init_scale: float = 1.0
    lr_ratio: float = 1.0
    weight_decay: float = 0.0
    head_lr: float = 0.0

    def label(self) -> str:
        """A short name for people: `r8 lr0.015 init2.8`."""
        ratio = f" ratio{self.lr_ratio:.2g}" if self.lr_ratio != 1 else ""
        head = f" head{self.head_lr:.2g}" if self.head_lr else ""
        return f"r{self.rank} lr{self.lr:.2g} init{self.init_scale:.2g}{ratio}{head}"


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """The dimensions of a sweep. A constant is a `Choice` of one value."""

    rank: Choice | Range
    alpha: Choice | Range
    lr: Choice | Range
    init_scale: Choice | Range
    lr_ratio: Choice | Range
    weight_decay: Choice | Range
    head_lr: Choice | Range

    @classmethod
    def of(cls, spec: SweepSpec) -> SearchSpace:
        """Reads the dimensions of a spec."""
        return cls(**{name: getattr(spec.parameters, name) for name in DIMENSIONS})

    @property
    def searched(self) -> tuple[str, ...]:
        """Names of the dimensions that have more than one value."""
        return tuple(name for name in DIMENSIONS if not getattr(self, name).constant)

    @property
    def size(self) -> int | None:
        """How many configurations there are; None where a dimension is continuous."""
        axes = [values_of(getattr(self, name)) for name in DIMENSIONS]
        return None if None in axes else math.prod(len(axis) for axis in axes if axis is not None)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank, ascending."""
        return tuple(sorted(int(value) for value in values_of(self.rank) or ()))

    @property
    def trains_head(self) -> bool:
        """Whether something is trained whole beside the adapters."""
        return not (isinstance(self.head_lr, Choice) and self.head_lr.values == (0.0,))

    @property
    def alpha_rules(self) -> tuple[AlphaRule, ...]:
        """The values of alpha where they are listed; empty for a range."""
        return tuple(alpha_rule(value) for value in values_of(self.alpha) or ())

    def axes(self) -> tuple[tuple[int, ...], tuple[AlphaRule, ...], tuple[tuple[float, ...], ...]]:
        """The values of a finite space: ranks, rules for alpha, and the remaining dimensions in `DIMENSIONS` order."""
        others = tuple(tuple(map(float, values_of(getattr(self, name)) or ())) for name in DIMENSIONS[2:])
        return self.ranks, self.alpha_rules, others

    def configurations(self) -> Iterator[Configuration]:
        """Every configuration of a finite space, in index order."""
        ranks, rules, others = self.axes()
        for rank, rule in product(ranks, rules):
            alpha = rule.at(rank)
            for values in product(*others):
                yield Configuration(rank, alpha, *values)

    def configuration(self, index: int) -> Configuration:
        """The configuration of a finite space that has this index."""
        ranks, rules, others = self.axes()
        digits = []
        for axis in reversed((ranks, rules, *others)):
            index, digit = divmod(index, len(axis))
            digits.append(digit)
        i_rank, i_alpha, *rest = reversed(digits)
        values = (axis[i] for axis, i in zip(others, rest, strict=True))
        return Configuration(ranks[i_rank], rules[i_alpha].at(ranks[i_rank]), *values)


def alpha_rule(value: float | str | AlphaRule) -> AlphaRule:
    """alpha as written, as a rule."""
    return value if isinstance(value, AlphaRule) else AlphaRule.parse(value)


def values_of(dimension: Choice | Range) -> tuple[Any, ...] | None:
    """The values of a dimension, or None where it is continuous; a range with integer ends (of ranks) has values."""
    if isinstance(dimension, Choice):
        return tuple(dimension.values)
    if isinstance(dimension.min, int) and isinstance(dimension.max, int):
        return tuple(range(dimension.min, dimension.max + 1))
    return None
