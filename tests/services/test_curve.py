"""The drawing of how a search got better."""

from __future__ import annotations

import math
import re

import pytest

from services.curve import Curve, curve


def heights(drawn: Curve) -> list[float]:
    """Where the line runs, from left to right."""
    return [float(y) for y in re.findall(r"(?:M[\d.]+ |V)([\d.]+)", drawn.line)]


def test_the_line_only_ever_gets_better():
    drawn = curve([(1, 0.9), (2, 1.4), (3, 0.5), (4, 0.7), (6, 0.2)], 8, sign=1, log=False)
    assert drawn is not None
    assert (drawn.first, drawn.last) == (0.9, 0.2)
    assert heights(drawn) == sorted(heights(drawn)), "y grows downwards, and small values are good"
    assert len(heights(drawn)) == 3
    assert drawn.line.endswith(f"H{float(drawn.right)}")


def test_where_large_values_are_good_the_line_climbs():
    drawn = curve([(1, 0.5), (2, 0.8), (3, 0.6)], 3, sign=-1, log=False)
    assert drawn is not None
    assert drawn.last == 0.8
    assert heights(drawn) == sorted(heights(drawn), reverse=True)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[0.19, 0.2, 0.21], [1e-6, 1.0, 1e6], [0.5, 0.5], [1234.5, 1234.6], [3.0, 40.0, 41.0]]
)
def test_everything_lies_within_the_frame(values: list[float], log: bool):
    drawn = curve(list(enumerate(values, start=1)), len(values), sign=1, log=log)
    assert drawn is not None
    assert drawn.log == log
    assert len(drawn.y_ticks) >= 2
    for y in [y for _, y in drawn.dots] + [tick.at for tick in drawn.y_ticks] + heights(drawn):
        assert drawn.top <= y <= drawn.bottom
    for x in [x for x, _ in drawn.dots] + [tick.at for tick in drawn.x_ticks]:
        assert drawn.left <= x <= drawn.right


def test_ticks_stand_where_their_values_do():
    drawn = curve([(1, 0.1), (2, 1.0), (3, 10.0)], 3, sign=1, log=True)
    assert drawn is not None
    at = {tick.label: tick.at for tick in drawn.y_ticks}
    assert (drawn.dots[0][1], drawn.dots[1][1], drawn.dots[2][1]) == (at["0.1"], at["1"], at["10"])


def test_nothing_is_drawn_of_less_than_two_values():
    assert curve([(1, 0.5)], 3, sign=1, log=False) is None
    assert curve([(1, 0.5), (2, math.nan)], 3, sign=1, log=False) is None


def test_a_value_that_is_not_positive_is_drawn_on_a_plain_scale():
    drawn = curve([(1, 0.5), (2, -0.5)], 2, sign=1, log=True)
    assert drawn is not None
    assert not drawn.log
