"""`lora-sweeps drive SWEEP`: what a service starts, one process a sweep. People have `run --resume`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from sweeps.errors import InputError, StateError

if TYPE_CHECKING:
    from sweeps.home import Home


@click.command(hidden=True)
@click.argument("sweep")
@click.option("--address", help="The Ray cluster to run on; without it one is started on this machine.")
def drive(sweep: str, address: str | None) -> None:
    """Drive a sweep that a service has queued, from where its ledger leaves off."""
    from services.output import print_outcome, watching
    from sweeps import driver
    from sweeps.home import Home

    with watching() as (progress, interrupts):
        home = Home.open()
        before, trials = _standing(home, sweep)
        try:
            outcome = driver.resume(
                sweep,
                home,
                address=address,
                progress=progress,
                interrupts=interrupts,
                trials=trials,
                attended=False,
            )
        except StateError:
            raise  # the ledger or the right to drive is out of reach: there is nobody to tell
        except InputError as error:
            _pause(home, sweep, str(error), after=before)
            raise
    sys.exit(print_outcome(outcome, as_json=False))


def _standing(home: Home, sweep: str) -> tuple[int, int | None]:
    """The number of the sweep's last event, and how many trials it is to be extended to."""
    from services.store import Store
    from sweeps.records import read_sweep

    with home.ledger() as ledger:
        record, row = read_sweep(ledger, sweep), Store(ledger).get(sweep)
    return record.last_seq, row.trials if row.trials > record.plan.trials else None


def _pause(home: Home, sweep: str, reason: str, *, after: int) -> None:
    """Says in the ledger why the sweep cannot go on, unless its driver has said so itself."""
    from sweeps.events import SweepEnded
    from sweeps.secrecy import hide_passwords

    with home.ledger() as ledger:
        if not any(isinstance(record.event, SweepEnded) for record in ledger.read(sweep, after=after)):
            ledger.append(sweep, [SweepEnded(state="paused", reason=hide_passwords(reason))])
