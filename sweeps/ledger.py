"""The one truth about sweeps: an append-only list of events in a database.

A SQLite file, or a PostgreSQL that several machines share. Studies, MLflow and reports are projections of it and can be
made again at any time.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from sweeps.database import Database, database_file
from sweeps.errors import StateError, SweepNotFoundError
from sweeps.events import EVENT, Event, Record, SweepCreated

_METADATA = sa.MetaData()

_SWEEPS = sa.Table(
    "sweeps",
    _METADATA,
    sa.Column("id", sa.String(80), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False, index=True),
    sa.Column("created_at_s", sa.Float, nullable=False),
)

_EVENTS = sa.Table(
    "events",
    _METADATA,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("sweep", sa.String(80), sa.ForeignKey("sweeps.id"), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("at_s", sa.Float, nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Index("events_of_sweep", "sweep", "seq"),
)


_PAGE = 2000
"""Events that are read at once by who goes through them all."""


@dataclass(frozen=True, slots=True)
class SweepName:
    """A sweep as it is listed."""

    id: str
    name: str
    created_at_s: float


class Entry:
    """Events on their way into the ledger, as rows that are made once: tried as often as need be, entered once.

    Whoever has lost the answer to a commit does not know whether it was carried out; a second attempt looks.

    Attributes:
        sweep: whose they are.
        rows: what is entered.
        after: an event of the sweep that was there before these were first tried; 0 where none is known.
    """

    def __init__(self, sweep: str, events: Iterable[Event]) -> None:
        self.sweep = sweep
        self.rows = [_row(sweep, event) for event in events]
        self._tried = False
        self.after = 0

    def into(self, connection: sa.Connection) -> None:
        """Enters the rows within a connection's transaction, unless they are there already."""
        again, self._tried = self._tried, True
        # One appender at a time to a sweep, so that its numbers become visible in order; SQLite has but one. And an
        # attempt whose answer was lost has come to its end, whichever, when the next one has the lock.
        last = sa.select(sa.func.max(_EVENTS.c.seq)).where(_EVENTS.c.sweep == _SWEEPS.c.id).scalar_subquery()
        last_seq = connection.scalar(sa.select(last).where(_SWEEPS.c.id == self.sweep).with_for_update())
        if again:
            if self._is_entered(connection):
                return
        else:
            self.after = last_seq or self.after
        connection.execute(_EVENTS.insert(), self.rows)

    def _is_entered(self, connection: sa.Connection) -> bool:
        times = [row["at_s"] for row in self.rows]
        found = connection.execute(
            sa.select(_EVENTS.c.at_s, _EVENTS.c.payload).where(
                _EVENTS.c.sweep == self.sweep,
                _EVENTS.c.seq > self.after,
                _EVENTS.c.at_s.between(min(times), max(times)),
            )
        )
        return {(row["at_s"], row["payload"]) for row in self.rows} <= {(at_s, payload) for at_s, payload in found}


class Ledger:
    """Appends and reads events. Safe to use from several threads and processes at once."""

    def __init__(self, url: str) -> None:
        """Opens the database at an SQLAlchemy URL, making its tables where they are missing.

        Raises:
            StateError: the database cannot be opened or written.
        """
        self.database = Database(url, _METADATA)

    @classmethod
    def in_directory(cls, home: Path) -> Ledger:
        """Opens the ledger file of a state directory, readable by its owner only.

        Raises:
            StateError: the file cannot be opened or written.
        """
        return cls(database_file(home))

    def create(self, sweep: str, created: SweepCreated, connection: sa.Connection | None = None) -> None:
        """Enters a new sweep with its first event, within the transaction of a connection where one is given."""
        with self._within(connection) as connection:
            connection.execute(_SWEEPS.insert().values(id=sweep, name=created.name, created_at_s=time.time()))
            connection.execute(_EVENTS.insert(), [_row(sweep, created)])

    def append(self, sweep: str, events: Iterable[Event], connection: sa.Connection | None = None) -> None:
        """Appends events in one transaction, that of a connection where one is given: a reader sees all or none."""
        entry = Entry(sweep, events)
        if not entry.rows:
            return
        if connection is None:
            self.enter(entry)
        else:
            entry.into(connection)

    def enter(self, entry: Entry) -> None:
        """Enters what is appended, in a transaction of its own."""
        with self.database.writing() as connection:
            entry.into(connection)

    def read(self, sweep: str, *, after: int = 0, limit: int | None = None) -> list[Record]:
        """The events of a sweep in order, from those after a sequence number on; at most `limit`."""
        rows = self.read_raw(sweep, after=after, limit=limit)
        return [Record(seq, at_s, self._event(seq, payload)) for seq, at_s, payload in rows]

    def stream(self, sweep: str, *, after: int = 0) -> Iterator[Record]:
        """The same a page at a time, for sweeps whose events would fill the memory; ends where the ledger then does."""
        while page := self.read(sweep, after=after, limit=_PAGE):
            yield from page
            after = page[-1].seq

    def last_seqs(self, sweeps: Collection[str]) -> dict[str, int]:
        """The number of each sweep's last event."""
        query = (
            sa.select(_EVENTS.c.sweep, sa.func.max(_EVENTS.c.seq))
            .where(_EVENTS.c.sweep.in_(sweeps))
            .group_by(_EVENTS.c.sweep)
        )
        with self.database.reading() as connection:
            return {sweep: seq for sweep, seq in connection.execute(query)}  # noqa: C416  # rows are no pairs to mypy

    def read_raw(self, sweep: str, *, after: int = 0, limit: int | None = None) -> list[tuple[int, float, str]]:
        """Events as they are stored, for those who pass them on: number, time, JSON; at most `limit`."""
        query = (
            sa.select(_EVENTS.c.seq, _EVENTS.c.at_s, _EVENTS.c.payload)
            .where(_EVENTS.c.sweep == sweep, _EVENTS.c.seq > after)
            .order_by(_EVENTS.c.seq)
            .limit(limit)
        )
        with self.database.reading() as connection:
            return [(seq, at_s, payload) for seq, at_s, payload in connection.execute(query)]

    def sweeps(self) -> list[SweepName]:
        """All sweeps, oldest first."""
        query = sa.select(_SWEEPS.c.id, _SWEEPS.c.name, _SWEEPS.c.created_at_s).order_by(_SWEEPS.c.created_at_s)
        with self.database.reading() as connection:
            return [SweepName(*row) for row in connection.execute(query)]

    def open_sweeps(self) -> list[str]:
        """Ids of the sweeps of which nobody has said how they ended: driven now, or their driver was killed."""
        kinds = ("driver_started", "sweep_ended")  # one that was never driven waits in a queue
        last = sa.select(sa.func.max(_EVENTS.c.seq)).where(_EVENTS.c.kind.in_(kinds)).group_by(_EVENTS.c.sweep)
        query = sa.select(_EVENTS.c.sweep).where(_EVENTS.c.seq.in_(last), _EVENTS.c.kind != "sweep_ended")
        with self.database.reading() as connection:
            return list(connection.scalars(query))

    def find(self, sweep: str) -> SweepName:
        """The sweep with this id, else the latest with this name, else, for `last`, the latest of all.

        Raises:
            SweepNotFoundError: there is none.
        """
        known = self.sweeps()
        by_id = [found for found in known if found.id == sweep]
        by_name = [found for found in known if found.name == sweep]
        candidates = by_id or by_name or (known if sweep == "last" else [])
        if candidates:
            return candidates[-1]
        latest = ", ".join(found.id for found in reversed(known[-5:]))
        raise SweepNotFoundError(
            f"a sweep must be named by its id, its name or `last`; found {sweep!r}; "
            + (f"the latest are {latest}" if latest else "there are none yet: start one with `lora-sweeps run SPEC`")
        )

    def close(self) -> None:
        """Closes every connection."""
        self.database.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _within(self, connection: sa.Connection | None) -> AbstractContextManager[sa.Connection]:
        return self.database.writing() if connection is None else nullcontext(connection)

    def _event(self, seq: int, payload: str) -> Event:
        try:
            return EVENT.validate_json(payload)
        except ValidationError as error:
            raise StateError(
                f"the ledger must hold events that this version knows; event {seq} of {self.database.shown} is "
                "none: it is damaged, or was written by another version, which can read it"
            ) from error


def _row(sweep: str, event: Event) -> dict[str, Any]:
    return {"sweep": sweep, "kind": event.kind, "at_s": time.time(), "payload": event.model_dump_json()}
