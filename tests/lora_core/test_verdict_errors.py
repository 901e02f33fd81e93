"""The verdict's own error rates, on twins and near-twins that are really trained."""

import pytest
import torch

from benchmarks.verdicts import experiment, upper_bound
from tests.lora_core.verdict_experiment import QUANTITIES, STEPS, Judged


@pytest.fixture(scope="module")
def population() -> list[Judged]:
    return experiment()


def twins(population: list[Judged]) -> list[Judged]:
    return [judged for judged in population if judged.quantity is None]


def near_twins(population: list[Judged], size: float) -> list[Judged]:
    return [judged for judged in population if judged.quantity is not None and judged.size == size]


def shown(judged: Judged) -> tuple[object, ...]:
    verdict = judged.verdict()
    return judged.case.seed, judged.case.config.name, judged.quantity, judged.size, verdict.max_ratio


def test_the_population_is_as_large_and_as_wild_as_it_should_be(population):
    assert len(twins(population)) >= 200
    for quantity in QUANTITIES:
        for size in (0.01, 0.0001):
            assert sum(each.quantity == quantity for each in near_twins(population, size)) >= 50
    assert all(len(judged.controls) == 4 and len(judged.run.losses) <= STEPS == 200 for judged in population)
    chaotic = {
        judged.case.seed
        for judged in twins(population)
        if judged.case.config.name == "adamw" and judged.verdict().envelope > 1e-3
    }
    assert len(chaotic) >= 5
    assert {judged.verdict().kind for judged in twins(population)} == {"identical up to rounding"}


def test_no_twin_is_called_different(population):
    assert [shown(judged) for judged in twins(population) if judged.verdict().kind == "different"] == []


def test_everything_off_by_one_percent_is_called_different(population):
    assert [shown(each) for each in near_twins(population, 0.01) if each.verdict().kind != "different"] == []


def test_at_least_99_in_100_off_by_a_hundredth_of_a_percent_are_called_different(population):
    near = near_twins(population, 0.0001)
    missed = [shown(judged) for judged in near if judged.verdict().kind != "different"]
    assert len(missed) <= len(near) / 100, missed


def test_with_another_threshold_the_verdict_would_err(population):
    """Else the experiment could not have failed."""
    assert all(judged.verdict(threshold=1e-3).kind == "different" for judged in twins(population))
    single = [judged for judged in near_twins(population, 0.01) if judged.case.dtype == torch.float32]
    missed = [judged for judged in single if judged.verdict(threshold=1e9).kind != "different"]
    assert len(missed) > 0.9 * len(single), "the rest are infinitely far apart: one has blown up, the other has not"


def test_bounds_on_rates():
    assert upper_bound(0, 200) == 0.015
    assert upper_bound(0, 2) == 1.0
    assert upper_bound(1, 200) == pytest.approx(0.0221, abs=1e-4)  # worked out by hand, z = 1.645
    assert upper_bound(200, 200) == pytest.approx(1.0)
