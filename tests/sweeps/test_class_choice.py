"""Which classes are certified: spread over the space, named by their numbers, or put on trial by a claim."""

from __future__ import annotations

import pytest

from sweeps import class_choice
from sweeps.canonical import Ordinal
from sweeps.certifying import ClassOrder
from sweeps.class_choice import check_order, choose_classes, claim, name_class, read_configuration
from sweeps.errors import InputError
from sweeps.space import Configuration
from tests.sweeps.support import SWEPT, make_reduction, make_spec

CONTINUOUS = f"{SWEPT}, alpha: {{values: [4, 16, 64]}}"
GRID = "rank: {values: [2, 4]}, lr: {values: [0.02, 0.01, 0.3]}, init_scale: {values: [2, 1]}, alpha: {values: [4, 16]}"
CONSTANT = "rank: 4, lr: 0.01, alpha: 16"


def choose(parameters: str, wanted: int | None = None, **sections: str) -> list[ClassOrder]:
    spec = make_spec(parameters, **sections)
    return choose_classes(spec, make_reduction(parameters, **sections), wanted)


# -- chosen ------------------------------------------------------------------------------------------------------------


def test_all_classes_of_a_grid_are_those_of_two_members_or_more():
    reduction, orders = make_reduction(GRID), choose(GRID)
    assert [order.class_id for order in orders] == [c.id for c in reduction.classes or () if len(c.members) > 1]
    for order in orders:
        assert {order.representative, *order.twins} == set(reduction.members_of(order.class_id) or ())
    assert len(orders) == 2  # alpha 4 with 0.02 and 2 is alpha 16 with 0.01 and 1, at each of two ranks


def test_some_classes_are_spread_over_the_grid():
    parameters = (
        "rank: {values: [1, 2, 4, 8]}, lr: {values: [2, 1]}, init_scale: {values: [4, 2, 1]}, alpha: {values: [4, 16]}"
    )
    everything, some = choose(parameters), choose(parameters, 4)
    assert len(everything) == 8
    assert set(some) < set(everything)
    assert sorted({order.representative.rank for order in some}) == [1, 2, 4, 8]


def test_more_classes_than_there_are_is_all_of_them():
    assert choose(GRID, 10**12) == choose(GRID)


def test_all_of_a_continuous_space_is_as_many_as_it_gets_trials():
    assert len(choose(CONTINUOUS)) == 64
    assert len(choose(CONTINUOUS, search="trials: 7")) == 7
    assert len(choose(CONTINUOUS, 3)) == 3


def test_drawn_classes_fill_the_space_evenly_and_are_the_same_every_time():
    orders = choose(CONTINUOUS, 30)
    assert orders == choose(CONTINUOUS, 30)
    assert orders != choose(CONTINUOUS, 30, search="seed: 1")
    ranks = [order.representative.rank for order in orders]
    assert [ranks.count(rank) for rank in (2, 4, 8)] == [10, 10, 10]
    lrs = sorted(order.representative.lr for order in orders)
    for i, lr in enumerate(lrs):  # one to each thirtieth of the range's logarithm
        assert 1e-4 * 1e3 ** (i / 30) <= lr <= 1e-4 * 1e3 ** ((i + 1) / 30)


@pytest.mark.parametrize(
    "parameters",
    [
        CONSTANT,
        "rank: {values: [2, 4]}, lr: {values: [0.1, 0.3]}, alpha: 16",
        "rank: {values: [2, 4]}, lr: {min: 0.1, max: 0.3}",
        "rank: 4, lr: 0.01, alpha: {values: [4, 16]}",
        "rank: 4, lr: 0.01, alpha: {min: 4, max: 16}",
        'rank: {values: [2, 3]}, lr: {min: 1e-3, max: 0.1, distribution: uniform}, alpha: "2*rank"',
        "rank: {min: 1, max: 8}, lr: 0.1, lr_ratio: {min: 1, max: 16}, alpha: 16",
    ],
)
def test_a_space_of_one_alpha_has_its_twins_a_power_of_four_away(parameters: str):
    reduction = make_reduction(parameters)
    for order in choose(parameters, 3):
        gauges = [reduction.gauge_between(order.representative, twin) for twin in order.twins]
        assert [gauge.k for gauge in gauges] == [0.25, 4.0]
        assert all(gauge.exact_in_binary for gauge in gauges) or reduction.two_parameter


def test_a_large_grid_is_enumerated_once(monkeypatch: pytest.MonkeyPatch):
    many = [0.001 * 1.01**i for i in range(150)]
    parameters = f"rank: 4, lr: {{values: {many}}}, init_scale: {{values: {many}}}, alpha: 16"
    with pytest.raises(InputError, match=r"at most 10,000 classes .* found 22,500; take some with --classes N"):
        choose(parameters)
    assert len(choose(parameters, 5)) == 5
    with pytest.raises(InputError, match=r"at most 10,000 classes .* found 1,000,000"):
        choose(CONTINUOUS, 1_000_000)


@pytest.mark.parametrize(
    ("train", "quantities"),
    [
        ("optimizer: adamw", "eps"),
        ("optimizer: sgd, clip_norm: 1", "clip norm"),
        ("optimizer: adam, clip_norm: 1", "clip norm and eps"),
    ],
)
@pytest.mark.parametrize("parameters", [CONTINUOUS, GRID, CONSTANT])
def test_constants_read_literally_leave_no_twins(parameters: str, train: str, quantities: str):
    with pytest.raises(InputError, match=f"constants: fixed holds {quantities} where .* write constants: travel"):
        choose(parameters, reduction="constants: fixed", train=train)


def test_constants_read_literally_do_no_harm_where_there_are_none():
    (order,) = choose(CONSTANT, reduction="constants: fixed", train="optimizer: sgd")
    assert [twin.lr for twin in order.twins] == [0.04, 0.0025]


# -- named -------------------------------------------------------------------------------------------------------------


def test_a_named_configuration_represents_its_class():
    order = name_class(make_reduction(GRID), "rank=4, alpha=4, lr=0.02, init_scale=2")
    assert order.representative == Configuration(4, 4.0, 0.02, 2.0)
    assert order.twins == (Configuration(4, 16.0, 0.01, 1.0),)


def test_a_named_configuration_need_not_be_in_the_space():
    order = name_class(make_reduction(CONTINUOUS), "rank=3,alpha=16,lr=7,init_scale=1,lr_ratio=2,weight_decay=.1")
    assert order.representative == Configuration(3, 16.0, 7.0, 1.0, 2.0, 0.1)
    assert [twin.alpha for twin in order.twins] == [4.0, 64.0]


def test_what_a_spec_holds_constant_may_be_left_out():
    assert read_configuration(make_reduction(CONSTANT), "lr=1e-3") == Configuration(4, 16.0, 1e-3)
    rule = make_reduction('rank: {values: [2, 4]}, lr: 0.1, alpha: "2*rank", weight_decay: 0.2')
    assert read_configuration(rule, "rank=2") == Configuration(2, 4.0, 0.1, weight_decay=0.2)
    assert read_configuration(rule, "rank=2,weight_decay=0") == Configuration(2, 4.0, 0.1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"a configuration is written as rank=8,alpha=16,lr=0.01,init_scale=1.*found '' in ''"),
        ("rank", "found 'rank' in 'rank'"),
        ("rnk=4", "each of rank, alpha, lr, init_scale, lr_ratio, weight_decay, head_lr at most once; found 'rnk=4'"),
        ("rank=4,rank=2", "at most once; found 'rank=2'"),
        ("rank=4,", "found '' in 'rank=4,'"),
        (
            "rank=4,lr=0.1,init_scale=1",
            r"alpha is searched, so a configuration must name it; found none in .*alpha=\.\.\.",
        ),
        ("alpha=4,lr=0.1,init_scale=1", "rank is searched"),
        ("rank=4.5", "rank must be a whole number above 0; found '4.5'"),
        ("rank=0", "rank must be a whole number above 0; found '0'"),
        ("rank=-2", "rank must be a whole number above 0; found '-2'"),
        ("rank=1e300", "rank must be a whole number above 0; found '1e300'"),
        ("rank=٣", "rank must be a whole number"),
        ("rank=9999999999999999999999", "rank must be a whole number"),
        ("lr=0", "lr must be a number above 0; found '0'"),
        ("lr=-1", "lr must be a number above 0; found '-1'"),
        ("lr=nan", "found 'nan'"),
        ("lr=inf", "found 'inf'"),
        ("lr=1e400", "found '1e400'"),
        ("lr=1_0", "found '1_0'"),
        ("lr=", "lr must be a number above 0; found ''"),
        ("alpha=2*rank", r"alpha must be a number above 0; found '2\*rank'"),
        ("weight_decay=-1", "weight_decay must be a number of at least 0; found '-1'"),
    ],
)
def test_what_is_no_configuration_is_refused_in_words(text: str, words: str):
    with pytest.raises(InputError, match=words):
        read_configuration(make_reduction(CONTINUOUS), text)


def test_an_optimizer_without_weight_decay_is_given_none():
    reduction = make_reduction(CONTINUOUS, train="optimizer: rprop")
    with pytest.raises(InputError, match=r"weight_decay must be 0, for rprop has no weight decay; found 0\.1 in"):
        name_class(reduction, "rank=4,alpha=16,lr=0.1,init_scale=1,weight_decay=0.1")


@pytest.mark.parametrize(
    "text",
    [
        "rank=4,alpha=1e-320,lr=1e300,init_scale=1",
        "rank=4,alpha=16,lr=1e308,init_scale=1e308",
        "rank=4,alpha=1e300,lr=1,init_scale=1",
        "rank=4,alpha=16,lr=1e-31,init_scale=1",
        "rank=4,alpha=16,lr=1e20,init_scale=1,lr_ratio=1e20",
    ],
)
def test_numbers_that_training_cannot_hold_are_refused(text: str):
    with pytest.raises(InputError, match=r"between 1e-30 and 1e\+30, for beyond that float32 ends; found rank=4"):
        name_class(make_reduction(CONTINUOUS), text)
    with pytest.raises(InputError, match=r"must be between 1e-30 and 1e\+30"):
        claim(make_reduction(CONTINUOUS), "rank=4,alpha=16,lr=0.1,init_scale=1", [text])


@pytest.mark.parametrize(
    "member", [Configuration(0, 16.0, 0.1), Configuration(-4, 16.0, 0.1), Configuration(4, 16.0, -1)]
)
def test_an_order_of_no_numbers_is_refused(member: Configuration):
    with pytest.raises(InputError, match="the numbers of a class"):
        check_order(make_reduction(CONTINUOUS), ClassOrder("c-0", member, ()))


# -- claimed -----------------------------------------------------------------------------------------------------------


def test_a_claim_is_taken_as_it_is_written():
    order = claim(
        make_reduction(CONTINUOUS), "rank=4,alpha=16,lr=0.1,init_scale=1", ["rank=4,alpha=64,lr=3,init_scale=1"]
    )
    assert order.representative == Configuration(4, 16.0, 0.1)
    assert order.twins == (Configuration(4, 64.0, 3.0),)


def test_a_twin_of_another_rank_is_refused():
    with pytest.raises(InputError, match="twins have one rank: required 4; found 2; no gauge changes the rank"):
        claim(make_reduction(CONSTANT), "rank=4", ["rank=4,alpha=64", "rank=2"])


def test_the_last_value_of_a_dimension_is_its_end():
    assert class_choice._at(Ordinal("rank", (1.0, 2.0)), 1.0) == 2.0
