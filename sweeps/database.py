"""Opens the database that a ledger lives in, and puts what goes wrong with it into words.

SQLite (WAL, synchronous=FULL, so that what was committed survives a power cut) or PostgreSQL.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from sweeps.errors import LedgerAwayError, StateError
from sweeps.secrecy import hide_passwords

_BUSY_TIMEOUT_S = 30

_PATIENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 30,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,  # milliseconds; keep-alives are silent while something that was sent is not confirmed
    # A session whose other end was cut off must not keep the rows that it has locked from whoever comes again.
    "options": f"-c statement_timeout={_BUSY_TIMEOUT_S}s -c idle_in_transaction_session_timeout={2 * _BUSY_TIMEOUT_S}s",
}
"""A server that no longer answers is given up on, and whoever asked is told."""

_AWAY = {
    "08000": "connection_exception",
    "08001": "sqlclient_unable_to_establish_sqlconnection",
    "08003": "connection_does_not_exist",
    "08004": "sqlserver_rejected_establishment_of_sqlconnection",
    "08006": "connection_failure",
    "25006": "read_only_sql_transaction",  # a standby that has not been promoted yet
    "25P03": "idle_in_transaction_session_timeout",  # a driver whose machine stood still
    "53300": "too_many_connections",
    "57014": "query_canceled",  # statement_timeout: a lock of a session that is gone, a disk that does not answer
    "57P01": "admin_shutdown",
    "57P02": "crash_shutdown",
    "57P03": "cannot_connect_now",
}
"""States of PostgreSQL that pass, by their code."""

_REFUSED = (
    "authentication failed",
    "does not exist",
    "no pg_hba.conf entry",
    "no password supplied",
    "permission denied",
    "not permitted",
)
"""What a server that is there says at the door to those whom it will not let in later either; there are no codes."""

_CONNECTIONS = 10
"""Kept open, once they were needed."""


class Database:
    """Connections to one database. Safe to use from several threads and processes at once."""

    def __init__(self, url: str, metadata: sa.MetaData) -> None:
        """Opens the database at an SQLAlchemy URL, making the tables where they are missing.

        Raises:
            StateError: the database cannot be opened or written.
        """
        self.url = url
        try:
            parsed = _with_driver(url)
            file = parsed.get_backend_name() == "sqlite"
            # Connections to a server break, and are tried before they are used; those to a file do not.
            own: dict[str, Any] = {} if file else {"connect_args": _PATIENCE}
            self._engine = sa.create_engine(parsed, pool_pre_ping=not file, pool_size=_CONNECTIONS, **own)
            if file:
                sa.event.listen(self._engine, "connect", _set_sqlite_pragmas)
        except (sa.exc.SQLAlchemyError, ModuleNotFoundError) as error:
            raise self._unusable(error) from error
        self.make_tables(metadata)

    @property
    def shown(self) -> str:
        """The URL without its password."""
        try:
            sa.make_url(self.url)
        except sa.exc.ArgumentError:
            return "what was given"  # who knows what stands in it
        return hide_passwords(self.url)

    def make_tables(self, metadata: sa.MetaData) -> None:
        """Makes tables that are missing.

        Raises:
            StateError: the database cannot be written.
        """
        try:
            with self._engine.begin() as connection:
                if self._engine.dialect.name == "postgresql":
                    # There, of two processes that make a table at once, one would fail in spite of IF NOT EXISTS.
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_TABLES_LOCK)))
                _create_missing_tables(connection, metadata)
        except (sa.exc.SQLAlchemyError, ModuleNotFoundError) as error:
            raise self._unusable(error) from error

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection to read with.

        Raises:
            LedgerAwayError: the database's server cannot be reached for now.
            StateError: the database refuses.
        """
        try:
            with self._engine.connect() as connection:
                yield connection
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            raise self._failed(
                error, "readable", "mend the file or the database, or use another state directory"
            ) from error

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A connection in a transaction, which is committed at the end unless something was raised.

        Raises:
            LedgerAwayError: the database's server cannot be reached for now; where the commit's answer was lost, the
                rows may be there.
            StateError: the database refuses.
            IntegrityError: a row is there already.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except sa.exc.IntegrityError:
            raise
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            raise self._failed(
                error, "writable", "nothing was lost: free the disk or the database, then `lora-sweeps run --resume`"
            ) from error

    @contextmanager
    def alone(self, what: str) -> Iterator[Callable[[], bool]]:
        """Holds the database for one of a kind, as long as the context lasts; the system takes it back at the end.

        A PostgreSQL that is restarted forgets who held it. What is yielded takes it again, and says whether nobody else
        has it; whoever means to stay the only one calls it now and then, one thread at a time.

        Args:
            what: whoever wants to be the only one, in words.

        Raises:
            StateError: another one holds it.
        """
        taken = f"one {what} uses a ledger at a time; another one uses {self.shown} now"
        with ExitStack() as held:
            if self._engine.dialect.name == "postgresql":
                session = _Session(self._engine, zlib.crc32(what.encode()) & 0x7FFFFFFF)
                held.callback(session.let_go)
                with self.reading():  # whose words these are, where there is no server
                    got, still = session.take(), session.holds
            else:
                got = _lock_file(f"{self._engine.url.database}-{what.replace(' ', '-')}.lock", held)
                still = _certainly
            if not got:
                raise StateError(taken)
            yield still

    def close(self) -> None:
        """Closes every connection."""
        self._engine.dispose()

    def _failed(self, error: sa.exc.DBAPIError | sa.exc.TimeoutError, must_be: str, way_out: str) -> StateError:
        cause = _first_line(error)
        message = f"the ledger must be {must_be}; {self.shown} is not: {cause}; {way_out}"
        if self._engine.dialect.name == "postgresql" and isinstance(error, sa.exc.DBAPIError) and _is_away(error):
            return LedgerAwayError(message, cause)
        return StateError(message)

    def _unusable(self, error: Exception) -> StateError:
        return StateError(
            "the ledger must be a database that can be written; "
            f"{self.shown} cannot: {_first_line(error)}; mend it, or use another state directory"
        )


_TABLES_LOCK = 0x6C6F7261
"""Any number of our own."""


class _Session:
    """A session of a PostgreSQL that holds an advisory lock, and is begun anew where the server has forgotten it."""

    def __init__(self, engine: sa.Engine, number: int) -> None:
        self._engine = engine
        self._lock = sa.select(sa.func.pg_try_advisory_lock(_TABLES_LOCK, number))
        self._connection: sa.Connection | None = None
        self._own: dict[str, object] = {}

    def take(self) -> bool:
        """Takes the lock; False where another session has it."""
        if self._connection is None:
            self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        if not self._connection.scalar(self._lock):
            return False
        own = sa.text("SELECT pid, backend_start AS began FROM pg_stat_activity WHERE pid = pg_backend_pid()")
        self._own = dict(self._connection.execute(own).mappings().one())
        return True

    def holds(self) -> bool:
        """Whether the lock is ours, or will be: a server that is away has nobody else."""
        try:
            if self._connection is not None:
                self._connection.execute(sa.text("SELECT 1"))
                return True
        except sa.exc.DBAPIError:
            self.let_go()
        try:
            if self.take():
                return True
            # Where the way was cut, the server may have kept the session that we had.
            ended = self._connection and self._connection.scalar(
                sa.text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :pid AND backend_start = :began"
                ),
                self._own,
            )
            self.let_go()
            return bool(ended)  # and is taken at the next call
        except sa.exc.DBAPIError:
            self.let_go()
            return True

    def let_go(self) -> None:
        """Ends the session, and with it the lock."""
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None


def _certainly() -> bool:
    return True


def _lock_file(path: str, held: ExitStack) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def database_file(home: Path) -> str:
    """The URL of the SQLite file of a state directory, made readable by its owner only.

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
    return f"sqlite:///{path}"


def _with_driver(url: str) -> sa.URL:
    """The URL with psycopg for a PostgreSQL that names no driver, which SQLAlchemy would take psycopg2 for."""
    parsed = sa.make_url(url)
    if parsed.drivername in ("postgres", "postgresql"):
        return parsed.set(drivername="postgresql+psycopg")
    return parsed


def _create_missing_tables(connection: sa.Connection, metadata: sa.MetaData) -> None:
    # Not `create_all`, which looks first and creates then: of two processes that open a new ledger, one would fail.
    for table in metadata.sorted_tables:
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


def _is_away(error: sa.exc.DBAPIError) -> bool:
    """Whether a PostgreSQL cannot be reached for now: its server is down, starts, or the way to it is cut."""
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return state in _AWAY
    if error.connection_invalidated:
        return True
    said = str(error.orig)
    return isinstance(error, sa.exc.OperationalError) and not any(refusal in said for refusal in _REFUSED)


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
