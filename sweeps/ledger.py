"""The one truth about sweeps: an append-only list of events in a database.

A SQLite file (WAL, synchronous=FULL, so that what was appended survives a power cut). Studies, MLflow and reports are
projections of it and can be made again at any time. Any database that SQLAlchemy speaks to should do; none other is
tested yet.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from pydantic import ValidationError

from sweeps.errors import StateError, SweepNotFoundError
from sweeps.events import EVENT, Event, SweepCreated
from sweeps.secrecy import hide_passwords

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

_BUSY_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Record:
    """An event with its place.

    Attributes:
        seq: its number in the ledger; later events have larger ones.
        at_s: when it was appended, in seconds since the epoch.
        event: what happened.
    """

    seq: int
    at_s: float
    event: Event


@dataclass(frozen=True, slots=True)
class SweepName:
    """A sweep as it is listed."""

    id: str
    name: str
    created_at_s: float


class Ledger:
    """Appends and reads events. Safe to use from several threads and processes at once."""

    def __init__(self, url: str) -> None:
        """Opens the database at an SQLAlchemy URL, making its tables where they are missing.

        Raises:
            StateError: the database cannot be opened or written.
        """
        self.url = url
        try:
            self._engine = sa.create_engine(url, pool_pre_ping=True)
            if self._engine.dialect.name == "sqlite":
                sa.event.listen(self._engine, "connect", _set_sqlite_pragmas)
            with self._engine.begin() as connection:
                _create_missing_tables(connection)
        except (sa.exc.SQLAlchemyError, ModuleNotFoundError) as error:
            raise StateError(
                "the ledger must be a database that can be written; "
                f"{_shown(url)} cannot: {_first_line(error)}; mend it, or use another state directory"
            ) from error

    @classmethod
    def in_directory(cls, home: Path) -> Ledger:
        """Opens the ledger file of a state directory, readable by its owner only.

        Raises:
            StateError: the file cannot be opened or written.
        """
        path = home / "ledger.db"
        try:
            # Made before SQLite opens it, because the files that it puts beside it take over its mode.
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT, 0o600))
            os.chmod(path, 0o600)
        except OSError as error:
            raise StateError(
                f"the ledger must be a file that can be written; {path} cannot: {error.strerror or error}; "
                "change to another working directory or set LORA_SWEEPS_HOME"
            ) from error
        return cls(f"sqlite:///{path}")

    def create(self, sweep: str, created: SweepCreated) -> None:
        """Enters a new sweep with its first event."""
        with self._writing() as connection:
            connection.execute(_SWEEPS.insert().values(id=sweep, name=created.name, created_at_s=time.time()))
            connection.execute(_EVENTS.insert(), [_row(sweep, created)])

    def append(self, sweep: str, events: Iterable[Event]) -> None:
        """Appends events in one transaction: a reader sees all of them or none."""
        rows = [_row(sweep, event) for event in events]
        if rows:
            with self._writing() as connection:
                # One appender at a time to a sweep, so that its numbers become visible in order; SQLite has but one.
                connection.execute(sa.select(_SWEEPS.c.id).where(_SWEEPS.c.id == sweep).with_for_update())
                connection.execute(_EVENTS.insert(), rows)

    def read(self, sweep: str, *, after: int = 0) -> list[Record]:
        """The events of a sweep in order, from those after a sequence number on."""
        query = (
            sa.select(_EVENTS.c.seq, _EVENTS.c.at_s, _EVENTS.c.payload)
            .where(_EVENTS.c.sweep == sweep, _EVENTS.c.seq > after)
            .order_by(_EVENTS.c.seq)
        )
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return [Record(seq, at_s, self._event(seq, payload)) for seq, at_s, payload in rows]

    def sweeps(self) -> list[SweepName]:
        """All sweeps, oldest first."""
        query = sa.select(_SWEEPS.c.id, _SWEEPS.c.name, _SWEEPS.c.created_at_s).order_by(_SWEEPS.c.created_at_s)
        with self._reading() as connection:
            return [SweepName(*row) for row in connection.execute(query)]

    def open_sweeps(self) -> list[str]:
        """Ids of the sweeps of which nobody has said how they ended: driven now, or their driver was killed."""
        kinds = ("sweep_created", "driver_started", "sweep_ended")
        last = sa.select(sa.func.max(_EVENTS.c.seq)).where(_EVENTS.c.kind.in_(kinds)).group_by(_EVENTS.c.sweep)
        query = sa.select(_EVENTS.c.sweep).where(_EVENTS.c.seq.in_(last), _EVENTS.c.kind != "sweep_ended")
        with self._reading() as connection:
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
        self._engine.dispose()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _event(self, seq: int, payload: str) -> Event:
        try:
            return EVENT.validate_json(payload)
        except ValidationError as error:
            raise StateError(
                f"the ledger must hold events that this version knows; event {seq} of {_shown(self.url)} is "
                "none: it is damaged, or was written by another version, which can read it"
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except sa.exc.DatabaseError as error:
            raise StateError(
                f"the ledger must be readable; {_shown(self.url)} is not: {_first_line(error)}; "
                "mend the file or the database, or use another state directory"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except sa.exc.IntegrityError:
            raise
        except sa.exc.DatabaseError as error:
            raise StateError(
                f"the ledger must be writable; {_shown(self.url)} is not: {_first_line(error)}; "
                "nothing was lost: free the disk or the database, then `lora-sweeps run --resume`"
            ) from error


def _row(sweep: str, event: Event) -> dict[str, object]:
    return {"sweep": sweep, "kind": event.kind, "at_s": time.time(), "payload": event.model_dump_json()}


def _create_missing_tables(connection: sa.Connection) -> None:
    # Not `create_all`, which looks first and creates then: of two processes that open a new ledger, one would fail.
    for table in _METADATA.sorted_tables:
        connection.execute(sa.schema.CreateTable(table, if_not_exists=True))
        for index in table.indexes:
            connection.execute(sa.schema.CreateIndex(index, if_not_exists=True))


def _set_sqlite_pragmas(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_S * 1000}")
    deadline_s = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError:
            # SQLite does not wait here while another process does the same to a new ledger.
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _shown(url: str) -> str:
    try:
        sa.make_url(url)
    except sa.exc.ArgumentError:
        return "what was given"  # who knows what stands in it
    return hide_passwords(url)


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
