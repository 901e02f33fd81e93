import re
import time
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.gauge import FactorSettings, Gauge, Point, regauge
from lora_core.laws import LAWS
from sweeps.errors import InputError
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from tests.sweeps.support import make_reduction

OPTIMIZERS = ("sgd", "adam", "adamw")
DEGREE = {"sgd": 1, "adam": 0, "adamw": 0}

# Axes as a user writes them; `brute_force` reads the same text.
AXES = {
    "rank": ["2", "8"],
    "alpha": ["8", "16", "32", "2*rank", "sqrt(rank)"],
    "lr": ["0.1", "0.2", "0.4"],
    "init_scale": ["1", "2"],
    "lr_ratio": ["1"],
    "weight_decay": ["0", "0.1", "0.4"],
}
WITH_RATIO = {
    "rank": ["8"],
    "alpha": ["8", "16", "32", "sqrt(rank)"],
    "lr": ["0.1", "0.2", "0.4"],
    "init_scale": ["1", "2"],
    "lr_ratio": ["0.25", "1", "4"],
    "weight_decay": ["0", "0.1"],
}


def parameters_of(axes: dict[str, list[str]]) -> str:
    return ", ".join(f"{name}: {{values: [{', '.join(values)}]}}" for name, values in axes.items())


# -- brute force -------------------------------------------------------------------------------------------------------


def scaling_squared(rank: int, alpha: str, rslora: bool) -> Fraction:
    rule = re.fullmatch(r"(?:([\d.]+)\*)?(rank|sqrt\(rank\))", alpha)
    if rule is None:
        alpha_squared = Fraction(alpha) ** 2
    else:
        alpha_squared = Fraction(rule[1] or 1) ** 2 * (rank**2 if rule[2] == "rank" else rank)
    return alpha_squared / (rank if rslora else rank**2)


def are_twins(x, y, s2_x, s2_y, optimizer: str, *, fixed: bool, clip: bool) -> bool:
    """The table of the published equivalence, entry by entry, with one learning rate for both factors."""
    (rank_x, _, lr_x, c_x, ratio_x, wd_x), (rank_y, _, lr_y, c_y, ratio_y, wd_y) = x, y
    k2 = s2_y / s2_x  # alpha_y / alpha_x, squared
    if rank_x != rank_y or ratio_x != ratio_y or c_x**4 != c_y**4 * k2:
        return False
    if (lr_x**2 != lr_y**2 * k2) if optimizer == "sgd" else (lr_x**4 != lr_y**4 * k2):
        return False
    if not fixed:
        return wd_x == wd_y
    same_constants = k2 == 1 or (optimizer == "sgd" and not clip)
    decay = wd_x**4 * k2 == wd_y**4 if optimizer == "adamw" else wd_x**2 * k2 == wd_y**2
    return same_constants and decay


def are_two_parameter_twins(x, y, s2_x, s2_y, optimizer: str, *, fixed: bool) -> bool:
    """A -> A / a, B -> B / b, with a from the init scales and b from what remains of alpha."""
    (rank_x, _, lr_x, c_x, ratio_x, wd_x), (rank_y, _, lr_y, c_y, ratio_y, wd_y) = x, y
    a, steps = c_x / c_y, 1 + DEGREE[optimizer]
    b2 = s2_y / s2_x / a**2
    if rank_x != rank_y or lr_x != lr_y * a**steps or (lr_x * ratio_x) ** 2 != (lr_y * ratio_y) ** 2 * b2**steps:
        return False
    if not fixed:
        return wd_x == wd_y
    if optimizer != "sgd":
        return a == 1 == b2 and wd_x == wd_y
    return wd_x * a**2 == wd_y == wd_x * b2


def brute_force(axes, optimizer: str, *, rslora=False, fixed=False, clip=False) -> set[frozenset[int]]:
    """Every pair is compared; twins are an equivalence, which is checked on the way."""
    points = [
        (int(rank), alpha, *map(Fraction, others))
        for rank, alpha, *others in product(*(sorted(axes[n], key=int) if n == "rank" else axes[n] for n in axes))
    ]
    s2 = cache(scaling_squared)
    group = list(range(len(points)))
    twins: set[tuple[int, int]] = set()
    for i, j in combinations(range(len(points)), 2):
        s2_i, s2_j = (s2(points[n][0], points[n][1], rslora) for n in (i, j))
        if len(axes["lr_ratio"]) > 1 and not clip:
            same = are_two_parameter_twins(points[i], points[j], s2_i, s2_j, optimizer, fixed=fixed)
        else:
            same = are_twins(points[i], points[j], s2_i, s2_j, optimizer, fixed=fixed, clip=clip)
        if same:
            twins.add((i, j))
            group[j] = min(group[j], group[i])
    classes = {root: frozenset(i for i in range(len(points)) if group[i] == root) for root in group}
    assert sum(len(c) * (len(c) - 1) // 2 for c in classes.values()) == len(twins)
    return set(classes.values())


def classes_of(reduction: Reduction) -> set[frozenset[int]]:
    return {frozenset(found.members) for found in reduction.classes}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("constants", ["travel", "fixed"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_classes_of_a_grid_are_those_of_brute_force(optimizer, rslora, constants, clip):
    reduction = make_reduction(
        parameters_of(AXES),
        lora=f"rslora: {str(rslora).lower()}",
        train=f"optimizer: {optimizer}, clip_norm: {0.5 if clip else 'null'}",
        reduction=f"constants: {constants}",
    )
    expected = brute_force(AXES, optimizer, rslora=rslora, fixed=constants == "fixed", clip=clip)
    assert classes_of(reduction) == expected
    merging = constants == "travel" or (optimizer == "sgd" and not clip)
    different = len(set(reduction.space.configurations()))
    assert len(expected) < different if merging else len(expected) == different


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("constants", ["travel", "fixed"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_classes_of_a_grid_with_lr_ratio_are_those_of_brute_force(optimizer, rslora, constants, clip):
    reduction = make_reduction(
        parameters_of(WITH_RATIO),
        lora=f"rslora: {str(rslora).lower()}",
        train=f"optimizer: {optimizer}, clip_norm: {0.5 if clip else 'null'}",
        reduction=f"constants: {constants}",
    )
    expected = brute_force(WITH_RATIO, optimizer, rslora=rslora, fixed=constants == "fixed", clip=clip)
    assert classes_of(reduction) == expected
    assert reduction.two_parameter is not clip


def test_lr_ratio_merges_init_scales_only_where_nothing_clips_both_factors():
    parameters = "rank: 4, lr: {values: [0.1, 0.2]}, init_scale: {values: [1, 2]}, lr_ratio: {values: [1, 0.25]}"
    free, clipped = make_reduction(parameters), make_reduction(parameters, train="clip_norm: 1")
    (merged,) = [found for found in free.classes if len(found.members) > 1]
    # a = 1/2, b = 2: A starts twice as large with twice the lr, B learns half as fast.
    assert {(c.lr, c.init_scale, c.lr_ratio) for c in merged.configurations} == {(0.1, 1, 1), (0.2, 2, 0.25)}
    assert len(free.classes) == 7
    assert len(clipped.classes) == 8


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_eps_read_literally_keeps_every_alpha_apart(optimizer):
    grid = "rank: 4, alpha: {values: [4, 16, 64]}, lr: {values: [0.1, 0.05, 0.2]}, init_scale: {values: [0.5, 1, 2]}"
    train = f"optimizer: {optimizer}"
    travel = make_reduction(grid, train=train)
    literal = make_reduction(grid, train=train, reduction="constants: fixed")
    assert len(travel.classes) < travel.space.size == 27
    assert len(literal.classes) == 27
    assert literal.eliminated == ()
    assert "reads eps literally" in literal.stuck


def test_sgd_read_literally_still_merges_and_a_clip_norm_stops_it():
    grid = "rank: 4, alpha: {values: [4, 16]}, lr: {values: [0.4, 0.1]}, init_scale: {values: [2, 1]}"
    free = make_reduction(grid, train="optimizer: sgd", reduction="constants: fixed")
    clipped = make_reduction(grid, train="optimizer: sgd, clip_norm: 1", reduction="constants: fixed")
    assert len(free.classes) == 7
    assert free.eliminated == ("alpha",)
    assert len(clipped.classes) == 8
    assert "reads clip_norm literally" in clipped.stuck


def test_weight_decay_read_literally_merges_where_it_moves_with_alpha():
    grid = (
        "rank: 4, alpha: {values: [4, 16]}, lr: {values: [0.4, 0.1]}, init_scale: {values: [2, 1]}, "
        "weight_decay: {values: [0, 0.1, 0.4]}"
    )
    reduction = make_reduction(grid, train="optimizer: sgd", reduction="constants: fixed")
    merged = [sorted((c.alpha, c.weight_decay) for c in k.configurations) for k in reduction.classes if k.members[1:]]
    assert merged == [[(4, 0), (16, 0)], [(4, 0.1), (16, 0.4)]]
    for found in reduction.classes:
        assert found.representative in set(found.configurations)


# -- decimals ----------------------------------------------------------------------------------------------------------


def test_decimals_that_binary_cannot_hold_merge_exactly():
    # 0.1 and 0.05 are no exact fractions in binary, nor is 0.2 / sqrt(0.04 * 25) in any rounding.
    reduction = make_reduction("rank: 4, alpha: {values: [0.1, 0.4, 1.6]}, lr: {values: [0.2, 0.1, 0.05]}, "
                               "init_scale: {values: [1.2, 0.6, 0.3]}")  # fmt: skip
    (largest,) = [found for found in reduction.classes if len(found.members) == 3]
    assert sorted((c.alpha, c.lr, c.init_scale) for c in largest.configurations) == [
        (0.1, 0.2, 1.2), (0.4, 0.1, 0.6), (1.6, 0.05, 0.3)]  # fmt: skip


@pytest.mark.parametrize("near", ["0.1000001", "0.10000000000000002"])
def test_a_near_miss_is_no_twin(near):
    grid = "rank: 4, alpha: {{values: [8, 32]}}, lr: {{values: [0.2, {}]}}, init_scale: {{values: [2, 1]}}"
    exact, missed = make_reduction(grid.format("0.1")), make_reduction(grid.format(near))
    assert len(exact.classes) == 7
    assert len(missed.classes) == 8


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(["0.1", "0.05", "0.2", "0.1000001", "0.3", "1e-3", "4e-3"]), min_size=1, unique=True),
    st.lists(st.sampled_from(["4", "9", "16", "2*rank", "rank", "sqrt(rank)", "0.1"]), min_size=1, unique=True),
    st.lists(st.sampled_from(["0.5", "1", "2", "3", "0.3333333"]), min_size=1, unique=True),
    st.sampled_from(OPTIMIZERS),
    st.booleans(),
)
def test_any_grid_has_the_classes_of_brute_force(lrs, alphas, init_scales, optimizer, fixed):
    axes = {"rank": ["1", "4"], "alpha": alphas, "lr": lrs, "init_scale": init_scales}
    axes |= {"lr_ratio": ["1"], "weight_decay": ["0"]}
    constants = "constants: fixed" if fixed else "constants: travel"
    reduction = make_reduction(parameters_of(axes), train=f"optimizer: {optimizer}", reduction=constants)
    assert classes_of(reduction) == brute_force(axes, optimizer, fixed=fixed)


# -- motion within a class ---------------------------------------------------------------------------------------------

CONTINUOUS = "rank: {values: [1, 4, 8]}, lr: {min: 1e-4, max: 1}, init_scale: {min: 0.1, max: 10}"
ALPHAS = "alpha: {min: 1, max: 256}"


@cache
def continuous(optimizer: str, ratio: bool, rslora: bool, constants: str) -> Reduction:
    decay = "0" if constants == "fixed" else "{values: [0, 0.1]}"
    parameters = f"{CONTINUOUS}, {ALPHAS}, weight_decay: {decay}" + (", lr_ratio: {min: 1, max: 16}" if ratio else "")
    lora, train = f"rslora: {str(rslora).lower()}", f"optimizer: {optimizer}"
    return make_reduction(parameters, lora=lora, train=train, reduction=f"constants: {constants}")


reductions = st.one_of(
    st.builds(continuous, st.sampled_from(OPTIMIZERS), st.booleans(), st.booleans(), st.just("travel")),
    st.builds(continuous, st.just("sgd"), st.booleans(), st.booleans(), st.just("fixed")),
)
configurations = st.builds(
    Configuration,
    rank=st.sampled_from([1, 4, 8]),
    alpha=st.floats(1, 256),
    lr=st.floats(1e-4, 1),
    init_scale=st.floats(0.1, 10),
    lr_ratio=st.floats(1, 16),
    weight_decay=st.sampled_from([0.0, 0.1]),
)


def numbers(c: Configuration) -> list[float]:
    return [c.rank, c.alpha, c.lr, c.init_scale, c.lr_ratio, c.weight_decay]


def invariants(point: Point, optimizer: str) -> list[float]:
    """What no gauge changes, two-parameter or shared, in floats: the law of each factor by itself."""
    steps, cs = 1 + DEGREE[optimizer], point.init_scale * point.scaling
    found: list[float] = [point.rank, point.a.lr / point.init_scale**steps, point.b.lr * cs**steps]
    if "eps" in LAWS[optimizer].powers:
        found += [point.a.eps * point.init_scale, point.b.eps / cs]
    decoupled = optimizer == "adamw"
    found.append(point.a.weight_decay * (point.a.lr if decoupled else point.init_scale**2))
    found.append(point.b.weight_decay * (point.b.lr if decoupled else cs**-2))
    if point.clip_norm is not None:
        found.append(point.clip_norm**2 / point.scaling)
    return found


@given(reductions, configurations, st.floats(1, 256))
def test_canonical_and_lift_are_inverse(reduction, configuration, alpha):
    canonical = reduction.canonical(configuration)
    assert canonical.alpha == reduction.reference.at(configuration.rank)
    back = reduction.lift(canonical, configuration.alpha, configuration.init_scale if reduction.two_parameter else None)
    assert numbers(back) == pytest.approx(numbers(configuration), rel=1e-12)
    elsewhere = reduction.lift(configuration, alpha)
    assert elsewhere.alpha == alpha
    assert numbers(reduction.canonical(elsewhere)) == pytest.approx(numbers(canonical), rel=1e-12)


@given(reductions, configurations, st.floats(1, 256))
def test_a_lift_has_the_invariants_of_where_it_came_from(reduction, configuration, alpha):
    optimizer = reduction.law.name
    if reduction.two_parameter and not reduction.travel:
        # Read literally, one number cannot move with the gauges of both factors.
        configuration = replace(configuration, weight_decay=0.0)
    here, there = reduction.point(configuration), reduction.point(reduction.lift(configuration, alpha))
    assert invariants(there, optimizer) == pytest.approx(invariants(here, optimizer), rel=1e-11)


@pytest.mark.parametrize("clip", ["null", "0.5"])
@pytest.mark.parametrize("axes", [AXES, WITH_RATIO], ids=["shared", "two-parameter"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_sees_the_same_invariants_in_every_member_of_a_class(optimizer, axes, clip):
    reduction = make_reduction(parameters_of(axes), train=f"optimizer: {optimizer}, clip_norm: {clip}")
    for found in reduction.classes:
        first, *others = [invariants(reduction.point(c), optimizer) for c in found.configurations]
        assert all(other == pytest.approx(first, rel=1e-12) for other in others)
        assert invariants(reduction.point(found.representative), optimizer) == pytest.approx(first, rel=1e-12)


def test_different_classes_differ_in_their_invariants():
    reduction = make_reduction(parameters_of(AXES))
    seen = [tuple(round(x, 14) for x in invariants(reduction.point(c.representative), "adamw"))
            for c in reduction.classes]  # fmt: skip
    assert len(set(seen)) == len(seen)


def test_constants_move_by_the_published_table_when_alpha_is_four_times_as_large():
    parameters = "rank: 4, alpha: {values: [4, 16, 64]}, lr: {values: [0.1, 0.2]}, weight_decay: 0.1"
    for optimizer, wd in (("adamw", 0.2), ("adam", 0.4), ("sgd", 0.4)):
        eps = "" if optimizer == "sgd" else ", eps: 1e-8"
        reduction = make_reduction(parameters, train=f"optimizer: {optimizer}{eps}, clip_norm: 1")
        at_reference = reduction.point(Configuration(4, 16.0, 0.1, 1.0, weight_decay=0.1))
        at_four_times = reduction.point(Configuration(4, 64.0, 0.1, 1.0, weight_decay=0.1))
        assert (at_reference.a.weight_decay, at_reference.clip_norm) == (0.1, 1.0)
        assert at_reference.a.eps == (None if optimizer == "sgd" else 1e-8)
        assert at_four_times.clip_norm == 2.0
        assert at_four_times.a.weight_decay == at_four_times.b.weight_decay == wd
        if optimizer != "sgd":
            assert at_four_times.a.eps == 2e-8


@pytest.mark.parametrize("optimizer", LAWS)
def test_every_optimizers_grid_collapses_by_its_own_powers(optimizer):
    step = 4.0 if LAWS[optimizer].degree == 1 else 2.0
    lrs = [0.5 * step**n for n in range(3)]
    parameters = f"rank: 4, lr: {{values: {lrs}}}, init_scale: {{values: [1, 2, 4]}}, alpha: {{values: [4, 16, 64]}}"
    reduction = make_reduction(parameters, train=f"optimizer: {optimizer}")
    (largest,) = [found for found in reduction.classes if len(found.members) == 3]
    members = sorted(largest.configurations, key=lambda c: c.alpha)
    assert [(c.alpha, c.lr, c.init_scale) for c in members] == list(zip((4, 16, 64), lrs[::-1], (4, 2, 1), strict=True))
    points = [reduction.point(c) for c in members]
    for here, there in pairwise(points):
        assert regauge(here, Gauge(2.0, 2.0), LAWS[optimizer]) == there


def test_magnitudes_and_dropout_are_the_same_at_every_alpha():
    lora, train = "dora: true, dropout: 0.1", "magnitude_lr: 0.5, eps: 1e-6"
    reduction = make_reduction("rank: 4, lr: {values: [0.1, 0.2]}, alpha: {values: [4, 16]}", lora=lora, train=train)
    points = [reduction.point(Configuration(4, alpha, 0.1)) for alpha in (4.0, 16.0)]
    assert {point.dropout for point in points} == {0.1}
    for point in points:
        assert point.magnitude == FactorSettings(0.5, 0.0, {"eps": 1e-6})
    assert points[0].a.eps != points[1].a.eps


# -- twins and representatives -----------------------------------------------------------------------------------------


def test_twins_are_the_class_at_the_users_other_alphas():
    reduction = make_reduction('rank: 4, lr: {min: 1e-4, max: 1}, alpha: {values: [4, 16, 64, "16*rank"]}')
    twins = reduction.twins(Configuration(4, 16.0, 0.1, 1.0))
    assert [(twin.alpha, twin.lr, twin.init_scale) for twin in twins] == [(4, 0.2, 2), (64, 0.05, 0.5)]


def test_twins_of_a_range_are_its_ends_and_powers_of_four():
    reduction = make_reduction("rank: 4, lr: {min: 1e-4, max: 1}, alpha: {min: 2, max: 128}")
    twins = reduction.twins(Configuration(4, 16.0, 0.1, 1.0))
    assert [twin.alpha for twin in twins] == [2, 4, 64, 128]
    for twin in twins:
        assert reduction.gauge_between(Configuration(4, 16.0, 0.1, 1.0), twin).exact_in_binary == (
            twin.alpha in (4, 64)
        )


@pytest.mark.parametrize("lr", ["0.1", "{min: 0.1, max: 1}"])
def test_there_are_no_twins_where_alpha_is_a_constant_or_cannot_move(lr):
    alpha = "16" if lr != "0.1" else "{values: [8, 16]}"
    assert make_reduction(f"rank: 4, lr: {lr}, alpha: {alpha}").twins(Configuration(4, 16.0, 0.1, 1.0)) == ()


@pytest.mark.parametrize("axes", [AXES, WITH_RATIO], ids=["shared", "two-parameter"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_members_have_the_id_of_their_class_and_classes_have_ids_of_their_own(optimizer, axes):
    reduction = make_reduction(parameters_of(axes), train=f"optimizer: {optimizer}")
    again = make_reduction(parameters_of(axes), train=f"optimizer: {optimizer}")
    assert [found.id for found in reduction.classes] == [found.id for found in again.classes]
    assert len({found.id for found in reduction.classes}) == len(reduction.classes)
    for found in reduction.classes:
        assert {reduction.class_id(configuration) for configuration in found.configurations} == {found.id}
        assert reduction.members_of(found.id) == tuple(found.configurations)


def test_a_class_keeps_its_id_in_a_larger_sweep():
    small = make_reduction("rank: 4, alpha: {values: [4, 16, 64]}, lr: {values: [0.1, 0.2]}")
    large = make_reduction(
        "rank: {values: [4, 8]}, alpha: {values: [1, 4, 16, 64, 256]}, lr: {values: [0.3, 0.1, 0.2]}"
    )
    assert {found.id for found in small.classes} < {found.id for found in large.classes}


def id_of(parameters: str, configuration: Configuration, **sections: str) -> str:
    found = make_reduction(parameters, **sections).class_id(configuration)
    assert re.fullmatch("c-[0-9a-f]{16}", found)
    return found


@pytest.mark.parametrize("ratio", ["", ", lr_ratio: {min: 1, max: 16}"], ids=["shared", "two-parameter"])
def test_whatever_decides_the_training_is_in_the_id(ratio):
    parameters, point = f"{CONTINUOUS}, alpha: 16{ratio}", Configuration(4, 16.0, 0.1, 1.0, weight_decay=0.1)
    base = id_of(parameters, point)
    for section in ("optimizer: adam", "optimizer: sgd", "eps: 1e-7", "clip_norm: 1"):
        assert id_of(parameters, point, train=section) != base
    assert id_of(parameters, point, lora="rslora: true") != base
    # The constants are stated at another alpha, so that at alpha 16 they are others.
    elsewhere = parameters.replace("alpha: 16", "alpha: 64")
    assert id_of(elsewhere, point) != base
    assert id_of(elsewhere, point, train="eps: 2e-8") != base
    # Literally they are not.
    assert id_of(elsewhere, point, reduction="constants: fixed") == base


def test_the_same_training_has_the_same_id_whichever_alpha_it_was_stated_at():
    point = Configuration(4, 16.0, 0.1, 2.0, weight_decay=0.1)
    base = id_of(f"{CONTINUOUS}, alpha: 16", point, train="eps: 1e-8, clip_norm: 1")
    # Four times alpha: eps, weight decay and clip norm twice as large (AdamW), lr and init scale half.
    twin = Configuration(4, 64.0, 0.05, 1.0, weight_decay=0.2)
    assert id_of(f"{CONTINUOUS}, alpha: 64", twin, train="eps: 2e-8, clip_norm: 2") == base
    # At rank 4 rsLoRA's alpha / sqrt(r) is alpha / r of an alpha twice as large.
    rslora = replace(point, alpha=8.0)
    assert id_of(f"{CONTINUOUS}, alpha: 8", rslora, train="clip_norm: 1", lora="rslora: true") == base
    # SGD has no eps, and without weight decay or clip norm nothing depends on where they are stated.
    plain = replace(point, weight_decay=0.0)
    sgd = [id_of(f"{CONTINUOUS}, alpha: {alpha}", plain, train="optimizer: sgd") for alpha in (16, 64)]
    assert sgd[0] == sgd[1]


@pytest.mark.parametrize("clip", ["null", "0.5"])
@pytest.mark.parametrize("ratio", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_across_references_equal_ids_are_equal_training_invariants(optimizer, ratio, clip):
    by_id: dict[str, list[float]] = {}
    seen = 0
    for alpha, eps, c in product(("8", "32", "{values: [8, 32]}"), ("1e-8", "2e-8"), ("1", "{values: [1, 2]}")):
        parameters = f"rank: 4, lr: {{values: [0.1, 0.2]}}, alpha: {alpha}, init_scale: {c}, weight_decay: 0.1"
        parameters += ", lr_ratio: {values: [1, 4]}" if ratio else ""
        reduction = make_reduction(parameters, train=f"optimizer: {optimizer}, eps: {eps}, clip_norm: {clip}")
        for configuration in reduction.space.configurations():
            found = invariants(reduction.point(configuration), optimizer)
            assert by_id.setdefault(reduction.class_id(configuration), found) == pytest.approx(found, rel=1e-12)
            seen += 1
    assert len(by_id) < seen
    distinct = {tuple(f"{x:.9e}" for x in found) for found in by_id.values()}
    assert len(distinct) == len(by_id)


def test_two_classes_of_one_id_are_an_error_and_never_merge_in_silence(monkeypatch):
    monkeypatch.setattr(Reduction, "_id_of", lambda self, key: "c-" + key[1][:1])
    with pytest.raises(InputError, match="found two different ones with the same id"):
        _ = make_reduction("rank: 4, lr: {values: [0.1, 0.2, 0.3]}").classes


def test_an_unknown_class_has_no_members():
    assert make_reduction("rank: 4, lr: {values: [1, 2]}").members_of("c-0000000000") is None
    assert make_reduction("rank: 4, lr: {min: 1, max: 2}").members_of("c-0000000000") is None


def test_the_representative_is_at_the_reference_alpha():
    reduction = make_reduction(parameters_of(AXES))
    for found in reduction.classes:
        representative, members = found.representative, list(found.configurations)
        reference = reduction.reference.at(representative.rank)
        assert representative.alpha == reference
        if any(member.alpha == reference for member in members):
            assert representative in members
        else:
            assert numbers(representative) == numbers(reduction.canonical(members[0]))


# -- what is eliminated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "reference"),
    [
        ("16", "16"),
        ('"2*rank"', "2*rank"),
        ("{values: [8, 16, 32]}", "16"),
        ("{values: [8, 16, 32, 64]}", "16"),
        ('{values: [rank, "2*rank", "4*rank"]}', "2*rank"),
        ("{min: 4, max: 64}", "16"),
    ],
)
def test_the_reference_is_in_the_middle_and_in_the_users_own_convention(alpha, reference):
    assert (
        str(make_reduction(f"rank: {{values: [2, 4, 8]}}, lr: {{values: [1, 2]}}, alpha: {alpha}").reference)
        == reference
    )


def test_a_constant_lr_keeps_alpha_and_says_why():
    reduction = make_reduction("rank: 4, lr: 0.1, alpha: {values: [8, 16]}, init_scale: {values: [1, 2]}")
    assert reduction.eliminated == ()
    assert "lr is a constant" in reduction.stuck


def test_constants_read_literally_are_named_where_they_keep_alpha():
    parameters = f"{CONTINUOUS}, {ALPHAS}, weight_decay: 0.1"
    reduction = make_reduction(parameters, train="optimizer: adamw, clip_norm: 1", reduction="constants: fixed")
    assert reduction.eliminated == ()
    assert "eps and clip_norm and weight_decay" in reduction.stuck
    assert make_reduction(parameters, train="optimizer: adamw, clip_norm: 1").stuck is None


# -- size --------------------------------------------------------------------------------------------------------------


def geometric(count: int, first: float) -> str:
    return "{values: [" + ", ".join(repr(first * 2**i) for i in range(count)) + "]}"


@pytest.mark.parametrize("ratio", [False, True])
def test_a_hundred_thousand_configurations_are_reduced_to_the_classes_that_counting_gives(ratio):
    lrs, init_scales, alphas = (10, 10, 10) if ratio else (25, 25, 40)
    other = f"lr_ratio: {geometric(25, 0.001)}" if ratio else "weight_decay: {values: [0, 0.1]}"
    parameters = (
        f"rank: {{values: [2, 4{', 8, 16' if ratio else ''}]}}, lr: {geometric(lrs, 1e-4)}, "
        f"init_scale: {geometric(init_scales, 0.01)}, alpha: {geometric(alphas, 0.25)}, {other}"
    )
    reduction = make_reduction(parameters)
    started_s = time.perf_counter()
    classes = reduction.classes
    print(f"{reduction.space.size} configurations, {len(classes)} classes: {time.perf_counter() - started_s:.2f} s")
    assert reduction.space.size == 100_000
    assert sum(len(found.members) for found in classes) == 100_000
    # In powers of two the invariants are sums of whole numbers, and their different values can be counted.
    if ratio:
        steps = product(range(10), range(10), range(10), range(25))
        expected = 4 * len({(lr - c, lr + q + c + alpha) for lr, c, alpha, q in steps})
    else:
        steps = product(range(25), range(25), range(40))
        expected = 2 * 2 * len({(2 * lr + alpha, 2 * c + alpha) for lr, c, alpha in steps})
    assert len(classes) == expected < 50_000
