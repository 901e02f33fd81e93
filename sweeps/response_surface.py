"""Where each rank's best learning rate lies, and how it moves with rank: a response surface over a sweep's trials.

    symbol      meaning
    r, s, c     rank, scaling and init scale, as in `lora_core/gauge.py`; everything here is in the gauge s = 1
    n, d, R     trials fitted; dimensions: lr, then c and the ratio of the lrs where they were searched; ranks
    u [n, d]    logarithms of lr, c, ...
    y [n]       the objective, less is better; its logarithm where it spreads over orders of magnitude
    g, h        a rank's surface is y = m_r + g_r u + u h u / 2: gradient [R, d], curvature [d, d]
    x [R]       log lr where a rank's surface is lowest, the other dimensions anywhere in their sampled range
    beta        d x / d log r: the best lr goes like rank**beta
    B           replicates of the bootstrap

The curvature h is one for all ranks. Sweeps leave some 10 trials to a rank, too few for 6 coefficients each; a valley
that moves with rank changes its gradients, and its width much less. That, and the quadratic, are assumptions. Fitted
are the trials nearest in lr to the good ones, for far from them a loss is no quadratic: it has a plateau where nothing
is learned. Nearest in lr and not best in y, because a choice by y bends the surface.

Errors are those of a wild bootstrap: each replicate turns the signs of the residuals at random, grown by 1 / (1 - their
leverage), and fits again (Wu 1986; HC3 of MacKinnon & White 1985). What a quadratic cannot follow is in the residuals,
and so in the errors. Drawing trials anew would leave ranks of few trials without a surface in many replicates. Where
ranks scatter about the line by more than their errors, the replicates of beta are spread by that factor (Birge 1932).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

REPLICATES = 1000
LEVEL = 0.95
"""Of the intervals, and the share of replicates that a convention must win to be named."""

_DIFFERENT_LRS = 3
"""Through fewer, no curvature can be seen."""

_MOST_LEVERAGE = 0.95
"""A trial that its surface goes through exactly has no residual to speak of: 0 / 0."""

_LEAST_ERROR = 1e-9
"""Of ln(lr); for trials that lie on a quadratic exactly."""

_AT_ONCE = 2**24
"""Signs drawn at once: with many trials the replicates are made some at a time."""

_NODES = 129
"""Points of the other dimensions at which the surface is searched, in all."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A trial in the gauge s = 1.

    Attributes:
        trial: its number.
        rank: r.
        lr, init_scale, lr_ratio: in that gauge.
        values: the metric by step, where it was finite.
        diverged: whether it blew up, at whichever step: its lr is known to be bad, and it has no value.
        head_lr: of what is trained whole beside the adapters, the same in every gauge; 0 where nothing is.
    """

    trial: int
    rank: int
    lr: float
    init_scale: float
    lr_ratio: float
    values: Mapping[int, float]
    diverged: bool
    head_lr: float = 0.0


@dataclass(frozen=True, slots=True)
class RankFit:
    """One rank, in the gauge s = 1.

    Attributes:
        rank: r.
        trials: how many have a value at the step that is compared.
        diverged: how many blew up, whenever they did.
        observed: the best of the trials, None where there is none.
        missing: why the best lr is not located; empty where it is.
        at_edge: whether that is because the surface falls towards an end of the sampled range.
        lr, init_scale: where the surface is lowest; None where lr is not located.
        error: standard error of ln(lr).
    """

    rank: int
    trials: int
    diverged: int
    observed: Observation | None
    missing: str
    at_edge: bool = False
    lr: float | None = None
    init_scale: float | None = None
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Slope:
    """The line through the located ranks at s = 1.

    Attributes:
        beta: how steep it is.
        middle: (log r, log lr) of a point on it, the weighted middle of the ranks.
        replicates: of beta, [B]; NaN where one had no minimum.
    """

    beta: float
    middle: tuple[float, float]
    replicates: Array

    @property
    def interval(self) -> tuple[float, float]:
        """Of `LEVEL`."""
        low, high = np.nanquantile(self.replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def shares(self, shifts: Sequence[float]) -> list[float]:
        """Share of replicates in which each convention's slope is the flattest; equal slopes share a win."""
        slopes = np.abs(self.replicates[:, None] + np.array(shifts))
        flattest = slopes == slopes.min(axis=1, keepdims=True)  # NaN wins for nobody
        return [float(share) for share in flattest.mean(axis=0)]


@dataclass(frozen=True, slots=True)
class LrFit:
    """The step at which trials are compared, what was found at each rank, and the slope if two or more are located."""

    step: int | None
    ranks: tuple[RankFit, ...]
    slope: Slope | None


def fit_lr(observations: Sequence[Observation], *, sign: int, log_scale: bool, rng: np.random.Generator) -> LrFit:
    """Locates the best lr of every rank and fits its slope over rank, in the gauge s = 1.

    Args:
        observations: the trials.
        sign: what the metric is multiplied by so that less is better.
        log_scale: whether the metric spreads over orders of magnitude; its logarithm is fitted if all are positive.
        rng: for the bootstrap.
    """
    by_rank = {rank: [t for t in observations if t.rank == rank] for rank in sorted({t.rank for t in observations})}
    varied = ["lr"] + [
        name
        for name in ("init_scale", "lr_ratio", "head_lr")
        if any(_different([getattr(trial, name) for trial in trials]) > 1 for trials in by_rank.values())
    ]
    needed = 2 * len(varied) + 1
    step = _step_to_compare(by_rank, needed)
    if step is None:
        nothing = tuple(RankFit(rank, 0, _diverged(by_rank[rank]), None, "no trial") for rank in by_rank)
        return LrFit(None, nothing, None)
    compared = [trial.values[step] for trial in observations if step in trial.values and not trial.diverged]
    logarithm = log_scale and min(compared) > 0
    tables = [
        _Table.of(trials, step, varied, lambda value: sign * (math.log(value) if logarithm else value))
        for trials in by_rank.values()
    ]
    enough = [table for table in tables if not table.too_few(step, needed)]
    fits = {table.rank: _not_located(table, table.too_few(step, needed)) for table in tables}
    if not enough:
        return LrFit(step, tuple(fits.values()), None)
    best = _replicated_minima(enough, needed, rng)
    if best is None:
        why = "the trials are too few, or too much alike, for a surface"
        fits |= {table.rank: _not_located(table, why) for table in enough}
        return LrFit(step, tuple(fits.values()), None)
    errors = _spread(best[:, :, 0])
    fits |= {table.rank: _located(table, best[0, i], float(errors[i])) for i, table in enumerate(enough)}
    located = [i for i, table in enumerate(enough) if not fits[table.rank].missing]
    log_ranks = np.log([enough[i].rank for i in located])
    slope = _slope(best[:, located, 0], errors[located], log_ranks) if len(located) > 1 else None
    return LrFit(step, tuple(fits.values()), slope)


@dataclass(frozen=True)
class _Table:
    """The trials of a rank that have a value at the step: u [n, d], y [n]; and the range of lr that was sampled."""

    rank: int
    trials: tuple[Observation, ...]
    diverged: int
    varied: tuple[str, ...]
    u: Array
    y: Array
    span: tuple[float, float]

    @classmethod
    def of(
        cls, observed: Sequence[Observation], step: int, varied: Sequence[str], objective: Callable[[float], float]
    ) -> _Table:
        # One that blew up later on was no good lr either, whatever it looked like at this step. It has no value, but
        # where it was the lr has been tried.
        kept = tuple(trial for trial in observed if step in trial.values and not trial.diverged)
        tried = [math.log(trial.lr) for trial in observed if step in trial.values or trial.diverged]
        u = np.array([[math.log(getattr(trial, name)) for name in varied] for trial in kept]).reshape(-1, len(varied))
        y = np.array([objective(trial.values[step]) for trial in kept])
        span = (min(tried), max(tried)) if tried else (0.0, 0.0)
        return cls(observed[0].rank, kept, _diverged(observed), tuple(varied), u, y, span)

    def too_few(self, step: int, needed: int) -> str:
        """What is missing for a surface; empty if nothing is."""
        if len(self.y) < needed:
            return f"{_count(len(self.y), 'trial')} at step {step}, {needed} needed"
        if (lrs := _different(self.u[:, 0])) < _DIFFERENT_LRS:
            return f"{_count(lrs, 'learning rate')} tried, {_DIFFERENT_LRS} different ones needed"
        return ""

    def near_the_best(self, needed: int) -> npt.NDArray[np.intp]:
        """The trials that are fitted: half of them, those nearest in lr to the middle of the best quarter."""
        order = np.argsort(self.y, kind="stable")
        middle = np.median(self.u[order[: max(3, math.ceil(len(order) / 4))], 0])
        kept = min(len(order), max(2 * needed, math.ceil(len(order) / 2)))
        nearest = np.argsort(np.abs(self.u[:, 0] - middle), kind="stable")
        while kept < len(order) and _different(self.u[nearest[:kept], 0]) < _DIFFERENT_LRS:
            kept += 1
        return nearest[:kept]


def _step_to_compare(by_rank: Mapping[int, Sequence[Observation]], needed: int) -> int | None:
    """The last step at which every rank has enough trials; else the last of those at which most ranks have."""

    def ranks_with_enough(step: int) -> int:
        lrs = [[t.lr for t in trials if step in t.values and not t.diverged] for trials in by_rank.values()]
        return sum(len(found) >= needed and _different(found) >= _DIFFERENT_LRS for found in lrs)

    steps = {step for trials in by_rank.values() for trial in trials if not trial.diverged for step in trial.values}
    return max(steps, key=lambda step: (ranks_with_enough(step), step), default=None)


def _replicated_minima(tables: Sequence[_Table], needed: int, rng: np.random.Generator) -> Array | None:
    """Where each rank's surface is lowest, [1 + B, R, d]: as fitted, then in every replicate; NaN if not convex in lr.

    None where the trials do not determine the surfaces.
    """
    kept = [table.near_the_best(needed) for table in tables]
    rank_of = np.repeat(np.arange(len(tables)), [len(rows) for rows in kept])
    u = np.concatenate([table.u[rows] for table, rows in zip(tables, kept, strict=True)])
    y = np.concatenate([table.y[rows] for table, rows in zip(tables, kept, strict=True)])
    centre = u.mean(axis=0)
    (n, d), ranks = u.shape, len(tables)
    # Two values of a dimension show no curvature along it.
    bent = [max(_different(u[rank_of == r, i]) for r in range(ranks)) >= _DIFFERENT_LRS for i in range(d)]
    pairs = [(i, j) for i, j in combinations_with_replacement(range(d), 2) if i != j or bent[i]]
    own = (rank_of[:, None] == np.arange(ranks)).astype(float)
    v = u - centre
    columns = [own, *(own * v[:, [i]] for i in range(d))]
    columns += [(v[:, i] * v[:, j] * (0.5 if i == j else 1.0))[:, None] for i, j in pairs]
    design = np.concatenate(columns, axis=1)
    if n < design.shape[1] + 2 or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    solve = np.linalg.pinv(design)
    leverage = np.minimum(np.einsum("nk,kn->n", design, solve), _MOST_LEVERAGE)
    fitted = solve @ y
    residuals = (y - design @ fitted) / (1 - leverage)
    some = max(1, _AT_ONCE // n)
    sizes = [min(some, REPLICATES - first) for first in range(0, REPLICATES, some)]
    drawn = [(rng.choice([-1.0, 1.0], size=(size, n)) * residuals) @ solve.T for size in sizes]
    coefficients = np.concatenate([fitted[None], *(fitted + each for each in drawn)])
    g = coefficients[:, ranks : ranks * (1 + d)].reshape(-1, d, ranks).transpose(0, 2, 1)
    h = np.zeros((len(coefficients), d, d))
    for column, (i, j) in enumerate(pairs, start=ranks * (1 + d)):
        h[:, i, j] = h[:, j, i] = coefficients[:, column]
    minima = [_minima(g[:, r], h, table.u - centre) for r, table in enumerate(tables)]
    return np.asarray(np.stack(minima, axis=1) + centre)


def _minima(g: Array, h: Array, sampled: Array) -> Array:
    """Lowest points [B, d] of g u + u h u / 2 with lr free and the other dimensions within their sampled range."""
    h_lr = np.where(h[:, 0, 0] > 0, h[:, 0, 0], np.nan)[:, None]
    others = sampled.shape[1] - 1
    nodes = round(_NODES ** (1 / max(others, 1)))
    axes = [np.linspace(axis.min(), axis.max(), nodes) for axis in sampled[:, 1:].T]
    grid = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, others) if others else np.zeros((1, 0))
    slope = g[:, :1] + h[:, 0, 1:] @ grid.T  # along lr, at lr's centre; [B, nodes]
    along = g[:, 1:] @ grid.T + np.einsum("ni,bij,nj->bn", grid, h[:, 1:, 1:], grid) / 2
    lowest = np.argmin(np.nan_to_num(along - slope**2 / h_lr / 2, nan=0.0), axis=1)
    lr = -np.take_along_axis(slope, lowest[:, None], axis=1) / h_lr
    return np.concatenate([lr, grid[lowest]], axis=1)


def _slope(x: Array, errors: Array, log_ranks: Array) -> Slope:
    """Weighted least squares of x [1 + B, R] on log r."""
    # An error from a few residuals can be small by luck: none counts as less than half of the usual one.
    errors = np.maximum(errors, max(np.median(errors) / 2, _LEAST_ERROR))
    weights = errors**-2.0 / np.sum(errors**-2.0)
    middle = float(weights @ log_ranks), float(weights @ x[0])
    centred = log_ranks - middle[0]
    betas = x @ (weights * centred) / (weights @ centred**2)
    beta, factor = betas[0], 1.0
    if len(log_ranks) > 2:
        off = x[0] - middle[1] - beta * centred
        factor = max(1.0, math.sqrt(np.sum((off / errors) ** 2) / (len(log_ranks) - 2)))
    return Slope(float(beta), middle, beta + factor * (betas[1:] - beta))


def _located(table: _Table, best: Array, error: float) -> RankFit:
    low, high = table.span
    if not np.isfinite(best[0]):
        return _not_located(table, "no minimum: the surface is not convex in lr")
    if not low <= best[0] <= high:
        better = "lower" if best[0] < low else "higher"
        why = f"no minimum within the range of lr that was tried: {better} is better"
        return replace(_not_located(table, why), at_edge=True)
    # Two errors to either side would take in all that was sampled.
    if not 4 * error < high - low:
        return _not_located(table, "the minimum's error is as wide as the range of lr that was tried")
    found = _not_located(table, "")
    init_scale = math.exp(best[1]) if "init_scale" in table.varied else table.trials[0].init_scale
    return replace(found, lr=math.exp(best[0]), init_scale=init_scale, error=error)


def _not_located(table: _Table, why: str) -> RankFit:
    observed = table.trials[int(np.argmin(table.y))] if table.trials else None
    return RankFit(table.rank, len(table.trials), table.diverged, observed, why)


def _spread(replicates: Array) -> Array:
    """Standard error of x from [1 + B, R], by the quantiles that hold one deviation of a normal law."""
    if not np.isfinite(replicates[1:]).any():
        return np.full(replicates.shape[1], np.inf)
    low, high = np.nanquantile(replicates[1:], [0.1587, 0.8413], axis=0)
    return np.asarray((high - low) / 2)


def _different(values: Sequence[float] | Array) -> int:
    """How many values differ by more than rounding; a gauge multiplies equal ones by equal factors."""
    return len({f"{value:.9g}" for value in values})


def _diverged(trials: Sequence[Observation]) -> int:
    return sum(trial.diverged for trial in trials)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
