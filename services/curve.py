"""How a search got better: the best value so far, drawn as SVG by coordinates that a template only writes down.

x   trials that have ended, 1 to n
y   value of the metric, on a log scale where the task's metric is compared on one
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 220
"""Of the drawing, in its own units."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 40
_MOST_DOTS = 500
"""With more, dots say nothing that the line does not."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: where, and what stands beside it."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Curve:
    """The drawing.

    Attributes:
        line: the best value so far, as an SVG path.
        dots: finished trials, each (x, y).
        x_ticks, y_ticks: marks.
        log: whether the axis of values is logarithmic.
        first, last: best value so far after the first finished trial, and now.
        ended: trials that have ended.
        left, right, top, bottom: the frame.
    """

    line: str
    dots: tuple[tuple[float, float], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    log: bool
    first: float
    last: float
    ended: int
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM
    width: int = WIDTH
    height: int = HEIGHT


def curve(finished: Sequence[tuple[int, float]], ended: int, *, sign: float, log: bool) -> Curve | None:
    """Draws how a search got better; None where fewer than two trials have finished.

    Args:
        finished: of each finished trial, in the order they ended: how many had ended with it, and its value.
        ended: trials that have ended in all.
        sign: 1 where small values are good, -1 where large ones are.
        log: whether values are compared on a log scale.
    """
    shown = [(place, value) for place, value in finished if math.isfinite(value)]
    if len(shown) < 2:
        return None
    log = log and all(value > 0 for _, value in shown)
    low, high = min(value for _, value in shown), max(value for _, value in shown)
    ticks = _log_ticks(low, high) if log else []
    if len(ticks) < 2:
        ticks = [value for value in _ticks(low, high) if value > 0 or not log]
    low, high = _with_margin(min(low, ticks[0]), max(high, ticks[-1]), log=log)

    def x(place: float) -> float:
        return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * (place - 1) / max(1, ended - 1), 1)

    def y(value: float) -> float:
        over, whole = (math.log(value / low), math.log(high / low)) if log else (value - low, high - low)
        return round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (over / whole if whole else 0.5), 1)

    best = first = shown[0][1]
    line = [f"M{x(shown[0][0])} {y(best)}"]
    for place, value in shown[1:]:
        if sign * value < sign * best:
            best = value
            line.append(f"H{x(place)}V{y(best)}")
    line.append(f"H{x(ended)}")
    return Curve(
        line="".join(line),
        dots=tuple((x(place), y(value)) for place, value in shown) if len(shown) <= _MOST_DOTS else (),
        x_ticks=tuple(Tick(x(place), f"{place:g}") for place in _places(ended)),
        y_ticks=tuple(Tick(y(value), f"{value:.4g}") for value in ticks),
        log=log,
        first=first,
        last=best,
        ended=ended,
    )


def _with_margin(low: float, high: float, *, log: bool) -> tuple[float, float]:
    """A range a little wider than this one, so that nothing lies on the frame."""
    if log:
        factor = (high / low) ** 0.06
        return low / factor, high * factor
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def _places(ended: int) -> list[int]:
    step = max(1, math.ceil(_step((ended - 1) / 6)))
    return [1, *range(step if step > 1 else 2, ended + 1, step)]


def _step(rough: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... from a number on."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around a range, four or so."""
    if low == high:
        low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
    step = _step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range: 1, 2, 5 of each power of ten, or the powers alone where it spans many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    every = max(1, len(powers) // 8)
    found = [factor * 10.0**power for power in powers[::every] for factor in factors]
    return [value for value in found if low <= value <= high]
