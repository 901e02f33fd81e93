import math
import random
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from lora_core.gauge import AlphaRule
from sweeps.canonical import CanonicalSpace, ClassGrid, Continuous, Integer, Ordinal, _rules_by_alpha
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import Choice
from tests.sweeps.support import make_spec

SEARCHED = {
    "alpha": "{min: 4, max: 64}",
    "lr": "{min: 1e-4, max: 1e-1}",
    "init_scale": "{min: 0.25, max: 4}",
    "lr_ratio": "{min: 1, max: 16}",
}
CONSTANT = {"alpha": "16", "lr": "0.01", "init_scale": "1", "lr_ratio": "1"}


def make_space(parameters: str, **sections: str) -> CanonicalSpace:
    spec = make_spec(parameters, **sections)
    return CanonicalSpace.of(spec, Reduction.of(spec))


def names(space: CanonicalSpace) -> tuple[str, ...]:
    return tuple(dimension.name for dimension in space.dimensions)


def parameters_of(searched: tuple[str, ...]) -> str:
    written = {name: SEARCHED[name] if name in searched else CONSTANT[name] for name in SEARCHED}
    return ", ".join(["rank: {values: [2, 4]}", *(f"{name}: {value}" for name, value in written.items())])


def subsets() -> list[tuple[str, ...]]:
    return [tuple(n for n, on in zip(SEARCHED, chosen, strict=True) if on) for chosen in product((0, 1), repeat=4)]


# -- dimensions --------------------------------------------------------------------------------------------------------


def degrees_of_freedom(searched: tuple[str, ...], degree: int, *, clip: bool) -> int:
    """How many numbers matter: the rank of the invariants' logarithms in those of the searched parameters.

    Columns: alpha, lr, init_scale, lr_ratio.
    """
    if "lr_ratio" in searched and not clip:
        rows = [[0, 1, -(1 + degree), 0], [1 + degree, 1, 1 + degree, 1]]  # lr_A / c**(1+p), lr_B (c s)**(1+p)
    else:
        rows = [[1, 2 / (1 + degree), 0, 0], [1, 0, 2, 0], [0, 0, 0, 1]]  # lr**(2/(1+p)) s, c**2 s, lr_B / lr_A
    columns = [list(SEARCHED).index(name) for name in searched]
    return int(np.linalg.matrix_rank(np.array(rows)[:, columns])) if columns else 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("searched", subsets(), ids="+".join)
def test_as_many_dimensions_are_searched_as_there_are_numbers_that_matter(searched, clip, optimizer):
    space = make_space(parameters_of(searched), train=f"optimizer: {optimizer}, clip_norm: {1 if clip else 'null'}")
    degree = 1 if optimizer == "sgd" else 0
    assert len(names(space)) == 1 + degrees_of_freedom(searched, degree, clip=clip)
    assert names(space)[0] == "rank"


@pytest.mark.parametrize(
    ("searched", "clip", "after"),
    [
        (("alpha", "lr", "init_scale"), False, ("lr", "init_scale")),
        (("alpha", "lr"), False, ("lr", "init_scale")),
        (("alpha", "init_scale"), False, ("alpha", "init_scale")),
        (("alpha",), False, ("alpha",)),
        (("lr", "init_scale"), False, ("lr", "init_scale")),
        (("alpha", "lr", "init_scale", "lr_ratio"), False, ("lr", "lr_ratio")),
        (("alpha", "lr", "init_scale", "lr_ratio"), True, ("lr", "init_scale", "lr_ratio")),
        (("alpha", "lr", "lr_ratio"), False, ("lr", "lr_ratio")),
        (("alpha", "lr", "lr_ratio"), True, ("lr", "init_scale", "lr_ratio")),
        (("lr", "init_scale", "lr_ratio"), False, ("lr", "lr_ratio")),
        (("alpha", "init_scale", "lr_ratio"), False, ("init_scale", "lr_ratio")),
        (("alpha", "lr_ratio"), False, ("lr_ratio",)),
    ],
)
def test_what_stays_keeps_its_right_name(searched, clip, after):
    space = make_space(parameters_of(searched), train=f"clip_norm: {1 if clip else 'null'}")
    assert names(space) == ("rank", *after)


def test_constants_read_literally_leave_alpha_a_dimension():
    searched = parameters_of(("alpha", "lr", "init_scale"))
    assert names(make_space(searched, reduction="constants: fixed")) == ("rank", "alpha", "lr", "init_scale")
    sgd = make_space(searched, reduction="constants: fixed", train="optimizer: sgd")
    assert names(sgd) == ("rank", "lr", "init_scale")


# -- bounds ------------------------------------------------------------------------------------------------------------

BOX = "rank: {values: [2, 4]}, lr: {min: 1e-4, max: 1e-1}, init_scale: {min: 0.25, max: 4}"


def bounds(space: CanonicalSpace, name: str) -> tuple[float, float]:
    (dimension,) = [dimension for dimension in space.dimensions if dimension.name == name]
    assert isinstance(dimension, Continuous)
    assert dimension.log
    return dimension.low, dimension.high


@pytest.mark.parametrize("alpha", ["{values: [8, 16, 32, 64, 128]}", "{min: 8, max: 128}"])
def test_kept_ranges_stand_at_the_reference_and_widened_ones_reach_every_corner(alpha):
    kept = make_space(f"{BOX}, alpha: {alpha}")
    assert bounds(kept, "lr") == (1e-4, 1e-1)
    assert bounds(kept, "init_scale") == (0.25, 4)
    # The reference is 32, so that k goes from 1/4 to 4, sqrt(k) from 1/2 to 2.
    adamw = make_space(f"{BOX}, alpha: {alpha}", reduction="ranges: widen")
    assert bounds(adamw, "lr") == pytest.approx((5e-5, 2e-1), rel=1e-12)
    assert bounds(adamw, "init_scale") == pytest.approx((0.125, 8), rel=1e-12)
    sgd = make_space(f"{BOX}, alpha: {alpha}", reduction="ranges: widen", train="optimizer: sgd")
    assert bounds(sgd, "lr") == pytest.approx((2.5e-5, 4e-1), rel=1e-12)
    assert bounds(sgd, "init_scale") == pytest.approx((0.125, 8), rel=1e-12)


def test_widened_lists_hold_every_shifted_value_once():
    space = make_space(
        "rank: 4, lr: {values: [0.1, 0.2]}, init_scale: {values: [1, 2]}, alpha: {values: [8, 32, 128]}",
        reduction="ranges: widen",
    )
    assert space.dimensions == (Ordinal("lr", (0.05, 0.1, 0.2, 0.4)), Ordinal("init_scale", (0.5, 1.0, 2.0, 4.0)))


def test_two_parameter_ranges_widen_by_the_init_scale_as_well():
    parameters = f"{BOX}, alpha: {{min: 8, max: 128}}, lr_ratio: {{min: 1, max: 16}}"
    space = make_space(parameters, reduction="ranges: widen")
    # Reference 32 and 1; a = 1 / c from 1/4 to 4, lr x a; lr_ratio x k / a**2, from 1/4 / 16 to 4 x 16.
    assert bounds(space, "lr") == pytest.approx((2.5e-5, 4e-1), rel=1e-12)
    assert bounds(space, "lr_ratio") == pytest.approx((1 / 64, 16 * 64), rel=1e-12)


@pytest.mark.parametrize("ranges", ["keep", "widen"])
def test_a_constant_init_scale_spans_what_alpha_spanned(ranges):
    listed = make_space(
        "rank: 4, lr: {min: 1e-3, max: 1}, alpha: {values: [8, 32, 128]}", reduction=f"ranges: {ranges}"
    )
    assert listed.dimensions[-1] == Ordinal("init_scale", (0.5, 1.0, 2.0))
    ranged = make_space(
        "rank: 4, lr: {min: 1e-3, max: 1}, alpha: {min: 8, max: 128}, init_scale: 3", reduction=f"ranges: {ranges}"
    )
    assert bounds(ranged, "init_scale") == pytest.approx((1.5, 6), rel=1e-12)


def test_a_uniform_range_stays_uniform_when_it_is_widened_too():
    parameters = "rank: 4, lr: {min: 0.1, max: 1, distribution: uniform}, alpha: {values: [8, 32, 128]}"
    assert make_space(parameters).dimensions[0] == Continuous("lr", 0.1, 1, log=False)
    assert make_space(parameters, reduction="ranges: widen").dimensions[0] == Continuous("lr", 0.05, 2, log=False)


def test_listed_ranks_ascend_and_a_range_of_ranks_keeps_its_distribution():
    assert make_space("rank: {values: [8, 2, 4]}, lr: 1").dimensions == (Ordinal("rank", (2, 4, 8)),)
    ranged = make_space("rank: {min: 2, max: 4}, lr: 1")
    assert ranged.dimensions == (Integer("rank", 2, 4, log=True),)
    assert ranged.size == 3
    assert ranged.trial({"rank": 3})[0].rank == 3
    uniform = make_space("rank: {min: 2, max: 4, distribution: uniform}, lr: 1")
    assert uniform.dimensions == (Integer("rank", 2, 4, log=False),)


# -- trials ------------------------------------------------------------------------------------------------------------


def test_a_trial_is_a_canonical_point_and_knows_its_class():
    space = make_space(f'{BOX}, alpha: {{values: [rank, "2*rank", "4*rank"]}}, weight_decay: 0.1')
    configuration, class_id = space.trial({"rank": 4.0, "lr": 0.01, "init_scale": 2.0})
    assert configuration == Configuration(4, 8.0, 0.01, 2.0, 1.0, 0.1)
    assert isinstance(configuration.rank, int)
    assert class_id == space.reduction.class_id(configuration)
    assert space.reduction.canonical(configuration) == configuration


def test_a_trial_of_a_finite_space_is_in_a_class_of_the_users_grid():
    parameters = "rank: 4, alpha: {values: [4, 16, 64]}, lr: {values: [0.1, 0.2, 0.4]}, init_scale: {values: [1, 2, 4]}"
    space = make_space(parameters)
    for lr, init_scale in product((0.1, 0.2, 0.4), (1.0, 2.0, 4.0)):
        _, class_id = space.trial({"lr": lr, "init_scale": init_scale})
        assert space.reduction.members_of(class_id)
    # In the widened space too, where a member lies there: its values have been rounded, and still they are the same.
    wide = make_space(parameters, reduction="ranges: widen")
    reached = {wide.trial({"lr": lr, "init_scale": c})[1] for d in [wide.dimensions] for lr in d[0].values
               for c in d[1].values}  # fmt: skip
    assert {found.id for found in wide.reduction.classes} <= reached


def test_alpha_rules_that_stay_are_followed_at_every_rank():
    space = make_space('rank: {values: [2, 4]}, lr: 0.1, alpha: {values: [4, rank, "2*rank"]}')
    alpha = space.dimensions[1]
    # At rank 2 the rules 4 and 2*rank meet, and at rank 4 the rules 4 and rank; at rank 1 none do.
    assert alpha == Ordinal("alpha", (1.0, 2.0, 4.0))
    found = {(rank, value): space.trial({"rank": rank, "alpha": value})[0].alpha for rank in (2, 4)
             for value in alpha.values}  # fmt: skip
    assert found == {(2, 1): 2, (2, 2): 4, (2, 4): 4, (4, 1): 4, (4, 2): 8, (4, 4): 4}


@pytest.mark.parametrize(
    "rules",
    [
        (AlphaRule(Fraction(1), 2), AlphaRule(1 + Fraction(1, 10**20), 2)),  # different fractions, the same floats
        tuple(map(AlphaRule.parse, ("1e308", "1e308*rank", "1.1e308*rank"))),  # meet at rank 1, are infinite beyond
    ],
)
def test_alpha_rules_that_meet_at_every_rank_are_named_by_their_places(rules):
    space = replace(make_space("rank: {values: [2, 4]}, lr: 0.1").reduction.space, alpha=Choice(rules))
    assert _rules_by_alpha(space) == dict(enumerate(rules))


def test_a_range_of_alpha_that_stays_is_a_dimension_like_others():
    space = make_space("rank: 4, lr: 0.1, alpha: {min: 4, max: 64}")
    assert space.dimensions == (Continuous("alpha", 4, 64, log=True),)
    assert space.trial({"alpha": 5.5})[0].alpha == 5.5


def test_the_size_counts_canonical_points():
    assert make_space("rank: {values: [2, 4]}, lr: {values: [1, 2, 3]}, alpha: {values: [8, 32]}").size == 2 * 3 * 2
    assert make_space("rank: 4, lr: 1").size == 1
    assert make_space(BOX).size is None


def test_a_grid_hands_out_every_class_once():
    spec = make_spec(
        "rank: 4, lr: {values: [0.1, 0.2]}, init_scale: {values: [1, 2]}, alpha: {values: [4, 16]}",
        search="method: grid",
    )
    reduction = Reduction.of(spec)
    grid = ClassGrid(reduction)
    (dimension,) = grid.dimensions
    assert len(dimension.values) == len(reduction.classes) == 7
    assert [grid.trial({"class": value})[1] for value in dimension.values] == [found.id for found in reduction.classes]


# -- what is left outside ----------------------------------------------------------------------------------------------


def draw(dimension, random_: random.Random, rank: int) -> float:
    if hasattr(dimension, "values"):
        value = random_.choice(dimension.values)
        return AlphaRule.parse(value).at(rank)
    return math.exp(random_.uniform(math.log(dimension.min), math.log(dimension.max)))


def holds(dimension, configuration: Configuration) -> bool:
    value = getattr(configuration, dimension.name)
    if isinstance(dimension, Ordinal):
        return any(math.isclose(value, listed, rel_tol=1e-9) for listed in dimension.values)
    return dimension.low * (1 - 1e-9) <= value <= dimension.high * (1 + 1e-9)


@pytest.mark.parametrize("ranges", ["keep", "widen"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "parameters",
    [
        f"{BOX}, alpha: {{min: 4, max: 256}}",
        f"{BOX}, alpha: {{values: [4, 16, 64]}}",
        f'{BOX}, alpha: {{values: [16, "4*rank", "sqrt(rank)"]}}',
        "rank: {values: [2, 4]}, lr: {min: 1e-2, max: 1e-1}, alpha: {min: 4, max: 256}",
        "rank: {values: [2, 4]}, lr: {values: [0.1, 0.2, 0.4]}, init_scale: {values: [1, 2, 4]}, "
        "alpha: {values: [4, 16, 64]}",
        f"{BOX}, alpha: {{min: 8, max: 128}}, lr_ratio: {{min: 1, max: 100}}",
        f"{BOX}, lr_ratio: {{min: 1, max: 100}}",
    ],
)
def test_the_share_outside_is_what_sampling_finds(parameters, optimizer, ranges):
    space = make_space(parameters, train=f"optimizer: {optimizer}", reduction=f"ranges: {ranges}")
    user, random_, samples = space.reduction.space, random.Random(0), 1_500
    outside = 0
    for _ in range(samples):
        rank = random_.choice(user.ranks)
        others = {name: draw(getattr(user, name), random_, rank) for name in ("alpha", "lr", "init_scale", "lr_ratio")}
        canonical = space.reduction.canonical(Configuration(rank=rank, **others))
        outside += not all(holds(dimension, canonical) for dimension in space.dimensions)
    # Four standard deviations of the sampling.
    assert space.share_outside() == pytest.approx(outside / samples, abs=4 * 0.5 / math.sqrt(samples))
    assert (space.share_outside() == 0) == (ranges == "widen")


def test_nothing_is_outside_where_nothing_is_eliminated():
    assert make_space(BOX).share_outside() == 0
    assert make_space("rank: 4, lr: 0.1, alpha: {min: 4, max: 64}").share_outside() == 0
