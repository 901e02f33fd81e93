import math
from itertools import permutations

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.canonical import Continuous, Dimension, Integer, Ordinal
from sweeps.spec import MedianPruner, NoPruner, SearchSpec, SuccessiveHalving
from sweeps.study import Study, Suggestion

DIMENSIONS: tuple[Dimension, ...] = (
    Ordinal("rank", (2, 4, 8, 16)),
    Continuous("lr", 1e-4, 1e-1, log=True),
    Continuous("dropout", 0.0, 0.5, log=False),
)
METHODS = ("gp", "tpe", "random", "cmaes")
RUNGS = (4, 8, 16)
HALVING = SuccessiveHalving(type="successive_halving")


def make_study(
    method="random", pruner=HALVING, goal="minimize", seed=0, dimensions=DIMENSIONS, log_scale=False
) -> Study:
    search = SearchSpec(method=method, pruner=pruner, seed=seed)
    return Study(dimensions, search, goal=goal, rungs=RUNGS, log_scale=log_scale)


def loss(values: dict[str, float]) -> float:
    return math.log10(values["lr"] / 3e-3) ** 2 + math.log2(values["rank"] / 8) ** 2 / 4 + values["dropout"]


Told = tuple[Suggestion, str | None, float | None]


def run(study: Study, history: list[Told], packs: int, size: int = 4) -> None:
    """Trains packs; of each, the best goes on to the end, one diverges and one stays open for ever."""
    for _ in range(packs):
        pack = [study.ask() for _ in range(size)]
        values = {s.number: loss(s.values) for s in pack}
        pruned = study.prune(RUNGS[0], values)
        for place, suggestion in enumerate(pack):
            state, value = ("pruned" if suggestion.number in pruned else "finished"), values[suggestion.number]
            if place == 1:
                state, value = "diverged", None
            if place == 2 and suggestion.number not in pruned:
                history.append((suggestion, None, value))
                continue
            study.tell(suggestion.number, state, value)
            history.append((suggestion, state, value))


def rebuilt(study: Study, history: list[Told], size: int = 4) -> Study:
    for start in range(0, len(history), size):
        pack = history[start : start + size]
        for suggestion, _, _ in pack:
            again = study.ask_known(suggestion.values, by_sampler=suggestion.by_sampler)
            assert (again.number, again.values) == (suggestion.number, suggestion.values)
        study.prune(RUNGS[0], {s.number: loss(s.values) for s, _, _ in pack})
        for suggestion, state, value in pack:
            if state is not None:
                study.tell(suggestion.number, state, value)
    return study


# -- suggestions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_suggestions_and_another_others(method):
    histories: list[list[Told]] = [[], [], []]
    for history, seed in zip(histories, (7, 7, 8), strict=True):
        run(make_study(method, seed=seed), history, packs=4)
    assert histories[0] == histories[1]
    assert histories[0] != histories[2]


@pytest.mark.parametrize("method", METHODS)
def test_every_trial_has_a_seed_of_its_own(method):
    study = make_study(method)
    assert len({study.ask().values["lr"] for _ in range(8)}) == 8


@pytest.mark.parametrize("method", METHODS)
def test_a_rebuilt_study_goes_on_as_if_it_had_never_stopped(method):
    history: list[Told] = []
    study = make_study(method)
    run(study, history, packs=4)
    again, later = rebuilt(make_study(method), history), []
    expected: list[Told] = []
    assert again.count == study.count == 16
    run(study, expected, packs=1)
    run(again, later, packs=1)
    assert later == expected


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
@pytest.mark.parametrize("method", METHODS)
def test_values_stay_within_their_bounds(method, goal):
    study, history = make_study(method, goal=goal), []
    run(study, history, packs=4)
    for suggestion, _, _ in history:
        assert list(suggestion.values) == ["rank", "lr", "dropout"]
        assert suggestion.values["rank"] in (2, 4, 8, 16)
        assert 1e-4 <= suggestion.values["lr"] <= 1e-1
        assert 0 <= suggestion.values["dropout"] <= 0.5


def test_the_sampler_does_not_care_how_much_of_the_method_was_repeated():
    study, plain = make_study("tpe"), make_study("random")
    drawn = study.ask(at_random=True)
    assert drawn.values == plain.ask().values
    assert not drawn.by_sampler


@pytest.mark.parametrize("method", ["gp", "tpe", "random"])
@pytest.mark.parametrize("dimensions", [(), (Ordinal("rank", (2, 4)),)], ids=["none", "one"])
def test_a_space_of_next_to_nothing_is_searched_without_a_warning(method, dimensions):
    study = make_study(method, dimensions=dimensions)
    for number in range(12):
        assert study.ask().number == number
        study.tell(number, "finished", 1.0)


def test_a_grid_is_gone_through_in_order_and_then_is_over():
    study = make_study("grid", dimensions=(Ordinal("class", (0.0, 1.0, 2.0)),))
    assert [study.ask().values["class"] for _ in range(3)] == [0, 1, 2]
    assert study.ask() is None
    again = make_study("grid", dimensions=(Ordinal("class", (0.0, 1.0, 2.0)),))
    again.ask_known({"class": 0.0}, by_sampler=False)
    assert again.ask().values == {"class": 1.0}


def test_gp_learns_where_the_valley_is():
    study, history = make_study("gp", pruner=NoPruner(type="none")), []
    for _ in range(24):
        suggestion = study.ask()
        study.tell(suggestion.number, "finished", loss(suggestion.values))
        history.append(loss(suggestion.values))
    assert min(history[12:]) < 0.5 * sum(history[:10]) / 10
    assert sum(history[-6:]) < 0.7 * sum(history[:6])


def test_a_range_of_ranks_is_drawn_evenly_in_the_logarithm_or_evenly():
    for log, share in ((True, 0.5), (False, 7 / 64)):  # of the ranks below 8, up to the rounding to whole numbers
        study = make_study(dimensions=(Integer("rank", 1, 64, log=log),))
        drawn = [study.ask().values["rank"] for _ in range(600)]
        assert set(drawn) <= set(range(1, 65))
        assert {1, 64} <= set(drawn)
        assert sum(rank < 8 for rank in drawn) / len(drawn) == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_of_a_range_that_is_known_is_opened_as_it_was(method):
    dimensions = (Integer("rank", 1, 64, log=True), DIMENSIONS[1])
    first, again = (make_study(method, dimensions=dimensions) for _ in range(2))
    for _ in range(12):
        asked = first.ask()
        assert isinstance(asked.values["rank"], int)
        assert again.ask_known(asked.values, by_sampler=True).values == asked.values
        for study in (first, again):
            study.tell(asked.number, "finished", asked.values["lr"])


def test_a_loss_of_exactly_zero_is_the_best_of_all_to_a_gaussian_process():
    study = make_study("gp", log_scale=True)
    losses = (1.0, 1e-6, 0.0, 0.5)
    for number, value in zip(open_pack(study, len(losses)), losses, strict=True):
        study.tell(number, "finished", value)
    told = [trial.value for trial in study._study.trials]
    assert told == [0.0, math.log(1e-6), math.log(2.0**-52), math.log(0.5)]
    assert study._study.best_trial.number == 2


# -- pruning -----------------------------------------------------------------------------------------------------------


def open_pack(study: Study, size: int) -> list[int]:
    return [study.ask().number for _ in range(size)]


@pytest.mark.parametrize("pruner", [HALVING, MedianPruner(type="median", warmup_trials=1)])
def test_a_packs_pruning_does_not_depend_on_the_order_of_its_members(pruner):
    values = (3.0, 1.0, 4.0, 1.5, 9.0)
    found = set()
    for order in list(permutations(range(5)))[::7]:
        study = make_study(pruner=pruner)
        for number, value in zip(open_pack(study, 5), (2.0, 3.0, 4.0, 5.0, 6.0), strict=True):
            study.prune(RUNGS[0], {number: value})
            study.tell(number, "finished", value)
        numbers = open_pack(study, 5)
        found.add(study.prune(RUNGS[0], {numbers[i]: values[i] for i in order}))
    assert len(found) == 1
    assert 0 < len(found.pop()) < 5


@pytest.mark.parametrize(("size", "kept"), [(1, 1), (2, 1), (3, 1), (8, 3), (9, 3), (16, 5), (64, 21)])
@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_successive_halving_keeps_the_best_third_and_always_one(size, kept, goal):
    study = make_study(goal=goal)
    numbers = open_pack(study, size)
    values = {number: float((7 * number) % size) for number in numbers}
    pruned = study.prune(RUNGS[0], values)
    ranked = sorted(numbers, key=values.__getitem__, reverse=goal == "maximize")
    assert set(numbers) - pruned == set(ranked[:kept])


def test_the_best_so_far_is_never_pruned():
    study = make_study()
    for pack in range(6):
        numbers = open_pack(study, 4)
        values = {number: 100.0 - 10 * pack + place for place, number in enumerate(numbers)}
        assert numbers[0] not in study.prune(RUNGS[0], values)


def test_a_pack_of_nothing_but_bad_trials_is_pruned_whole():
    study = make_study()
    study.prune(RUNGS[0], dict.fromkeys(open_pack(study, 8), 1.0))
    numbers = open_pack(study, 4)
    assert study.prune(RUNGS[0], dict.fromkeys(numbers, 2.0)) == set(numbers)


def test_each_rung_judges_among_those_that_reached_it():
    study = make_study()
    numbers = open_pack(study, 9)
    first = study.prune(RUNGS[0], {number: float(number) for number in numbers})
    for number in first:
        study.tell(number, "pruned", float(number))
    survivors = [number for number in numbers if number not in first]
    assert survivors == [0, 1, 2]
    second = study.prune(RUNGS[1], {0: 5.0, 1: 4.0, 2: 3.0})
    assert second == {0, 1}
    assert study.prune(RUNGS[2], {2: 99.0}) == frozenset()


def test_the_share_that_is_kept_is_the_specs():
    study = make_study(pruner=SuccessiveHalving(type="successive_halving", reduction_factor=2))
    numbers = open_pack(study, 8)
    assert len(study.prune(RUNGS[0], {number: float(number) for number in numbers})) == 4


def test_without_a_pruner_nothing_is_pruned():
    study = make_study(pruner=NoPruner(type="none"))
    numbers = open_pack(study, 4)
    assert study.prune(RUNGS[0], {number: float(number) for number in numbers}) == frozenset()


def test_the_median_pruner_waits_for_trials_that_finished():
    study = make_study(pruner=MedianPruner(type="median", warmup_trials=3))
    for value in (1.0, 2.0, 3.0):
        (number,) = open_pack(study, 1)
        assert study.prune(RUNGS[0], {number: value}) == frozenset()
        study.tell(number, "finished", value)
    better, worse = open_pack(study, 2)
    assert study.prune(RUNGS[0], {better: 1.9, worse: 2.1}) == {worse}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5, -1.0]) | st.floats(-9, 9), min_size=1, max_size=6)),
    st.integers(2, 4),
    st.sampled_from(["minimize", "maximize"]),
)
def test_successive_halving_decides_as_optunas_own_pruner(packs, factor, goal):
    """Optuna's is entered whole packs first, as `Study.prune` promises."""
    search = SuccessiveHalving(type="successive_halving", reduction_factor=factor)
    study = make_study(pruner=search, goal=goal)
    theirs = optuna.create_study(direction=goal, pruner=optuna.pruners.SuccessiveHalvingPruner(1, factor))
    under_way: dict[int, optuna.trial.Trial] = {}
    for pack in packs:
        numbers = open_pack(study, len(pack))
        under_way |= {number: theirs.ask() for number in numbers}
        values = dict(zip(numbers, pack, strict=True))
        for place, rung in enumerate(RUNGS[:-1]):
            for number, value in values.items():
                under_way[number].report(value, factor**place)
            frozen = {number: under_way[number].storage.get_trial(under_way[number]._trial_id) for number in values}
            for number in values:
                under_way[number].should_prune()  # enters it at the rung
            pruned = {number for number, each in frozen.items() if theirs.pruner.prune(theirs, each)}
            assert study.prune(rung, values) == pruned
            values = {number: -value for number, value in values.items() if number not in pruned}
            if not values:
                break
