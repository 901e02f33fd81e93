"""Which classes `lora-sweeps certify` trains: all, some, or those of configurations that the user names."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import fields

from sweeps import collapse
from sweeps.canonical import CanonicalSpace, Continuous, Dimension
from sweeps.certifying import ClassOrder
from sweeps.errors import InputError
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import Choice, SweepSpec

_STANDARD_TRIALS = 64
"""Classes that stand for a continuous space, unless the spec says how many trials it gets."""

_TWINS_OF_ONE_ALPHA = (0.25, 4.0)
"""Where a spec has one alpha only, its twins are at these multiples of it: exact in binary."""


def choose_classes(spec: SweepSpec, reduction: Reduction, wanted: int | None) -> list[ClassOrder]:
    """Picks classes with twins, spread evenly over the space.

    Args:
        spec: whose space.
        reduction: the spec's.
        wanted: how many; None for all. A continuous space has no end of them: all means as many as it gets trials.

    Raises:
        InputError: no configuration has a twin.
    """
    if reduction.classes is None:
        return [_order(reduction, *drawn) for drawn in _draw(spec, reduction, wanted or _trials(spec))]
    found = [(each.representative, each.id) for each in reduction.classes]
    orders = [_order(reduction, *each) for each in found if collapse.twins(reduction, *each)]
    # No class has two members: those that the law gives them elsewhere do as well.
    orders = orders or [_order(reduction, *each) for each in found]
    count = len(orders) if wanted is None else min(wanted, len(orders))
    return [orders[i * len(orders) // count] for i in range(count)]


def name_class(reduction: Reduction, text: str) -> ClassOrder:
    """Returns the class of a configuration that is written as `rank=8,alpha=16,lr=0.01`.

    Raises:
        InputError: it is not written like that, or leaves out what the spec searches.
    """
    configuration = read_configuration(reduction, text)
    return _order(reduction, configuration, reduction.class_id(configuration))


def claim(reduction: Reduction, configuration: str, twins: Sequence[str]) -> ClassOrder:
    """Returns a configuration and others that are said to be its twins, as they are written: the claim is on trial.

    Raises:
        InputError: see `name_class`; or a rank that is not the first one's.
    """
    first = read_configuration(reduction, configuration)
    claimed = tuple(read_configuration(reduction, text) for text in twins)
    for twin in claimed:
        if twin.rank != first.rank:
            raise InputError(
                f"twins have one rank: required {first.rank}; found {twin.rank}; no gauge changes the rank"
            )
    return ClassOrder(reduction.class_id(first), first, claimed)


def read_configuration(reduction: Reduction, text: str) -> Configuration:
    """Reads `rank=8,alpha=16,lr=0.01,init_scale=1`; what the spec holds constant may be left out.

    Raises:
        InputError: an unknown or repeated key, a value that is no number above 0, or a key left out that is searched.
    """
    names = [field.name for field in fields(Configuration)]
    shape = "a configuration is written as rank=8,alpha=16,lr=0.01,init_scale=1"
    values: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if not equals or name not in names or name in values:
            raise InputError(f"{shape}, each of {', '.join(names)} at most once; found {part.strip()!r} in {text!r}")
        values[name] = _number(name, number, text)
    for name in names:
        if name not in values:
            values[name] = _constant(reduction, name, int(values.get("rank", 0)), text)
    return Configuration(**{**values, "rank": int(values["rank"])})  # type: ignore[arg-type]


def _number(name: str, text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    least = 0 if name == "weight_decay" else math.ulp(0.0)
    if not least <= value < math.inf or (name == "rank" and value != int(value)):
        required = "a whole number above 0" if name == "rank" else "a number above 0"
        raise InputError(f"{name} must be {required}; found {text!r} in {whole!r}")
    return value


def _constant(reduction: Reduction, name: str, rank: int, text: str) -> float:
    dimension = getattr(reduction.space, name)
    if not isinstance(dimension, Choice) or not dimension.constant:
        raise InputError(f"{name} is searched, so a configuration must name it; found none in {text!r}; add {name}=...")
    return reduction.space.alpha_rules[0].at(rank) if name == "alpha" else float(dimension.values[0])


def _order(reduction: Reduction, representative: Configuration, class_id: str) -> ClassOrder:
    twins = collapse.twins(reduction, representative, class_id)
    if not twins:
        if reduction.stuck is not None and not reduction.travel:
            raise InputError(f"a certificate needs twins; found none: {reduction.stuck}; write constants: travel")
        alphas = [representative.alpha * k for k in _TWINS_OF_ONE_ALPHA]
        twins = tuple(reduction.lift(representative, alpha) for alpha in alphas)
    return ClassOrder(class_id, representative, twins)


def _trials(spec: SweepSpec) -> int:
    return spec.search.trials or _STANDARD_TRIALS


def _draw(spec: SweepSpec, reduction: Reduction, count: int) -> Iterator[tuple[Configuration, str]]:
    """Canonical points of a continuous space, each dimension's values evenly: a Latin hypercube."""
    space = CanonicalSpace.of(spec, reduction)
    draws = random.Random(f"certify {spec.search.seed}")
    columns = {}
    for dimension in space.dimensions:
        strata = [(i + draws.random()) / count for i in range(count)]
        draws.shuffle(strata)
        columns[dimension.name] = [_at(dimension, share) for share in strata]
    for i in range(count):
        yield space.trial({name: column[i] for name, column in columns.items()})


def _at(dimension: Dimension, share: float) -> float:
    """The value below which that share of a dimension lies."""
    if not isinstance(dimension, Continuous):
        return dimension.values[int(share * len(dimension.values))]
    if dimension.log:
        return float(dimension.low * (dimension.high / dimension.low) ** share)
    return dimension.low + (dimension.high - dimension.low) * share
