"""Which convention for alpha makes the best learning rate most nearly independent of rank, from a sweep's own trials.

    symbol     meaning
    r, s, c, p rank, scaling, init scale and gradient degree, as in `lora_core/gauge.py`
    s0, q      a convention: s = s0 r**-q; q is 1 for a constant alpha, 0 for alpha = r and 2r, 1/2 for rsLoRA
    beta       at s = 1 the best lr goes like rank**beta (`sweeps/response_surface.py`)

A run at s = 1 is a run at scaling s with lr / s**((1+p)/2) and c / sqrt(s). So the best lr goes like
rank**(beta + q (1+p)/2) in a convention: one slope is fitted, the differences between conventions are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sweeps.response_surface import LEVEL, LrFit, Observation, RankFit, fit_lr

_LEAST_RANKS = 3
"""A line goes exactly through two points, so that two ranks cannot speak for a power of the rank, or against it."""


@dataclass(frozen=True, slots=True)
class Convention:
    """A way to choose alpha: the scaling is factor * rank**-power (s0 and q)."""

    name: str
    factor: float
    power: float

    def shift(self, degree: int) -> float:
        """What it adds to beta."""
        return self.power * (1 + degree) / 2

    def of_unit_scaling(self, lr: float, init_scale: float, rank: float, degree: int) -> tuple[float, float]:
        """lr and init scale, in this convention, of a run that has the given ones at s = 1."""
        root = math.sqrt(self.factor * rank**-self.power)
        return lr / root ** (1 + degree), init_scale / root


def conventions(alpha: float) -> tuple[Convention, ...]:
    """The conventions that are compared; `alpha` is that of the two that keep it the same at every rank."""
    return (
        Convention(f"constant alpha = {alpha:g}", alpha, 1.0),
        Convention("alpha = r", 1.0, 0.0),
        Convention("alpha = 2r", 2.0, 0.0),
        Convention(f"rsLoRA, alpha = {alpha:g}", alpha, 0.5),
    )


@dataclass(frozen=True, slots=True)
class RankTrials:
    """What was seen at one rank.

    Attributes:
        rank: r.
        trials: how many were compared.
        diverged: how many blew up, which says that their lr is bad, and no more.
        best_trial, best_value: the best of those compared, by its metric at that step; None where there is none.
        missing: why the best lr is not located; empty where it is.
        error: standard error of ln(lr), dimensionless and the same in every convention; None where not located.
    """

    rank: int
    trials: int
    diverged: int
    best_trial: int | None
    best_value: float | None
    missing: str
    error: float | None


@dataclass(frozen=True, slots=True)
class BestPoint:
    """A rank's best point in one convention: of the fitted surface, and of the best trial; None where there is none.

    lr has no unit; init_scale is a factor on the default. The init scale moves with the convention too.
    """

    rank: int
    lr: float | None
    init_scale: float | None
    observed_lr: float | None
    observed_init_scale: float | None


@dataclass(frozen=True, slots=True)
class ConventionSlope:
    """How the best lr moves in one convention.

    Attributes:
        name: of the convention.
        slope: best lr ~ rank**slope, dimensionless; None where fewer than two ranks are located.
        low, high: its 95 % interval.
        middle_rank, middle_lr: a point on the line, in the weighted middle of the ranks.
        share: of the replicates in which no other slope is flatter.
        best: by rank.
    """

    name: str
    slope: float | None
    low: float | None
    high: float | None
    middle_rank: float | None
    middle_lr: float | None
    share: float | None
    best: tuple[BestPoint, ...]


@dataclass(frozen=True, slots=True)
class RankScaling:
    """The answer.

    Attributes:
        step: at which trials are compared, in steps of training; None where there are none.
        ranks: what was seen at each.
        conventions: the same runs in each convention.
        flattest: in which conventions lr is most nearly independent of rank; empty where the trials do not suffice.
        conclusion: the answer in words.
    """

    step: int | None
    ranks: tuple[RankTrials, ...]
    conventions: tuple[ConventionSlope, ...]
    flattest: tuple[str, ...]
    conclusion: str

    @property
    def speaks(self) -> bool:
        """Whether so many ranks are located that their slope says something."""
        return sum(not rank.missing for rank in self.ranks) >= _LEAST_RANKS


def answer(
    observations: Sequence[Observation],
    *,
    lr_searched: bool,
    alpha: float,
    degree: int,
    sign: int,
    log_scale: bool,
    rng: np.random.Generator,
) -> RankScaling:
    """Answers from a sweep's trials, in whatever state it is.

    Args:
        observations: the trials, in the gauge s = 1.
        lr_searched: whether they differ in lr by more than the gauge.
        alpha: of the conventions that keep it the same at every rank.
        degree: p.
        sign: what the metric is multiplied by so that less is better.
        log_scale: whether the metric spreads over orders of magnitude.
        rng: for the bootstrap.
    """
    fit = fit_lr(observations, sign=sign, log_scale=log_scale, rng=rng)
    compared = conventions(alpha)
    shares = fit.slope.shares([convention.shift(degree) for convention in compared]) if fit.slope else None
    slopes = tuple(
        _in_convention(convention, fit, degree, shares[i] if shares else None) for i, convention in enumerate(compared)
    )
    flattest, conclusion = _conclude(fit, slopes, lr_searched)
    return RankScaling(fit.step, tuple(_seen(rank, fit.step) for rank in fit.ranks), slopes, flattest, conclusion)


def _seen(fit: RankFit, step: int | None) -> RankTrials:
    best = fit.observed
    value = best.values[step] if best is not None and step is not None else None
    number = None if best is None else best.trial
    return RankTrials(fit.rank, fit.trials, fit.diverged, number, value, fit.missing, fit.error)


def _in_convention(convention: Convention, fit: LrFit, degree: int, share: float | None) -> ConventionSlope:
    best = []
    for found in fit.ranks:
        here, seen = partial(convention.of_unit_scaling, rank=found.rank, degree=degree), found.observed
        fitted = (None, None) if found.lr is None or found.init_scale is None else here(found.lr, found.init_scale)
        observed = (None, None) if seen is None else here(seen.lr, seen.init_scale)
        best.append(BestPoint(found.rank, *fitted, *observed))
    if fit.slope is None:
        return ConventionSlope(convention.name, None, None, None, None, None, share, tuple(best))
    shift, (low, high), middle = convention.shift(degree), fit.slope.interval, np.exp(fit.slope.middle)
    return ConventionSlope(
        name=convention.name,
        slope=fit.slope.beta + shift,
        low=low + shift,
        high=high + shift,
        middle_rank=float(middle[0]),
        middle_lr=convention.of_unit_scaling(float(middle[1]), 1.0, float(middle[0]), degree)[0],
        share=share,
        best=tuple(best),
    )


# -- in words ----------------------------------------------------------------------------------------------------------


def _conclude(fit: LrFit, slopes: Sequence[ConventionSlope], lr_searched: bool) -> tuple[tuple[str, ...], str]:
    """The conventions that are named, and the sentence."""
    if not fit.ranks or fit.step is None:
        return (), "No trial has reported a value yet, so there is nothing to say of how lr should move with rank."
    if len(fit.ranks) == 1:
        return (), f"Only rank {fit.ranks[0].rank} has trials, so they say nothing of how lr should move with rank."
    if not lr_searched:
        return (), "lr is a constant of this sweep, so its trials do not say which lr is best; search lr."
    located = [rank for rank in fit.ranks if not rank.missing]
    missing = [rank for rank in fit.ranks if rank.missing]
    lacking = "The trials do not suffice to say in which convention lr is most nearly independent of rank: "
    if len(located) < _LEAST_RANKS:
        found = f"the best lr is located at {len(located)} of {len(fit.ranks)} ranks, {_LEAST_RANKS} needed"
        return (), f"{lacking}{found}" + (
            f" ({_why(missing)}). {_help(missing)}" if missing else ". Search more ranks."
        )
    best = max(slopes, key=lambda slope: slope.share or 0.0)
    assert best.share is not None, "three ranks have a slope"
    if best.share < LEVEL or not _narrow(slopes):
        return (), f"{lacking}{_too_wide(slopes)} More trials would narrow it; so would ranks further apart."
    # Equal slopes win together: the exact differences between conventions make alpha = r and alpha = 2r one.
    winners = [slope for slope in slopes if slope.share == best.share]
    names = _joined([slope.name for slope in winners], "or")
    others = ", ".join(f"rank^{slope.slope:z.2f} with {slope.name}" for slope in slopes if slope not in winners)
    return tuple(slope.name for slope in winners), (
        f"On this task lr is most nearly independent of rank with {names}: the best lr goes like "
        f"rank^{_interval(best)}, and no other slope is flatter in {100 * best.share:.0f} % of the replicates. "
        f"The others: {others}." + _still_moving(best) + (f" Not located are {_why(missing)}." if missing else "")
    )


def _still_moving(slope: ConventionSlope) -> str:
    low, high = slope.low or 0.0, slope.high or 0.0
    if low <= 0 <= high:
        return ""
    return f" It still {'rises' if low > 0 else 'falls'} with rank there, by more than its error."


def _narrow(slopes: Sequence[ConventionSlope]) -> bool:
    """Whether the interval is at most twice as wide as the conventions are apart.

    With a wider one an extreme convention may win most replicates only because the slope is unknown.
    """
    found = [slope.slope for slope in slopes if slope.slope is not None]
    low, high = slopes[0].low, slopes[0].high
    return low is not None and high is not None and high - low <= 2 * (max(found) - min(found))


def _too_wide(slopes: Sequence[ConventionSlope]) -> str:
    interval = f"the interval of the slope is too wide (rank^{_interval(slopes[0])} with {slopes[0].name})"
    if not _narrow(slopes):
        return f"{interval}, more than twice as wide as the conventions are apart."
    contenders = [slope for slope in slopes if (slope.share or 0.0) >= (1 - LEVEL) / 2]
    names = _joined([f"{slope.name} ({100 * (slope.share or 0.0):.0f} %)" for slope in contenders], "and")
    return f"{interval}. By the share of replicates in which it is the flattest it may be {names or 'any'}."


def _interval(slope: ConventionSlope) -> str:
    return f"{slope.slope:z.2f}, 95 % interval {slope.low:z.2f} to {slope.high:z.2f}"


def _why(missing: Sequence[RankFit]) -> str:
    """What is missing, the ranks that miss the same named together."""
    ranks: dict[str, list[str]] = {}
    for rank in missing:
        ranks.setdefault(rank.missing, []).append(str(rank.rank))
    return "; ".join(f"{'ranks' if len(of) > 1 else 'rank'} {_joined(of, 'and')}: {why}" for why, of in ranks.items())


def _help(missing: Sequence[RankFit]) -> str:
    """What would locate the ranks that are not."""
    ranged = any(rank.at_edge for rank in missing)
    few = not all(rank.at_edge for rank in missing)
    wanted = (["more trials"] if few else []) + (["a wider range of lr"] if ranged else [])
    return f"{' and '.join(wanted).capitalize()} would help."


def _joined(names: Sequence[str], word: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
