"""What the service keeps beside the events: the queue, the tokens, and who did what. Tables of the ledger's database.

A row of `submissions` says where a sweep stands in the queue; what happened within the sweep is in its events. Both are
written in one transaction, and a row only ever moves from the state that its mover saw it in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from services.auth import NewToken, Scope
from sweeps.errors import InputError, SweepNotFoundError
from sweeps.events import QueueMoved, QueueState, SweepCreated
from sweeps.ledger import Ledger

OPEN: tuple[QueueState, ...] = ("queued", "starting", "running", "degraded")
"""States of a sweep that its service has still to do with."""

DRIVEN: tuple[QueueState, ...] = ("starting", "running", "degraded")
"""States in which a driver may be at work."""

_METADATA = sa.MetaData()

_SUBMISSIONS = sa.Table(
    "submissions",
    _METADATA,
    sa.Column("sweep", sa.String(80), primary_key=True),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("shared", sa.Boolean, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("devices", sa.Float, nullable=False),
    sa.Column("trials", sa.Integer, nullable=False),
    sa.Column("submitted_at_s", sa.Float, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("moved_at_s", sa.Float, nullable=False),
    sa.Column("wanted", sa.String(16), nullable=False),
    sa.Column("wanted_by", sa.String(64), nullable=False),
    sa.Column("wanted_at_s", sa.Float, nullable=False),
    sa.Column("handle", sa.String(200), nullable=False),
    sa.Column("held", sa.String(1000), nullable=False),
    sa.Column("delivering", sa.Boolean, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("begun_seq", sa.BigInteger, nullable=False),
    sa.Column("not_before_s", sa.Float, nullable=False),
    sa.Column("counted_s", sa.Float, nullable=False),
    sa.Column("used_device_s", sa.Float, nullable=False),
    sa.Column("key", sa.String(255), nullable=True),
    sa.Column("request_sha256", sa.String(64), nullable=False),
    sa.UniqueConstraint("owner", "key"),
    sa.Index("submissions_by_state", "state"),
    sa.Index("submissions_by_time", "submitted_at_s", "sweep"),
)

_DEVICE_TIME = sa.Table(
    "device_time",
    _METADATA,
    sa.Column("owner", sa.String(64), primary_key=True),
    sa.Column("hour", sa.Integer, primary_key=True),
    sa.Column("device_s", sa.Float, nullable=False),
)

_TOKENS = sa.Table(
    "tokens",
    _METADATA,
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("user", sa.String(64), nullable=False),
    sa.Column("note", sa.String(200), nullable=False),
    sa.Column("scope", sa.String(8), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("created_at_s", sa.Float, nullable=False),
    sa.Column("expires_at_s", sa.Float, nullable=True),
    sa.Column("revoked_at_s", sa.Float, nullable=True),
)

_AUDIT = sa.Table(
    "audit",
    _METADATA,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("at_s", sa.Float, nullable=False),
    sa.Column("user", sa.String(64), nullable=False),
    sa.Column("token", sa.String(12), nullable=False),
    sa.Column("address", sa.String(64), nullable=False),
    sa.Column("action", sa.String(32), nullable=False),
    sa.Column("sweep", sa.String(80), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Submission:
    """A sweep in the service's care.

    Attributes:
        sweep: its id.
        owner: the user who submitted it.
        name: the spec's name.
        shared: whether every user may see it.
        priority: above 0: before everybody's; below: after its owner's others.
        devices: GPUs, or cores, that it takes while it runs.
        trials: how many it trains in all; its driver extends it where that is more than it has.
        submitted_at_s: seconds since the epoch, as all times here.
        state: where it stands.
        reason: why, in words.
        moved_at_s: since when.
        wanted: `cancel` or `pause` once somebody asked for it; else empty.
        wanted_by, wanted_at_s: who, and when.
        handle: of its driver, in its runner's words; empty where it has none.
        held: the GPUs that were given to it, with commas between.
        delivering: whether all that is left to do is to tell MLflow.
        attempts: how often in a row its driver was started without getting anywhere.
        begun_seq: the ledger's last event before the driver was started.
        not_before_s: it is not started again before.
        counted_s: up to when its device time was counted.
        used_device_s: device-seconds counted so far.
        key: the idempotency key that it was submitted with.
        request_sha256: of what was submitted.
    """

    sweep: str
    owner: str
    name: str
    shared: bool
    priority: int
    devices: float
    trials: int
    submitted_at_s: float
    state: QueueState = "queued"
    reason: str = ""
    moved_at_s: float = 0.0
    wanted: str = ""
    wanted_by: str = ""
    wanted_at_s: float = 0.0
    handle: str = ""
    held: str = ""
    delivering: bool = False
    attempts: int = 0
    begun_seq: int = 0
    not_before_s: float = 0.0
    counted_s: float = 0.0
    used_device_s: float = 0.0
    key: str | None = None
    request_sha256: str = ""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A token without its secret."""

    id: str
    user: str
    note: str
    scope: Scope
    sha256: str
    created_at_s: float
    expires_at_s: float | None
    revoked_at_s: float | None

    def valid(self, now_s: float) -> bool:
        """Whether it still opens anything."""
        return self.revoked_at_s is None and (self.expires_at_s is None or now_s < self.expires_at_s)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what."""

    user: str
    action: str
    sweep: str = ""
    detail: str = ""
    token: str = ""
    address: str = ""
    at_s: float = 0.0
    seq: int = 0


class KeyTakenError(InputError):
    """The user has submitted something with this idempotency key already."""


class Store:
    """The service's tables. Safe to use from several threads."""

    def __init__(self, ledger: Ledger) -> None:
        """Makes the tables in a ledger's database where they are missing."""
        self._ledger, self._database = ledger, ledger.database
        self._database.make_tables(_METADATA)

    # -- the queue

    def submit(self, submission: Submission, created: SweepCreated, audit: AuditEntry) -> None:
        """Enters a sweep, in the ledger and at the end of the queue.

        Raises:
            KeyTakenError: its owner has used the idempotency key before.
        """
        try:
            with self._database.writing() as connection:
                values = asdict(submission) | {"moved_at_s": submission.submitted_at_s}
                connection.execute(_SUBMISSIONS.insert().values(**values))
                self._ledger.create(submission.sweep, created, connection)
                moved = QueueMoved(state="queued", reason=submission.reason, by=submission.owner)
                self._ledger.append(submission.sweep, [moved], connection)
                _enter(connection, audit)
        except sa.exc.IntegrityError as error:
            if submission.key is None or self.by_key(submission.owner, submission.key) is None:
                raise
            raise KeyTakenError(f"an idempotency key names one request; {submission.key!r} was used before") from error

    def move(
        self,
        seen: Submission,
        state: QueueState,
        reason: str = "",
        *,
        by: str = "",
        audit: AuditEntry | None = None,
        **changes: Any,
    ) -> bool:
        """Moves a sweep to a state, and says so in the ledger; False where it is no longer as its mover saw it.

        Args:
            seen: the sweep as the mover saw it.
            state: where to.
            reason: why.
            by: the user who asked for it.
            audit: for the audit log.
            changes: what else changes of the row.
        """
        values = changes | {"state": state, "reason": reason, "moved_at_s": time.time()}
        with self._database.writing() as connection:
            if not self._changed(connection, seen, values):
                return False
            if (state, reason) != (seen.state, seen.reason):
                self._ledger.append(seen.sweep, [QueueMoved(state=state, reason=reason, by=by)], connection)
            if audit is not None:
                _enter(connection, audit)
        return True

    def note(self, seen: Submission, *, audit: AuditEntry | None = None, **changes: Any) -> bool:
        """Changes what is kept of a sweep that stays in its state; False where it is no longer as the caller saw it."""
        with self._database.writing() as connection:
            if not self._changed(connection, seen, changes):
                return False
            if audit is not None:
                _enter(connection, audit)
        return True

    def _changed(self, connection: sa.Connection, seen: Submission, values: dict[str, Any]) -> bool:
        columns = _SUBMISSIONS.c
        same = (columns.sweep == seen.sweep, columns.state == seen.state, columns.wanted == seen.wanted)
        unmoved = columns.moved_at_s == seen.moved_at_s
        if connection.execute(_SUBMISSIONS.update().where(*same, unmoved).values(**values)).rowcount != 1:
            return False
        used_s = values.get("used_device_s", seen.used_device_s) - seen.used_device_s
        if used_s > 0:
            _count(connection, seen.owner, int(values["counted_s"] // 3600), used_s)
        return True

    def get(self, sweep: str) -> Submission:
        """A sweep in the queue.

        Raises:
            SweepNotFoundError: it was not submitted here.
        """
        found = self._select(_SUBMISSIONS.c.sweep == sweep)
        if not found:
            raise SweepNotFoundError(f"a sweep must be one of this service's; found {sweep!r}")
        return found[0]

    def by_key(self, owner: str, key: str) -> Submission | None:
        """What a user submitted with an idempotency key."""
        return next(iter(self._select(_SUBMISSIONS.c.owner == owner, _SUBMISSIONS.c.key == key)), None)

    def in_states(self, *states: QueueState) -> list[Submission]:
        """All sweeps in these states, oldest first."""
        return self._select(_SUBMISSIONS.c.state.in_(states))

    def used_since(self, since_s: float) -> dict[str, float]:
        """Device-seconds of each user since a time, by the hours that had not ended by then."""
        columns = _DEVICE_TIME.c
        query = sa.select(columns.owner, sa.func.sum(columns.device_s)).where(columns.hour >= int(since_s // 3600))
        with self._database.reading() as connection:
            return {row[0]: row[1] for row in connection.execute(query.group_by(columns.owner))}

    def counts(self) -> dict[str, int]:
        """Sweeps by state."""
        query = sa.select(_SUBMISSIONS.c.state, sa.func.count()).group_by(_SUBMISSIONS.c.state)
        with self._database.reading() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def page(
        self,
        *,
        viewer: str | None = None,
        owner: str | None = None,
        name: str | None = None,
        states: Sequence[QueueState] = (),
        before: tuple[float, str] | None = None,
        limit: int,
    ) -> list[Submission]:
        """Sweeps, latest first.

        Args:
            viewer: only what this user may see; None for an administrator.
            owner, name, states: only these.
            before: what comes after this one in the list: its time of submission and id.
            limit: at most so many.
        """
        columns = _SUBMISSIONS.c
        where: list[sa.ColumnElement[bool]] = []
        if viewer is not None:
            where.append(sa.or_(columns.owner == viewer, columns.shared.is_(True)))
        if owner is not None:
            where.append(columns.owner == owner)
        if name is not None:
            where.append(columns.name == name)
        if states:
            where.append(columns.state.in_(states))
        if before is not None:
            where.append(sa.tuple_(columns.submitted_at_s, columns.sweep) < sa.tuple_(*before))
        return self._select(*where, latest=limit)

    def _select(self, *where: sa.ColumnElement[bool], latest: int | None = None) -> list[Submission]:
        columns = _SUBMISSIONS.c
        query = sa.select(_SUBMISSIONS).where(*where)
        if latest is None:
            query = query.order_by(columns.submitted_at_s, columns.sweep)
        else:
            query = query.order_by(columns.submitted_at_s.desc(), columns.sweep.desc()).limit(latest)
        with self._database.reading() as connection:
            return [Submission(**row) for row in connection.execute(query).mappings()]

    # -- tokens

    def add_token(
        self, token: NewToken, *, user: str, scope: Scope, note: str, expires_at_s: float | None, audit: AuditEntry
    ) -> None:
        """Keeps a new token's hash."""
        row = {"id": token.id, "user": user, "note": note, "scope": scope, "sha256": token.sha256}
        with self._database.writing() as connection:
            times = {"created_at_s": time.time(), "expires_at_s": expires_at_s, "revoked_at_s": None}
            connection.execute(_TOKENS.insert().values(**row, **times))
            _enter(connection, audit)

    def token(self, token: str) -> TokenRow | None:
        """A token by its id."""
        with self._database.reading() as connection:
            row = connection.execute(sa.select(_TOKENS).where(_TOKENS.c.id == token)).mappings().first()
        return None if row is None else TokenRow(**row)

    def tokens(self) -> list[TokenRow]:
        """All tokens, oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(_TOKENS).order_by(_TOKENS.c.created_at_s, _TOKENS.c.id)).mappings()
            return [TokenRow(**row) for row in rows]

    def revoke_token(self, token: str, audit: AuditEntry) -> bool:
        """Makes a token open nothing from now on; False where there is no such token, or it was revoked before."""
        with self._database.writing() as connection:
            query = _TOKENS.update().where(_TOKENS.c.id == token, _TOKENS.c.revoked_at_s.is_(None))
            if connection.execute(query.values(revoked_at_s=time.time())).rowcount == 0:
                return False
            _enter(connection, audit)
        return True

    # -- who did what

    def enter(self, audit: AuditEntry) -> None:
        """Enters what somebody did."""
        with self._database.writing() as connection:
            _enter(connection, audit)

    def audit(self, *, before: int | None = None, limit: int) -> list[AuditEntry]:
        """What was done, latest first."""
        query = sa.select(_AUDIT).order_by(_AUDIT.c.seq.desc()).limit(limit)
        if before is not None:
            query = query.where(_AUDIT.c.seq < before)
        with self._database.reading() as connection:
            return [AuditEntry(**row) for row in connection.execute(query).mappings()]


def _enter(connection: sa.Connection, audit: AuditEntry) -> None:
    values = asdict(audit) | {"at_s": time.time()}
    del values["seq"]
    connection.execute(_AUDIT.insert().values(**values))


def _count(connection: sa.Connection, owner: str, hour: int, used_s: float) -> None:
    """Adds device time to a user's hour. One service writes to a database, so that nobody is in between."""
    columns = _DEVICE_TIME.c
    this = _DEVICE_TIME.update().where(columns.owner == owner, columns.hour == hour)
    if connection.execute(this.values(device_s=columns.device_s + used_s)).rowcount == 0:
        connection.execute(_DEVICE_TIME.insert().values(owner=owner, hour=hour, device_s=used_s))
