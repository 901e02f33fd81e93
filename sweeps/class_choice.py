"""Which classes `lora-sweeps certify` trains: all, some, or those of configurations that the user names."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from lora_core.causes import misplaced
from sweeps import collapse
from sweeps.canonical import CanonicalSpace, Continuous, Dimension
from sweeps.certifying import ClassOrder
from sweeps.errors import InputError
from sweeps.reduction import Reduction
from sweeps.space import DIMENSIONS, Configuration
from sweeps.spec import Choice, SweepSpec

_STANDARD_TRIALS = 64
"""Classes that stand for a continuous space, unless the spec says how many trials it gets."""

_MOST_CLASSES = 10_000
"""More than this would train for hours, and fill the memory with what they did."""

_LEAST, _MOST = 1e-30, 1e30
"""Twins of numbers beyond these would differ because float32 cannot hold them, not because the law is wrong."""

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_WHOLE_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
_MAY_BE_ZERO = ("weight_decay", "head_lr")

_TWINS_OF_ONE_ALPHA = (0.25, 4.0)
"""Where a spec has one alpha only, its twins are at these multiples of it: exact in binary."""


def choose_classes(spec: SweepSpec, reduction: Reduction, wanted: int | None) -> list[ClassOrder]:
    """Picks classes of two members or more, spread evenly over the space.

    Args:
        spec: whose space.
        reduction: the spec's.
        wanted: how many; None for all. A continuous space has no end of them: all means as many as it gets trials.

    Raises:
        InputError: no configuration has a twin, or there are more classes than can be certified at once.
    """
    if reduction.classes is None:
        count = _at_most(wanted or spec.search.trials or _STANDARD_TRIALS)
        return [_order(reduction, *drawn) for drawn in _draw(spec, reduction, count)]
    # Where no class has two members, twins that the law gives them elsewhere do as well.
    found = [each for each in reduction.classes if len(each.members) > 1] or reduction.classes
    count = _at_most(len(found) if wanted is None else min(wanted, len(found)))
    picked = (found[i * len(found) // count] for i in range(count))
    return [_order(reduction, each.representative, each.id) for each in picked]


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
    order = ClassOrder(reduction.class_id(first), first, claimed)
    check_order(reduction, order)
    return order


def check_order(reduction: Reduction, order: ClassOrder) -> None:
    """Refuses a class with numbers that the arithmetic of training does not hold.

    Raises:
        InputError: a number of a member is not above 0, or is too small or too large.
    """
    for member in (order.representative, *order.twins):
        if not _is_trainable(reduction, order.representative, member):
            raise _out_of_range(member)


def _is_trainable(reduction: Reduction, representative: Configuration, member: Configuration) -> bool:
    try:
        point = reduction.point(member)
        reduction.gauge_between(representative, member)
    except (ValueError, ArithmeticError):
        return False
    positive = (member.alpha, member.lr, member.init_scale, member.lr_ratio, point.scaling, point.b.lr)
    not_negative = (member.weight_decay, member.head_lr)
    return all(_LEAST <= x <= _MOST for x in positive) and all(0 <= x <= _MOST for x in not_negative)


def _out_of_range(member: Configuration) -> InputError:
    written = ",".join(f"{name}={value:g}" for name, value in asdict(member).items())
    required = f"the numbers of a class, its twins' among them, must be between {_LEAST:g} and {_MOST:g}"
    return InputError(f"{required}, for beyond that float32 ends; found {written}")


def read_configuration(reduction: Reduction, text: str) -> Configuration:
    """Reads `rank=8,alpha=16,lr=0.01,init_scale=1`; what the spec holds constant may be left out.

    Raises:
        InputError: an unknown or repeated key, a value that is no number above 0, or a key left out that is searched.
    """
    shape = "a configuration is written as rank=8,alpha=16,lr=0.01,init_scale=1"
    values: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if not equals or name not in DIMENSIONS or name in values:
            known = ", ".join(DIMENSIONS)
            raise InputError(f"{shape}, each of {known} at most once; found {part.strip()!r} in {text!r}")
        values[name] = _number(name, number, text)
    for name in DIMENSIONS:
        if name not in values:
            values[name] = _constant(reduction, name, int(values.get("rank", 0)), text)
    if values["weight_decay"] and reduction.law.decay is None:
        found = f"{values['weight_decay']:g} in {text!r}"
        raise InputError(f"weight_decay must be 0, for {reduction.law.name} has no weight decay; found {found}")
    if bool(values["head_lr"]) != reduction.space.trains_head:
        required = (
            "above 0, for this task trains a head" if reduction.space.trains_head else "0, for no head is trained"
        )
        raise InputError(f"head_lr must be {required}; found {values['head_lr']:g} in {text!r}")
    return Configuration(rank=int(values.pop("rank")), **values)


def _number(name: str, text: str, whole: str) -> float:
    required = "a number above 0"
    accepted = _NUMBER
    if name == "rank":
        required, accepted = "a whole number above 0", _WHOLE_NUMBER
    elif name in _MAY_BE_ZERO:
        required = "a number of at least 0"
    value = float(text) if accepted.fullmatch(text) else math.nan
    if not (0 < value < math.inf or (value == 0 and name in _MAY_BE_ZERO)):
        raise InputError(f"{name} must be {required}; found {text!r} in {whole!r}")
    return value


def _constant(reduction: Reduction, name: str, rank: int, text: str) -> float:
    dimension = getattr(reduction.space, name)
    if not isinstance(dimension, Choice) or not dimension.constant:
        raise InputError(f"{name} is searched, so a configuration must name it; found none in {text!r}; add {name}=...")
    return reduction.space.alpha_rules[0].at(rank) if name == "alpha" else float(dimension.values[0])


def _order(reduction: Reduction, representative: Configuration, class_id: str) -> ClassOrder:
    try:
        twins = collapse.twins(reduction, representative, class_id) or _twins_by_law(reduction, representative)
    except InputError:
        raise
    except (ValueError, ArithmeticError):
        raise _out_of_range(representative) from None
    order = ClassOrder(class_id, representative, twins)
    check_order(reduction, order)
    return order


def _twins_by_law(reduction: Reduction, representative: Configuration) -> tuple[Configuration, ...]:
    """Twins at other values of alpha than the spec's.

    Raises:
        InputError: constants that are read literally leave it none.
    """
    twins = tuple(reduction.lift(representative, representative.alpha * k) for k in _TWINS_OF_ONE_ALPHA)
    for twin in twins:
        points = reduction.point(representative), reduction.point(twin)
        off = misplaced(*points, reduction.law, reduction.gauge_between(representative, twin))
        if off:
            quantities = " and ".join(each.quantity for each in off)
            raise InputError(
                f"a certificate needs twins; found none: constants: fixed holds {quantities} where another alpha would "
                "need another value; write constants: travel, or name a --configuration and a --twin to put on trial"
            )
    return twins


def _at_most(count: int) -> int:
    if count > _MOST_CLASSES:
        raise InputError(
            f"at most {_MOST_CLASSES:,} classes can be certified at once; found {count:,}; take some with --classes N"
        )
    return count


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
        return dimension.values[min(int(share * len(dimension.values)), len(dimension.values) - 1)]
    if dimension.log:
        return float(dimension.low * (dimension.high / dimension.low) ** share)
    return dimension.low + (dimension.high - dimension.low) * share
