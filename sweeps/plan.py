"""What would run, before it runs: the reduction's accounting, trials, rungs, packs, and what they cost.

K   members to a pack
rungs r_1 < ... < r_m: member-steps expected of successive halving by factor f are
    trials (r_1 + sum over i >= 2 of (r_i - r_{i-1}) / f**(i-1))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from sweeps.canonical import CanonicalSpace, ClassGrid, Continuous, Dimension, Integer, TrialSpace
from sweeps.errors import InputError
from sweeps.reduction import MOST_CONFIGURATIONS, Reduction
from sweeps.spec import MedianPruner, SuccessiveHalving, SweepSpec
from sweeps.spec_sections import MOST_TRIALS

_DEFAULT_TRIALS = 64
_LARGEST_AUTO_PACK = 64
_PACKS_TO_LEARN_FROM = 8
"""An automatic pack leaves the sampler at least so many rounds to learn in."""


_ASKING = {"gp": (2_000, 33.0, 3), "tpe": (10_000, 0.11, 1), "cmaes": (2_000, 0.0096, 1)}
"""Trials known, seconds of one CPU core that the sampler then takes to suggest another, and the power of the trials
that these grow with: docs/scale.md says how they were measured."""

_MANY_WORKERS = 32
"""From so many on, waiting for the slowest of them costs more than a fifth to a half of their time."""

_LONG_ASKING_S = 3600.0
"""A search whose sampler takes longer than this in all is warned of."""


class Outside(BaseModel):
    """What part of the user's space the search does not reach."""

    model_config = ConfigDict(frozen=True)

    share: float
    """Between 0 and 1, of the space as the user wrote it, log-uniform in its ranges."""
    explanation: str


class Plan(BaseModel):
    """What would run."""

    model_config = ConfigDict(frozen=True)

    optimizer: str
    dtype: str | None = None
    """Number format of the training, `auto` found out; None in plans from before it was kept."""
    law: str
    """What the same run has at k times the alpha, in words."""
    reference_alpha: str
    configurations: int | None
    """Of the space as the user wrote it; None where it is continuous."""
    classes: int | None
    """Groups of configurations that are one training run; None where the space is continuous."""
    dimensions: Mapping[str, tuple[str, ...]]
    """`before` and `after` the reduction."""
    space: tuple[dict[str, Any], ...]
    """What the sampler searches: each dimension with its values, or its bounds."""
    method: str
    trials: int
    rungs: tuple[int, ...]
    """Steps at which trials report."""
    pack: int
    """Members to a pack."""
    workers: int
    base_bytes: int | None = None
    """Of the base model, which a pack has once; None where it was not looked at."""
    member_bytes: int | None = None
    """What each member adds to it at most; None where that could not be counted."""
    member_steps: int
    """Steps of training expected, summed over members; a pruned trial does not take all of its own."""
    certificates: int
    """Classes whose twins are trained."""
    seconds: float | None
    """Training time expected on all workers together; None where it has not been measured."""
    untimed: str = ""
    """Why it could not be measured, where it should have been."""
    outside: Outside
    warnings: tuple[str, ...]

    def with_memory(self, base_bytes: int, member_bytes: int) -> Plan:
        """The plan with the bytes of the base model and of each member."""
        return self.model_copy(update={"base_bytes": base_bytes, "member_bytes": member_bytes})

    def with_warning(self, text: str) -> Plan:
        """The plan with one warning more; as it is where there is none."""
        return self.model_copy(update={"warnings": (*self.warnings, text)}) if text else self

    def without_time(self, reason: str) -> Plan:
        """The plan with the reason why its time is not known."""
        return self.model_copy(update={"untimed": reason})

    def with_time(self, seconds_per_member_step: float) -> Plan:
        """The plan with its time.

        Args:
            seconds_per_member_step: measured on this machine, of a full pack on one worker.
        """
        return self.model_copy(update={"seconds": self.member_steps * seconds_per_member_step / self.workers})

    def with_trials(self, spec: SweepSpec, trials: int) -> Plan:
        """The plan with so many trials in all, and what they cost; packs and workers stay as they are."""
        member_steps = _member_steps(spec, trials, self.rungs)
        changes = {
            "trials": trials,
            "member_steps": member_steps,
            # A plan without any stays so: nothing was eliminated, or nobody wants one.
            "certificates": min(spec.certify.classes, trials) if self.certificates else 0,
            "seconds": None if self.seconds is None else self.seconds * member_steps / self.member_steps,
        }
        return self.model_copy(update=changes)


def trial_space(spec: SweepSpec, reduction: Reduction) -> TrialSpace:
    """Where the trials of a spec come from."""
    return ClassGrid(reduction) if spec.search.method == "grid" else CanonicalSpace.of(spec, reduction)


def make_plan(spec: SweepSpec, reduction: Reduction, *, workers: int, most_members: int | None) -> Plan:
    """Plans a sweep.

    Args:
        spec: the sweep's spec.
        reduction: its reduction.
        workers: how many jobs can run at once.
        most_members: the largest pack that a worker's memory holds; None where that is not known.

    Raises:
        InputError: a grid that is too large to be enumerated, or a pack that is too large for the memory.
    """
    canonical = CanonicalSpace.of(spec, reduction)
    grid = spec.search.method == "grid"
    classes = len(reduction.classes) if reduction.classes is not None else None
    if grid and classes is None:
        raise InputError(
            f"search.method: grid takes at most {MOST_CONFIGURATIONS:,} configurations; found "
            f"{reduction.space.size:,}; list fewer values, or let gp or tpe choose among them"
        )
    distinct = _distinct(spec, canonical, classes)
    trials = spec.search.trials or (distinct if grid and distinct else _DEFAULT_TRIALS)
    trials = min(trials, distinct) if distinct else trials
    rungs = spec.search.rungs(spec.train.steps)
    pack = _pack_size(spec, trials, workers, most_members)
    member_steps = _member_steps(spec, trials, rungs)
    return Plan(
        optimizer=spec.train.optimizer,
        dtype=spec.train.dtype,
        law=reduction.law.describe(),
        reference_alpha=str(reduction.reference),
        configurations=reduction.space.size,
        classes=classes,
        dimensions={
            "before": reduction.space.searched,
            "after": tuple(dimension.name for dimension in canonical.dimensions),
        },
        space=tuple(_describe(dimension) for dimension in canonical.dimensions),
        method=spec.search.method,
        trials=trials,
        rungs=rungs,
        pack=pack,
        workers=workers,
        member_steps=member_steps,
        certificates=min(spec.certify.classes, trials) if reduction.eliminated else 0,
        seconds=None,
        outside=_outside(spec, canonical),
        warnings=(
            *_warnings(spec, reduction, trials, distinct),
            *_order_warnings(spec, workers),
            *_memory_warnings(pack, most_members),
        ),
    )


def extended(plan: Plan, spec: SweepSpec, trials: int) -> Plan:
    """Plans a sweep that is given more trials than it has.

    Args:
        plan: what the sweep has now.
        spec: its spec.
        trials: how many it is to train in all.

    Raises:
        InputError: it has as many already, or there are not so many different runs, or no sweep may have so many.
    """
    distinct = _distinct(spec, CanonicalSpace.of(spec, Reduction.of(spec)), plan.classes)
    if distinct is not None and plan.trials >= distinct:
        only = "there is only one run" if distinct == 1 else f"there are only {distinct:,} different runs"
        has = "every class of its grid" if spec.search.method == "grid" else "all of them"
        raise InputError(
            f"a sweep with more trials must have runs that it has not trained; found none: {only}, and it has {has}; "
            "write a spec with more values or with ranges, and run that"
        )
    if trials <= plan.trials:
        raise InputError(
            f"trials are counted in all, so there must be more than the {plan.trials:,} that the sweep has already; "
            f"found {trials:,}; name a larger number, or leave it out to go on with those"
        )
    most = min(MOST_TRIALS, distinct or MOST_TRIALS)
    if trials > most:
        why = f", for there are only {distinct:,} different runs" if most == distinct else ""
        raise InputError(f"trials must be at most {most:,}{why}; found {trials:,}; name a number up to that")
    return plan.with_trials(spec, trials)


def _distinct(spec: SweepSpec, canonical: CanonicalSpace, classes: int | None) -> int | None:
    """How many different runs there are; None where the space is continuous."""
    return classes if spec.search.method == "grid" else canonical.size


def most_workers(spec: SweepSpec, trials: int) -> int:
    """So many workers can do something for a sweep in packs of one trial, and leave its sampler rounds to learn in."""
    return max(1, math.ceil(trials / _rounds(spec)))


def _rounds(spec: SweepSpec) -> int:
    return 1 if spec.search.method in ("grid", "random") else _PACKS_TO_LEARN_FROM


def _pack_size(spec: SweepSpec, trials: int, workers: int, most_members: int | None) -> int:
    """The pack size of the spec; automatic: the largest power of two that memory, the sampler and the workers like."""
    if spec.compute.pack != "auto":
        pack = min(spec.compute.pack, trials)
        if most_members is not None and pack > most_members:
            raise InputError(
                f"compute.pack: required at most {most_members:,} members, which is what the memory of each of "
                f"{workers:,} {'worker' if workers == 1 else 'workers'} holds; found {pack:,}; write a smaller pack, "
                "pack: auto, or fewer workers"
            )
        return pack
    rounds = _rounds(spec)
    limit = _LARGEST_AUTO_PACK if most_members is None else min(most_members, _LARGEST_AUTO_PACK)
    wanted = max(1, min(limit, trials // max(rounds, workers)))
    return int(2 ** math.floor(math.log2(wanted)))


def _member_steps(spec: SweepSpec, trials: int, rungs: tuple[int, ...]) -> int:
    match spec.search.pruner:
        case SuccessiveHalving() as pruner:
            factor = pruner.reduction_factor
        case MedianPruner():
            factor = 2
        case _:
            factor = 1
    stretches = zip((0, *rungs), rungs, strict=False)
    return sum(round(max(1.0, trials / factor**i) * (stop - start)) for i, (start, stop) in enumerate(stretches))


def _describe(dimension: Dimension) -> dict[str, Any]:
    if isinstance(dimension, Continuous | Integer):
        distribution = "log_uniform" if dimension.log else "uniform"
        return {"name": dimension.name, "min": dimension.low, "max": dimension.high, "distribution": distribution}
    return {"name": dimension.name, "values": list(dimension.values)}


def _outside(spec: SweepSpec, canonical: CanonicalSpace) -> Outside:
    if spec.search.method == "grid":
        return Outside(share=0.0, explanation="a grid trains every class")
    share = canonical.share_outside()
    if not canonical.reduction.eliminated:
        explanation = "nothing was eliminated, so the space is searched as it stands"
    elif canonical.widened:
        explanation = "the ranges are widened to reach every corner that alpha did"
    else:
        explanation = (
            f"the ranges stand at alpha = {canonical.reduction.reference}; the rest needs lr or init_scale beyond them "
            "(reduction.ranges: widen searches it too, at 1.5 to 2 times the trials)"
        )
    return Outside(share=share, explanation=explanation)


def _memory_warnings(pack: int, most_members: int | None) -> list[str]:
    if most_members is not None or pack == 1:
        return []
    return [
        f"the memory of the workers is not known here: packs start with {pack} members, and are halved if that is too "
        "much for them"
    ]


def _warnings(spec: SweepSpec, reduction: Reduction, trials: int, distinct: int | None) -> list[str]:
    found = [reduction.stuck] if reduction.stuck else []
    searched = reduction.space.searched
    if "alpha" in reduction.eliminated and "init_scale" not in searched and not reduction.two_parameter:
        found.append(
            "alpha is searched and init_scale is not: alpha was an init-scale knob, and init_scale takes its place"
        )
    if "lr_ratio" in searched and reduction.clip_norm is not None:
        found.append("clip_norm ties A and B together, so lr_ratio eliminates alpha only, and init_scale stays")
    if spec.train.unused:
        found.append(f"{spec.train.optimizer} has no {' and no '.join(spec.train.unused)}: not used")
    if not spec.train.law.scheduled and spec.train.schedule != "constant":
        found.append(f"{spec.train.optimizer} reads lr at its first step only: schedule has no effect")
    if spec.search.trials and distinct and spec.search.trials > distinct:
        found.append(
            f"search.trials is {spec.search.trials}, but there are only {distinct} different runs: {trials} trials"
        )
    return [*found, *_asking_warnings(spec.search.method, trials)]


def _order_warnings(spec: SweepSpec, workers: int) -> list[str]:
    """That many workers in the reproducible order wait for the slowest of them."""
    if spec.search.order == "asynchronous" or workers < _MANY_WORKERS:
        return []
    return [
        f"search.order reproducible lets {workers:,} workers wait for the slowest job under way: where job times "
        "spread by 30 %, 100 are in use 59 % of the time and 1,000 are 47 % (docs/scale.md); asynchronous never waits"
    ]


def _asking_warnings(method: str, trials: int) -> list[str]:
    """What the sampler takes of the driver, where that is much: for c n**p a suggestion, c n**(p+1) / (p+1) in all."""
    if method not in _ASKING:
        return []
    known, seconds, power = _ASKING[method]
    each_s = seconds * (trials / known) ** power
    total_s = each_s * trials / (power + 1)
    if total_s <= _LONG_ASKING_S:
        return []
    other = "tpe or random take" if method == "gp" else "random takes"
    return [
        f"search.method {method} takes longer to suggest a trial the more it knows: some {_rough(each_s)} each at "
        f"{trials:,} and {_rough(total_s)} in all, on one core of the driver, while workers wait; {other} less"
    ]


def _rough(seconds: float) -> str:
    """A time in the unit that it is read in, to one digit or two."""
    for size, unit in ((86_400.0, "days"), (3_600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):,.0f} {unit}"
    return f"{seconds:.2g} s"
