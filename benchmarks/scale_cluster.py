"""Workers that train nothing, on a clock that does not wait: what `scale_sim.py` runs a real search against.

    virtual time   seconds of the simulated sweep; moves on to the next thing that happens
    charged        what a call on the driver took in truth; the driver is busy for that long in virtual time

A pack takes a log-normal time, its median in proportion to the steps trained. Injected: workers that die, nodes that
vanish with all their workers and come back, packs that are too large for the memory, members that diverge. All of it
is drawn from the seed and the number of the job, so that two runs of the same search meet the same.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sweeps.jobs import JobOrder, JobResult, MemberOrder, MemberResult
from sweeps.search import PackSearcher

_OOM_S = 5.0
"""How long a pack trains before it runs out of memory."""


@dataclass(frozen=True)
class Workers:
    """A cluster.

    Attributes:
        count: workers.
        node: workers to a node.
        job_s: median time of a job of the first rung.
        spread: standard deviation of its logarithm.
        fits: members that a worker's memory holds.
        deaths: chance that a worker dies during a job.
        diverging: chance that a trial diverges.
        node_hours: mean time between losses of a node; inf for none.
        back_s: after which a lost node is replaced.
        losses: training losses that a job reports of each member.
        seed: of all that is drawn.
    """

    count: int
    node: int = 8
    job_s: float = 300.0
    spread: float = 0.3
    fits: int = 8
    deaths: float = 0.002
    diverging: float = 0.02
    node_hours: float = 24.0
    back_s: float = 300.0
    losses: int = 100
    seed: int = 0

    def draw(self, *key: object) -> random.Random:
        """Chance of its own for whatever is named."""
        return random.Random(f"{self.seed}/{key}")


@dataclass
class Course:
    """How a simulated sweep went.

    Attributes:
        spans_s: of each job, when it began and ended, in virtual seconds.
        driver_s: charged to the driver, in all.
        asked_s: when the last new trial was handed out.
        end_s: when the last result had been taken.
        errors: jobs that ended badly, by kind.
    """

    spans_s: list[tuple[float, float]] = field(default_factory=list)
    driver_s: float = 0.0
    asked_s: float = 0.0
    end_s: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def busy_s(self) -> float:
        """Worker time in all."""
        return sum(stop - start for start, stop in self.spans_s)

    def utilisation(self, workers: int) -> float:
        """Share of the workers' time in which they trained, until the last new trial was handed out.

        What comes after is the end of every sweep, when ever fewer jobs are left.
        """
        if not self.asked_s:
            return 0.0
        within = sum(max(0.0, min(stop, self.asked_s) - start) for start, stop in self.spans_s)
        return within / (workers * self.asked_s)


class Cluster:
    """Drives a search to its end against simulated workers."""

    def __init__(
        self, workers: Workers, *, charge: Callable[[], float], beside: Callable[[float], None], free_driver: bool
    ) -> None:
        """Prepares a cluster.

        Args:
            workers: what there is.
            charge: seconds that the driver has used so far, in truth.
            beside: called with the virtual time whenever it moves on; what it does is not charged.
            free_driver: whether the driver's calls take no virtual time.
        """
        self._workers, self._charge, self._beside, self._free = workers, charge, beside, free_driver
        self._heap: list[tuple[float, int, int, JobResult | None]] = []
        self._ties = itertools.count()
        self._lost_s = [self._next_loss(node, 0.0) for node in range(math.ceil(workers.count / workers.node))]
        self._now_s = 0.0
        self.slowed = 1.0
        """How much longer the driver takes because another thread of its process works too."""
        self.course = Course()

    def run(self, searcher: PackSearcher) -> Course:
        """Runs a search until it has no more jobs."""
        idle = list(range(self._workers.count))
        while True:
            while idle and (order := self._charged(lambda: _over_the_wire(searcher.suggest()))) is not None:
                self._start(idle.pop(), order)
            if not self._heap:
                break
            at_s, _, worker, result = heapq.heappop(self._heap)
            self._now_s = max(self._now_s, at_s)
            self._beside(self._now_s)
            if result is not None:
                text = result.model_dump_json()  # the worker's part
                self._charged(lambda text=text: searcher.complete(JobResult.model_validate_json(text)))
            if result is None or not self._gone(worker, at_s):
                idle.append(worker)
        self.course.end_s = self._now_s
        return self.course

    @property
    def now_s(self) -> float:
        """The driver's virtual time."""
        return self._now_s

    def _charged(self, call: Callable[[], Any]) -> Any:
        before_s = self._charge()
        answer = call()
        taken_s = self._charge() - before_s
        self.course.driver_s += taken_s
        if not self._free:
            self._now_s += taken_s * self.slowed
        self._beside(self._now_s)
        return answer

    # -- workers

    def _start(self, worker: int, order: JobOrder) -> None:
        workers, start_s, node = self._workers, self._now_s, worker // self._workers.node
        draw = workers.draw("job", order.job)
        median_s = workers.job_s * (order.stop - order.start) / _first_steps(order)
        stop_s = start_s + median_s * math.exp(draw.gauss(0.0, workers.spread))
        while self._lost_s[node] <= start_s:
            self._lost_s[node] = self._next_loss(node, max(start_s, self._lost_s[node] + workers.back_s))
        result = self._result(order)
        if len(order.members) > workers.fits:
            stop_s = start_s + _OOM_S
            result = JobResult(job=order.job, error="oom", detail="OutOfMemoryError: simulated")
        elif draw.random() < workers.deaths:
            stop_s = start_s + (stop_s - start_s) * draw.random()
            result = JobResult(job=order.job, error="worker_died", detail="simulated death")
        if stop_s > self._lost_s[node]:
            stop_s = self._lost_s[node]
            result = JobResult(job=order.job, error="worker_died", detail="simulated loss of a node")
            heapq.heappush(self._heap, (stop_s + workers.back_s, next(self._ties), worker, None))
        if result.error:
            self.course.errors[result.error] = self.course.errors.get(result.error, 0) + 1
        if order.start == 0:
            self.course.asked_s = start_s
        self.course.spans_s.append((start_s, stop_s))
        heapq.heappush(self._heap, (stop_s, next(self._ties), worker, result))

    def _gone(self, worker: int, at_s: float) -> bool:
        """Whether its node was lost just then; it comes back by itself."""
        return self._lost_s[worker // self._workers.node] == at_s

    def _next_loss(self, node: int, after_s: float) -> float:
        if math.isinf(self._workers.node_hours):
            return math.inf
        draw = self._workers.draw("node", node, after_s)
        return after_s + draw.expovariate(1 / (3600 * self._workers.node_hours))

    def _result(self, order: JobOrder) -> JobResult:
        stretch, workers = order.stop - order.start, self._workers
        every = max(1, math.ceil(stretch / workers.losses)) if workers.losses else stretch + 1
        members = []
        for member in order.members:
            draw = workers.draw("trial", member.trial)
            loss = loss_of(member, order.stop) * math.exp(draw.gauss(0.0, 0.1))
            losses = tuple((step, loss + 1 / step) for step in range(order.start + 1, order.stop + 1, every))
            if draw.random() < workers.diverging:
                diverged_at = order.start + 1 + int(draw.random() * stretch)
                members.append(MemberResult(trial=member.trial, diverged_at=diverged_at, train_losses=losses))
                continue
            metrics = {"eval/loss": loss, "eval/accuracy": math.exp(-loss)}
            checkpoint = f"trial-{member.trial}/step-{order.stop}"
            members.append(
                MemberResult(trial=member.trial, metrics=metrics, train_losses=losses, checkpoint=checkpoint)
            )
        train_s = 1.0
        return JobResult(job=order.job, members=tuple(members), train_s=train_s, tokens=1000 * len(members))


def loss_of(member: MemberOrder, step: int) -> float:
    """A valley in (log lr, log init scale) that deepens with training, at another place for every rank."""
    c = member.configuration
    lr = math.log10(c.lr / 3e-3 * c.rank**0.25)
    return 0.2 + lr**2 + 0.05 * math.log2(c.init_scale) ** 2 + 0.5 / c.rank + 20.0 / step


def _first_steps(order: JobOrder) -> int:
    """Steps of the first rung, which the median time is of."""
    rungs = order.spec["search"]["pruner"].get("rungs")
    return int(rungs[0]) if rungs else int(order.stop - order.start)


def _over_the_wire(order: JobOrder | None) -> JobOrder | None:
    """As a driver hands it to Ray."""
    if order is not None:
        order.model_dump_json()
    return order


def driver_clock() -> float:
    """Seconds that the calling thread had a CPU: on a machine that others share, what is the driver's own."""
    return time.thread_time()


def in_use_at_best(workers: int, lanes: int, spread: float, jobs: int) -> float:
    """Share of the workers' time in which they train in the reproducible order, were nothing else in the way.

    Job j begins once a worker is free and jobs 0 .. j - lanes have all ended; log-normal times of median 1.
    """
    draw = random.Random(0)
    free_s = [0.0] * workers
    all_ended_s: list[float] = []
    spans_s: list[tuple[float, float]] = []
    start_s = 0.0
    for job in range(jobs):
        start_s = max(start_s, heapq.heappop(free_s), all_ended_s[job - lanes] if job >= lanes else 0.0)
        stop_s = start_s + math.exp(draw.gauss(0.0, spread))
        all_ended_s.append(max(stop_s, all_ended_s[-1] if job else 0.0))
        heapq.heappush(free_s, stop_s)
        spans_s.append((start_s, stop_s))
    return sum(min(stop, start_s) - start for start, stop in spans_s) / (workers * start_s)
