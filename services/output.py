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


def print_outcome(outcome: Outcome, *, as_json: bool) -> int:
    """Prints how a sweep came out, and returns the exit code."""
    record = outcome.record
    shown = Shown(record, record.state, outcome.seconds, outcome.delivered, outcome.report)
    print_shown(shown, as_json=as_json)
    if not outcome.delivered:
        click.echo(
            f"MLflow does not have everything yet ({outcome.undelivered_reason}); the rest waits in the ledger and is "
            f"delivered by `lora-sweeps run --resume {record.id}`",
            err=True,
        )
    if outcome.signal is not None:
        click.echo(f"stopped; go on with `lora-sweeps run --resume {record.id}`", err=True)
        return 128 + outcome.signal
    if record.state == "paused":
        reason = record.ended.reason if record.ended else ""
        click.echo(f"paused: {reason}; mend that and `lora-sweeps run --resume {record.id}`", err=True)
        return 1
    return 0
