"""Fills packs: asks the study for trials, promotes or prunes them at rungs, and orders certificates at the end.

    lane   one of the jobs that may be under way at once; job j is composed from the results of jobs 0 .. j - lanes
    rung   a step count at which trials report; a *job* takes one pack from one rung to the next

Pure logic: no Ray, no torch, no clock in any decision. In the reproducible order (the default) results are applied in
the order in which their jobs were composed, so that what is searched depends on the spec, its seeds, the pack size and
the number of lanes, not on which worker came first; in the asynchronous order they are applied as they arrive.

A pack that ran out of memory is split in two, and no later pack is larger than its parts.

Every decision follows from the calls made on the searcher, and the ledger has all of those. Resuming is therefore
replaying: the same code is run over the recorded calls, with recorded answers in the sampler's place. That a search was
given more trials is such a call; it comes between a replay and the next job, and has its place in the replays after it.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

from sweeps import collapse
from sweeps.canonical import Continuous, TrialSpace
from sweeps.errors import StateError
from sweeps.events import (
    Certified,
    Event,
    JobEnded,
    JobStarted,
    MemberDiverged,
    Record,
    RungReported,
    SweepExtended,
    TrialAsked,
    TrialState,
    TrialTold,
)
from sweeps.jobs import JobOrder, JobResult, MemberOrder, MemberResult
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SweepSpec
from sweeps.study import Study, Suggestion

_MOST_REPEATS = 10
"""After so many known points in a pack the sampler has nothing new to say, and the rest are drawn at random; after as
many again the points of a finite space are gone through one by one."""

_MOST_RETRIES = 2
"""How often a pack whose worker died is tried again."""

_MOST_LOSSES = 20
"""How often a job whose node vanished is handed out again, as the same job: it is nobody's fault, and changes nothing
of the search. But jobs that take longer than nodes live never end, and somebody must be told."""

_BREAKER = 5
"""So many trials failing alike, before any has succeeded, pause the sweep: the fault is not the trials'. A search that
is given more trials starts counting anew."""


@dataclass(frozen=True, slots=True)
class _Pack:
    work: Literal["train", "certify"]
    trials: tuple[int, ...]
    start: int
    stop: int
    deaths: int = 0
    alone: bool = False


@dataclass(slots=True)
class _Trial:
    number: int
    configuration: Configuration
    class_id: str
    checkpoint: str | None = None
    state: TrialState | None = None
    value: float | None = None
    followers: list[int] = field(default_factory=list)


class PackSearcher:
    """Composes jobs and takes their results. One thread at a time."""

    def __init__(
        self,
        spec: SweepSpec,
        reduction: Reduction,
        space: TrialSpace,
        *,
        trials: int,
        rungs: tuple[int, ...],
        pack: int,
        lanes: int,
        cache: Path | None,
        checkpoints: str,
        append: Callable[[list[Event]], None],
    ) -> None:
        """Starts a search from nothing; `replay` brings it to where a ledger left off.

        Args:
            spec: the sweep's spec.
            reduction: its reduction.
            space: where trials come from.
            trials: how many to train, duplicates not counted, unless it is given more (`extend`).
            rungs: steps at which trials report, ascending; the last is the end of training.
            pack: K, members to a pack.
            lanes: jobs under way at once.
            cache: the workers' directory for what tasks keep; None where each node has one of its own.
            checkpoints: the sweep's place for members' states.
            append: takes events to the ledger, all or none.
        """
        self._spec, self._reduction, self._space = spec, reduction, space
        self._budget, self._rungs, self._size, self._lanes = trials, rungs, pack, lanes
        self._cache, self._checkpoints, self._append = cache, checkpoints, append
        self._study = Study(
            space.dimensions,
            spec.search,
            goal=spec.metric.goal,
            rungs=rungs,
            log_scale=spec.metric.name in spec.task.log_metrics,
        )
        self._trials: dict[int, _Trial] = {}
        self._trial_of_class: dict[str, _Trial] = {}
        self._waiting: dict[int, deque[int]] = {rung: deque() for rung in rungs[:-1]}
        self._retries: deque[_Pack] = deque()
        self._jobs: list[_Pack] = []
        self._applied = 0
        self._arrived: dict[int, JobResult] = {}
        self._to_certify: deque[int] | None = None
        self._certified: set[str] = set()
        self._orphans: deque[int] = deque()
        self._losses: Counter[int] = Counter()
        self._ended: set[int] = set()
        self._untried: Iterator[dict[str, float]] | None = None
        self._recorded_asks: dict[int, TrialAsked] = {}
        self._recorded_ends: set[int] = set()
        self._events: list[Event] = []
        self._failures: list[str] = []
        self._succeeded = False
        self.exhausted = False
        self.paused: str | None = None
        self.finished = False

    # -- the two calls

    def suggest(self) -> JobOrder | None:
        """Composes the next job; None where it must wait for a result, or has `finished`."""
        job = self._orphans.popleft() if self._orphans else self._compose()
        if job is not None:
            pack = self._jobs[job]
            self._events.append(
                JobStarted(job=job, work=pack.work, trials=pack.trials, start=pack.start, stop=pack.stop)
            )
        self._commit()
        return None if job is None else self._order(job)

    def complete(self, result: JobResult, *, wall_s: float = 0.0) -> None:
        """Takes a job's result; what follows from it is decided when the next job is composed."""
        pack = self._jobs[result.job]
        if pack.work == "train":
            self._events += [_member_event(result.job, pack.stop, member) for member in result.members]
        if result.certificate is not None:
            self._events.append(Certified(certificate=result.certificate))
        self._events.append(
            JobEnded(
                job=result.job,
                error=result.error,
                detail=result.detail,
                setup_s=result.setup_s,
                train_s=result.train_s,
                tokens=result.tokens,
                eval_s=result.eval_s,
                wall_s=wall_s,
                node=result.node,
            )
        )
        self._commit()
        self._take(result)

    def extend(self, trials: int) -> list[Event]:
        """Gives the search more trials: after the `replay` of all that was before, and before anything new is composed.

        Args:
            trials: how many to train in all from now on.

        Returns:
            What the ledger must be told, in one transaction, before the next call.
        """
        self._grow(trials)
        events, self._events = self._events, []
        return [SweepExtended(trials=trials), *events]

    def replay(self, records: Iterable[Record]) -> None:
        """Brings a fresh searcher to where the ledger left off; jobs that were under way are handed out again.

        Raises:
            StateError: the ledger tells of jobs that this version would not have composed.
        """
        recorded = [record.event for record in records]
        self._recorded_asks = {event.trial: event for event in recorded if isinstance(event, TrialAsked)}
        self._recorded_ends = {event.trial for event in recorded if isinstance(event, TrialTold)}
        members: dict[int, list[MemberResult]] = {}
        for event in recorded:
            match event:
                case JobStarted() if event.job == len(self._jobs):
                    self._replay_start(event)
                case RungReported() | MemberDiverged():
                    members.setdefault(event.job, []).append(_member_result(event))
                case JobEnded():
                    self._take(_job_result(event, members.pop(event.job, [])))
                case SweepExtended():
                    self._grow(event.trials)
        self._orphans = deque(job for job in range(len(self._jobs)) if job not in self._ended)
        self._events.clear()

    def _take(self, result: JobResult) -> None:
        """Keeps a result until it is applied; a job whose node vanished has none, and is handed out again."""
        if result.error == "node_lost" and self._losses[result.job] < _MOST_LOSSES:
            self._losses[result.job] += 1
            self._orphans.append(result.job)
            return
        self._arrived[result.job] = result
        self._ended.add(result.job)

    def _replay_start(self, started: JobStarted) -> None:
        job = self._compose()
        if job is None or self._jobs[job].trials != started.trials or self._jobs[job].stop != started.stop:
            found = "nothing" if job is None else f"trials {self._jobs[job].trials} to step {self._jobs[job].stop}"
            raise StateError(
                f"to resume, the ledger must replay: job {started.job} was recorded with trials {started.trials} to "
                f"step {started.stop}, this version composes {found}; resume with the version that began the sweep, or "
                "run it anew"
            )

    def _grow(self, trials: int) -> None:
        """Raises the budget.

        A search that had spent its budget, and has no job under way, first learns what its last jobs said. One that had
        not goes on as if it had always had so many trials: whichever results have arrived by now changes nothing.
        """
        spent = len(self._trial_of_class) >= self._budget
        if spent and self._applied + len(self._arrived) == len(self._jobs):
            asynchronous = self._spec.search.order == "asynchronous"
            for job in list(self._arrived) if asynchronous else sorted(self._arrived):
                self._apply(job)
        self._budget = trials
        self._to_certify = None  # chosen anew, once the new trials have ended too
        self._failures.clear()
        self._succeeded = False
        self.paused, self.finished = None, False

    # -- composing

    def _compose(self) -> int | None:
        """Appends the next pack to `_jobs`, applying results as the order of the search demands; its number."""
        while not self.finished:
            if not self._apply_due():
                return None
            pack = None if self.paused else self._next_pack()
            if pack is not None:
                self._jobs.append(pack)
                return len(self._jobs) - 1
            if self._applied == len(self._jobs):
                self.finished = True
            elif not self._apply_next():
                return None
        return None

    def _apply_due(self) -> bool:
        """Applies what must be known before the next job is composed; False where some of it has not arrived yet."""
        if self._spec.search.order == "asynchronous":
            while self._arrived:
                self._apply(next(iter(self._arrived)))
            return len(self._jobs) - self._applied < self._lanes
        while self._applied < len(self._jobs) - self._lanes + 1:
            if not self._apply_next():
                return False
        return True

    def _apply_next(self) -> bool:
        """Applies the result of the earliest job that has none applied; False where it has not arrived yet."""
        if self._applied not in self._arrived:
            return False
        self._apply(self._applied)
        return True

    def _next_pack(self) -> _Pack | None:
        if self._retries:
            return self._next_retry()
        full = [rung for rung, waiting in self._waiting.items() if len(waiting) >= self._size]
        if full:
            return self._promote(max(full))
        fresh = self._ask_pack()
        if fresh:
            return _Pack("train", fresh, 0, self._rungs[0])
        # Partial packs from the lowest rung up, so that survivors gather above.
        partial = [rung for rung, waiting in self._waiting.items() if waiting]
        if partial:
            return self._promote(min(partial))
        return self._next_certificate() if self._applied == len(self._jobs) or self._to_certify is not None else None

    def _next_retry(self) -> _Pack:
        pack = self._retries.popleft()
        if len(pack.trials) > self._size:  # memory has run out since it was put there
            self._retries.appendleft(replace(pack, trials=pack.trials[self._size :]))
        return replace(pack, trials=pack.trials[: self._size])

    def _promote(self, rung: int) -> _Pack:
        waiting = self._waiting[rung]
        trials = tuple(waiting.popleft() for _ in range(min(self._size, len(waiting))))
        return _Pack("train", trials, rung, self._rungs[self._rungs.index(rung) + 1])

    def _next_certificate(self) -> _Pack | None:
        if self._to_certify is None:
            ended = [
                (t.number, t.value, t.configuration, t.class_id) for t in self._trials.values() if t.state == "finished"
            ]
            chosen = collapse.choose(self._spec, self._reduction, ended)
            missing = self._spec.certify.classes - len(self._certified)
            uncertified = [number for number in chosen if self._trials[number].class_id not in self._certified]
            self._to_certify = deque(uncertified[:missing])
        if not self._to_certify:
            return None
        return _Pack("certify", (self._to_certify.popleft(),), 0, self._spec.certify.steps)

    # -- asking

    def _ask_pack(self) -> tuple[int, ...]:
        found: list[int] = []
        repeats = 0
        while len(found) < self._size and len(self._trial_of_class) < self._budget and not self.exhausted:
            suggestion, recorded = self._ask(repeats)
            if suggestion is None:
                self.exhausted = True
                break
            configuration, class_id = self._space.trial(suggestion.values)
            original = self._trial_of_class.get(class_id)
            if not recorded:
                self._events.append(
                    TrialAsked(
                        trial=suggestion.number,
                        values=suggestion.values,
                        configuration=configuration,
                        class_id=class_id,
                        duplicate_of=original.number if original else None,
                        by_sampler=suggestion.by_sampler,
                    )
                )
            if original is None:
                trial = _Trial(suggestion.number, configuration, class_id)
                self._trials[trial.number] = self._trial_of_class[class_id] = trial
                found.append(trial.number)
                continue
            repeats += 1
            if original.state is None:
                original.followers.append(suggestion.number)
            else:
                self._study.tell(suggestion.number, original.state, original.value)
        return tuple(found)

    def _ask(self, repeats: int) -> tuple[Suggestion | None, bool]:
        """A suggestion, None where every point is known, and whether it comes from the ledger."""
        recorded = self._recorded_asks.pop(self._study.count, None)
        if recorded is not None:
            return self._study.ask_known(recorded.values, by_sampler=recorded.by_sampler), True
        if repeats < 2 * _MOST_REPEATS:
            return self._study.ask(at_random=repeats >= _MOST_REPEATS), False
        unknown = self._unknown_point()
        return None if unknown is None else self._study.ask_known(unknown, by_sampler=False), False

    def _unknown_point(self) -> dict[str, float] | None:
        """The first point of a finite space that was never asked."""
        names, axes = [], []
        for dimension in self._space.dimensions:
            if isinstance(dimension, Continuous):
                return None
            names.append(dimension.name)
            axes.append(dimension.values)
        if self._untried is None:  # what is known stays known, so that the points are gone through once
            self._untried = (dict(zip(names, values, strict=True)) for values in product(*axes))
        return next((p for p in self._untried if self._space.trial(p)[1] not in self._trial_of_class), None)

    # -- applying

    def _apply(self, job: int) -> None:
        result, pack = self._arrived.pop(job), self._jobs[job]
        self._applied += 1
        if result.error is not None:
            self._apply_error(pack, result)
        elif pack.work == "train":
            self._apply_members(pack, result)
        else:
            self._certified.add(self._trials[pack.trials[0]].class_id)

    def _apply_members(self, pack: _Pack, result: JobResult) -> None:
        values: dict[int, float] = {}
        for member in result.members:
            value = member.metrics.get(self._spec.metric.name, math.nan)
            if member.diverged_at is not None or not math.isfinite(value):
                at = pack.stop if member.diverged_at is None else member.diverged_at
                self._end(member.trial, "diverged", None, f"the loss was not finite at step {at}")
                continue
            values[member.trial] = value
            self._trials[member.trial].checkpoint = member.checkpoint
        pruned = self._study.prune(pack.stop, values) if values else frozenset()
        for trial, value in values.items():
            if pack.stop == self._rungs[-1]:
                self._end(trial, "finished", value, "")
            elif trial in pruned:
                self._end(trial, "pruned", value, f"{self._spec.search.pruner.type} at step {pack.stop}")
            else:
                self._waiting[pack.stop].append(trial)

    def _apply_error(self, pack: _Pack, result: JobResult) -> None:
        """Each kind of failure has its policy; a failing member never takes its pack-mates with it."""
        if result.error == "worker_died" and pack.deaths < _MOST_RETRIES:
            self._retries.append(replace(pack, deaths=pack.deaths + 1))
        elif pack.work == "certify":
            pass  # one certificate fewer; its trial has finished all the same
        elif (
            result.error in ("worker_died", "node_lost")
            or pack.alone
            or (result.error == "oom" and len(pack.trials) == 1)
        ):
            reason = (
                f"{result.error}: {result.detail.strip().splitlines()[-1] if result.detail.strip() else 'no detail'}"
            )
            for trial in pack.trials:
                self._end(trial, "failed", self._trials[trial].value, reason)
        elif result.error == "oom":
            half = len(pack.trials) // 2
            self._retries += [replace(pack, trials=part) for part in (pack.trials[:half], pack.trials[half:])]
            self._size = min(self._size, len(pack.trials) - half)
        else:
            self._retries += [replace(pack, trials=(trial,), alone=True) for trial in pack.trials]

    def _end(self, number: int, state: TrialState, value: float | None, reason: str) -> None:
        trial = self._trials[number]
        trial.state, trial.value = state, value
        for told in (number, *trial.followers):
            self._study.tell(told, state, value)
        if number not in self._recorded_ends:
            self._events.append(TrialTold(trial=number, state=state, value=value, reason=reason))
        self._succeeded |= state in ("finished", "pruned")
        if state == "failed" and number not in self._recorded_ends:
            # Failures of an earlier driver do not count: whoever starts one again may have mended what failed.
            self._failures.append(reason)
            self._check_breaker()

    def _check_breaker(self) -> None:
        if not self._succeeded and len(self._failures) >= _BREAKER and len(set(self._failures)) == 1:
            self.paused = f"the first {_BREAKER} trials failed alike: {self._failures[0]}"

    # -- orders and events

    def _order(self, job: int) -> JobOrder:
        pack = self._jobs[job]
        trials = [self._trials[number] for number in pack.trials]
        certify = pack.work == "certify"
        return JobOrder(
            job=job,
            work=pack.work,
            spec=self._spec_as_json,
            cache=None if self._cache is None else str(self._cache),
            checkpoints=self._checkpoints,
            members=tuple(
                MemberOrder(
                    trial=t.number,
                    configuration=t.configuration,
                    class_id=t.class_id,
                    checkpoint=None if certify else t.checkpoint,
                )
                for t in trials
            ),
            twins=collapse.twins(self._reduction, trials[0].configuration, trials[0].class_id) if certify else (),
            start=pack.start,
            stop=pack.stop,
        )

    @cached_property
    def _spec_as_json(self) -> dict[str, Any]:
        return self._spec.model_dump(mode="json")

    def _commit(self) -> None:
        events, self._events = self._events, []
        if events:
            self._append(events)


def _member_event(job: int, stop: int, member: MemberResult) -> Event:
    if member.diverged_at is not None:
        return MemberDiverged(trial=member.trial, job=job, step=member.diverged_at, train_losses=member.train_losses)
    return RungReported(
        trial=member.trial,
        job=job,
        step=stop,
        metrics=member.metrics,
        train_losses=member.train_losses,
        checkpoint=member.checkpoint,
    )


def _member_result(event: RungReported | MemberDiverged) -> MemberResult:
    if isinstance(event, MemberDiverged):
        return MemberResult(trial=event.trial, diverged_at=event.step)
    return MemberResult(trial=event.trial, metrics=event.metrics, checkpoint=event.checkpoint)


def _job_result(event: JobEnded, members: list[MemberResult]) -> JobResult:
    return JobResult(job=event.job, error=event.error, detail=event.detail, members=tuple(members))
