"""How lr moves with rank: on landscapes whose answer is known, and where trials do not suffice for one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from lora_core.gauge import Gauge, regauge, scaling_of
from sweeps import response_surface
from sweeps.rank_scaling import RankScaling, answer, conventions
from sweeps.response_surface import Observation, fit_lr
from sweeps.space import Configuration
from tests.sweeps.support import make_reduction

RANKS = (2, 4, 8, 16, 32)
ALPHA = 16.0
CONSTANT, R, TWO_R, RSLORA = conventions(ALPHA)
Y = Callable[[float, float, int], float]


def valley(slope: float, *, middle: float = math.log(0.02)) -> Y:
    """ln(loss) at s = 1, lowest at lr = exp(middle) (rank / 8)**slope; c has its best at 1, and pulls at lr's."""

    def y(lr: float, init_scale: float, rank: int) -> float:
        u, v = math.log(lr) - middle - slope * math.log(rank / 8), math.log(init_scale)
        return 0.2 * u * u + 0.1 * v * v + 0.08 * u * v - 0.1 * math.log(rank)

    return y


def trials(
    y: Y,
    *,
    seed: int = 0,
    count: int = 16,
    noise: float = 0.05,
    ranks: Sequence[int] = RANKS,
    lr: tuple[float, float] = (1e-3, 1.0),
    init_scale: tuple[float, float] = (0.25, 4.0),
    steps: Sequence[int] = (100,),
) -> list[Observation]:
    rng = np.random.default_rng(seed)
    found = []
    for number, rank in enumerate(rank for rank in ranks for _ in range(count)):
        point = [math.exp(rng.uniform(*np.log(ends))) if ends[0] < ends[1] else ends[0] for ends in (lr, init_scale)]
        value = math.exp(y(point[0], point[1], rank) + rng.normal(0.0, noise))
        found.append(Observation(number, rank, *point, 1.0, dict.fromkeys(steps, value), diverged=False))
    return found


def asked(
    observations: Sequence[Observation], *, degree: int = 0, sign: int = 1, log_scale: bool = True
) -> RankScaling:
    return answer(
        observations,
        lr_searched=True,
        alpha=ALPHA,
        degree=degree,
        sign=sign,
        log_scale=log_scale,
        rng=np.random.default_rng(0),
    )


# -- the right answer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 1], ids=["adamw", "sgd"])
@pytest.mark.parametrize("convention", [CONSTANT, R, RSLORA], ids=lambda convention: convention.name)
def test_the_convention_in_which_lr_does_not_move_is_named(convention, degree: int):
    found = asked(trials(valley(-convention.shift(degree))), degree=degree)
    expected = {R.name, TWO_R.name} if convention is R else {convention.name}
    assert set(found.flattest) == expected
    assert all(name in found.conclusion for name in expected)
    (slope,) = (one for one in found.conventions if one.name == convention.name)
    assert slope.low < 0 < slope.high
    assert slope.high - slope.low < 0.25
    assert slope.share >= 0.95


def test_the_interval_covers_the_truth_as_often_as_it_says():
    covered, widths = 0, []
    for seed in range(40):
        fit = fit_lr(
            trials(valley(-0.3), seed=seed, count=12, noise=0.1),
            sign=1,
            log_scale=True,
            rng=np.random.default_rng(seed),
        )
        low, high = fit.slope.interval
        covered += low <= -0.3 <= high
        widths.append(high - low)
    assert covered >= 34  # fewer happen once in 500 times at 95 %
    assert np.median(widths) < 0.3


def test_a_landscape_that_is_no_quadratic_is_followed_too():
    # A plateau where nothing is learned, a wall where lr is too large: as losses have them.
    smooth = valley(-0.5)

    def y(lr: float, init_scale: float, rank: int) -> float:
        below = lr < 0.02 * (rank / 8) ** -0.5
        return min(smooth(lr, init_scale, rank), 0.8) if below else 1.5 * smooth(lr, init_scale, rank)

    for seed in range(3):
        found = asked(trials(y, seed=seed, count=40))
        assert found.conventions[0].slope == pytest.approx(0.0, abs=0.1)
        assert found.flattest == (CONSTANT.name,)


def test_slopes_of_conventions_differ_by_what_the_law_says():
    for degree in (0, 1):
        slopes = {one.name: one.slope for one in asked(trials(valley(0.1)), degree=degree).conventions}
        assert slopes[R.name] == slopes[TWO_R.name]
        assert slopes[CONSTANT.name] - slopes[R.name] == pytest.approx((1 + degree) / 2)
        assert slopes[RSLORA.name] - slopes[R.name] == pytest.approx((1 + degree) / 4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("convention", conventions(ALPHA), ids=lambda convention: convention.name)
def test_points_move_between_conventions_as_regauge_moves_them(optimizer: str, convention):
    reduction = make_reduction("rank: {values: [2, 8]}, lr: {min: 1e-4, max: 1e-1}", train=f"optimizer: {optimizer}")
    alpha = {CONSTANT.name: ALPHA, R.name: 8.0, TWO_R.name: 16.0, RSLORA.name: ALPHA}[convention.name]
    scaling = scaling_of(alpha, 8, rslora=convention is RSLORA or convention.name == RSLORA.name)
    point = reduction.point(Configuration(rank=8, alpha=32.0, lr=0.01, init_scale=1.5))
    unit = regauge(point, Gauge.of_alpha(1 / point.scaling), reduction.law)
    there = regauge(point, Gauge.of_alpha(scaling / point.scaling), reduction.law)
    moved = convention.of_unit_scaling(unit.a.lr, unit.init_scale, 8, reduction.law.degree)
    assert moved == pytest.approx((there.a.lr, there.init_scale))


def test_the_best_points_are_those_of_the_landscape_and_the_best_trial_stands_beside():
    observations = trials(valley(-0.5), noise=0.02)
    found = asked(observations)
    unit = found.conventions[1]
    assert unit.name == "alpha = r"
    for seen, best in zip(found.ranks, unit.best, strict=True):
        here = [trial for trial in observations if trial.rank == seen.rank]
        observed = min(here, key=lambda trial: trial.values[100])
        assert (seen.best_trial, seen.best_value) == (observed.trial, observed.values[100])
        assert (best.observed_lr, best.observed_init_scale) == (observed.lr, observed.init_scale)
        # ln(lr) within four errors of the truth
        assert abs(math.log(best.lr / (0.02 * (seen.rank / 8) ** -0.5))) < 4 * seen.error
        assert best.init_scale == pytest.approx(1.0, rel=0.4)


def test_more_is_better_gives_the_same_answer_upside_down():
    observations = trials(valley(-0.5))
    upward = [replace(trial, values={100: -math.log(trial.values[100])}) for trial in observations]
    down, up = asked(observations), asked(upward, sign=-1, log_scale=False)
    assert up.flattest == down.flattest == (CONSTANT.name,)
    assert up.conventions == down.conventions
    assert [rank.best_trial for rank in up.ranks] == [rank.best_trial for rank in down.ranks]


def test_the_same_trials_give_the_same_answer():
    assert asked(trials(valley(-0.5))) == asked(trials(valley(-0.5)))


def test_replicates_made_some_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch):
    whole = asked(trials(valley(-0.5)))
    monkeypatch.setattr(response_surface, "_AT_ONCE", 64 * len(RANKS) * 16)
    some = asked(trials(valley(-0.5)))
    assert some.flattest == whole.flattest
    for one, other in zip(some.conventions, whole.conventions, strict=True):
        assert (one.low, one.high, one.share) == pytest.approx((other.low, other.high, other.share), rel=1e-9)


def test_trials_without_noise_are_no_trouble():
    found = asked(trials(valley(-0.5), noise=0.0))
    assert found.conventions[0].slope == pytest.approx(0.0, abs=0.02)
    assert found.flattest == (CONSTANT.name,)


@pytest.mark.parametrize("init_scales", [(1.0,), (0.5, 1.0), (0.5, 1.0, 2.0)])
def test_a_grid_and_a_constant_init_scale_will_do(init_scales: tuple[float, ...]):
    y, rng = valley(-0.5), np.random.default_rng(0)
    found = asked(
        [
            Observation(0, rank, lr, c, 1.0, {100: math.exp(y(lr, c, rank) + rng.normal(0, 0.01))}, diverged=False)
            for rank in RANKS
            for lr in (0.005, 0.01, 0.02, 0.04, 0.08)
            for c in init_scales
        ]
    )
    assert found.conventions[1].low - 0.05 < -0.5 < found.conventions[1].high + 0.05
    assert found.flattest == (CONSTANT.name,)


# -- which trials are compared -----------------------------------------------------------------------------------------


def test_trials_are_compared_at_the_last_step_that_enough_of_every_rank_reached():
    observations = trials(valley(-0.5), steps=(50, 100, 200))
    early = [
        replace(trial, values={step: value for step, value in trial.values.items() if step <= 100 or trial.rank > 2})
        for trial in observations
    ]
    assert asked(observations).step == 200
    assert asked(early).step == 100


def test_a_diverged_trial_shows_that_its_lr_was_tried_and_has_no_value():
    narrow = trials(valley(0.0), lr=(1e-3, 0.015), noise=0.01)
    assert "higher is better" in asked(narrow).ranks[0].missing
    # Good at first, then it blew up: not the best trial, nor part of the surface.
    lost = [Observation(900 + rank, rank, 0.3, 1.0, 1.0, {100: 1e-6}, diverged=True) for rank in RANKS]
    found = asked(narrow + lost)
    assert [rank.missing for rank in found.ranks] == [""] * len(RANKS)
    assert [rank.diverged for rank in found.ranks] == [1] * len(RANKS)
    assert all(rank.best_trial < 900 for rank in found.ranks)
    assert found.ranks[0].trials == 16


# -- no answer ---------------------------------------------------------------------------------------------------------


def lacks(found: RankScaling, *words: str) -> None:
    assert found.flattest == ()
    assert "do not suffice" in found.conclusion
    for word in words:
        assert word in found.conclusion


def test_noise_leaves_conventions_open_and_they_are_named():
    found = asked(trials(valley(-0.25), count=10, noise=0.5, ranks=(2, 4, 8)))
    lacks(found, "More trials")


def test_too_few_trials_at_a_rank_are_counted():
    few = [trial for trial in trials(valley(-0.5), ranks=(2, 4, 8)) if trial.rank != 4 or trial.trial % 16 < 3]
    lacks(asked(few), "2 of 3 ranks", "rank 4: 3 trials at step 100, 5 needed", "More trials would help")


def test_a_minimum_beyond_the_range_is_not_located():
    beyond = trials(valley(0.0), lr=(1e-4, 1e-3))
    lacks(asked(beyond), "0 of 5 ranks", "higher is better", "A wider range of lr would help")
    lacks(asked(trials(valley(0.0), lr=(0.2, 2.0))), "lower is better")


def test_two_learning_rates_show_no_minimum():
    few = [replace(trial, lr=0.01 * (1 + trial.trial % 2)) for trial in trials(valley(0.0))]
    lacks(asked(few), "2 learning rates tried")


def test_a_ridge_of_lr_and_init_scale_is_no_surface():
    # alpha swept alone, lr and init scale constant: at s = 1 both follow it.
    tied = [replace(trial, init_scale=trial.lr) for trial in trials(valley(0.0))]
    lacks(asked(tied), "too much alike")


def test_a_slope_that_could_be_anything_names_no_extreme():
    # The steepest convention is the flattest in most replicates, for no better reason than that it is the extreme.
    found = asked(trials(valley(-4.0), noise=0.2, count=30, ranks=(6, 7, 8)))
    assert found.conventions[0].share >= 0.95
    assert found.conventions[0].high - found.conventions[0].low > 1
    lacks(found, "more than twice as wide as the conventions are apart")


@pytest.mark.parametrize(
    ("observations", "says"),
    [
        ([], "No trial has reported"),
        ([Observation(0, 2, 0.1, 1.0, 1.0, {}, diverged=True)], "No trial has reported"),
        (trials(valley(0.0), ranks=(8,)), "Only rank 8"),
        (trials(valley(0.0), count=1, ranks=range(1, 65)), "1 trial at step 100"),
    ],
)
def test_there_may_be_nothing_to_say(observations: list[Observation], says: str):
    found = asked(observations)
    assert found.flattest == ()
    assert says in found.conclusion


def test_a_constant_lr_has_no_best():
    found = answer(
        trials(valley(0.0)),
        lr_searched=False,
        alpha=ALPHA,
        degree=0,
        sign=1,
        log_scale=True,
        rng=np.random.default_rng(0),
    )
    assert found.flattest == ()
    assert "lr is a constant" in found.conclusion
