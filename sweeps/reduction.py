"""From the user's search space to the space without alpha: which configurations are one training run.

    k       alpha / reference alpha at the same rank (so also the ratio of the scalings)
    (a, b)  the gauge from the reference to a configuration: a = b = sqrt(k) with one learning rate (the *shared*
            gauge);
            a = reference init scale / init scale, b = k / a where lr_ratio is searched too (the *two-parameter* gauge)

Configurations of a finite space are grouped by exact rational invariants, never by a tolerance. The canonical point
of a class is its member at the reference alpha.

    key     rank and invariants of a class as text, each as the hexadecimal numerator/denominator of an exact rational
    id      64 bits of a hash of the optimizer's law and the key
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import product

from lora_core.gauge import (
    AlphaRule,
    FactorSettings,
    Gauge,
    Point,
    exact,
    gauge_to,
    invariant_of_a,
    invariant_of_b,
    regauge,
    scaling_of,
    scaling_squared_of,
    shared_invariant,
)
from lora_core.laws import Constant, OptimizerLaw, law_of
from sweeps.errors import InputError
from sweeps.space import DIMENSIONS, Configuration, SearchSpace, alpha_rule, values_of
from sweeps.spec import Choice, Range, SweepSpec

Key = tuple[str, ...]

MOST_CONFIGURATIONS = 2_000_000
"""A finite space larger than this is not enumerated."""


@dataclass(frozen=True, slots=True)
class ConfigurationClass:
    """All configurations of a finite space that are one training run.

    Attributes:
        key: rank and invariants as text, the same for every member; empty text for what there is not.
        members: indices of its configurations in the search space.
        reduction: the reduction it is part of.
    """

    key: Key
    members: tuple[int, ...]
    reduction: Reduction

    @property
    def id(self) -> str:
        """The name of the class; see `Reduction.class_id`."""
        return self.reduction._id_of(self.key)

    @property
    def configurations(self) -> Iterator[Configuration]:
        """The members themselves."""
        return map(self.reduction.space.configuration, self.members)

    @property
    def representative(self) -> Configuration:
        """The configuration that is trained: a member at the reference alpha, else the class's canonical point.

        Where alpha is not eliminated there need be no twin at the reference, and the first member is trained.
        """
        reduction, first = self.reduction, next(self.configurations)
        at_reference = (c for c in self.configurations if c.alpha == reduction.reference.at(c.rank))
        otherwise = reduction.canonical(first) if "alpha" in reduction.eliminated else first
        return next(at_reference, otherwise)


@dataclass(frozen=True)
class Reduction:
    """A search space with alpha eliminated, as far as the optimizer's law and the spec's dimensions let it be.

    Attributes:
        space: the user's dimensions.
        law: the optimizer's law.
        reference: alpha in which canonical points are written, as the user's own rule where the spec has one.
        reference_init_scale: c in which canonical points are written; None where init scale is not eliminated.
        eliminated: names of the dimensions that are not searched because they are a gauge.
        rslora: whether the scaling is alpha / sqrt(r).
        travel: whether constants (eps and its like, weight decay, clip norm) move with alpha (`constants: travel`) or
            are read literally.
        constants: the optimizer's absolute constants, as stated in the spec.
        clip_norm: as stated in the spec.
        dropout: as stated in the spec; no gauge moves it.
        magnitude: settings of DoRA's magnitudes, None without DoRA; no gauge moves them.
        stuck: why configurations of different alpha stay apart although a law exists; None where they do not.
    """

    space: SearchSpace
    law: OptimizerLaw
    reference: AlphaRule
    reference_init_scale: float | None
    eliminated: tuple[str, ...]
    rslora: bool
    travel: bool
    constants: Mapping[str, Constant]
    clip_norm: float | None
    dropout: float
    magnitude: FactorSettings | None
    stuck: str | None

    @classmethod
    def of(cls, spec: SweepSpec) -> Reduction:
        """Derives the reduction of a spec.

        Raises:
            NoLawError: the optimizer has no law.
        """
        space = SearchSpace.of(spec)
        law = law_of(spec.train.optimizer)
        travel = spec.reduction.constants == "travel"
        clipped = spec.train.clip_norm is not None
        eliminated, stuck = _eliminated(space, clipped=clipped)
        pinned = () if travel else _pinned(space, spec.train.constants, clipped=clipped)
        if eliminated and pinned:
            eliminated, stuck = (), _why_pinned(pinned) if "alpha" in eliminated else None
        held_init = "init_scale" in eliminated
        return cls(
            space=space,
            law=law,
            reference=_reference(space),
            reference_init_scale=_middle(space.init_scale) if held_init else None,
            eliminated=eliminated,
            rslora=spec.lora.rslora,
            travel=travel,
            constants=spec.train.constants,
            clip_norm=spec.train.clip_norm,
            dropout=spec.lora.dropout,
            magnitude=_magnitude(spec),
            stuck=stuck,
        )

    @property
    def two_parameter(self) -> bool:
        """Whether A and B have gauges of their own, because lr_ratio is searched and nothing clips them together."""
        return "lr_ratio" in self.space.searched and self.clip_norm is None

    def middle(self, name: str) -> float:
        """The middle of a dimension of numbers: geometric for a range, the (lower) middle one of a list."""
        return _middle(getattr(self.space, name))

    # -- motion within a class

    def point(self, configuration: Configuration) -> Point:
        """What training sees of a configuration: its scaling, and its optimizer constants moved from the reference."""
        stated = Point(
            rank=configuration.rank,
            scaling=self._scaling(self.reference.at(configuration.rank), configuration.rank),
            init_scale=1.0,
            a=FactorSettings(0.0, configuration.weight_decay, self.constants),
            b=FactorSettings(0.0, configuration.weight_decay, self.constants),
            clip_norm=self.clip_norm,
            magnitude=self.magnitude,
            dropout=self.dropout,
        )
        moved = regauge(stated, self._gauge_of(configuration), self.law) if self.travel else stated
        return replace(
            moved,
            scaling=self._scaling(configuration.alpha, configuration.rank),
            init_scale=configuration.init_scale,
            a=replace(moved.a, lr=configuration.lr),
            b=replace(moved.b, lr=configuration.lr * configuration.lr_ratio),
            # With the constants as they are stated: no gauge moves them.
            head=FactorSettings(configuration.head_lr, constants=self.constants) if configuration.head_lr else None,
        )

    def canonical(self, configuration: Configuration) -> Configuration:
        """The member of the configuration's class at the reference alpha (and init scale, where that is a gauge)."""
        return self.lift(configuration, self.reference.at(configuration.rank), self.reference_init_scale)

    def lift(self, configuration: Configuration, alpha: float, init_scale: float | None = None) -> Configuration:
        """The member of the configuration's class at another alpha.

        Args:
            configuration: any member of the class.
            alpha: of the member that is wanted.
            init_scale: of the member that is wanted; None keeps the shared gauge, or, in the two-parameter gauge, the
                configuration's own init scale.
        """
        old = self.point(configuration)
        if self.two_parameter and init_scale is None:
            init_scale = configuration.init_scale
        gauge = gauge_to(old, self._scaling(alpha, configuration.rank), init_scale)
        new = regauge(replace(old, clip_norm=None), gauge, self.law)
        return replace(
            configuration,
            alpha=alpha,
            lr=new.a.lr,
            init_scale=new.init_scale if init_scale is None else init_scale,
            lr_ratio=configuration.lr_ratio * (gauge.a / gauge.b) ** (1 + self.law.degree),
            weight_decay=configuration.weight_decay if self.travel else new.a.weight_decay,
        )

    def twins(self, configuration: Configuration) -> tuple[Configuration, ...]:
        """The configuration's class at every alpha the user would have swept (the ends and powers of 4 of a range)."""
        if "alpha" not in self.eliminated:
            return ()
        here = configuration.alpha
        alphas = sorted({alpha for alpha in self._alphas(configuration.rank) if not math.isclose(alpha, here)})
        return tuple(self.lift(configuration, alpha) for alpha in alphas)

    def gauge_between(self, configuration: Configuration, twin: Configuration) -> Gauge:
        """The gauge that leads from one member of a class to another."""
        old, new = self.point(configuration), self.point(twin)
        return gauge_to(old, new.scaling, new.init_scale if self.two_parameter else None)

    # -- classes

    @cached_property
    def classes(self) -> tuple[ConfigurationClass, ...] | None:
        """Every class of a finite space in the order of its first member; None for a continuous or enormous one.

        Raises:
            InputError: two classes have the same id, for which there is one chance in ten million among two million.
        """
        size = self.space.size
        if size is None or size > MOST_CONFIGURATIONS:
            return None
        groups: dict[Key, list[int]] = {}
        for index, key in enumerate(self._keys()):
            groups.setdefault(key, []).append(index)
        # Before any trial is looked up by its id: the later class of two would count as trained already.
        if len({self._id_of(key) for key in groups}) < len(groups):
            raise InputError(
                "classes that can be told apart by their ids were required; found two different ones with the same "
                "id (a collision of hashes); change any value of a searched parameter"
            )
        return tuple(ConfigurationClass(key, tuple(members), self) for key, members in groups.items())

    def members_of(self, class_id: str) -> tuple[Configuration, ...] | None:
        """The configurations of a class of a finite space; None where the space has no such class or is not finite."""
        found = self._class_by_id.get(class_id)
        return None if found is None else tuple(found.configurations)

    @cached_property
    def _class_by_id(self) -> dict[str, ConfigurationClass]:
        return {found.id: found for found in self.classes or ()}

    def class_id(self, configuration: Configuration) -> str:
        """The name of the configuration's class: 16 hexadecimal digits.

        Equal ids mean the same optimizer, rank and exact invariants, those of eps, weight decay and clip norm among
        them as the configuration really has them: so the same training, whichever alpha was stated with or without
        rsLoRA, wherever data, seeds, steps and what else a spec fixes (betas, momentum, schedule, init) are the same
        too, for the id knows nothing of those. Two different classes of a finite space never share an id (`classes`
        would have refused it); elsewhere the chance is that of a collision of 64 bits. Different ids in one sweep mean
        different training; in two sweeps they may not, because one that searches lr_ratio unclipped has another gauge
        and so other invariants.
        """
        rules = (self.reference, *self.space.alpha_rules)
        rank, alpha = configuration.rank, configuration.alpha
        rule = next((rule for rule in rules if rule.at(rank) == alpha), None) or AlphaRule.parse(alpha)
        others = tuple((getattr(configuration, name),) for name in DIMENSIONS[2:])
        (key,) = self._keys_at(rank, rule, others)
        return self._id_of(key)

    def _id_of(self, key: Key) -> str:
        gauge = "two-parameter" if self.two_parameter else "shared"
        parts = (part for part in (self.law.name, gauge, *key) if part)
        return "c-" + hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def _keys(self) -> Iterator[Key]:
        """The key of every configuration, in index order."""
        ranks, rules, others = self.space.axes()
        for rank, rule in product(ranks, rules):
            yield from self._keys_at(rank, rule, others)

    def _keys_at(self, rank: int, rule: AlphaRule, others: tuple[tuple[float, ...], ...]) -> Iterator[Key]:
        """Keys of all configurations of one rank and alpha.

        Exact fractions are slow and grids are large, so each invariant is computed once for the values it depends on,
        and becomes text, which hashes and compares fast; the loop over configurations joins them.
        """
        s2 = scaling_squared_of(rule, rank, rslora=self.rslora)
        # Constants that travel are stated at the reference: there they have the invariants that they have everywhere.
        stated_s2 = scaling_squared_of(self.reference, rank, rslora=self.rslora) if self.travel else s2
        lrs, init_scales, ratios, decays, head_lrs = (tuple(exact(value) for value in axis) for axis in others)
        # As they are, for no gauge moves them.
        heads = [f"head {_text(lr)}" if lr else "" for lr in head_lrs]
        if self.two_parameter:
            keys = self._two_parameter_keys(rank, (lrs, init_scales, ratios, decays), s2, stated_s2)
            yield from ((*key, head) for key in keys for head in heads)
            return
        law = self.law
        stated = [*self._stated, (exact(self.clip_norm or 0), 1)]
        yield from product(
            (str(rank),),
            [_text(shared_invariant(lr, law.lr_power, s2)) for lr in lrs],
            [_text(shared_invariant(c, -1, s2)) for c in init_scales],
            [_text(ratio) for ratio in ratios],
            [_text(shared_invariant(wd, law.decay_power, stated_s2)) for wd in decays],
            heads,
            [" ".join(_text(shared_invariant(value, power, stated_s2)) for value, power in stated)],
        )

    def _two_parameter_keys(
        self, rank: int, axes: tuple[tuple[Fraction, ...], ...], scaling_squared: Fraction, stated_s2: Fraction
    ) -> Iterator[Key]:
        power, s2 = self.law.lr_power, scaling_squared
        lrs, init_scales, ratios, decays = axes
        held = None if self.reference_init_scale is None or not self.travel else exact(self.reference_init_scale)
        # lr_b is a product of powers, so that what it owes to c and s is computed once for each of them.
        b_of_c = [
            (c, invariant_of_b(Fraction(1), power, c, s2), [self._constants(wd, held or c, stated_s2) for wd in decays])
            for c in init_scales
        ]
        for lr in lrs:
            b_of_lr = [invariant_of_b(lr * ratio, power, Fraction(1), Fraction(1)) for ratio in ratios]
            for c, share_of_c, constants in b_of_c:
                step_a = _text(invariant_of_a(lr, power, c))
                for share_of_lr in b_of_lr:
                    step_b = _text(share_of_lr * share_of_c)
                    for of_both in constants:
                        yield str(rank), step_a, step_b, of_both

    def _constants(self, weight_decay: Fraction, init_scale: Fraction, scaling_squared: Fraction) -> str:
        found = (
            invariant
            for value, power in [*self._stated, (weight_decay, self.law.decay_power)]
            for invariant in (
                invariant_of_a(value, power, init_scale),
                invariant_of_b(value, power, init_scale, scaling_squared),
            )
        )
        return " ".join(map(_text, found))

    @cached_property
    def _stated(self) -> list[tuple[Fraction, int]]:
        """The optimizer's absolute constants, each number with its power."""
        return [
            (exact(number), self.law.powers[name])
            for name, value in self.constants.items()
            for number in (value if isinstance(value, tuple) else (value,))
        ]

    def _alphas(self, rank: int) -> list[float]:
        dimension = self.space.alpha
        if isinstance(dimension, Choice):
            return [rule.at(rank) for rule in self.space.alpha_rules]
        reference, found = self.reference.at(rank), [float(dimension.min), float(dimension.max)]
        steps = int(math.log(dimension.max / dimension.min, 4)) + 1
        found += [reference * 4.0**power for power in range(-steps, steps + 1)]
        return [alpha for alpha in found if dimension.min <= alpha <= dimension.max]

    def _scaling(self, alpha: float, rank: int) -> float:
        return scaling_of(alpha, rank, rslora=self.rslora)

    def _gauge_of(self, configuration: Configuration) -> Gauge:
        """The gauge from the reference, where the constants are stated, to a configuration."""
        k = configuration.alpha / self.reference.at(configuration.rank)
        if not self.two_parameter:
            return Gauge.of_alpha(k)
        a = 1.0 if self.reference_init_scale is None else self.reference_init_scale / configuration.init_scale
        return Gauge(a, k / a)


def _text(value: Fraction) -> str:
    """A rational as text, the same for the same number; hexadecimal, which has no limit of digits and is quick."""
    return f"{value.numerator:x}/{value.denominator:x}"


def _magnitude(spec: SweepSpec) -> FactorSettings | None:
    """What DoRA's magnitudes are trained with: a learning rate of their own, and no decay."""
    lr = spec.train.magnitude_lr
    return None if lr is None else FactorSettings(lr, constants=spec.train.constants)


def _middle(dimension: Choice | Range) -> float:
    """The geometric middle of a range, the (lower) middle of a list of values."""
    if isinstance(dimension, Range):
        return math.sqrt(dimension.min * dimension.max)
    values = sorted(map(float, dimension.values))
    return values[(len(values) - 1) // 2]


def _reference(space: SearchSpace) -> AlphaRule:
    if isinstance(space.alpha, Range):
        return alpha_rule(_middle(space.alpha))
    ranks = space.ranks
    middle_rank = ranks[(len(ranks) - 1) // 2]
    rules = sorted(space.alpha_rules, key=lambda rule: rule.at(middle_rank))
    return rules[(len(rules) - 1) // 2]


def _pinned(space: SearchSpace, constants: Mapping[str, Constant], *, clipped: bool) -> tuple[str, ...]:
    """The constants that, read literally, no other hyperparameter can move along with alpha; 0 is 0 in every gauge."""
    decays = values_of(space.weight_decay)
    present = {name: bool(value) for name, value in constants.items()}
    present |= {"clip_norm": clipped, "weight_decay": decays is None or any(decays)}
    return tuple(name for name, on in present.items() if on)


def _why_pinned(constants: tuple[str, ...]) -> str:
    return (
        f"constants: fixed reads {' and '.join(constants)} literally, so configurations of different alpha are twins "
        "but for that, unless it moves with alpha by the law, and alpha is searched"
    )


def _eliminated(space: SearchSpace, *, clipped: bool) -> tuple[tuple[str, ...], str | None]:
    """The searched dimensions that are a gauge, and why alpha is not among them if it is searched and is not."""
    searched = space.searched
    if "lr_ratio" in searched and not clipped:
        # B's gauge absorbs alpha through lr_ratio alone; A's absorbs the init scale if lr is free to move.
        both = "init_scale" in searched and "lr" in searched
        return tuple(name for name in searched if name == "alpha" or (name == "init_scale" and both)), None
    if "alpha" not in searched:
        return (), None
    if "lr" in searched:
        return ("alpha",), None
    return (), (
        "lr is a constant, so every alpha is a different training run: alpha moves lr and init scale together; "
        "search lr (and init_scale) instead, and alpha drops out"
    )
