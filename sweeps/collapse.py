"""Which classes get their twins really trained, and the certificate that comes of it.

A certificate is the recorded proof that a class collapses: the representative and its twins at the other values of
alpha, trained over the same data (certifying.py), with every step's loss and update norm kept. Control runs, the
representative with its init moved by one unit in the last place, say how far rounding alone would take them apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from lora_core.gauge import VerdictKind
from sweeps.errors import InputError
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SweepSpec

CONTROLS = 4
"""Control runs to a certificate."""

_MOST_TWINS = 8
"""Twins to a certificate."""


class TwinVerdict(BaseModel):
    """A twin that was trained, and how it compares."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    configuration: Configuration
    exact_in_binary: bool
    """Whether the gauge from the representative is made of powers of two, so that bit-identity is expected."""
    verdict: VerdictKind
    max_ratio: float
    """Largest deviation in units of the rounding envelope; 0 if bit-identical."""
    first_step: int | None = None
    """The first step (from 1) outside the envelope; None unless different."""
    first_difference: int | None = None
    """The first step (from 1) at which any bit differs; None if bit-identical."""
    max_deviation: float = 0.0
    """Largest deviation from the representative, relative, over all steps, losses and update norms."""
    envelope: float = 0.0
    """How far rounding alone took the control runs apart: the largest over all steps, relative, floor included."""
    horizon: int | None = None
    """The first step (from 1) at which rounding alone decides a loss or an update norm, which is not judged from there
    on; None if there is none."""
    compared_steps: int | None = None
    """Steps that were compared: fewer than were trained where both losses left all bounds; None in old records."""
    cause: str | None = None
    """Why it is different, as far as training it again with suspects removed could tell; None unless different."""
    in_float64: VerdictKind | None = None
    """The verdict on the same twin in float64, which is heard where float32's is not what the law says; None where it
    was not. If that is not `different`, what looked different was rounding."""
    deviations: tuple[float, ...] = ()
    """At each step, the relative deviation of the loss or update norm that is the most envelopes away."""
    envelopes: tuple[float, ...] = ()
    """At each step, the envelope of that same quantity."""
    losses: tuple[float, ...]
    """Training loss before each step."""
    update_norms: dict[str, tuple[float, ...]]
    """By layer: Frobenius norm of s B A after each step."""

    @property
    def reservations(self) -> tuple[str, ...]:
        """What a reader should know beside the verdict: how far it was judged, and in which number format."""
        said = []
        if self.in_float64 is not None:
            said.append(f"{self.in_float64} in float64")
        steps = len(self.losses)
        if self.horizon is not None and self.verdict != "bit-identical":
            said.append(f"judged to step {self.horizon - 1} of {steps}, where rounding takes over")
        elif self.compared_steps is not None and self.compared_steps < steps:
            said.append(f"compared to step {self.compared_steps} of {steps}, where the loss leaves all bounds")
        return tuple(said)

    @property
    def fault(self) -> str | None:
        """Why this twin is no proof of the class, None where it is one.

        A twin that is exact in binary must be bit-identical: rounding cannot excuse it, and a constant that does not
        move with alpha may well be small enough to hide within the rounding envelope.
        """
        twin = f"the twin at alpha {self.configuration.alpha:g}"
        if self.verdict == "different":
            step = "" if self.first_step is None else f" from step {self.first_step}"
            return f"{twin} is different{step}" + (f": {self.cause}" if self.cause else "")
        if self.exact_in_binary and self.verdict != "bit-identical":
            why = "; in float64 it is: numbers here leave float32's range" if self.in_float64 == "bit-identical" else ""
            return f"{twin} is exact in binary and had to be bit-identical, but is {self.verdict}{why}"
        return None


class Certificate(BaseModel):
    """The proof for one class."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    class_id: str
    trial: int | None = None
    """The trial whose class it is; None where it was not a sweep that certified it."""
    steps: int
    representative: Configuration
    losses: tuple[float, ...]
    update_norms: dict[str, tuple[float, ...]]
    controls: int
    """How many control runs made the envelope."""
    repeat: VerdictKind = "bit-identical"
    """The verdict on the representative trained a second time: anything else means that training is not deterministic
    here."""
    twins: tuple[TwinVerdict, ...]

    @property
    def holds(self) -> bool:
        """Whether every twin exact in binary is bit-identical, and no other is different."""
        return not self.faults

    @property
    def faults(self) -> tuple[str, ...]:
        """Why it does not hold: a sentence for each twin that speaks against it."""
        faults = tuple(twin.fault for twin in self.twins if twin.fault is not None)
        if faults and self.repeat != "bit-identical":
            return (
                f"training is not deterministic here: {self.representative.label()} twice was not the same",
                *faults,
            )
        return faults


def steps_within(spec: SweepSpec, asked: int | None) -> int:
    """Returns how many steps a certificate's runs take: those asked for, else the spec's certify.steps.

    Raises:
        InputError: more than train.steps, at which the learning rate ends.
    """
    if asked is not None and asked > spec.train.steps:
        raise InputError(f"--steps must be at most train.steps, which is {spec.train.steps}; found {asked}")
    return asked or spec.certify.steps


def choose(
    spec: SweepSpec, reduction: Reduction, finished: Iterable[tuple[int, float | None, Configuration, str]]
) -> list[int]:
    """Picks the trials whose classes are certified: the best of each rank first, then the next best of all.

    Args:
        spec: says how many.
        reduction: says which have twins.
        finished: number, value, configuration and class of each finished trial.

    Returns:
        Trial numbers, in the order in which they are to be certified.
    """
    sign = spec.metric.sign
    ranked = sorted(finished, key=lambda trial: (math.inf if trial[1] is None else sign * trial[1], trial[0]))
    ranks_seen: set[int] = set()
    first: list[tuple[int, Configuration, str]] = []
    rest: list[tuple[int, Configuration, str]] = []
    for number, _, configuration, class_id in ranked:
        (rest if configuration.rank in ranks_seen else first).append((number, configuration, class_id))
        ranks_seen.add(configuration.rank)
    with_twins = (number for number, configuration, name in first + rest if twins(reduction, configuration, name))
    return [number for number, _ in zip(with_twins, range(spec.certify.classes), strict=False)]


def twins(reduction: Reduction, configuration: Configuration, class_id: str) -> tuple[Configuration, ...]:
    """The members of a configuration's class that a certificate trains: the user's own where the space lists them.

    Those whose gauge is exact in binary come first, because they can be held to the last bit.
    """
    members = reduction.members_of(class_id)
    found = reduction.twins(configuration) if members is None else members
    others = {twin: None for twin in found if twin != configuration}  # each once, where two rules for alpha meet
    exact_first = sorted(others, key=lambda twin: not reduction.gauge_between(configuration, twin).exact_in_binary)
    return tuple(sorted(exact_first[:_MOST_TWINS], key=lambda twin: (twin.alpha, twin.init_scale)))
