import pytest

from sweeps.space import DIMENSIONS, SearchSpace
from tests.sweeps.support import make_spec

GRID = (
    'rank: {values: [8, 2]}, alpha: {values: [16, "2*rank", sqrt(rank)]}, lr: {values: [0.2, 0.1]}, '
    "init_scale: {values: [0.5, 1, 2]}, lr_ratio: {values: [1, 4]}, weight_decay: {values: [0, 0.1]}, "
    "head_lr: {values: [0.01, 0.03]}"
)


def make_space(parameters: str) -> SearchSpace:
    return SearchSpace.of(make_spec(parameters))


def test_every_index_names_the_configuration_that_the_enumeration_has_there():
    space = make_space(GRID)
    listed = list(space.configurations())
    assert space.size == len(listed) == 2 * 3 * 2 * 3 * 2 * 2 * 2
    assert [space.configuration(index) for index in range(len(listed))] == listed


def test_alpha_rules_follow_the_rank():
    alphas = {(c.rank, c.alpha) for c in make_space(GRID).configurations()}
    assert alphas == {(2, 16.0), (2, 4.0), (2, 2**0.5), (8, 16.0), (8, 8**0.5)}


def test_ranks_ascend_however_they_are_written():
    assert make_space("rank: {values: [8, 2, 4]}, lr: 1").ranks == (2, 4, 8)
    assert make_space("rank: {min: 3, max: 6}, lr: 1").ranks == (3, 4, 5, 6)


@pytest.mark.parametrize("name", DIMENSIONS[1:])
def test_one_range_makes_the_space_continuous(name):
    parameters = {"rank": "2", "lr": "1", name: "{min: 1, max: 2}"}
    space = make_space(", ".join(f"{key}: {value}" for key, value in parameters.items()))
    assert space.size is None
    assert space.searched == (name,)


def test_constants_are_not_searched():
    assert make_space("rank: 2, lr: 1").searched == ()
    assert make_space("rank: 2, lr: 1").size == 1
    assert make_space(GRID).searched == DIMENSIONS


def test_a_head_is_trained_where_it_has_a_learning_rate():
    assert make_space(GRID).trains_head
    assert make_space("rank: 2, lr: 1, head_lr: 0.1").trains_head
    assert not make_space("rank: 2, lr: 1").trains_head


def test_a_label_names_what_tells_trials_apart():
    first, *_, last = make_space(GRID).configurations()
    assert first.label() == "r2 lr0.2 init0.5 head0.01"
    assert last.label() == "r8 lr0.1 init2 ratio4 head0.03"
