import json
import re

import pytest

from sweeps import reduction as reduction_module
from sweeps.errors import InputError
from sweeps.plan import Plan, extended, make_plan, most_workers
from sweeps.reduction import Reduction
from tests.sweeps.support import make_spec

GRID = (
    "rank: {values: [2, 4]}, lr: {values: [0.1, 0.2]}, init_scale: {values: [1, 2]}, "
    "alpha: {values: [4, 16, 64]}, weight_decay: {values: [0, 0.1]}"
)
RANGES = "rank: {values: [2, 4]}, lr: {min: 1e-4, max: 1e-1}, init_scale: {min: 0.25, max: 4}, alpha: {min: 4, max: 64}"


def plan_of(parameters: str = RANGES, *, workers: int = 1, most_members: int = 64, **sections: str) -> Plan:
    spec = make_spec(parameters, **sections)
    return make_plan(spec, Reduction.of(spec), workers=workers, most_members=most_members)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_the_json_of_a_grid_has_the_documented_fields():
    plan = json.loads(plan_of(GRID, search="method: grid").model_dump_json())
    assert plan["configurations"] == 48
    # Of each rank and weight decay: 12 configurations, of which (4, 0.2, 2) = (16, 0.1, 1) and the same at 16 and 64.
    assert plan["classes"] == 2 * 2 * 10
    assert plan["dimensions"] == {
        "before": ["rank", "alpha", "lr", "init_scale", "weight_decay"],
        "after": ["rank", "lr", "init_scale", "weight_decay"],
    }
    assert plan["trials"] == 40
    assert plan["rungs"] == [50, 100, 200]
    assert plan["optimizer"] == "adamw"
    assert plan["law"].startswith("adamw: the same training run at alpha x k has lr / sqrt(k)")
    assert plan["outside"] == {"share": 0.0, "explanation": "a grid trains every class"}
    assert plan["warnings"] == []
    assert plan["reference_alpha"] == "16"


def test_a_continuous_space_counts_nothing():
    plan = json.loads(plan_of().model_dump_json())
    assert plan["configurations"] is None
    assert plan["classes"] is None
    assert plan["trials"] == 64
    assert plan["space"][1] == {"name": "lr", "min": 1e-4, "max": 1e-1, "distribution": "log_uniform"}
    assert plan["space"][0] == {"name": "rank", "values": [2, 4]}
    assert 0 < plan["outside"]["share"] < 1
    assert "ranges stand at alpha = 16" in plan["outside"]["explanation"]


def test_a_range_of_ranks_is_described_by_its_ends():
    plan = plan_of("rank: {min: 1, max: 64}, lr: {min: 1e-4, max: 1e-1}")
    assert plan.space[0] == {"name": "rank", "min": 1, "max": 64, "distribution": "log_uniform"}


def test_a_plan_survives_the_round_trip_through_json():
    plan = plan_of(GRID)
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_widened_ranges_leave_nothing_outside():
    outside = plan_of(reduction="ranges: widen").outside
    assert outside.share == 0
    assert "widened" in outside.explanation


def test_a_fixed_alpha_leaves_nothing_to_eliminate():
    plan = plan_of("rank: 4, lr: {min: 1e-4, max: 1}")
    assert plan.dimensions == {"before": ("lr",), "after": ("lr",)}
    assert plan.certificates == 0
    assert plan.warnings == ()
    assert "nothing was eliminated" in plan.outside.explanation


@pytest.mark.parametrize(
    ("parameters", "sections", "warning"),
    [
        ("rank: 4, lr: 0.1, alpha: {values: [4, 16]}", {}, "lr is a constant"),
        ("rank: 4, lr: {values: [1, 2]}, alpha: {values: [4, 16]}", {}, "alpha was an init-scale knob"),
        (RANGES, {"reduction": "constants: fixed"}, "reads eps literally"),
        (RANGES, {"reduction": "constants: fixed", "train": "clip_norm: 1"}, "reads eps and clip_norm literally"),
        (f"{RANGES}, lr_ratio: {{min: 1, max: 4}}", {"train": "clip_norm: 1"}, "clip_norm ties A and B together"),
        (GRID, {"search": "trials: 100"}, "there are only 16 different runs: 16 trials"),
    ],
)
def test_what_is_not_as_it_seems_is_said(parameters, sections, warning):
    found = plan_of(parameters, **sections).warnings
    assert len(found) == 1
    assert warning in found[0]


@pytest.mark.parametrize(
    ("search", "warning"),
    [
        ("method: gp, trials: 1000", None),
        (
            "method: gp, trials: 2000",
            r"some 33 s each at 2,000 and 5 h in all, .* wait; tpe or random take less",
        ),
        ("method: tpe, trials: 20000", None),
        ("method: tpe, trials: 100000", r"some 1\.1 s each at 100,000 and 15 h in all, .* random takes less"),
        ("method: cmaes, trials: 100000", r"search\.method cmaes takes longer to suggest a trial the more it knows"),
        ("method: random, trials: 1000000", None),
    ],
)
def test_a_sampler_that_workers_would_wait_for_is_warned_of(search, warning):
    found = plan_of(search=search).warnings
    assert len(found) == (warning is not None)
    assert warning is None or re.search(warning, found[0])


@pytest.mark.parametrize(
    ("order", "workers", "warned"),
    [("reproducible", 31, False), ("reproducible", 32, True), ("asynchronous", 1000, False)],
)
def test_many_workers_in_the_reproducible_order_are_warned_of(order, workers, warned):
    found = plan_of(search=f"order: {order}", workers=workers).warnings
    assert [f"lets {workers:,} workers wait" in text for text in found] == [True] * warned


# -- trials ------------------------------------------------------------------------------------------------------------


def test_trials_are_no_more_than_there_are_different_runs():
    assert plan_of(GRID, search="method: grid").trials == 40
    assert plan_of(GRID, search="method: grid, trials: 10").trials == 10
    assert plan_of(GRID).trials == 16
    assert plan_of(GRID, search="trials: 5").trials == 5
    assert plan_of(search="trials: 1000").trials == 1000
    assert plan_of("rank: 4, lr: 0.1").trials == 1


def test_no_more_classes_are_certified_than_are_trained():
    assert plan_of(search="trials: 2").certificates == 2
    assert plan_of().certificates == 4
    assert plan_of(certify="classes: 0").certificates == 0


def test_a_grid_too_large_to_list_is_refused(monkeypatch):
    monkeypatch.setattr(reduction_module, "MOST_CONFIGURATIONS", 40)
    with pytest.raises(InputError, match=r"method: grid takes at most .* configurations; found 48"):
        plan_of(GRID, search="method: grid")
    assert plan_of(GRID).classes is None


# -- more of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "search", "trials"),
    [
        (RANGES, "trials: 10", 90),
        (RANGES, "trials: 10, pruner: {type: median}", 11),
        (RANGES, "trials: 2", 1_000_000),
        (GRID, "trials: 5", 16),
        (GRID, "method: grid, trials: 5", 40),
        ("rank: {min: 1, max: 64}, lr: 0.1, alpha: {values: [4, 16]}, init_scale: {values: [1, 2]}", "trials: 5", 128),
    ],
)
def test_a_sweep_with_more_trials_costs_what_it_would_have_cost_at_first_but_keeps_its_packs(
    parameters, search, trials
):
    spec = make_spec(parameters, search=search)
    plan = plan_of(parameters, search=search, workers=2).with_time(0.01)
    at_first = make_plan(
        spec.model_copy(update={"search": spec.search.model_copy(update={"trials": trials})}),
        Reduction.of(spec),
        workers=2,
        most_members=64,
    ).with_time(0.01)
    found = extended(plan, spec, trials)
    assert found.trials == trials
    assert found.seconds == pytest.approx(at_first.seconds)
    kept = {"pack": plan.pack, "seconds": found.seconds, "warnings": plan.warnings}
    assert found == at_first.model_copy(update=kept)
    # What was planned elsewhere and read again is the same plan.
    assert extended(Plan.model_validate_json(plan.model_dump_json()), spec, trials) == found


def test_a_sweep_with_more_trials_certifies_no_more_classes_than_it_was_to():
    spec = make_spec(RANGES, search="trials: 2")
    assert extended(plan_of(RANGES, search="trials: 2"), spec, 3).certificates == 3
    assert extended(plan_of(RANGES, search="trials: 2"), spec, 30).certificates == 4
    nothing = "rank: 4, lr: {min: 1e-4, max: 1}"
    assert extended(plan_of(nothing), make_spec(nothing), 100).certificates == 0
    untimed = extended(plan_of(), make_spec(RANGES), 100)
    assert untimed.seconds is None


@pytest.mark.parametrize(
    ("parameters", "search", "trials", "message"),
    [
        (RANGES, "trials: 10", 10, "there must be more than the 10 that the sweep has already; found 10"),
        (RANGES, "trials: 10", -1, "there must be more than the 10 that the sweep has already; found -1"),
        (RANGES, "trials: 10", 1_000_001, "trials must be at most 1,000,000; found 1,000,001"),
        (GRID, "trials: 5", 17, "trials must be at most 16, for there are only 16 different runs; found 17"),
        (GRID, "trials: 99", 99, "found none: there are only 16 different runs, and it has all of them"),
        (GRID, "method: grid, trials: 5", 41, "at most 40, for there are only 40 different runs; found 41"),
        (GRID, "method: grid", 41, "there are only 40 different runs, and it has every class of its grid"),
        ("rank: 4, lr: 0.1", "trials: 1", 2, "found none: there is only one run, and it has all of them"),
    ],
)
def test_trials_that_there_cannot_be_are_refused_with_the_way_out(parameters, search, trials, message):
    with pytest.raises(InputError, match=message):
        extended(plan_of(parameters, search=search), make_spec(parameters, search=search), trials)


# -- cost --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pruner", "member_steps"),
    [
        # A third goes on at each rung: 90 x 50 + 30 x 50 + 10 x 100.
        ("{type: successive_halving, rungs: [50, 100, 200]}", 7_000),
        ("{type: successive_halving, rungs: [50, 100, 200], reduction_factor: 2}", 90 * 50 + 45 * 50 + 2_250),
        ("{type: median, rungs: [100, 200]}", 90 * 100 + 45 * 100),
        ("{type: none, rungs: [100, 200]}", 90 * 200),
        ("{type: none}", 90 * 200),
    ],
)
def test_member_steps_are_those_worked_out_by_hand(pruner, member_steps):
    assert plan_of(search=f"trials: 90, pruner: {pruner}", train="steps: 200").member_steps == member_steps


def test_at_least_one_trial_is_trained_to_the_end():
    search = "trials: 2, pruner: {type: successive_halving, rungs: [10, 20, 100]}"
    assert plan_of(search=search, train="steps: 100").member_steps == 2 * 10 + 10 + 80


def test_the_time_is_that_of_all_workers_together():
    spec = make_spec(search="trials: 10, pruner: {type: none}", train="steps: 100")
    plan = make_plan(spec, Reduction.of(spec), workers=2, most_members=64)
    assert plan.seconds is None
    assert plan.with_time(0.01).seconds == pytest.approx(10 * 100 * 0.01 / 2)
    assert plan.with_time(0.01).model_copy(update={"seconds": None}) == plan


@pytest.mark.parametrize(
    ("search", "workers", "most_members", "pack"),
    [
        ("trials: 64", 1, 64, 8),  # eight rounds to learn in
        ("trials: 64", 16, 64, 4),  # a pack for every worker
        ("trials: 63", 1, 64, 4),  # 7, as a power of two
        ("trials: 64", 1, 5, 4),  # what memory holds, as a power of two
        ("trials: 64, method: random", 1, 256, 64),  # nothing to learn
        ("trials: 64, method: random", 4, 256, 16),
        ("trials: 1000000, method: random", 1, 1_000_000, 64),
        ("trials: 1", 4, 64, 1),
    ],
)
def test_an_automatic_pack_suits_memory_the_sampler_and_the_workers(search, workers, most_members, pack):
    assert plan_of(search=search, workers=workers, most_members=most_members).pack == pack


def test_a_pack_in_the_spec_is_taken_as_it_stands_but_for_the_trials_there_are():
    assert plan_of(compute="pack: 7").pack == 7
    assert plan_of(compute="pack: 100", search="trials: 10").pack == 10


def test_a_pack_in_the_spec_that_no_memory_holds_is_refused_with_the_numbers():
    with pytest.raises(InputError, match=r"compute\.pack: required at most 6 members, .* of 2 workers .*; found 7"):
        plan_of(compute="pack: 7", most_members=6, workers=2)
    assert plan_of(compute="pack: 7", most_members=7).pack == 7
    assert plan_of(compute="pack: 7", search="trials: 6", most_members=6).pack == 6


@pytest.mark.parametrize(
    ("train", "warning"),
    [
        ("optimizer: sgd, eps: 1e-6, betas: [0.9, 0.99]", "sgd has no eps and no betas: not used"),
        ("optimizer: rprop", "rprop reads lr at its first step only: schedule has no effect"),
        ("optimizer: rprop, schedule: constant", None),
        ("optimizer: sgd", None),
    ],
)
def test_what_an_optimizer_does_not_use_is_said(train, warning):
    found = [text for text in plan_of(train=train).warnings if "not used" in text or "no effect" in text]
    assert found == ([warning] if warning else [])


@pytest.mark.parametrize(
    ("method", "trials", "workers"), [("gp", 64, 8), ("tpe", 65, 9), ("cmaes", 3, 1), ("random", 64, 64)]
)
def test_a_cluster_grows_for_no_more_workers_than_leave_the_sampler_something_to_learn(method, trials, workers):
    assert most_workers(make_spec(search=f"method: {method}"), trials) == workers
