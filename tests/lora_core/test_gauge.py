import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core import gauge
from lora_core.gauge import AlphaRule, Gauge, invariant_of_a, invariant_of_b, shared_invariant
from lora_core.laws import LAWS, law_of
from tests.lora_core.support import make_point

laws = st.sampled_from(list(LAWS.values()))
positive = st.floats(1e-4, 1e4)
powers_of_two = st.integers(-6, 6).map(lambda n: 2.0**n)


@st.composite
def points(draw: st.DrawFn, *, clip: bool = True) -> gauge.Point:
    constants = st.fixed_dictionaries(
        {"eps": st.floats(1e-9, 1e-3), "lambd": positive, "step_sizes": st.tuples(positive, positive)}
    )
    settings = [
        gauge.FactorSettings(draw(positive), draw(st.just(0.0) | st.floats(1e-6, 1)), draw(constants)) for _ in range(2)
    ]
    clip_norm = draw(st.none() | positive) if clip else None
    return gauge.Point(draw(st.integers(1, 64)), draw(positive), draw(positive), *settings, clip_norm)


def numbers(point: gauge.Point) -> list[float]:
    both = [
        value
        for each in (point.a, point.b)
        for value in (each.lr, each.weight_decay, each.eps, each.constants["lambd"], *each.constants["step_sizes"])
    ]
    return [point.rank, point.scaling, point.init_scale, *both, point.clip_norm or 0.0]


# -- the law -----------------------------------------------------------------------------------------------------------


@given(points(), laws, powers_of_two)
def test_lift_undoes_canonical_exactly_for_powers_of_four(point, law, root):
    there = gauge.canonical(point, law, scaling=point.scaling * root**2)
    assert gauge.lift(there, law, scaling=point.scaling) == point


@given(points(), laws, positive)
def test_lift_undoes_canonical_up_to_rounding_for_any_alpha(point, law, scaling):
    there = gauge.canonical(point, law, scaling=scaling)
    back = gauge.lift(there, law, scaling=point.scaling)
    assert numbers(there)[1] == pytest.approx(scaling, rel=1e-12)
    assert numbers(back) == pytest.approx(numbers(point), rel=1e-12)


@given(points(clip=False), laws, positive, positive)
def test_lift_undoes_the_two_parameter_canonical(point, law, scaling, init_scale):
    there = gauge.canonical(point, law, scaling=scaling, init_scale=init_scale)
    back = gauge.lift(there, law, scaling=point.scaling, init_scale=point.init_scale)
    assert (there.scaling, there.init_scale) == pytest.approx((scaling, init_scale), rel=1e-12)
    assert numbers(back) == pytest.approx(numbers(point), rel=1e-12)


@given(points(clip=False), laws, powers_of_two, powers_of_two, powers_of_two, powers_of_two)
def test_gauges_compose_as_a_group(point, law, a1, b1, a2, b2):
    in_turn = gauge.regauge(gauge.regauge(point, Gauge(a1, b1), law), Gauge(a2, b2), law)
    assert in_turn == gauge.regauge(point, Gauge(a1 * a2, b1 * b2), law)
    assert gauge.regauge(point, Gauge(1.0, 1.0), law) == point
    assert gauge.regauge(gauge.regauge(point, Gauge(a1, b1), law), Gauge(1 / a1, 1 / b1), law) == point


@pytest.mark.parametrize(
    ("optimizer", "lr", "weight_decay", "constants"),
    [
        ("sgd", 1 / 16, 16.0, {"eps": 1.0}),
        ("adam", 1 / 4, 16.0, {"eps": 4.0}),
        ("adamw", 1 / 4, 4.0, {"eps": 4.0}),
        ("adagrad", 1 / 4, 16.0, {"eps": 4.0, "initial_accumulator_value": 16.0}),
        ("rprop", 1 / 4, 16.0, {"step_sizes": (1 / 4, 2.0)}),
        ("asgd", 1 / 16, 16.0, {"lambd": 16.0}),
        ("muon", 1 / 4, 4.0, {"eps": 4.0}),
    ],
)
def test_sixteen_times_alpha_moves_each_constant_by_its_own_power(optimizer, lr, weight_decay, constants):
    stated = {name: (1.0, 8.0) if isinstance(value, tuple) else 1.0 for name, value in constants.items()}
    settings = gauge.FactorSettings(1.0, 1.0, stated)
    twin = gauge.regauge(gauge.Point(4, 1.0, 1.0, settings, settings, 1.0), Gauge.of_alpha(16), law_of(optimizer))
    assert twin.a == twin.b == gauge.FactorSettings(lr, weight_decay, constants)
    assert (twin.scaling, twin.init_scale, twin.clip_norm) == (16.0, 0.25, 4.0)


def test_a_gauge_leaves_magnitudes_and_dropout_alone():
    magnitude = gauge.FactorSettings(0.3, 0.2, {"eps": 0.1})
    point = replace(make_point(), magnitude=magnitude, dropout=0.5)
    twin = gauge.regauge(point, Gauge(2.0, 4.0), LAWS["adamw"])
    assert (twin.magnitude, twin.dropout) == (magnitude, 0.5)
    assert twin.a != point.a


def test_a_clipped_point_refuses_a_gauge_that_treats_a_and_b_differently():
    with pytest.raises(ValueError, match=r"A and B are scaled alike; found a=2\.0, b=1\.0"):
        gauge.regauge(make_point(clip_norm=1.0), Gauge(2.0, 1.0), LAWS["adamw"])


@pytest.mark.parametrize("factors", [(0.0, 1.0), (1.0, -1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_a_gauge_refuses_factors_that_are_not_positive_and_finite(factors):
    with pytest.raises(ValueError, match="two positive finite factors"):
        Gauge(*factors)


def test_only_powers_of_two_are_exact_in_binary():
    assert Gauge(0.25, 8.0).exact_in_binary
    assert Gauge.of_alpha(16).exact_in_binary
    assert not Gauge.of_alpha(2).exact_in_binary
    assert not Gauge(2.0, 3.0).exact_in_binary


# -- exact invariants --------------------------------------------------------------------------------------------------

rationals = st.fractions(Fraction(1, 1000), 1000, max_denominator=1000)


def invariants(law, lr, c, eps, wd, clip, s_squared):
    powers = (law.lr_power, -1, law.powers.get("eps", 0), law.decay_power, 1)
    values = (lr, c, eps, wd, clip)
    return tuple(shared_invariant(value, power, s_squared) for value, power in zip(values, powers, strict=True))


def rational_twin(law, root, lr, c, eps, wd, clip, s_squared):
    """The configuration with root**2 times the alpha, in rationals, by the law as DESIGN and the literature put it."""
    step = root ** (1 + law.degree)
    decay = step if law.decay == "decoupled" else root**2
    # Adadelta's eps is added to squared gradients, the others' to gradients; SGD has none.
    moved_eps = eps * root ** {"adadelta": 2, "sgd": 0, "asgd": 0, "rprop": 0}.get(law.name, 1)
    return lr / step, c / root, moved_eps, wd * decay, clip * root, s_squared * root**4


settings_of_a_configuration = st.tuples(*[rationals] * 5)


@given(laws, rationals, settings_of_a_configuration, rationals, st.integers(1, 64), st.booleans())
def test_twins_have_equal_invariants_exactly(law, root, settings, alpha, rank, rslora):
    s_squared = gauge.scaling_squared_of(AlphaRule(alpha), rank, rslora=rslora)
    twin_s_squared = gauge.scaling_squared_of(AlphaRule(alpha * root**2), rank, rslora=rslora)
    twin = rational_twin(law, root, *settings, s_squared)
    assert twin[-1] == twin_s_squared
    assert invariants(law, *settings, s_squared) == invariants(law, *twin)


@given(laws, rationals, settings_of_a_configuration, rationals, st.integers(1, 64), st.booleans())
def test_an_lr_off_by_a_billionth_changes_the_invariants(law, root, settings, alpha, rank, rslora):
    s_squared = gauge.scaling_squared_of(AlphaRule(alpha), rank, rslora=rslora)
    lr, *others = rational_twin(law, root, *settings, s_squared)
    near = (lr * (1 + Fraction(1, 10**9)), *others)
    assert invariants(law, *settings, s_squared) != invariants(law, *near)


@given(rationals, rationals, rationals, rationals, rationals, st.integers(-3, 3))
def test_two_parameter_twins_have_equal_invariants_exactly(a, b, value, c, s_squared, power):
    moved_s_squared = s_squared * (a * b) ** 2
    of_a, of_b = invariant_of_a(value, power, c), invariant_of_b(value, power, c, s_squared)
    assert of_a == invariant_of_a(value * a**power, power, c / a)
    assert of_b == invariant_of_b(value * b**power, power, c / a, moved_s_squared)
    near = value * (1 + Fraction(1, 10**9))
    assert of_a != invariant_of_a(near, power, c)
    assert of_b != invariant_of_b(near, power, c, s_squared)


@given(rationals, rationals, rationals, st.integers(-3, 3))
def test_a_constant_of_any_power_has_an_invariant(root, value, s_squared, power):
    before = shared_invariant(value, power, s_squared)
    assert before == shared_invariant(value * root**power, power, s_squared * root**4)
    assert before != shared_invariant(value * (1 + Fraction(1, 10**9)), power, s_squared)


@pytest.mark.parametrize("rslora", [False, True])
def test_configurations_written_as_decimals_are_twins_without_a_tolerance(rslora):
    s = [gauge.scaling_squared_of(AlphaRule.parse(alpha), 8, rslora=rslora) for alpha in (16, 64)]
    of_lr = [shared_invariant(gauge.exact(lr), LAWS["adamw"].lr_power, s[i]) for lr, i in ((3e-4, 0), (1.5e-4, 1))]
    assert of_lr[0] == of_lr[1]
    assert of_lr[0] != shared_invariant(gauge.exact(1.5000000001e-4), LAWS["adamw"].lr_power, s[1])


@given(points(), laws)
def test_default_init_is_the_twin_with_init_scale_one(point, law):
    twin = gauge.default_init(point, law)
    assert twin.init_scale == 1.0
    assert twin.scaling == pytest.approx(point.scaling * point.init_scale**2, rel=1e-12)
    degree = 1 + law.degree
    for before, after in ((point.a, twin.a), (point.b, twin.b)):
        assert after.lr**2 * twin.scaling**degree == pytest.approx(before.lr**2 * point.scaling**degree, rel=1e-12)
        if "eps" in law.powers:
            power = law.powers["eps"]
            here, there = before.eps**2 / point.scaling**power, after.eps**2 / twin.scaling**power
            assert there == pytest.approx(here, rel=1e-12)
    if point.clip_norm is not None:
        assert twin.clip_norm**2 / twin.scaling == pytest.approx(point.clip_norm**2 / point.scaling, rel=1e-12)


@given(points(), laws, powers_of_two)
def test_default_init_keeps_the_exact_invariants_for_powers_of_two(point, law, init_scale):
    point = replace(point, init_scale=init_scale, b=point.a)
    twin = gauge.default_init(point, law)

    def of(each: gauge.Point):
        values = (each.a.lr, each.init_scale, each.a.eps, each.a.weight_decay, each.clip_norm or 0.0)
        return invariants(law, *map(Fraction, values), Fraction(each.scaling) ** 2)

    assert of(twin) == of(point)


# -- alpha as people write it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "at_16", "written"),
    [
        (16, 16.0, "16"),
        (0.5, 0.5, "0.5"),
        ("32", 32.0, "32"),
        ("1e2", 100.0, "100"),
        ("rank", 16.0, "rank"),
        ("r", 16.0, "rank"),
        ("2*rank", 32.0, "2*rank"),
        (" 2 * r ", 32.0, "2*rank"),
        ("sqrt(rank)", 4.0, "sqrt(rank)"),
        ("8*sqrt( r )", 32.0, "8*sqrt(rank)"),
        ("0.5*rank", 8.0, "0.5*rank"),
    ],
)
def test_alpha_is_read_as_people_write_it(text, at_16, written):
    rule = AlphaRule.parse(text)
    assert rule.at(16) == at_16
    assert float(rule.squared_at(16)) == at_16**2
    assert str(rule) == written
    assert AlphaRule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    ["", "2rank", "rank*2", "rank**2", "-rank", "0*rank", 0, -16, "-1", "nan", "inf", math.nan, "1/0", "exp(r)", True],
)
def test_anything_else_is_refused_as_alpha(text):
    with pytest.raises(ValueError, match=r"alpha must be a positive number, or a rule such as .*; found "):
        AlphaRule.parse(text)


def test_scaling_divides_alpha_by_the_rank_or_its_root():
    assert gauge.scaling_of(32, 16) == 2.0
    assert gauge.scaling_of(32, 16, rslora=True) == 8.0
    assert gauge.scaling_squared_of(AlphaRule.parse("8*sqrt(rank)"), 2, rslora=True) == 64
    assert gauge.scaling_squared_of(AlphaRule.parse("rank"), 7) == 1


@given(st.sampled_from(["{}", "{}*rank", "{}*sqrt(rank)"]), st.decimals("1e-9", "1e9", places=30))
def test_different_rules_give_different_alphas_at_rank_one(term, factor):
    rules = {AlphaRule.parse(term.format(factor)), AlphaRule.parse(term.format(float(factor)))}
    assert len(rules) == len({rule.at(1) for rule in rules}) == 1
    assert AlphaRule.parse("1.00000000000000000001*rank") == AlphaRule.parse("rank")
