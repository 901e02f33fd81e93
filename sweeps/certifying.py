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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lora_core.adapter import LoraBank, Member
from lora_core.causes import find_cause, misplaced
from lora_core.gauge import Point
from lora_core.optimizers import PackOptimizer
from lora_core.trajectory import Comparison, Trajectory, align, record_trajectories
from sweeps.collapse import CONTROLS, Certificate, TwinVerdict
from sweeps.recipe import optimizer_of, steps_of
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SweepSpec
from sweeps.tasks import Task

_MOST_RERUNS = 15
"""Runs that the search for a cause may take: all there are for four suspects."""

Told = Callable[[int, int], None]
"""Told how many member-steps are done, of how many."""


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
) -> Iterator[Certificate]:
    """Trains classes and yields their certificates, in order.

    Args:
        spec: how they are trained.
        task: the spec's.
        classes: at least one twin each.
        steps: of each run.
        pack: the most classes in a pack.
        told: progress.
    """
    # A class with many twins would leave places idle beside one with few.
    order = sorted(range(len(classes)), key=lambda i: len(classes[i].twins))
    chunks = [[classes[i] for i in order[start : start + pack]] for start in range(0, len(order), pack)]
    bench = _Bench(spec, task, steps, told, packs=sum(len(chunk) * _packs_of(chunk) for chunk in chunks))
    made = [certificate for chunk in chunks for certificate in bench.certificates(chunk)]
    of = dict(zip(order, made, strict=True))
    yield from (of[i] for i in range(len(classes)))


class _Bench:
    """Runs packs and judges them."""

    def __init__(self, spec: SweepSpec, task: Task, steps: int, told: Told, *, packs: int) -> None:
        self._spec, self._task, self._steps = spec, task, steps
        self._reduction = Reduction.of(spec)
        self._eps = torch.finfo(getattr(torch, spec.train.dtype)).eps
        self._told, self._done, self._all = told, 0, packs * steps
        self._layers: tuple[str, ...] = ()

    def certificates(self, classes: Sequence[ClassOrder]) -> Iterator[Certificate]:
        """Certifies the classes of one pack."""
        representatives = [order.representative for order in classes]
        first, again = self._run(representatives), self._run(representatives)
        controls = [self._run(representatives, seed) for seed in range(1, CONTROLS + 1)]
        most = max(len(order.twins) for order in classes)
        twins = [[(*order.twins, *[order.representative] * most)[i] for order in classes] for i in range(most)]
        trained = [self._run(configurations) for configurations in twins]
        for k, order in enumerate(classes):
            judged = [
                self._judge(order, k, twin, first[k], trained[i][k], [control[k] for control in controls], twins[i])
                for i, twin in enumerate(order.twins)
            ]
            yield Certificate(
                class_id=order.class_id,
                trial=order.trial,
                steps=self._steps,
                representative=order.representative,
                losses=tuple(first[k].losses.tolist()),
                update_norms=self._by_layer(first[k]),
                controls=CONTROLS,
                deterministic=align(first[k], again[k], []).first_difference is None,
                twins=tuple(judged),
            )

    def _judge(
        self,
        order: ClassOrder,
        place: int,
        twin: Configuration,
        representative: Trajectory,
        trajectory: Trajectory,
        controls: Sequence[Trajectory],
        pack: Sequence[Configuration],
    ) -> TwinVerdict:
        found = align(representative, trajectory, controls, eps=self._eps)
        cause = None
        if found.verdict().kind == "different":
            # Before it is called different, rounding is asked on the twin's own side too (trajectory.py).
            own = [self._run(pack, seed)[place] for seed in range(1, CONTROLS + 1)]
            found = align(representative, trajectory, controls, twin_controls=own, eps=self._eps)
            if found.verdict().kind == "different":
                cause = self._cause(order, place, twin, representative, [*controls], own, pack)
        return self._verdict(order, twin, trajectory, found, cause)

    def _cause(
        self,
        order: ClassOrder,
        place: int,
        twin: Configuration,
        representative: Trajectory,
        controls: Sequence[Trajectory],
        own: Sequence[Trajectory],
        pack: Sequence[Configuration],
    ) -> str:
        """Why a twin is different: trains it again at its place, with constants put where the law wants them."""
        reduction = self._reduction
        here, there = reduction.point(order.representative), reduction.point(twin)
        suspects = misplaced(here, there, reduction.law, reduction.gauge_between(order.representative, twin))

        def again(point: Point) -> Comparison:
            points = [reduction.point(configuration) for configuration in pack]
            points[place] = point
            trajectory = self._train([Member(each, self._spec.train.seed) for each in points])[place]
            return align(representative, trajectory, controls, twin_controls=own, eps=self._eps)

        remedies = {suspect.name: suspect.put_right for suspect in suspects}
        found = find_cause(lambda point: again(point).verdict(), remedies, there, max_reruns=_MOST_RERUNS)
        return found.text

    def _verdict(
        self, order: ClassOrder, twin: Configuration, run: Trajectory, found: Comparison, cause: str | None
    ) -> TwinVerdict:
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
            cause=cause,
            deviations=tuple(found.deviation_T.tolist()),
            envelopes=tuple(found.envelope_T.tolist()),
            losses=tuple(run.losses.tolist()),
            update_norms=self._by_layer(run),
        )

    def _run(self, configurations: Sequence[Configuration], perturbation_seed: int | None = None) -> list[Trajectory]:
        seed, point = self._spec.train.seed, self._reduction.point
        return self._train([Member(point(each), seed, perturbation_seed) for each in configurations])

    def _train(self, members: Sequence[Member]) -> list[Trajectory]:
        lora = self._spec.lora
        with LoraBank.attach(self._task.model, lora.target_modules, members, init=lora.init) as bank:
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
