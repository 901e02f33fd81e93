"""A driver's ledger: waits for a database server that is away, where everybody else is told at once.

A sweep has work under way that goes on meanwhile and must not be lost; a request has a person who waits for an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TypeVar

from sweeps.errors import LedgerAwayError
from sweeps.ledger import Entry, Ledger, SweepName

T = TypeVar("T")

PATIENCE_S = 600.0
"""How long a driver waits for its database: longer than a server takes to be moved, upgraded or failed over."""

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.25, 5.0
"""Between attempts."""

_POLL_S = 0.1


class PatientLedger(Ledger):
    """A ledger whose reads and appends are tried again while its server is away. One thread at a time.

    What is appended is entered once, also where an attempt was carried out and its answer lost. Patience begins with
    the first failure and is restored by the first success: once it has run out, or somebody wants an end, nothing more
    is waited for.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        say: Callable[[str], None],
        hurried: Callable[[], bool],
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Shares the database of a ledger.

        Args:
            ledger: an open one, which is closed by whoever opened it.
            say: is told that there is a wait, and that it is over.
            hurried: whether somebody wants an end, so that nothing is waited for; asked several times a second.
            patience_s: how long to wait.
        """
        self.database = ledger.database
        self._say, self._hurried, self._patience_s = say, hurried, patience_s
        self._away_since_s: float | None = None
        self._known_seqs: dict[str, int] = {}

    def enter(self, entry: Entry) -> None:
        """Enters what is appended, as soon as the server is there."""
        entry.after = self._known_seqs.get(entry.sweep, 0)
        self._patiently(lambda: super(PatientLedger, self).enter(entry))
        self._known_seqs[entry.sweep] = entry.after

    def read_raw(self, sweep: str, *, after: int = 0, limit: int | None = None) -> list[tuple[int, float, str]]:
        """Events as they are stored."""
        return self._patiently(lambda: super(PatientLedger, self).read_raw(sweep, after=after, limit=limit))

    def last_seqs(self, sweeps: Collection[str]) -> dict[str, int]:
        """The number of each sweep's last event."""
        return self._patiently(lambda: super(PatientLedger, self).last_seqs(sweeps))

    def sweeps(self) -> list[SweepName]:
        """All sweeps, oldest first."""
        return self._patiently(super().sweeps)

    def open_sweeps(self) -> list[str]:
        """Ids of the sweeps of which nobody has said how they ended."""
        return self._patiently(super().open_sweeps)

    def _patiently(self, attempt: Callable[[], T]) -> T:
        delay_s = _FIRST_DELAY_S
        while True:
            try:
                result = attempt()
            except LedgerAwayError as error:
                self._note_away(error)
            else:
                self._note_back()
                return result
            again_s = time.monotonic() + delay_s
            while time.monotonic() < again_s and not self._hurried():
                time.sleep(_POLL_S)
            delay_s = min(1.5 * delay_s, _LONGEST_DELAY_S)

    def _note_away(self, error: LedgerAwayError) -> None:
        """Begins a wait or goes on with it; raises the error where there is no patience left."""
        first = self._away_since_s is None
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
        if self._hurried() or time.monotonic() - self._away_since_s >= self._patience_s:
            raise error
        if first:
            self._say(
                f"the ledger's database is away: {error.cause}; waiting for it, at most {self._patience_s / 60:g} min; "
                "jobs that are under way go on"
            )

    def _note_back(self) -> None:
        if self._away_since_s is not None:
            away_s, self._away_since_s = time.monotonic() - self._away_since_s, None
            self._say(f"the ledger's database is back after {away_s:.0f} s; going on")
