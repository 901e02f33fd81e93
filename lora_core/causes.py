"""Why is a twin different? The cause, by elimination.

    symbol  meaning
    T       whatever describes a comparison to its owner: the twin's point, or a pair of set-ups
    (a, b)  the gauge between a representative and its twin

Two steps. Arithmetic says which constants of a twin are not where the law puts them: these are suspects, and so may be
things that no constant shows (a clip norm shared with a classifier head). Then the twin is trained again with one
suspect removed, then with two, and so on: the cause is the smallest set whose removal makes the twin no longer
different. Nothing is called a cause that was not confirmed in this way; without reruns it stays a suspicion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from typing import Literal, TypeVar

from lora_core.gauge import Gauge, Point, regauge
from lora_core.laws import Constant, NoLawError, OptimizerLaw, law_of
from lora_core.trajectory import Verdict

T = TypeVar("T")

Standing = Literal["confirmed", "suspected", "unknown", "no law"]

_SAME = 1e-9
"""Relative difference up to which a constant is where it should be: powers of k are rounded, and so are decimals."""

_Place = tuple[str, ...]
_Value = Constant | None


@dataclass(frozen=True, slots=True)
class Misplaced:
    """A constant of a twin that is not where the law puts it.

    Attributes:
        quantity: its name: `eps`, or `eps of A` where A and B differ in it.
        required: what the law asks for; None for no clip norm.
        found: what the twin has.
        left_behind: whether that is the representative's own value: the gauge was forgotten, not miscalculated.
        places: where it is in a point.
    """

    quantity: str
    required: _Value
    found: _Value
    left_behind: bool
    places: tuple[_Place, ...]

    @property
    def name(self) -> str:
        """As a cause: `eps not scaled`."""
        return f"{self.quantity} {'not scaled' if self.left_behind else 'off'}"

    def put_right(self, twin: Point) -> Point:
        """The twin with this one constant where the law puts it: a remedy for `find_cause`."""
        return reduce(lambda point, place: _with(point, place, self.required), self.places, twin)

    def __str__(self) -> str:
        state = "is not scaled" if self.left_behind else "is off"
        return f"{self.quantity} {state}: required {_show(self.required)}, found {_show(self.found)}"


def misplaced(point: Point, twin: Point, law: OptimizerLaw, gauge: Gauge) -> tuple[Misplaced, ...]:
    """Returns the constants of a twin that are further than 1e-9 (relative) from where the law puts them.

    What the optimizer does not read is passed over.

    Args:
        point: the representative's.
        twin: the twin's.
        law: the optimizer's.
        gauge: between the two.

    Raises:
        ValueError: no twin exists in that gauge: see `regauge`.
    """
    before, required, found = (dict(_constants(each, law)) for each in (point, regauge(point, gauge, law), twin))
    every = list(dict.fromkeys([*required, *found]))
    wrong = [place for place in every if not _close(required.get(place), found.get(place))]
    results = []
    for place in wrong:
        values = [each.get(place) for each in (before, required, found)]
        pair = _other_factor(place)
        alike = pair in wrong and [each.get(pair) for each in (before, required, found)] == values
        if alike and place[0] == "b":
            continue  # said along with A's
        places = (place, pair) if alike else (place,)
        left_behind = _close(values[0], values[2])
        results.append(Misplaced(_quantity(place, alike), values[1], values[2], left_behind, places))
    return tuple(results)


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a twin is different, as far as that was found out.

    Attributes:
        standing: whether the names were confirmed by reruns, are only suspected, or nothing is known; or the optimizer
            has no law, so that no equality was to be expected.
        names: the cause, or the causes that act together.
        alternatives: other sets, as large, whose removal helps just as well.
        cleared: where the cause is unknown, the suspects whose removal did not help.
        reruns: how many runs the elimination took.
        reason: why the optimizer has no law.
    """

    standing: Standing
    names: tuple[str, ...] = ()
    alternatives: tuple[tuple[str, ...], ...] = ()
    cleared: tuple[str, ...] = ()
    reruns: int = 0
    reason: str = ""

    @property
    def text(self) -> str:
        """One plain sentence."""
        if self.standing == "no law":
            return f"The twin need not be the same: {self.reason}."
        if self.standing == "unknown" and self.cleared:
            how = ", all together" if self.reruns == 1 else ", alone and together"
            tried = "put right" + (how if len(self.cleared) > 1 else "")
            return f"The cause is unknown: the twin stays different with {_listed(self.cleared)} {tried}."
        if self.standing == "unknown":
            return "The cause is unknown: every constant is where the law puts it, and nothing else is suspected."
        one = len(self.names) == 1
        if self.standing == "suspected":
            what = "suspected cause is" if one else "suspected causes are"
            return f"The {what} {_listed(self.names)}; nothing was trained again to confirm it."
        alone = "with that alone put right" if one else "only with all of them put right"
        or_else = "".join(f", or equally with {_listed(names)} put right" for names in self.alternatives)
        what = "cause is" if one else "causes are"
        return f"The {what} {_listed(self.names)}: {alone}{or_else}, the twin is no longer different."


def without_law(optimizer: str) -> Cause | None:
    """Returns that an optimizer has no law, and why; None if it has one."""
    try:
        law_of(optimizer)
    except NoLawError as error:
        return Cause("no law", (optimizer,), reason=str(error).partition(";")[0])
    return None


def suspected(names: Sequence[str]) -> Cause:
    """Returns the verdict on suspects where nothing can be trained again."""
    return Cause("suspected", tuple(names)) if names else Cause("unknown")


def find_cause(
    verdict_of: Callable[[T], Verdict], remedies: Mapping[str, Callable[[T], T]], twin: T, *, max_reruns: int = 63
) -> Cause:
    """Finds out why a twin is different, by training it again with suspects removed: one, then two, and so on.

    Where there are more sets of suspects than reruns, the other way round: all of them are removed, and put back one by
    one as long as the twin stays the same. What is left then is a cause too, but there may be a smaller one.

    Args:
        verdict_of: trains a twin (and its representative, where a remedy changes that too) and gives the verdict.
        remedies: for each suspect, by name, what removes it: it returns a twin as it should be in this one respect.
        twin: one whose verdict is `different`.
        max_reruns: of all sets, if they are no more; 63 do for six suspects.
    """
    names, reruns = tuple(remedies), 0

    def cured(suspects: Sequence[str]) -> bool:
        nonlocal reruns
        reruns += 1
        return verdict_of(reduce(lambda each, name: remedies[name](each), suspects, twin)).kind != "different"

    if 2 ** len(names) - 1 > max_reruns:
        found = _put_back(names, cured)
        return Cause("confirmed", found, reruns=reruns) if found else Cause("unknown", cleared=names, reruns=reruns)
    for size in range(1, len(names) + 1):
        cures = [suspects for suspects in combinations(names, size) if cured(suspects)]
        if cures:
            return Cause("confirmed", cures[0], alternatives=tuple(cures[1:]), reruns=reruns)
    return Cause("unknown", cleared=names, reruns=reruns)


def _put_back(names: tuple[str, ...], cured: Callable[[Sequence[str]], bool]) -> tuple[str, ...]:
    """A set of suspects all of which must be removed; empty where not even the removal of all helps."""
    if not cured(names):
        return ()
    needed = names
    for name in names:
        rest = tuple(each for each in needed if each != name)
        if rest and cured(rest):
            needed = rest
    return needed


# -- a point, constant by constant -------------------------------------------------------------------------------------

_LABELS = {"init_scale": "init scale", "clip_norm": "clip norm", "weight_decay": "weight decay"}
_OWNERS = {"a": "A", "b": "B", "magnitude": "the magnitudes", "head": "the head"}


def _constants(point: Point, law: OptimizerLaw) -> Iterator[tuple[_Place, _Value]]:
    for name in ("rank", "scaling", "init_scale", "clip_norm", "dropout"):
        yield (name,), getattr(point, name)
    for owner in _OWNERS:
        settings = getattr(point, owner)
        if settings is None:
            continue
        yield (owner, "lr"), settings.lr
        if law.decay is not None:
            yield (owner, "weight_decay"), settings.weight_decay
        for name in law.powers:
            if name in settings.constants:
                yield (owner, "constants", name), settings.constants[name]


def _other_factor(place: _Place) -> _Place:
    return ({"a": "b", "b": "a"}.get(place[0], place[0]), *place[1:]) if len(place) > 1 else ()


def _quantity(place: _Place, alike: bool) -> str:
    label = _LABELS.get(place[-1], place[-1].replace("_", " "))
    of_both = len(place) == 1 or (alike and place[0] in ("a", "b"))
    return label if of_both else f"{label} of {_OWNERS[place[0]]}"


def _with(point: Point, place: _Place, value: _Value) -> Point:
    if len(place) == 1:
        return replace(point, **{place[0]: value})  # type: ignore[arg-type]
    settings = getattr(point, place[0])
    if len(place) == 2:
        return replace(point, **{place[0]: replace(settings, **{place[1]: value})})
    constants = {**settings.constants, place[2]: value}
    return replace(point, **{place[0]: replace(settings, constants=constants)})


def _close(one: _Value, other: _Value) -> bool:
    if one is None or other is None:
        return one is other
    pairs = zip(*(value if isinstance(value, tuple) else (value,) for value in (one, other)), strict=True)
    return all(math.isclose(left, right, rel_tol=_SAME) for left, right in pairs)


def _show(value: _Value) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_show, value))})"
    return "none" if value is None else f"{value:.6g}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
