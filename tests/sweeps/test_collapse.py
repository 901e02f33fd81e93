import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeps import collapse
from sweeps.collapse import Certificate, TwinVerdict
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from tests.sweeps.support import SWEPT, make_spec

ALPHAS = "alpha: {values: [4, 16, 64]}"


def configuration(rank: int) -> Configuration:
    return Configuration(rank=rank, alpha=16.0, lr=0.01)


def chosen(
    finished: list[tuple[int, float | None, int]], parameters=f"{SWEPT}, {ALPHAS}", **sections: str
) -> list[int]:
    spec = make_spec(parameters, **sections)
    ended = [(number, value, configuration(rank), f"c-{number}") for number, value, rank in finished]
    return collapse.choose(spec, Reduction.of(spec), ended)


# -- which classes -----------------------------------------------------------------------------------------------------


def test_the_best_of_each_rank_comes_first_then_the_next_best_of_all():
    finished = [(0, 5.0, 2), (1, 1.0, 4), (2, 2.0, 4), (3, 3.0, 8), (4, 4.0, 2), (5, 2.5, 4)]
    assert chosen(finished, certify="classes: 6") == [1, 3, 4, 2, 5, 0]
    assert chosen(finished, certify="classes: 4") == [1, 3, 4, 2]
    assert chosen(finished, certify="classes: 2") == [1, 3]


def test_the_best_are_the_largest_where_the_goal_is_to_maximize():
    finished = [(0, 1.0, 4), (1, 3.0, 4), (2, 2.0, 8), (3, None, 2)]
    assert chosen(finished, metric="goal: maximize", certify="classes: 4") == [1, 2, 3, 0]


def test_a_trial_without_a_value_comes_last_among_its_equals():
    for goal in ("minimize", "maximize"):
        assert chosen([(0, None, 4), (1, 7.0, 4)], metric=f"goal: {goal}") == [1, 0]


@pytest.mark.parametrize("alpha", ["alpha: 16", "alpha: {min: 4, max: 64}"])
@pytest.mark.parametrize("lr", ["{min: 1e-4, max: 1e-1}", "0.01"])
def test_nothing_is_certified_where_alpha_is_not_eliminated(alpha, lr):
    found = chosen([(0, 1.0, 4)], f"rank: {{values: [2, 4]}}, lr: {lr}, {alpha}")
    assert found == ([0] if "min" in lr and "min" in alpha else [])


def test_constants_read_literally_leave_nothing_to_certify():
    assert chosen([(0, 1.0, 4)], reduction="constants: fixed") == []
    assert chosen([(0, 1.0, 4)], reduction="constants: fixed", train="optimizer: sgd") == [0]


@given(
    st.lists(st.tuples(st.floats(-10, 10) | st.none(), st.sampled_from([2, 4, 8])), max_size=12),
    st.integers(0, 6),
    st.sampled_from(["minimize", "maximize"]),
)
def test_never_more_than_asked_and_every_rank_before_a_second_of_one(trials, classes, goal):
    finished = [(number, value, rank) for number, (value, rank) in enumerate(trials)]
    found = chosen(finished, metric=f"goal: {goal}", certify=f"classes: {classes}")
    assert len(found) == len(set(found)) == min(classes, len(finished))
    ranks = [trials[number][1] for number in found]
    distinct = min(len({rank for _, rank in trials}), classes)
    assert len(set(ranks[:distinct])) == distinct


# -- which twins -------------------------------------------------------------------------------------------------------


def test_twins_of_a_finite_class_are_its_other_members():
    spec = make_spec(
        "rank: 4, lr: {values: [0.2, 0.1, 0.05]}, init_scale: {values: [2, 1, 0.5]}, alpha: {values: [4, 16]}"
    )
    reduction = Reduction.of(spec)
    for found in reduction.classes:
        others = [member for member in found.configurations if member != found.representative]
        twins = collapse.twins(reduction, found.representative, found.id)
        assert sorted(twins, key=lambda c: c.alpha) == sorted(others, key=lambda c: c.alpha)


def test_a_class_of_one_is_not_certified():
    spec = make_spec("rank: 4, lr: {values: [0.1, 0.3]}, init_scale: {values: [1]}, alpha: {values: [4, 16]}")
    reduction = Reduction.of(spec)
    alone = [c for c in reduction.classes if len(c.members) == 1 and c.representative in set(c.configurations)]
    assert len(alone) == 2
    for found in alone:
        assert collapse.twins(reduction, found.representative, found.id) == ()


def test_two_rules_that_meet_are_one_twin():
    spec = make_spec(
        'rank: 4, lr: {values: [0.2, 0.1]}, init_scale: {values: [2, 1]}, alpha: {values: [1, 4, 16, "4*rank"]}'
    )
    reduction = Reduction.of(spec)
    (largest,) = [found for found in reduction.classes if len(found.members) > 2]
    assert len(collapse.twins(reduction, largest.representative, largest.id)) == 1


def test_no_more_than_eight_twins_and_those_exact_in_binary_among_them():
    alphas = [16 * 1.1**n for n in range(-6, 7) if n] + [1.0, 4.0, 16.0, 64.0, 256.0]
    spec = make_spec(f"{SWEPT}, alpha: {{values: {alphas}}}")
    reduction = Reduction.of(spec)
    trial = Configuration(rank=4, alpha=reduction.reference.at(4), lr=0.01)
    twins = collapse.twins(reduction, trial, reduction.class_id(trial))
    assert len(twins) == 8
    exact = [twin.alpha for twin in twins if reduction.gauge_between(trial, twin).exact_in_binary]
    assert exact == [1.0, 4.0, 64.0, 256.0]
    assert [twin.alpha for twin in twins] == sorted(twin.alpha for twin in twins)


# -- what a certificate says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "faults"),
    [
        ([(True, "bit-identical")], ()),
        ([(True, "bit-identical"), (False, "identical up to rounding")], ()),
        ([(False, "bit-identical")], ()),
        ([(True, "bit-identical"), (False, "different")], ("the twin at alpha 16 is different from step 3",)),
        (
            [(True, "identical up to rounding"), (False, "identical up to rounding")],
            ("the twin at alpha 16 is exact in binary and had to be bit-identical, but is identical up to rounding",),
        ),
    ],
)
def test_a_certificate_holds_if_exact_twins_are_bit_identical_and_no_other_is_different(verdicts, faults):
    twins = tuple(
        TwinVerdict(
            configuration=configuration(4),
            exact_in_binary=exact,
            verdict=verdict,
            max_ratio=0.0,
            first_step=3 if verdict == "different" else None,
            losses=(),
            update_norms={},
        )
        for exact, verdict in verdicts
    )
    certificate = Certificate(
        class_id="c-0",
        trial=0,
        steps=1,
        representative=configuration(4),
        losses=(),
        update_norms={},
        controls=4,
        twins=twins,
    )
    assert certificate.faults == faults
    assert certificate.holds is not bool(faults)
    assert Certificate.model_validate_json(certificate.model_dump_json()) == certificate
