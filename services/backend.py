"""What the command line asks: a service (client.py), or the state directory here. The same verbs, the same answers."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from services import following
from services.exports import export_of, trial_of
from services.schemas import ENDED, Accepted, Export, LogPart, State, SweepStatus, SweepSummary
from services.views import finite, status, summary
from sweeps.best import Best, best_point
from sweeps.errors import InputError, SweepNotFoundError
from sweeps.events import Record
from sweeps.home import Home
from sweeps.records import SweepRecord, read_sweep

if TYPE_CHECKING:
    from services.store import Store, Submission
    from sweeps.ledger import Ledger

_LOOK_EVERY_S = 0.25
_MOST_LOG_BYTES = 256 * 1024


class Backend(Protocol):
    """The verbs; what they mean, and raise, is said at `services.client.Client`."""

    def submit(
        self,
        spec: str | Path,
        *,
        name: str | None = None,
        priority: int = 0,
        shared: bool = False,
        idempotency_key: str | None = None,
    ) -> Accepted: ...

    def list(self) -> Iterator[SweepSummary]: ...

    def status(self, sweep: str) -> SweepStatus: ...

    def events(self, sweep: str, *, after: int = 0) -> Iterator[Record]: ...

    def logs(self, sweep: str, offset: int | None = None) -> LogPart: ...

    def follow_logs(self, sweep: str, offset: int | None = None) -> Iterator[LogPart]: ...

    def cancel(self, sweep: str) -> SweepStatus: ...

    def resume(self, sweep: str) -> SweepStatus: ...

    def extend(self, sweep: str, trials: int) -> SweepStatus: ...

    def best(self, sweep: str) -> Best: ...

    def report(self, sweep: str, format: Literal["md", "json", "html"] = "md") -> str: ...

    def export(
        self, sweep: str, format: str, *, alpha: str | float | None = None, trial: int | None = None
    ) -> Export: ...

    def adapter(self, sweep: str, directory: Path, *, trial: int | None = None) -> tuple[Path, ...]: ...


class Local:
    """Asks the ledger of a state directory; also for sweeps that a service runs from it."""

    def __init__(self, home: Home) -> None:
        """Opens nothing yet, and makes nothing.

        Args:
            home: the state directory.
        """
        self._home = home
        self._open: tuple[Ledger, Store] | None = None

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._open is not None:
            self._open[0].close()

    # -- looking

    def list(self) -> Iterator[SweepSummary]:
        """All sweeps, latest first."""
        if not self._home.has_ledger:
            return
        ledger, _ = self._opened()
        for sweep in reversed(ledger.sweeps()):
            record, row = read_sweep(ledger, sweep.id), self._row(sweep.id)
            yield summary(record, row, self._state(record, row))

    def status(self, sweep: str) -> SweepStatus:
        """A sweep by itself."""
        record, row = self._find(sweep)
        return status(record, row, self._state(record, row))

    def events(self, sweep: str, *, after: int = 0) -> Iterator[Record]:
        """A sweep's events: those that were, then those to come, until the sweep has come to its end."""
        sweep = self._find(sweep)[0].id
        ledger, _ = self._opened()
        while True:
            # Asked first, so that its last words are there to be read. A driver writes its report after its end.
            over = self.status(sweep).state in ENDED and not self._home.is_driven(sweep)
            for record in ledger.read(sweep, after=after):
                after = record.seq
                yield record
            if over:
                return
            time.sleep(_LOOK_EVERY_S)

    def logs(self, sweep: str, offset: int | None = None) -> LogPart:
        """What a sweep's drivers wrote, if a service started them."""
        from services.reading import read_log

        record, row = self._find(sweep)
        if row is None:
            raise InputError(
                f"a log is kept of sweeps that a service runs; {record.id} was run by hand, and told its terminal"
            )
        text, start, end = read_log(self._home.logs(record.id), offset=offset, most_bytes=_MOST_LOG_BYTES)
        return LogPart(text=text, offset=start, next=end)

    def follow_logs(self, sweep: str, offset: int | None = None) -> Iterator[LogPart]:
        """The same, and what is added to it until the sweep has come to its end."""
        sweep = self._find(sweep)[0].id
        return following.follow_logs(self.logs, self.status, sweep, offset, every_s=_LOOK_EVERY_S)

    # -- changing

    def submit(
        self,
        spec: str | Path,
        *,
        name: str | None = None,
        priority: int = 0,
        shared: bool = False,
        idempotency_key: str | None = None,
    ) -> Accepted:
        """Refused: only a service has a queue."""
        run = f"`lora-sweeps run {spec}`" if isinstance(spec, Path) else "`lora-sweeps run`"
        raise InputError(
            "submit takes a spec to a service; found neither --server URL nor LORA_SWEEPS_SERVER: name one, or "
            f"{run} runs it here"
        )

    def cancel(self, sweep: str) -> SweepStatus:
        """Asks the sweep's driver to end in order, and does not wait for it."""
        found = self.status(sweep)
        self._refuse_for_service(found, "cancel")
        pid = self._home.driver_pid(found.sweep)
        if pid is None:
            raise InputError(f"what is cancelled must run here; {found.sweep} is {found.state}, and nothing drives it")
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, signal.SIGTERM)
        return self.status(found.sweep)

    def resume(self, sweep: str) -> SweepStatus:
        """Refused: here a driver is a process of its user's terminal."""
        found = self.status(sweep)
        self._refuse_for_service(found, "resume")
        raise InputError(f"without a service a sweep runs in a terminal: `lora-sweeps run --resume {found.sweep}`")

    def extend(self, sweep: str, trials: int) -> SweepStatus:
        """Refused, as `resume`."""
        found = self.status(sweep)
        self._refuse_for_service(found, "extend")
        raise InputError(
            f"without a service a sweep runs in a terminal: `lora-sweeps run --resume {found.sweep} --trials {trials}`"
        )

    def _refuse_for_service(self, found: SweepStatus, verb: str) -> None:
        if self._row(found.sweep) is not None:
            raise InputError(
                f"a service looks after {found.sweep}, and would not know: `lora-sweeps {verb} {found.sweep} --server "
                "URL` asks it"
            )

    # -- results

    def best(self, sweep: str) -> Best:
        """The best point."""
        record, row = self._find(sweep)
        found = finite(best_point(record))
        if found is None:
            state = self._state(record, row)
            raise InputError(f"a best point needs a finished trial; {record.id} is {state} and has none")
        return found

    def report(self, sweep: str, format: Literal["md", "json", "html"] = "md") -> str:
        """The collapse report."""
        from sweeps.report import build, render

        return render(build(self._find(sweep)[0]), format)

    def export(self, sweep: str, format: str, *, alpha: str | float | None = None, trial: int | None = None) -> Export:
        """A point in a trainer's config format, with the texts of its files."""
        record, _ = self._find(sweep)
        given = None if alpha is None else str(alpha)
        return export_of(record, trial_of(record, trial), format, given, Path(tempfile.gettempdir()))

    def adapter(self, sweep: str, directory: Path, *, trial: int | None = None) -> tuple[Path, ...]:
        """Writes the trained adapter."""
        from sweeps.deliverables import write_adapter  # torch takes its time to load

        record, _ = self._find(sweep)
        return write_adapter(record, trial_of(record, trial), self._home, directory)

    def merged(self, sweep: str, directory: Path, *, trial: int | None = None) -> tuple[Path, ...]:
        """Writes the model with the trained adapter merged in: only here, where the model is."""
        from sweeps.deliverables import write_merged

        record, _ = self._find(sweep)
        return write_merged(record, trial_of(record, trial), self._home, directory)

    # -- reading

    def _opened(self) -> tuple[Ledger, Store]:
        if self._open is None:
            from services.store import Store

            ledger = self._home.ledger()
            self._open = ledger, Store(ledger)
        return self._open

    def _find(self, sweep: str) -> tuple[SweepRecord, Submission | None]:
        if not self._home.has_ledger:
            raise SweepNotFoundError(f"{self._home.path} has no sweeps yet: start one with `lora-sweeps run SPEC`")
        ledger, _ = self._opened()
        found = ledger.find(sweep).id
        return read_sweep(ledger, found), self._row(found)

    def _row(self, sweep: str) -> Submission | None:
        _, store = self._opened()
        try:
            return store.get(sweep)
        except SweepNotFoundError:
            return None

    def _state(self, record: SweepRecord, row: Submission | None) -> State:
        if row is not None:
            return row.state
        if record.state == "running" and not self._home.is_driven(record.id):
            return "interrupted"  # its driver was killed before it could say so
        return record.state
