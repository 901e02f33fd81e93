"""What the service does, whoever asks and however: accept, show, cancel, resume, extend. The routes are `api.py`'s."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from services.auth import Principal
from services.exports import export_of, trial_of
from services.planning import BusyError, Planned, Planner, Room
from services.policy import Places, with_ids
from services.problems import RefusedError, away
from services.reading import Records, read_log
from services.schemas import Accepted, Export, SweepPage, SweepStatus, SweepSummary
from services.settings import Settings
from services.store import DRIVEN, AuditEntry, KeyTakenError, Store, Submission
from services.supervisor import Supervisor
from services.views import finite, plan_of, status, summary
from sweeps.best import Best, best_point
from sweeps.errors import InputError, SweepNotFoundError
from sweeps.events import SweepCreated
from sweeps.home import Home
from sweeps.ledger import Ledger
from sweeps.plan import Plan, extended
from sweeps.records import SweepRecord
from sweeps.secrecy import hide_passwords
from sweeps.spec import SweepSpec

_MOST_SUMMARIES, _MOST_STATUSES, _MOST_REPORTS = 4096, 1024, 16
"""Answers that are kept until something happens to their sweep."""


_MOST_SILENT_S = 60.0

_MOST_UNDER_WAY = 4
"""Plans that one user may have waiting or running at a time; and so many reports and adapters."""


@dataclass(frozen=True, slots=True)
class Order:
    """A submission as it came.

    Attributes:
        text: the spec, YAML or JSON.
        source: what its file is called, for messages.
        name: in place of the spec's own; None keeps that.
        priority: see `Submission`.
        shared: whether every user may see it.
        key: the idempotency key; None where there is none.
        address: where it came from.
    """

    text: str
    source: str
    name: str | None = None
    priority: int = 0
    shared: bool = False
    key: str | None = None
    address: str = ""

    @property
    def sha256(self) -> str:
        """Of all that makes it this order and no other."""
        own = json.dumps([self.text, self.name, self.priority, self.shared])
        return hashlib.sha256(own.encode()).hexdigest()


class Service:
    """The verbs, over the parts that do the work."""

    def __init__(
        self,
        settings: Settings,
        home: Home,
        ledger: Ledger,
        store: Store,
        records: Records,
        planner: Planner,
        supervisor: Supervisor,
        *,
        devices: int,
        tracking_uri: str,
        checkpoints: str = "",
    ) -> None:
        self.settings, self.home, self.ledger, self.store, self.planner = settings, home, ledger, store, planner
        self.supervisor = supervisor
        self.looked_at_s = time.monotonic()
        """When the queue was looked after last."""
        self._records, self._devices, self._tracking_uri = records, devices, tracking_uri
        self._checkpoints = checkpoints
        self._places = Places(settings.models, settings.data, frozenset(settings.entrypoints))
        self._summaries: OrderedDict[str, tuple[tuple[int, Submission], SweepSummary]] = OrderedDict()
        self._statuses: OrderedDict[str, tuple[tuple[int, Submission], SweepStatus]] = OrderedDict()
        self._reports: OrderedDict[str, tuple[int, str]] = OrderedDict()
        self._under_way: Counter[tuple[str, str]] = Counter()
        self._counting = threading.Lock()
        self._keys: dict[tuple[str, str], asyncio.Lock] = {}

    # -- submitting

    async def plan(self, who: Principal, text: str, source: str, *, timed: bool) -> Plan:
        """What a spec would run here.

        Raises:
            InputError: it cannot run here; every fault of it.
        """
        return Plan.model_validate((await self._planned(who, text, source, timed=timed)).plan)

    async def submit(self, who: Principal, order: Order) -> tuple[Accepted, bool]:
        """Takes a sweep into the queue, once it has been planned; also whether it is new.

        Raises:
            InputError: it cannot run here, or its user may not have it run.
        """
        if order.priority > 0 and not who.may("admin"):
            raise RefusedError("a priority above 0 is before everybody's and takes scope admin", HTTPStatus.FORBIDDEN)
        async with self._one_at_a_time(who.user, order.key):
            if order.key and (earlier := await asyncio.to_thread(self.store.by_key, who.user, order.key)):
                return await asyncio.to_thread(self._accepted_before, earlier, order), False
            planned = await self._planned(who, order.text, order.source)
            try:
                return await asyncio.to_thread(self._enter, who, order, planned), True
            except KeyTakenError:  # by another process of the service, in the moment in between
                earlier = await asyncio.to_thread(self.store.by_key, who.user, order.key or "")
                assert earlier is not None, "a key that is taken has a row"
                return await asyncio.to_thread(self._accepted_before, earlier, order), False

    async def _planned(self, who: Principal, text: str, source: str, *, timed: bool = False) -> Planned:
        room = Room(self._devices, self.settings.most_workers)
        with self._one_of_few(who.user, "plans"):
            return await self.planner.plan(text, source, self._places, room, timed=timed)

    @contextlib.contextmanager
    def _one_of_few(self, user: str, what: str) -> Iterator[None]:
        """Keeps one user from filling the planner's queue. Only the event loop's thread comes here."""
        if self._under_way[user, what] >= _MOST_UNDER_WAY:
            raise BusyError(
                f"one user may have {_MOST_UNDER_WAY} {what} under way at once, and {user} has; try again in a while"
            )
        self._under_way[user, what] += 1
        try:
            yield
        finally:
            self._under_way[user, what] -= 1
            if not self._under_way[user, what]:
                del self._under_way[user, what]

    @contextlib.asynccontextmanager
    async def _one_at_a_time(self, user: str, key: str | None) -> AsyncIterator[None]:
        """Has requests with one idempotency key wait for the first of them."""
        if key is None:
            yield
            return
        lock = self._keys.setdefault((user, key), asyncio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._keys.pop((user, key), None)

    def _accepted_before(self, earlier: Submission, order: Order) -> Accepted:
        if earlier.request_sha256 != order.sha256:
            raise RefusedError(
                f"an idempotency key names one request; {order.key!r} was used for another one, which became "
                f"{earlier.sweep}: use a new key",
                HTTPStatus.UNPROCESSABLE_ENTITY,
            )
        with self._records.reading(earlier.sweep) as record:
            return Accepted(sweep=earlier.sweep, state=earlier.state, reason=earlier.reason, plan=record.plan)

    def _enter(self, who: Principal, order: Order, planned: Planned) -> Accepted:
        spec, plan = SweepSpec.model_validate(planned.spec), Plan.model_validate(planned.plan)
        name = order.name or spec.name
        sweep = f"{name}-{secrets.token_hex(3)}"
        created = SweepCreated(
            name=name,
            spec=planned.spec,
            spec_text=planned.text,
            source=order.source,
            plan=planned.plan,
            tracking_uri=hide_passwords(self._tracking_uri),
            experiment=spec.tracking.experiment or spec.name,
            lanes=plan.workers + 1,
            pack=plan.pack,
            checkpoints=self._checkpoints,
        )
        submission = Submission(
            sweep=sweep,
            owner=who.user,
            name=name,
            shared=order.shared,
            priority=order.priority,
            devices=planned.devices,
            trials=plan.trials,
            submitted_at_s=time.time(),
            key=order.key,
            request_sha256=order.sha256,
        )
        with self._counting:
            self._check_trials(who.user, plan.trials)
            self.store.submit(submission, created, self._audit(who, "submit", sweep, address=order.address))
        waits = self.supervisor.decide(self.store.in_states("queued")).reasons.get(sweep, "")
        return Accepted(sweep=sweep, state="queued", reason=waits, plan=plan)

    def _check_trials(self, user: str, trials: int, sweep: str = "") -> None:
        """Refuses trials that a user may not have, whatever this sweep of theirs had before.

        Whoever asks holds `_counting` until they are entered.
        """
        most = self.settings.user_trials
        if most is None:
            return
        if trials > most:
            raise RefusedError(
                f"search.trials: required at most {most:,}, which is what one user may have; found {trials:,}: it "
                "could never run here",
                HTTPStatus.UNPROCESSABLE_ENTITY,
            )
        others = (row for row in self.store.in_states("queued", *DRIVEN) if row.owner == user and row.sweep != sweep)
        open_trials = sum(row.trials for row in others)
        if open_trials + trials > most:
            raise RefusedError(
                f"the unfinished sweeps of {user} may have {most:,} trials together; they have {open_trials:,}, and "
                f"this one has {trials:,}: wait for one, or cancel one",
                HTTPStatus.TOO_MANY_REQUESTS,
            )

    # -- looking

    def unready(self) -> str:
        """Why the service cannot do its work; empty where it can."""
        try:
            self.store.counts()
        except InputError as error:
            return away(error)
        silent_s = time.monotonic() - self.looked_at_s
        return "" if silent_s < _MOST_SILENT_S else f"nobody has looked after the queue for {silent_s:.0f} s"

    def find(self, who: Principal, reference: str) -> Submission:
        """A sweep by its id, its name, or `last`, among those that somebody may see.

        A name, and `last`, are first those of their own sweeps, and only where they have none, of what they may see.

        Raises:
            SweepNotFoundError: there is none, or it is another's.
        """
        viewer = None if who.may("admin") else who.user
        found = self._exactly(viewer, reference) or self._latest(reference, owner=who.user)
        if found is None and (found := self._latest(reference, viewer=viewer)) is None:
            raise SweepNotFoundError(
                f"a sweep must be named by its id, its name or `last`; found {reference!r}; `list` has yours"
            )
        return found

    def _exactly(self, viewer: str | None, sweep: str) -> Submission | None:
        """The sweep of this id, if the viewer may see it."""
        with contextlib.suppress(SweepNotFoundError):
            row = self.store.get(sweep)
            return row if viewer is None or row.owner == viewer or row.shared else None
        return None

    def _latest(self, reference: str, *, viewer: str | None = None, owner: str | None = None) -> Submission | None:
        """The latest sweep of this name, or the latest of all for `last`."""
        name = None if reference == "last" else reference
        return next(iter(self.store.page(viewer=viewer, owner=owner, name=name, limit=1)), None)

    def own(self, who: Principal, reference: str) -> Submission:
        """The same, where it is to be changed: another's goes by its id only, so that nobody's is changed by mistake.

        Raises:
            SweepNotFoundError: there is none, or it is another's.
            RefusedError: it is another's, who only shares it.
        """
        row = self._exactly(None if who.may("admin") else who.user, reference)
        if row is None and (row := self._latest(reference, owner=who.user)) is None:
            raise SweepNotFoundError(
                f"a sweep must be named by its id, or one of your own by its name or `last`; found {reference!r}; "
                "`list` has yours"
            )
        if row.owner != who.user and not who.may("admin"):
            raise RefusedError(f"{row.sweep} is {row.owner}'s, who shares the sight of it only", HTTPStatus.FORBIDDEN)
        return row

    def page(self, who: Principal, after: str | None, limit: int, **only: Any) -> SweepPage:
        """A page of the sweeps that somebody may see, latest first."""
        viewer = None if who.may("admin") else who.user
        rows = self.store.page(viewer=viewer, before=_position(after), limit=limit + 1, **only)
        shown = rows[:limit]
        last = self.ledger.last_seqs([row.sweep for row in shown])
        summaries = tuple(self._summary(row, last.get(row.sweep, 0)) for row in shown)
        more = f"{shown[-1].submitted_at_s!r}:{shown[-1].sweep}" if len(rows) > limit else None
        return SweepPage(sweeps=summaries, next=more)

    def status(self, row: Submission) -> SweepStatus:
        """A sweep by itself."""
        seq = self.ledger.last_seqs([row.sweep]).get(row.sweep, 0)
        version = (seq, replace(row, counted_s=0.0))
        if (kept := self._statuses.get(row.sweep)) is not None and kept[0] == version:
            return self._with_place(row, kept[1])
        addresses = (self.settings.mlflow_url, self.settings.ray_address)
        mlflow_url, ray_url = (None if one is None else hide_passwords(one) for one in addresses)
        with self._records.reading(row.sweep) as record:
            made = status(record, row, row.state, mlflow_url=mlflow_url, ray_url=ray_url)
        _keep(self._statuses, row.sweep, (version, made), most=_MOST_STATUSES)
        return self._with_place(row, made)

    def _with_place(self, row: Submission, made: SweepStatus) -> SweepStatus:
        """With why it waits, which depends on the others."""
        if row.state != "queued" or row.reason:
            return made
        return made.model_copy(update={"reason": self.place(row)})

    def place(self, row: Submission) -> str:
        """Why a queued sweep waits."""
        return self.places().get(row.sweep, "starts now")

    def places(self) -> dict[str, str]:
        """Why each queued sweep waits, but for those that start now."""
        return self.supervisor.decide(self.store.in_states("queued")).reasons

    def record(self, row: Submission) -> AbstractContextManager[SweepRecord]:
        """All that the ledger has of a sweep; it stays as it is for as long as the context lasts."""
        return self._records.reading(row.sweep)

    def _summary(self, row: Submission, seq: int) -> SweepSummary:
        version = (seq, replace(row, counted_s=0.0, used_device_s=0.0))
        if (kept := self._summaries.get(row.sweep)) is not None and kept[0] == version:
            return kept[1]
        with self._records.reading(row.sweep) as record:
            made = summary(record, row, row.state)
        _keep(self._summaries, row.sweep, (version, made), most=_MOST_SUMMARIES)
        return made

    # -- results

    def best(self, row: Submission) -> Best:
        """The best point.

        Raises:
            SweepNotFoundError: no trial has finished yet.
        """
        with self._records.reading(row.sweep) as record:
            found = finite(best_point(record))
        if found is None:
            raise SweepNotFoundError(f"a best point needs a finished trial; {row.sweep} is {row.state} and has none")
        return found

    def export(self, row: Submission, form: str, alpha: str | None, trial: int | None) -> Export:
        """A point in a trainer's config format."""
        with self._records.reading(row.sweep) as record:
            made = export_of(record, trial_of(record, trial), form, alpha, self.scratch())
        files = {name: self.shown(text) for name, text in made.files.items()}
        leftovers = tuple(one.model_copy(update={"text": self.shown(one.text)}) for one in made.leftovers)
        return made.model_copy(update={"files": files, "leftovers": leftovers})

    async def report(self, who: Principal, row: Submission, form: str) -> str:
        """The collapse report, as `json`, `md` or `html`."""
        version = (await asyncio.to_thread(self.ledger.last_seqs, [row.sweep])).get(row.sweep, 0)
        key = f"{row.sweep} {form}"
        if (kept := self._reports.get(key)) is not None and kept[0] == version:
            return kept[1]
        with self._one_of_few(who.user, "reports and adapters"):
            text = self.shown(await self.planner.report(row.sweep, form))
        _keep(self._reports, key, (version, text), most=_MOST_REPORTS)
        return text

    async def adapter(self, who: Principal, row: Submission, trial: int | None, archive: Path) -> None:
        """Packs the trained adapter of a trial, or of the best one, into a ZIP archive."""
        with self._one_of_few(who.user, "reports and adapters"):
            await self.planner.adapter(row.sweep, trial, archive)

    def shown(self, text: str) -> str:
        """A text in which models and data go by the names that their users gave them."""
        return with_ids(hide_passwords(text), self._places)

    # -- changing

    def cancel(self, who: Principal, row: Submission, address: str) -> Submission:
        """Ends a sweep in order; one that is being driven is asked, and ends when it has."""
        audit = self._audit(who, "cancel", row.sweep, address=address)
        for _ in range(_TRIES):
            if row.state in ("finished", "failed", "cancelled") or row.wanted == "cancel":
                return row
            if row.state in DRIVEN:
                wanted = {"wanted": "cancel", "wanted_by": who.user, "wanted_at_s": time.time()}
                done = self.store.note(row, audit=audit, **wanted)
            else:
                done = self.store.move(row, "cancelled", by=who.user, audit=audit)
            row = self.store.get(row.sweep)
            if done:
                return row
        raise RefusedError(f"{row.sweep} changes too fast to be cancelled; try again")

    def resume(self, who: Principal, row: Submission, address: str) -> Submission:
        """Queues a sweep again that was paused, failed or cancelled: in the place that its submission had."""
        if row.state not in ("paused", "failed", "cancelled"):
            raise RefusedError(f"what is resumed must be paused, failed or cancelled; {row.sweep} is {row.state}")
        audit = self._audit(who, "resume", row.sweep, address=address)
        with self._counting:
            self._check_trials(row.owner, row.trials, row.sweep)
            return self._queue_again(who, row, audit)

    def extend(self, who: Principal, row: Submission, trials: int, address: str) -> Submission:
        """Gives a sweep more trials, and queues it again."""
        if row.state in DRIVEN:
            raise RefusedError(f"what is extended must not run; {row.sweep} is {row.state}: cancel it first, or wait")
        with self._records.reading(row.sweep) as record:
            extended(plan_of(record, row), record.spec, trials)  # or it says why not
        audit = self._audit(who, "extend", row.sweep, detail=f"to {trials} trials", address=address)
        with self._counting:
            self._check_trials(row.owner, trials, row.sweep)
            return self._queue_again(who, row, audit, trials=trials)

    def _queue_again(self, who: Principal, row: Submission, audit: AuditEntry, **changes: Any) -> Submission:
        fresh: dict[str, Any] = {"attempts": 0, "not_before_s": 0.0, "delivering": False, "wanted": "", "wanted_by": ""}
        if not self.store.move(row, "queued", by=who.user, audit=audit, **fresh, **changes):
            raise RefusedError(f"{row.sweep} was changed by somebody else at this moment; look again")
        return self.store.get(row.sweep)

    def _audit(self, who: Principal, action: str, sweep: str, *, detail: str = "", address: str = "") -> AuditEntry:
        return AuditEntry(who.user, action, sweep, detail, who.token, address)

    # -- files

    def logs(self, row: Submission, *, offset: int | None, most_bytes: int) -> tuple[str, int, int]:
        """A stretch of the drivers' log; see `read_log`."""
        text, start, end = read_log(self.home.logs(row.sweep), offset=offset, most_bytes=most_bytes)
        return self.shown(text), start, end

    def scratch(self) -> Path:
        """A directory for what is sent once and then deleted."""
        path = self.home.path / "scratch"
        path.mkdir(mode=0o700, exist_ok=True)
        return path


_TRIES = 10


def _keep(cache: OrderedDict[str, Any], key: str, value: Any, *, most: int) -> None:
    """Puts a value into a cache. Safe in several threads: each step is one operation of a dictionary."""
    cache[key] = value
    if len(cache) > most:
        with contextlib.suppress(KeyError):
            cache.popitem(last=False)


def _position(after: str | None) -> tuple[float, str] | None:
    if after is None:
        return None
    at_s, _, sweep = after.partition(":")
    try:
        return float(at_s), sweep
    except ValueError:
        raise RefusedError(
            f"after must be what a page named as its next; found {after!r}", HTTPStatus.UNPROCESSABLE_ENTITY
        ) from None
