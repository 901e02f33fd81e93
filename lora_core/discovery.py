"""The law of an optimizer that the table does not have, found by training twins.

    symbol    meaning
    k         the factor on alpha
    f         the gauge's factor on either adapter factor: A -> A / f, B -> B / f, with f = sqrt(k)
    power     of a constant: it becomes constant x f**power, so a power is twice the exponent of k
    telling   of a constant: at this value, doubling it changes the run
    moved     of a constant: its power is not 0

In a gauge of powers of two every factor is exact in binary, so a right set of powers gives the same run bit for bit and
a wrong one another. That makes a search possible without knowing the formula:

    1. the representative, twice               training must be deterministic, else no bit proves anything
    2. make constants tell                     a constant that changes nothing would pass with any power
    3. k = 4: all powers of lr from -4 to 4    with no constant moved, then one, then two; the first number that works
    4. k = 1/16, 1/4, 4, 16, 256               what works at k = 4 must work there
    5. 3 and 4 for weight decay                by itself: its power is free of the others'

What is found is a property of the formula on this task and at these values: a branch that no run took is not known of.
It is no proof for other values, and there is no other kind of exponent than these nine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from lora_core.foreign import ForeignOptimizer
from lora_core.gauge import Gauge, Point, moved, regauge
from lora_core.laws import Constant
from lora_core.trajectory import Trajectory, align

TRIED_AT = 4.0
"""The k at which candidates are tried; f = 2."""
CONFIRMED_AT = (1 / 16, 1 / 4, 4.0, 16.0, 256.0)
"""The k at which a finding must hold."""
POWERS = range(-4, 5)
"""Of sqrt(k): exponents of k from -2 to 2 by halves."""
MOST_MOVED = 2
"""Constants that may have to move, besides lr and weight decay."""

_DECADES = 8
_DECAY = 1e-2  # where the search for a telling weight decay starts

Run = Callable[[Point, int], Trajectory]
"""Trains a point for that many steps, always the same way; raises when the optimizer refuses a constant."""


# -- what is found -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exponents:
    """How an optimizer's constants move: `gauge.Powers`. Constants that do not are left out."""

    lr_power: int
    decay_power: int = 0
    powers: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """`lr / sqrt(k), eps x sqrt(k)`."""
        return ", ".join(_in_words(name, power) for name, power in {"lr": self.lr_power, **self.powers}.items())


@dataclass(frozen=True, slots=True)
class Discovery:
    """What was found.

    Attributes:
        optimizer: its name.
        steps: the length of the runs that were compared.
        powers: the exponents; None if there are none.
        alternatives: other exponents that hold as well (tried without weight decay).
        confirmed: the k at which `powers` was bit-identical.
        weight_decay: the value at which its power was found; None if there is none, or it changes nothing.
        without_decay: exponents that hold as long as weight decay is 0, where none hold with it.
        clipped: whether the task clips the gradient norm.
        telling: constants that make a difference here; those of them that `powers` has not stay as they are.
        shifted: constants that were given another value than their default to make them tell.
        set_aside: constants that were left alone, and why.
        nearest: the exponents that came nearest, where there are none.
        parts_at: the first step at which those part from the representative.
        parts_at_k: the k at which they do.
        runs: runs that were trained.
        obstacle: why nothing could be looked for; None if it could.
    """

    optimizer: str
    steps: int
    powers: Exponents | None = None
    alternatives: tuple[Exponents, ...] = ()
    confirmed: tuple[float, ...] = ()
    weight_decay: float | None = None
    without_decay: Exponents | None = None
    clipped: bool = False
    telling: tuple[str, ...] = ()
    shifted: Mapping[str, Constant] = field(default_factory=dict)
    set_aside: Mapping[str, str] = field(default_factory=dict)
    nearest: Exponents | None = None
    parts_at: int | None = None
    parts_at_k: float | None = None
    runs: int = 0
    obstacle: str | None = None

    @property
    def text(self) -> str:
        """The finding in a sentence or two."""
        if self.powers is not None:
            at = ", ".join(_fraction(k) for k in self.confirmed)
            said = f"{self._same_run(self.powers)}: bit-identical over {self.steps} steps at k = {at}"
            others = "; ".join(self._moves(each) for each in self.alternatives)
            return f"{said}. So is each of these, and it is not known which one is meant: {others}" if others else said
        if self.obstacle is not None:
            said = f"nothing can be found: {self.obstacle}"
        else:
            said = "it has no law with half-integer exponents"
        if self.obstacle is None and len(self.telling) > MOST_MOVED:
            said += f" with at most {MOST_MOVED} of {', '.join(self.telling)} moved"
        if self.obstacle is None and self.nearest is not None:
            where = "" if self.parts_at_k == TRIED_AT else f" at k = {_fraction(self.parts_at_k or 0)}"
            decay = f", {_in_words('weight_decay', self.nearest.decay_power)}" if self.without_decay else ""
            said += f": the nearest, {self.nearest.describe()}{decay}, parts at step {self.parts_at}{where}"
        return f"{said}. Without weight decay {self._same_run(self.without_decay)}" if self.without_decay else said

    def lost(self) -> Discovery:
        """The same with no exponents but those without weight decay."""
        return replace(self, powers=None, alternatives=(), confirmed=(), without_decay=self.powers)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it, the text included."""
        return {**asdict(self), "text": self.text}

    def _same_run(self, powers: Exponents) -> str:
        return f"at alpha x k the same run has {self._moves(powers)}"

    def _moves(self, powers: Exponents) -> str:
        moves = {"lr": powers.lr_power, "init_scale": -1, **powers.powers}
        if self.weight_decay is not None and self.powers is not None:
            moves["weight_decay"] = powers.decay_power
        if self.clipped:
            moves["clip_norm"] = 1
        return ", ".join(_in_words(name, power) for name, power in moves.items())


def _in_words(name: str, power: int) -> str:
    if power == 0:
        return f"{name} unchanged"
    return f"{name} {'x' if power > 0 else '/'} {('sqrt(k)', 'k', 'k**1.5', 'k**2')[abs(power) - 1]}"


def _fraction(k: float) -> str:
    return f"{k:g}" if k >= 1 else f"1/{1 / k:g}"


# -- the search --------------------------------------------------------------------------------------------------------


def find_law(
    run: Run,
    point: Point,
    kind: ForeignOptimizer,
    *,
    steps: int = 50,
    few_steps: int = 4,
    most_runs: int = 5000,
    progress: Callable[[int, str], None] = lambda done, text: None,
) -> Discovery:
    """Looks for the exponents of an optimizer on a task.

    Args:
        run: trains a point with that optimizer.
        point: the representative; its lr must be one that the optimizer learns with. Its constants and weight decay
            are not read: constants start from the optimizer's defaults, and weight decay from 0.
        kind: the optimizer.
        steps: of a run that counts.
        few_steps: of a run that sorts a candidate out; more than a warm-up has.
        most_runs: after as many the search is given up.
        progress: gets the number of runs done and what is being done, before each.

    Raises:
        ValueError: the optimizer does not take the representative itself.
    """
    search = _Search(run, kind, steps, min(few_steps, steps), most_runs, progress)
    settings = [replace(each, weight_decay=0.0, constants=kind.constants) for each in (point.a, point.b)]
    search.found = Discovery(kind.name, steps, clipped=point.clip_norm is not None)
    try:
        search.discover(replace(point, a=settings[0], b=settings[1]))
    except _CannotFindError as obstacle:
        search.found = replace(search.found.lost(), obstacle=str(obstacle))
    return replace(search.found, runs=search.runs)


class _CannotFindError(Exception):
    """The search cannot go on; the message says why."""


@dataclass
class _Search:
    """One search: what has been found so far, and how near the nearest candidate came.

    Attributes:
        nearness: of the nearest candidate that failed: gauges held, first step that parts, constants left alone, and
            how little that step differs.
    """

    run: Run
    kind: ForeignOptimizer
    steps: int
    few_steps: int
    most_runs: int
    progress: Callable[[int, str], None]
    runs: int = 0
    lr_powers: Sequence[int] = POWERS
    nearness: tuple[int, int, int, float] = (-1, 0, 0, 0.0)
    found: Discovery = field(init=False)

    def discover(self, point: Point) -> None:
        """Fills `found` in."""
        self._check_deterministic(point)
        point = self._make_constants_tell(point)
        holding: list[Exponents] = []
        for count in range(min(MOST_MOVED, len(self.found.telling)) + 1):
            holding = self._holding(point, self._candidates(count))
            if holding:
                break
        if not holding:
            return
        powers = holding[0]
        self.found = replace(self.found, powers=powers, alternatives=tuple(holding[1:]), confirmed=CONFIRMED_AT)
        if self.kind.has_decay:
            self._find_decay(point, powers)
        if self.found.powers is not None:
            self.found = replace(self.found, nearest=None, parts_at=None, parts_at_k=None)

    def _find_decay(self, point: Point, powers: Exponents) -> None:
        value = self._tell("weight_decay", point, _DECAY, _with_decay)
        if not isinstance(value, float):
            self.found = replace(self.found, set_aside={**self.found.set_aside, "weight_decay": str(value)})
            return
        self.nearness = (-1, 0, 0, 0.0)
        candidates = [replace(powers, decay_power=power) for power in sorted(POWERS, key=abs)]
        holding = self._holding(_with_decay(point, value), candidates)
        self.found = replace(self.found, weight_decay=value)
        if holding:
            alternatives = (*holding[1:], *self.found.alternatives)
            self.found = replace(self.found, powers=holding[0], alternatives=alternatives)
        else:
            self.found = self.found.lost()

    # -- what the task and the constants are good for --

    def _check_deterministic(self, point: Point) -> None:
        one, other = (self._train(point, self.steps, "the representative, twice") for _ in range(2))
        comparison = align(one, other, ())
        if comparison.first_difference is not None:
            raise _CannotFindError(
                "training is not deterministic here: two runs of the same point part at step "
                f"{comparison.first_difference}"
            )
        if not self._alive(one):
            raise _CannotFindError("the representative diverges or stays where it is: choose another learning rate")

    def _make_constants_tell(self, point: Point) -> Point:
        """The representative with constants at values at which they tell."""
        found: dict[str, Constant | str] = {}
        for name, default in self.kind.constants.items():
            # Beside those that have been shifted before it, which might hide it.
            value = found[name] = self._tell(name, point, default, partial(_with_constant, name=name))
            if not isinstance(value, str):
                point = _with_constant(point, value, name=name)
        telling = {name: value for name, value in found.items() if not isinstance(value, str)}
        shifted = {name: value for name, value in telling.items() if value != self.kind.constants[name]}
        set_aside = {name: value for name, value in found.items() if isinstance(value, str)}
        for name in [*telling] if shifted and len(telling) > 1 else []:
            # And beside those shifted after it.
            if isinstance(self._tell(name, point, telling[name], partial(_with_constant, name=name), decades=1), str):
                set_aside[name] = f"makes no difference here beside {', '.join(sorted(shifted.keys() - {name}))}"
                del telling[name]
        lone, double = (self._attempt(_with_lr(point, factor), self.steps, "lr: a difference?") for factor in (1, 2))
        if lone is not None and double is not None and _parting(lone, double) is None:
            self.lr_powers = (0,)  # it would pass with any
            set_aside["lr"] = "makes no difference here"
        self.found = replace(self.found, telling=tuple(telling), shifted=shifted, set_aside=set_aside)
        return point

    def _tell(
        self,
        name: str,
        point: Point,
        default: Constant,
        put: Callable[[Point, Constant], Point],
        *,
        decades: int = _DECADES,
    ) -> Constant | str:
        """The default x 10**j nearest to it at which doubling makes a difference, or why there is none.

        A floor, such as eps, tells once it is large enough, and a ceiling, such as a clip, once it is small enough.
        """
        doing, closed = f"{name}: a difference?", set[bool]()
        for decade in sorted(range(1 - decades, decades), key=lambda each: (abs(each), -each)):
            if (decade > 0) in closed:
                continue
            value = moved(default, 10.0, decade)
            lone, double = (self._attempt(put(point, each), self.steps, doing) for each in (value, moved(value, 2, 1)))
            if decade == 0 and double is None:
                return "refused when doubled, so a pure number"
            if lone is None or double is None or not self._alive(lone):
                closed.add(decade > 0)  # what lies farther out is no better
            elif _parting(lone, double) is not None:
                return value
        return "makes no difference here" + (" at values with which training works" if closed else "")

    # -- candidates --

    def _candidates(self, count: int) -> list[Exponents]:
        """Every power of lr with that many constants moved, the smallest powers first."""
        candidates = [
            Exponents(lr_power, powers=dict(zip(names, powers, strict=True)))
            for names in itertools.combinations(self.found.telling, count)
            for powers in itertools.product([power for power in POWERS if power], repeat=count)
            for lr_power in self.lr_powers
        ]
        return sorted(candidates, key=lambda each: abs(each.lr_power) + sum(map(abs, each.powers.values())))

    def _holding(self, point: Point, candidates: Sequence[Exponents]) -> list[Exponents]:
        """The candidates that hold at every k, in their order."""
        few = self._train(point, self.few_steps, "the representative, a few steps")
        whole = self._train(point, self.steps, "the representative")
        left: Iterable[Exponents] = candidates
        left = [each for each in left if self._holds(few, point, each, TRIED_AT)]
        left = [each for each in left if self._holds(whole, point, each, TRIED_AT)]
        rest = [k for k in CONFIRMED_AT if k != TRIED_AT]
        return [each for each in left if all(self._holds(whole, point, each, k, held=1) for k in rest)]

    def _holds(self, base: Trajectory, point: Point, powers: Exponents, k: float, *, held: int = 0) -> bool:
        """Whether the twin is the same run; if it is not, notes how near it came."""
        steps = len(base.losses)
        decay = f", {_in_words('weight_decay', powers.decay_power)}" if point.a.weight_decay else ""
        doing = f"k = {_fraction(k)}: {powers.describe()}{decay}, {steps} steps"
        twin = self._attempt(regauge(point, Gauge.of_alpha(k), powers), steps, doing)
        if twin is None:  # refused: no run, so no step at which it parts
            return False
        comparison = align(base, twin, ())
        parting = comparison.first_difference
        if parting is None:
            return True
        nearness = (held, parting, -len(powers.powers), -float(comparison.deviation_TQ[parting - 1].max()))
        if nearness > self.nearness:
            self.nearness = nearness
            self.found = replace(self.found, nearest=powers, parts_at=parting, parts_at_k=k)
        return False

    # -- runs --

    def _train(self, point: Point, steps: int, doing: str) -> Trajectory:
        if self.runs >= self.most_runs:
            raise _CannotFindError(f"given up after {self.runs} runs, as many as were allowed")
        self.progress(self.runs, doing)
        self.runs += 1
        return self.run(point, steps)

    def _attempt(self, point: Point, steps: int, doing: str) -> Trajectory | None:
        """None where the optimizer refuses. It may do so in any way: a check, a square root of a negative number."""
        try:
            return self._train(point, steps, doing)
        except (_CannotFindError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            return None

    def _alive(self, trajectory: Trajectory) -> bool:
        """Whether it is a run at all: of full length, finite, and moving."""
        quantities_TQ = trajectory.quantities_TQ
        full = len(quantities_TQ) == self.steps
        return full and bool(quantities_TQ.isfinite().all()) and bool((trajectory.update_norms[-1] > 0).any())


def _parting(base: Trajectory, run: Trajectory) -> int | None:
    """The first step at which any bit differs; None for the same run."""
    return align(base, run, ()).first_difference


def _with_constant(point: Point, value: Constant, *, name: str) -> Point:
    a, b = (replace(each, constants={**each.constants, name: value}) for each in (point.a, point.b))
    return replace(point, a=a, b=b)


def _with_lr(point: Point, factor: float) -> Point:
    return replace(point, a=replace(point.a, lr=point.a.lr * factor), b=replace(point.b, lr=point.b.lr * factor))


def _with_decay(point: Point, value: Constant) -> Point:
    assert isinstance(value, float)
    return replace(point, a=replace(point.a, weight_decay=value), b=replace(point.b, weight_decay=value))
