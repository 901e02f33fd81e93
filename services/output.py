"""What `run` prints beside its progress: how a sweep came out of this process's driver, and what to do about it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click

from services.outcome import Shown, print_shown
from services.progress import Watcher
from sweeps.driver import Outcome
from sweeps.interrupts import Interrupted, Interrupts


@contextlib.contextmanager
def watching() -> Iterator[tuple[Watcher, Interrupts]]:
    """A watcher and the handling of signals for as long as a sweep runs.

    A signal before there is a sweep ends the program.
    """
    watcher = Watcher()
    try:
        with Interrupts().watching() as interrupts:
            yield watcher, interrupts
    except Interrupted as interrupted:
        watcher.close()
        click.echo("stopped before the sweep had begun; nothing was entered", err=True)
        sys.exit(128 + interrupted.signal)
    finally:
        watcher.close()


def shown_of(outcome: Outcome) -> Shown:
    """What is shown of an outcome."""
    record = outcome.record
    return Shown(record, record.state, outcome.seconds, outcome.delivered, outcome.report)


def print_outcome(outcome: Outcome, *, as_json: bool) -> int:
    """Prints how a sweep came out, and returns the exit code."""
    print_shown(shown_of(outcome), as_json=as_json)
    return print_notes(outcome)


def print_notes(outcome: Outcome, *, at: str | None = None) -> int:
    """Says on stderr what is left to be done about a sweep, and returns the exit code.

    Args:
        outcome: how it came out.
        at: the cluster's address for the commands that are named; None where they are to be run here.
    """
    record = outcome.record
    go_on = f"`lora-sweeps run --resume {record.id}{f' --address {at}' if at else ''}`"
    if not outcome.delivered:
        click.echo(
            f"MLflow does not have everything yet ({outcome.undelivered_reason}); the rest waits in the ledger and is "
            f"delivered by {go_on}",
            err=True,
        )
    if outcome.signal is not None:
        click.echo(f"stopped; go on with {go_on}", err=True)
        return 128 + outcome.signal
    if record.state == "paused":
        reason = record.ended.reason if record.ended else ""
        click.echo(f"paused: {reason}; mend that and {go_on}", err=True)
        return 1
    return 0
