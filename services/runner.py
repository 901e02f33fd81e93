"""Who starts drivers for the service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Ending:
    """How a driver ended, as far as its runner can tell: what it achieved is in the ledger.

    Attributes:
        reason: for people: "exit code 1", "killed by SIGKILL", "the Ray job failed: ...".
    """

    reason: str


class Runner(Protocol):
    """Starts and stops drivers, one a sweep, and finds them again after its own restart."""

    def start(self, sweep: str) -> str:
        """Starts a driver, and returns a handle in words that finds it again: a process id, a Ray job's id.

        Raises:
            StateError: one runs already.
            InputError: none can be started.
        """

    def find(self, sweep: str, handle: str | None) -> str | None:
        """The handle of the driver that runs the sweep now; None where none does."""

    def ended(self, sweep: str, handle: str) -> Ending | None:
        """How the driver with this handle ended; None while it runs."""

    def interrupt(self, sweep: str, handle: str) -> None:
        """Asks a driver to end in order, as SIGTERM does. Nothing where it has ended."""

    def kill(self, sweep: str, handle: str) -> None:
        """Ends a driver that does not end in order."""
