"""The Optuna study of a sweep: asks for points, prunes at rungs, is told values. The only file that imports optuna.

The study lives in memory and is nobody's truth: the ledger is, and `ask_known` and `tell` rebuild a study from it. The
sampler's seed for trial n is derived from the spec's seed and n, so that a suggestion depends on what was told before
it and on nothing else, a restart least of all.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial, TrialState

from sweeps.canonical import Continuous, Dimension, Integer, Ordinal
from sweeps.events import TrialState as Ending
from sweeps.spec import Goal, MedianPruner, SearchSpec, SuccessiveHalving

_SEES_FINISHED_TRIALS_ONLY = ("gp", "cmaes")

_SMALLEST = 2.0**-52
"""Where values are modelled by their logarithm, those below this (a loss of exactly 0 too) count as this."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A point that the study proposes.

    Attributes:
        number: the trial's number.
        values: by dimension.
        by_sampler: whether the method itself chose them, rather than chance or whoever rebuilt the study.
    """

    number: int
    values: dict[str, float]
    by_sampler: bool


class Study:
    """An in-memory Optuna study over the dimensions of a canonical space."""

    def __init__(
        self,
        dimensions: tuple[Dimension, ...],
        search: SearchSpec,
        *,
        goal: Goal,
        rungs: tuple[int, ...],
        log_scale: bool = False,
    ) -> None:
        """Starts an empty study.

        Args:
            dimensions: what is searched.
            search: method, pruner and seed.
            goal: `minimize` or `maximize`.
            rungs: steps at which trials report, ascending.
            log_scale: whether values are positive and spread over orders of magnitude.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._dimensions = {dimension.name: dimension for dimension in dimensions}
        self._distributions = {dimension.name: _distribution(dimension) for dimension in dimensions}
        self._search = search
        # A Gaussian process takes its values for normally distributed, and one trial that blew up would flatten all the
        # others; the other samplers look at the order of values only.
        self._log_scale = log_scale and search.method == "gp"
        self._rungs = rungs
        self._report_steps = _report_steps(search, rungs)
        self._study = optuna.create_study(
            direction=goal, pruner=_pruner(search), sampler=optuna.samplers.RandomSampler()
        )
        self._halving = _Halving(search.pruner, goal) if isinstance(search.pruner, SuccessiveHalving) else None
        self._open: dict[int, Trial] = {}
        self._count = 0

    @property
    def count(self) -> int:
        """How many trials it has: the number of the next one."""
        return self._count

    def ask(self, *, at_random: bool = False) -> Suggestion | None:
        """Proposes a point; None where a grid has no more.

        Args:
            at_random: whether the point is drawn at random whatever the method, because that repeats itself.
        """
        number = self._count
        if self._search.method == "grid":
            (grid,) = self._dimensions.values()
            assert isinstance(grid, Ordinal), "a grid is searched by the number of the class"
            if number >= len(grid.values):
                return None
            return self.ask_known({grid.name: grid.values[number]}, by_sampler=False)
        return self._ask("random" if at_random else self._search.method, by_sampler=not at_random)

    def ask_known(self, values: Mapping[str, float], *, by_sampler: bool) -> Suggestion:
        """Opens the next trial at a known point.

        Args:
            values: the point, by dimension.
            by_sampler: whether the method chose it, when the study that is rebuilt here was asked. CMA-ES notes on
                its own trials where it stands, so it is asked again and makes the same notes; the others need not be.
        """
        self._study.enqueue_trial({name: _to_param(self._dimensions[name], value) for name, value in values.items()})
        again = by_sampler and self._search.method == "cmaes"
        return self._ask("cmaes" if again else "random", by_sampler=by_sampler)

    def _ask(self, method: str, *, by_sampler: bool) -> Suggestion:
        self._study.sampler = _sampler(method, _seed(self._search.seed, self._count))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self._study.ask(self._distributions)
            _ = trial.relative_params  # asks the sampler itself, which a known point alone would not
        self._open[trial.number] = trial
        self._count = trial.number + 1
        values = {name: _from_param(self._dimensions[name], trial.params[name]) for name in self._dimensions}
        return Suggestion(trial.number, values, by_sampler)

    def prune(self, step: int, values: Mapping[int, float]) -> frozenset[int]:
        """Reports the values of a pack's trials at a rung, and returns the numbers of those that the pruner ends.

        The whole pack is reported before the first decision, and all decisions see all of it: Optuna's pruners decide
        on what has been reported so far, which within a pack would favour whoever happened to come first.
        """
        report_step = self._report_steps[step]
        for number, value in values.items():
            self._open[number].report(value, report_step)
        if step == self._rungs[-1]:
            return frozenset()
        if self._halving is not None:
            return self._halving.prune(step, values)
        return frozenset(n for n in values if self._study.pruner.prune(self._study, self._frozen(n)))

    def tell(self, number: int, state: Ending, value: float | None) -> None:
        """Closes a trial.

        Samplers that look at finished trials only are told a pruned trial's last value as if it had finished: they
        would otherwise propose the same bad region again.
        """
        trial = self._open.pop(number)
        if state == "finished" or (state == "pruned" and self._search.method in _SEES_FINISHED_TRIALS_ONLY):
            if self._log_scale and value is not None:
                value = math.log(max(value, _SMALLEST))
            self._study.tell(trial, value)
        elif state == "pruned":
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, state=TrialState.FAIL)

    def _frozen(self, number: int) -> optuna.trial.FrozenTrial:
        trial = self._open[number]
        return trial.storage.get_trial(trial._trial_id)


class _Halving:
    """Optuna's rule of successive halving, over values that are kept in order.

    Optuna's own pruner goes through all trials for each decision, which at 100,000 of them is a tenth of a second a
    trial. The rule is the same, and a test holds the two to each other: a trial goes on if its value is among the best
    1 in `factor` of all that were reported at the rung, its own counted once more; the first `factor` - 1 go on if they
    are the best.
    """

    def __init__(self, pruner: SuccessiveHalving, goal: Goal) -> None:
        self._factor, self._sign = pruner.reduction_factor, 1 if goal == "minimize" else -1
        self._ranked: dict[int, list[float]] = {}

    def prune(self, step: int, values: Mapping[int, float]) -> frozenset[int]:
        """Enters a pack's values at a rung, and returns the numbers of those that do not go on."""
        ranked = self._ranked.setdefault(step, [])
        for value in values.values():
            insort(ranked, self._sign * value)
        last = max(0, (len(ranked) + 1) // self._factor - 1)
        return frozenset(n for n, value in values.items() if bisect_left(ranked, self._sign * value) > last)


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4])


def _sampler(method: str, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match method:
            case "gp":
                return optuna.samplers.GPSampler(seed=seed)
            case "tpe":
                return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
            case "cmaes":
                return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
            case _:
                return optuna.samplers.RandomSampler(seed=seed)


def _pruner(search: SearchSpec) -> optuna.pruners.BasePruner:
    match search.pruner:
        case SuccessiveHalving(reduction_factor=factor):
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor)
        case MedianPruner(warmup_trials=warmup_trials):
            return optuna.pruners.MedianPruner(n_startup_trials=warmup_trials)
        case _:
            return optuna.pruners.NopPruner()


def _report_steps(search: SearchSpec, rungs: tuple[int, ...]) -> dict[int, int]:
    """The step under which each rung is reported to Optuna.

    Its successive halving knows rungs at min_resource * factor**i only; reporting rung i as factor**i lets a spec put
    its rungs where it likes.
    """
    if isinstance(search.pruner, SuccessiveHalving):
        return {rung: search.pruner.reduction_factor**i for i, rung in enumerate(rungs)}
    return {rung: rung for rung in rungs}


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Continuous):
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    if isinstance(dimension, Integer):
        return IntDistribution(dimension.low, dimension.high, log=dimension.log)
    return IntDistribution(0, len(dimension.values) - 1)


def _to_param(dimension: Dimension, value: float) -> float | int:
    if isinstance(dimension, Continuous):
        return value
    if isinstance(dimension, Integer):
        return round(value)
    return min(range(len(dimension.values)), key=lambda i: math.fabs(dimension.values[i] - value))


def _from_param(dimension: Dimension, param: float) -> float:
    return dimension.values[int(param)] if isinstance(dimension, Ordinal) else param
