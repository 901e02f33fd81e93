"""Looks after every sweep in the queue: starts its driver, watches it, ends it, and settles how it ended.

    queued -> starting -> running <-> degraded -> finished | paused | failed | cancelled
                 ^----------- its driver died, or MLflow is behind -----------'

One call of `tick` looks at everything once. It keeps nothing in memory that it could not find again, so that a service
that was killed goes on where it was: drivers live on their own, and rows and events say what they were for.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.queue import Busy, Decision, Rules, Waiting, decide, over_hours
from services.reading import Records
from services.runner import Ending, Runner
from services.store import DRIVEN, Store, Submission
from sweeps.errors import ClusterError, InputError, StateError
from sweeps.events import QueueState, SweepEnded
from sweeps.ledger import Ledger
from sweeps.records import SweepRecord

_LOG = logging.getLogger("lora_sweeps")

_MOST_ATTEMPTS = 3
"""Starts in a row of a driver that dies without a job done; after that the fault is not chance."""

_BACKOFF_S, _LONGEST_BACKOFF_S = 5.0, 3600.0

_BEHIND_S = 120.0
"""MLflow has taken nothing for so long: people should know."""

_SILENT_S = 1800.0
"""A driver that says nothing for so long may hang: people should know."""

_COUNT_EVERY_S = 10.0
"""Device time is written down so often."""

_NOTHING_WANTED: dict[str, Any] = {"wanted": "", "wanted_by": "", "wanted_at_s": 0.0}

_WATCHED_JOBS, _TROUBLED_JOBS = 10, 3
"""So many of the last jobs failing is trouble."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the administrator has set.

    Attributes:
        rules: of the queue.
        window_s: that device time is counted over.
        cancel_s: that a driver has to end in order.
        gpus: of this machine, which are handed out; none where there are none, or drivers are elsewhere.
    """

    rules: Rules
    window_s: float
    cancel_s: float
    gpus: tuple[str, ...] = ()


class Supervisor:
    """Looks after the queue. One thread at a time, one service at a time."""

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        records: Records,
        runner: Runner,
        policy: Policy,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._ledger, self._records, self._runner, self._policy = store, ledger, records, runner, policy
        self._now = now
        self._asked: dict[tuple[str, str], float] = {}
        self._logged: set[str] = set()
        self.trouble = ""
        """Why nothing could be said of some sweeps at the last look; empty where all is well."""

    def tick(self) -> None:
        """Looks at every sweep once, and does what is due."""
        self.trouble = ""
        for row in self._store.in_states("starting", "running", "degraded"):
            self._guarded(self._look_at, row)
        rows = {row.sweep: row for row in self._store.in_states("queued")}
        now_s = self._now()
        ready = [row for row in rows.values() if now_s >= row.not_before_s]
        for sweep in self.decide(ready).start:
            self._guarded(self._start, rows[sweep])

    def _guarded(self, work: Callable[[Submission], None], row: Submission) -> None:
        """Does something for one sweep; whatever is wrong with it must not keep the others waiting."""
        try:
            work(row)
        except Exception as error:
            trouble = f"{row.sweep}: {error}"
            if not isinstance(error, InputError) and trouble not in self._logged:
                self._logged = {trouble} | set(list(self._logged)[:100])
                _LOG.exception("%s could not be looked after; tried again", row.sweep)
            self.trouble = trouble

    def used_hours(self) -> dict[str, float]:
        """Device-hours of each user within the window."""
        since_s = self._now() - self._policy.window_s
        return {user: used_s / 3600 for user, used_s in self._store.used_since(since_s).items()}

    # -- what runs

    def _look_at(self, row: Submission) -> None:
        handle = row.handle or self._runner.find(row.sweep, row.handle)
        if handle is None:
            self._look_at_undriven(row)
        elif (ending := self._runner.ended(row.sweep, handle)) is None:
            self._watch(row, handle)
        else:
            self._settle(row, ending)

    def _look_at_undriven(self, row: Submission) -> None:
        """MLflow waits for a driver to deliver; or the service was killed between saying it starts one and doing so."""
        if row.wanted == "cancel":
            state: QueueState = "finished" if row.delivering else "cancelled"
            self._store.move(row, state, by=row.wanted_by, **_NOTHING_WANTED)
        elif not row.delivering:
            later: dict[str, Any] = {"not_before_s": self._now() + _BACKOFF_S} if row.reason else {}
            self._store.move(row, "queued", row.reason or "to be started", **later, **_NOTHING_WANTED)
        elif self._now() >= row.not_before_s:
            self._start(row)

    def _watch(self, row: Submission, handle: str) -> None:
        now_s = self._now()
        if row.wanted:
            self._end(row, handle, now_s)
        elif over_hours(row.owner, self.used_hours(), self._policy.rules) and not row.delivering:
            self._store.note(row, wanted="pause", wanted_at_s=now_s)
            return
        if handle != row.handle or now_s - row.counted_s > _COUNT_EVERY_S:
            self._store.note(row, handle=handle, **self._counted(row, now_s))
        if row.delivering:
            return
        with self._records.reading(row.sweep) as record:
            begun = record.begun_seq > row.begun_seq
            trouble = _trouble(record, row, now_s) if begun else ""
            silent_s = now_s - max(record.last_at_s, row.moved_at_s)
        if not trouble and silent_s > _SILENT_S:
            trouble = f"its driver has said nothing for {_SILENT_S / 60:.0f} minutes; see its logs"
        state: QueueState = ("degraded" if trouble else "running") if begun else "starting"
        if (state, trouble) != (row.state, row.reason):
            self._store.move(row, state, trouble)

    def _end(self, row: Submission, handle: str, now_s: float) -> None:
        """Asks the driver to end, once, unless the service is another one by now; after a while it asks no more."""
        asked_s = self._asked.get((row.sweep, handle))
        if asked_s is None:
            self._asked[row.sweep, handle] = now_s
            self._runner.interrupt(row.sweep, handle)
        elif now_s - asked_s > self._policy.cancel_s:
            self._runner.kill(row.sweep, handle)

    def _counted(self, row: Submission, until_s: float) -> dict[str, Any]:
        """Device time up to now: what a driver that only delivers takes is nobody's."""
        devices = 0.0 if row.delivering else row.devices
        return {
            "used_device_s": row.used_device_s + max(0.0, until_s - row.counted_s) * devices,
            "counted_s": max(until_s, row.counted_s),
        }

    # -- what has ended

    def _settle(self, row: Submission, ending: Ending) -> None:
        now_s = self._now()
        self._asked = {pair: at_s for pair, at_s in self._asked.items() if pair[0] != row.sweep}
        with self._records.reading(row.sweep) as record:
            ended = record.ended if record.ended_seq > row.begun_seq or row.delivering else None
            ended_at_s, behind = record.ended_at_s, record.behind_since_s is not None
            progress = record.progress_seq > row.begun_seq
        done = {
            "handle": "",
            "held": "",
            **self._counted(row, min(now_s, ended_at_s) if ended else now_s),
            **_NOTHING_WANTED,
        }
        if ended is not None and ended.state == "finished":
            self._settle_finished(row, done, behind=behind and row.wanted != "cancel")
        elif row.wanted:
            if ended is None:
                self._ledger.append(row.sweep, [SweepEnded(state="interrupted", reason=ending.reason)])
            reason = over_hours(row.owner, self.used_hours(), self._policy.rules)
            state: QueueState = "cancelled" if row.wanted == "cancel" else "paused"
            reason = f"{reason or 'its user had used their device-hours'}; `resume` goes on then"
            self._store.move(row, state, "" if state == "cancelled" else reason, by=row.wanted_by, attempts=0, **done)
        elif ended is None or ended.state == "interrupted":
            self._start_again(row, 0 if progress else row.attempts, ending, done)
        else:
            self._store.move(row, ended.state, ended.reason, attempts=0, **done)

    def _settle_finished(self, row: Submission, done: dict[str, Any], *, behind: bool) -> None:
        if not behind:
            self._store.move(row, "finished", attempts=0, delivering=False, **done)
            return
        attempts = row.attempts + 1 if row.delivering else 1
        self._store.move(
            row,
            "degraded",
            "all trials have ended; MLflow has not got everything yet, and is told again later",
            attempts=attempts,
            delivering=True,
            not_before_s=self._now() + _backoff_s(attempts),
            **done,
        )

    def _start_again(self, row: Submission, attempts: int, ending: Ending, done: dict[str, Any]) -> None:
        if attempts + 1 >= _MOST_ATTEMPTS:
            reason = (
                f"its driver died {_MOST_ATTEMPTS} times in a row without a job done ({ending.reason}): see its logs"
            )
            self._ledger.append(row.sweep, [SweepEnded(state="failed", reason=reason)])
            self._store.move(row, "failed", reason, attempts=0, **done)
            return
        not_before_s = self._now() + _backoff_s(attempts)
        reason = f"its driver died ({ending.reason}) and is started again"
        self._store.move(row, "queued", reason, attempts=attempts + 1, not_before_s=not_before_s, **done)

    # -- what waits

    def decide(self, queued: list[Submission]) -> Decision:
        """Which of the queued sweeps start now, and why the others wait."""
        busy = self._store.in_states("starting", "running", "degraded")
        return decide(
            [Waiting(row.sweep, row.owner, row.priority, row.devices, row.submitted_at_s) for row in queued],
            [Busy(row.sweep, row.owner, row.devices) for row in busy if not row.delivering],
            self.used_hours(),
            self._policy.rules,
        )

    def _start(self, row: Submission) -> None:
        """Starts a driver: first the row says so, so that a service killed in between finds out what it was about."""
        with self._records.reading(row.sweep) as record:
            begun_seq = record.last_seq
        state: QueueState = "degraded" if row.delivering else "starting"
        reason = row.reason if row.delivering else ""
        held = self._gpus_for(row)
        fresh: dict[str, Any] = {"handle": "", "held": ",".join(held), "begun_seq": begun_seq, "counted_s": self._now()}
        if not self._store.move(row, state, reason, **fresh):
            return
        row = self._store.get(row.sweep)
        try:
            self._store.note(row, handle=self._runner.start(row.sweep, held))
        except StateError:
            pass  # somebody drives it: the next look finds out who
        except ClusterError as error:
            # It may have been started, and only the answer have been lost: the next look finds that out too.
            self._store.move(row, state, str(error), not_before_s=self._now() + _backoff_s(1))
        except InputError as error:
            self._store.move(row, "paused", str(error), held="")
        except OSError as error:
            reason = f"its driver could not be started: {error.strerror or error}"
            self._store.move(row, "queued", reason, not_before_s=self._now() + _backoff_s(2), held="")

    def _gpus_for(self, row: Submission) -> tuple[str, ...]:
        """GPUs of this machine that no other sweep holds; none where that is not for the service to say."""
        if row.delivering or not self._policy.gpus:
            return ()
        taken = {gpu for other in self._store.in_states(*DRIVEN) for gpu in other.held.split(",")}
        free = [gpu for gpu in self._policy.gpus if gpu not in taken]
        # With more devices allowed than there are GPUs, sweeps share.
        return tuple((free or self._policy.gpus)[: math.ceil(row.devices)])


def _backoff_s(attempts: int) -> float:
    return min(_BACKOFF_S * 2.0**attempts, _LONGEST_BACKOFF_S)


def _trouble(record: SweepRecord, row: Submission, now_s: float) -> str:
    """Why a running sweep is degraded; empty where it is not."""
    lately = list(record.jobs_ended.values())[-_WATCHED_JOBS:]
    failed = [job for job in lately if job.error]
    if len(failed) >= _TROUBLED_JOBS:
        kinds = ", ".join(dict.fromkeys(job.error or "" for job in failed))
        return f"{len(failed)} of the last {len(lately)} jobs failed: {kinds}"
    if record.behind_since_s is not None and now_s - max(record.behind_since_s, row.moved_at_s) > _BEHIND_S:
        return "MLflow takes nothing; what it lacks waits in the ledger"
    return ""
