"""Specs in a line, a worker that trains nothing, and a driver without Ray."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sweeps.events import DriverStarted, Event, SweepCreated
from sweeps.jobs import JobErrorKind, JobOrder, JobResult, MemberOrder, MemberResult
from sweeps.ledger import Record
from sweeps.plan import trial_space
from sweeps.records import SweepRecord, fold
from sweeps.reduction import Reduction
from sweeps.search import PackSearcher
from sweeps.spec import SweepSpec, parse_spec

SWEPT = "rank: {values: [2, 4, 8]}, lr: {min: 1e-4, max: 1e-1}, init_scale: {min: 0.25, max: 4}"


def make_spec(parameters: str = SWEPT, **sections: str) -> SweepSpec:
    """A spec of these parameters; a section is written as the inside of its braces: `train="optimizer: sgd"`. Its task
    is digits, or one that may have a head where there is a learning rate for one."""
    task = "type: python, entrypoint: some.module:make_task" if "head_lr" in parameters else "type: digits"
    lines = ["name: test", f"task: {{{task}}}", "lora: {target_modules: [fc1]}"]
    if "lora" in sections:
        lines[2] = f"lora: {{target_modules: [fc1], {sections.pop('lora')}}}"
    lines.append(f"parameters: {{{parameters}}}")
    lines += [f"{name}: {{{body}}}" for name, body in sections.items()]
    return parse_spec("\n".join(lines) + "\n", "test.yaml").spec


def make_reduction(parameters: str = SWEPT, **sections: str) -> Reduction:
    return Reduction.of(make_spec(parameters, **sections))


def make_created(spec: SweepSpec) -> SweepCreated:
    return SweepCreated(
        name=spec.name,
        spec=spec.model_dump(mode="json"),
        spec_text="",
        source="test.yaml",
        plan={},
        tracking_uri="",
        experiment="",
        lanes=1,
        pack=4,
    )


def as_records(events: Iterable[Event]) -> list[Record]:
    return [Record(seq, float(seq), event) for seq, event in enumerate(events, start=1)]


# -- a worker ----------------------------------------------------------------------------------------------------------


def loss_of(member: MemberOrder, step: int) -> float:
    """A valley in (log lr, log init scale) that deepens with training, different for every rank."""
    c = member.configuration
    valley = math.log10(c.lr / 3e-3) ** 2 + 0.3 * math.log2(c.init_scale) ** 2 + 0.1 * math.log2(c.rank)
    return valley + 5.0 / step


@dataclass
class FakeWorker:
    """A pure function of orders, which checks on the way that they are in order.

    Attributes:
        diverging: trials whose loss is not finite from the first job on.
        failing: trials that take their pack down with an error.
        oom_above: packs larger than this do not fit.
        dying: jobs whose worker dies.
        vanishing: jobs whose node vanishes.
        broken: every job ends with the same error.
        trained: how often each (trial, stop) was trained with success.
    """

    diverging: frozenset[int] = frozenset()
    failing: frozenset[int] = frozenset()
    oom_above: int = 1_000
    dying: frozenset[int] = frozenset()
    vanishing: Counter[int] = field(default_factory=Counter)
    broken: bool = False
    value: Callable[[MemberOrder, int], float] = loss_of
    trained: Counter[tuple[int, int]] = field(default_factory=Counter)
    sizes: list[int] = field(default_factory=list)

    def __call__(self, order: JobOrder) -> JobResult:
        trials = [member.trial for member in order.members]
        assert len(set(trials)) == len(trials)
        self.sizes.append(len(trials))
        error, detail = self._fault(order, trials)
        if error is not None:
            return JobResult(job=order.job, error=error, detail=detail)
        if order.work == "certify":
            (member,) = order.members
            return JobResult(job=order.job, certificate={"trial": member.trial, "twins": len(order.twins)})
        for member in order.members:
            handed_on = None if order.start == 0 else checkpoint_of(member.trial, order.start)
            assert member.checkpoint == handed_on
            self.trained[member.trial, order.stop] += 1
        return JobResult(job=order.job, members=tuple(self._result(member, order.stop) for member in order.members))

    def _fault(self, order: JobOrder, trials: list[int]) -> tuple[JobErrorKind | None, str]:
        if self.broken:
            return "error", "Traceback\nRuntimeError: no such file"
        if order.job in self.dying:
            return "worker_died", "the worker is gone"
        if self.vanishing[order.job] > 0:
            self.vanishing[order.job] -= 1
            return "node_lost", "the node is gone"
        if len(trials) > self.oom_above:
            return "oom", "Traceback\nOutOfMemoryError: too many"
        bad = sorted(self.failing & set(trials)) if order.work == "train" else []
        return ("error", f"Traceback\nValueError: trial {bad[0]} is bad") if bad else (None, "")

    def _result(self, member: MemberOrder, stop: int) -> MemberResult:
        if member.trial in self.diverging:
            return MemberResult(trial=member.trial, diverged_at=2)
        metrics = {"eval/loss": self.value(member, stop)}
        return MemberResult(trial=member.trial, metrics=metrics, checkpoint=checkpoint_of(member.trial, stop))


def checkpoint_of(trial: int, step: int) -> str:
    return f"trial-{trial}/step-{step}"


# -- a driver ----------------------------------------------------------------------------------------------------------


@dataclass
class Simulation:
    """A sweep driven without Ray, over a ledger in memory.

    Attributes:
        transactions: what was appended, a list for each call.
    """

    spec: SweepSpec
    trials: int = 12
    rungs: tuple[int, ...] = (4, 8, 16)
    pack: int = 4
    lanes: int = 3
    transactions: list[list[Event]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.transactions:
            self.transactions = [[make_created(self.spec)]]

    @property
    def events(self) -> list[Event]:
        return [event for transaction in self.transactions for event in transaction]

    @property
    def record(self) -> SweepRecord:
        return fold("test", as_records(self.events))

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def cut(self, transactions: int) -> Simulation:
        """What a driver that was killed after so many transactions would have left."""
        kept = [list(transaction) for transaction in self.transactions[:transactions]]
        return Simulation(self.spec, self.trials, self.rungs, self.pack, self.lanes, kept)

    def searcher(self, *, resumed: bool = False, extend_to: int | None = None) -> PackSearcher:
        reduction = Reduction.of(self.spec)
        searcher = PackSearcher(
            self.spec,
            reduction,
            trial_space(self.spec, reduction),
            trials=self.trials,
            rungs=self.rungs,
            pack=self.pack,
            lanes=self.lanes,
            cache=Path("cache"),
            checkpoints="checkpoints",
            append=self.transactions.append,
        )
        if resumed:
            searcher.replay(as_records(self.events))
        extension = [] if extend_to is None else searcher.extend(extend_to)
        self.transactions.append([*extension, DriverStarted(resumed=resumed)])
        return searcher

    def run(
        self,
        worker: Callable[[JobOrder], JobResult],
        *,
        timing: int | None = None,
        resumed: bool = False,
        jobs: int = 1_000,
        extend_to: int | None = None,
    ) -> PackSearcher:
        """Drives the sweep to its end, or until so many jobs have come back.

        Args:
            worker: trains.
            timing: seed of the order in which jobs end and are asked for; None ends them in the order they began.
            resumed: go on from the transactions there are.
            jobs: after so many the driver is killed, with others under way.
            extend_to: trials in all that the sweep is given before it goes on.
        """
        searcher, clock = self.searcher(resumed=resumed, extend_to=extend_to), random.Random(timing)
        under_way: list[JobOrder] = []
        while True:
            while len(under_way) < self.lanes and not (timing is not None and under_way and clock.random() < 0.3):
                order = searcher.suggest()
                if order is None:
                    break
                under_way.append(order)
            if not under_way:
                assert searcher.finished
                return searcher
            if jobs == 0:
                return searcher
            jobs -= 1
            searcher.complete(worker(under_way.pop(0 if timing is None else clock.randrange(len(under_way)))))
