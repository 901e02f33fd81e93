"""Trains the members of classes beside each other and compares them: the work behind certificates. Needs no Ray.

    suffix  meaning
    K       classes in a pack

A member's place in a pack can change the last bits of its matrix products, and a certificate is about alpha, not about
places. So a class has one place in all of its packs:

    pack               place 0               place 1               ...
    representatives    c0 at its own alpha   c1 at its own alpha
    the same again     c0                    c1                         is training deterministic at all?
    control 1 to 4     c0, one ulp off       c1, one ulp off            how far does rounding take it?
    twin 1, 2, ...     c0 at another alpha   c1 at another alpha

All packs have the same shape, and what a class computes in one depends on nothing but its own member and its place.

Where float32 is not clear, a twin and its representative are certified again in float64, where rounding is 2**29 times
finer and the range of numbers ends at 1e308: what is rounding, or overflow, or underflow, is gone there, and what is
another run stays another run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from lora_core.adapter import Member
from lora_core.causes import find_cause, misplaced
from lora_core.gauge import Point
from lora_core.optimizers import PackOptimizer
from lora_core.trajectory import (
    FLOAT32_EPS,
    Comparison,
    Trajectory,
    Verdict,
    align,
    control_of,
    record_trajectories,
)
from sweeps.collapse import CONTROLS, Certificate, TwinVerdict
from sweeps.recipe import bank_of, optimizer_of, steps_of
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SweepSpec
from sweeps.tasks import Task

_CONTROL_SEEDS = range(1, CONTROLS + 1)

Told = Callable[[int, int], None]
"""Told how many member-steps are done, of how many."""

InFloat64 = Callable[[SweepSpec], Task]
"""Loads the task of a spec in float64."""


@dataclass(frozen=True, slots=True)
class ClassOrder:
    """A class to certify.

    Attributes:
        class_id: its name.
        representative: the member that the others are held against.
        twins: the others.
        trial: the trial whose class it is, if any.
    """

    class_id: str
    representative: Configuration
    twins: tuple[Configuration, ...]
    trial: int | None = None


def certify(
    spec: SweepSpec,
    task: Task,
    classes: Sequence[ClassOrder],
    *,
    steps: int,
    pack: int = 64,
    told: Told = lambda done, of: None,
    in_float64: InFloat64 | None = None,
) -> Iterator[Certificate]:
    """Trains classes and yields their certificates, in order.

    Args:
        spec: how they are trained.
        task: the spec's.
        classes: at least one twin each.
        steps: of each run.
        pack: the most classes in a pack.
        told: progress.
        in_float64: loads the task for the spec that it is given; None: nothing is heard in float64.
    """
    # A class with many twins would leave places idle beside one with few.
    order = sorted(range(len(classes)), key=lambda i: len(classes[i].twins))
    chunks = [[classes[i] for i in order[start : start + pack]] for start in range(0, len(order), pack)]
    bench = _Bench(spec, task, steps, told, in_float64, packs=sum(len(chunk) * _packs_of(chunk) for chunk in chunks))
    made = [certificate for chunk in chunks for certificate in bench.certificates(chunk)]
    of = dict(zip(order, made, strict=True))
    yield from (of[i] for i in range(len(classes)))


@dataclass(frozen=True, slots=True)
class _Side:
    """A run, and how far rounding takes it."""

    run: Trajectory
    controls: Sequence[Trajectory]


@dataclass(frozen=True, slots=True)
class _Round:
    """A pack of twins, a class a place; one that has no more of them has its representative there."""

    configurations: tuple[Configuration, ...]
    runs: list[Trajectory]
    controls: Callable[[], list[tuple[Trajectory, ...]]]


class _Bench:
    """Runs packs and judges them."""

    def __init__(
        self, spec: SweepSpec, task: Task, steps: int, told: Told, in_float64: InFloat64 | None, *, packs: int
    ) -> None:
        self._spec, self._task, self._steps = spec, task, steps
        self._reduction = Reduction.of(spec)
        self._eps = torch.finfo(getattr(torch, spec.train.dtype)).eps
        narrow = spec.train.law.arithmetic
        self._arithmetic: torch.dtype | None = None if narrow is None else getattr(torch, narrow)
        self._told, self._done, self._all = told, 0, packs * steps
        self._layers: tuple[str, ...] = ()
        wide = spec.train.model_copy(update={"dtype": "float64"})
        self._wide_spec = spec.model_copy(update={"train": wide})
        load = in_float64 if spec.train.dtype != "float64" else None
        self._wide_task = None if load is None else cache(lambda: load(self._wide_spec))

    def certificates(self, classes: Sequence[ClassOrder]) -> Iterator[Certificate]:
        """Certifies the classes of one pack."""
        representatives = [order.representative for order in classes]
        first, again = self._run(representatives), self._run(representatives)
        controls = list(zip(*(self._run(representatives, seed) for seed in _CONTROL_SEEDS), strict=True))
        rounds = [
            self._round([order.twins[i] if i < len(order.twins) else order.representative for order in classes])
            for i in range(max(len(order.twins) for order in classes))
        ]
        sides = [_Side(run, of_run) for run, of_run in zip(first, controls, strict=True)]
        for k, order in enumerate(classes):
            yield Certificate(
                class_id=order.class_id,
                trial=order.trial,
                steps=self._steps,
                representative=order.representative,
                losses=tuple(first[k].losses.tolist()),
                update_norms=self._by_layer(first[k]),
                controls=CONTROLS,
                repeat=self._compare(sides[k], _Side(again[k], ())).verdict().kind,
                twins=tuple(self._judge(order, k, sides[k], each) for each in rounds[: len(order.twins)]),
            )

    def _round(self, configurations: Sequence[Configuration]) -> _Round:
        # Controls of twins are trained if any twin of the round needs them.
        controls = cache(lambda: list(zip(*(self._run(configurations, seed) for seed in _CONTROL_SEEDS), strict=True)))
        return _Round(tuple(configurations), self._run(configurations), controls)

    def _judge(self, order: ClassOrder, place: int, representative: _Side, twins: _Round) -> TwinVerdict:
        run, configuration = twins.runs[place], twins.configurations[place]
        found = self._compare(representative, _Side(run, ()))
        if found.verdict().kind == "different":
            # Before it is called different, rounding is asked on the twin's own side too (trajectory.py).
            found = self._compare(representative, _Side(run, twins.controls()[place]))
        judged = self._verdict(order, configuration, run, found)
        if judged.fault is None:
            return judged
        second = self._heard_in_float64(order, configuration)
        if second is not None and second.verdict != "different":
            rounded = {"verdict": "identical up to rounding", "first_step": None, "in_float64": second.verdict}
            return judged.model_copy(update=rounded)
        if judged.verdict != "different":
            return judged
        cause = self._cause(order, place, representative, twins.configurations) if second is None else second.cause
        return judged.model_copy(update={"cause": cause, "in_float64": None if second is None else second.verdict})

    def _heard_in_float64(self, order: ClassOrder, twin: Configuration) -> TwinVerdict | None:
        """The verdict on the twin in float64, with its cause; None where that is not to be had."""
        if self._wide_task is None:
            return None
        pair = ClassOrder(order.class_id, order.representative, (twin,))
        (certificate,) = certify(self._wide_spec, self._wide_task(), [pair], steps=self._steps)
        return certificate.twins[0]

    def _cause(self, order: ClassOrder, place: int, representative: _Side, pack: Sequence[Configuration]) -> str:
        """Why a twin is different: trains it again at its place, with constants put where the law wants them."""
        reduction, seed = self._reduction, self._spec.train.seed
        points = [reduction.point(configuration) for configuration in pack]
        gauge = reduction.gauge_between(order.representative, pack[place])
        suspects = misplaced(reduction.point(order.representative), points[place], reduction.law, gauge)

        def verdict_of(point: Point) -> Verdict:
            members = [Member(point if k == place else other, seed) for k, other in enumerate(points)]
            # The twin's controls are those of another run than this one: beside them whatever moved it would pass.
            return self._compare(representative, _Side(self._train(members)[place], ())).verdict()

        remedies = {suspect.name: suspect.put_right for suspect in suspects}
        cause = find_cause(verdict_of, remedies, points[place])
        details = "; ".join(str(suspect) for suspect in suspects if suspect.name in cause.names)
        return f"{cause.text} {details[:1].upper()}{details[1:]}.".removesuffix(" .")

    def _compare(self, representative: _Side, twin: _Side) -> Comparison:
        return align(representative.run, twin.run, representative.controls, twin_controls=twin.controls, eps=self._eps)

    def _verdict(self, order: ClassOrder, twin: Configuration, run: Trajectory, found: Comparison) -> TwinVerdict:
        verdict = found.verdict()
        return TwinVerdict(
            configuration=twin,
            exact_in_binary=self._reduction.gauge_between(order.representative, twin).exact_in_binary,
            verdict=verdict.kind,
            max_ratio=verdict.max_ratio,
            first_step=verdict.first_step,
            first_difference=verdict.first_difference,
            max_deviation=verdict.max_deviation,
            envelope=verdict.envelope,
            horizon=verdict.horizon,
            compared_steps=verdict.compared_steps,
            deviations=tuple(found.deviation_T.tolist()),
            envelopes=tuple(found.envelope_T.tolist()),
            losses=tuple(run.losses.tolist()),
            update_norms=self._by_layer(run),
        )

    def _run(self, configurations: Sequence[Configuration], perturbation_seed: int | None = None) -> list[Trajectory]:
        members = [Member(self._reduction.point(each), self._spec.train.seed) for each in configurations]
        if perturbation_seed is not None:
            # Constants are numbers of 64 bits, and weights of 32 at least, whatever the model computes in.
            eps = min(self._eps, FLOAT32_EPS)
            members = [
                control_of(member, perturbation_seed, eps=eps, arithmetic=self._arithmetic) for member in members
            ]
        return self._train(members)

    def _train(self, members: Sequence[Member]) -> list[Trajectory]:
        with bank_of(self._spec, self._task, members) as bank:
            optimizer = PackOptimizer(bank, optimizer_of(self._spec))
            records = steps_of(self._spec, self._task, optimizer, start=0, stop=self._steps)
            self._layers = tuple(bank.layers)
            trajectories = record_trajectories(bank, records)
        self._done += len(members) * self._steps
        self._told(self._done, max(self._done, self._all))
        return list(trajectories)

    def _by_layer(self, trajectory: Trajectory) -> dict[str, tuple[float, ...]]:
        columns = zip(self._layers, trajectory.update_norms.T.tolist(), strict=True)
        return {name: tuple(column) for name, column in columns}


def _packs_of(classes: Sequence[ClassOrder]) -> int:
    """Packs that the classes of one chunk take, if no twin is different."""
    return 2 + CONTROLS + max(len(order.twins) for order in classes)
