"""`lora-sweeps list`, `status`, `watch`, `logs`, `best`, `report`: how sweeps stand, and what they found."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from services.options import AS_JSON, SERVER, SWEEP, at_server, backend_of

if TYPE_CHECKING:
    from services.backend import Backend
    from sweeps.events import Record


@click.command(name="list")
@SERVER
@AS_JSON
def list_sweeps(server: str | None, as_json: bool) -> None:
    """List sweeps, latest first: those of this state directory, or those that you may see at a service."""
    from services.words import print_json, print_sweeps

    with backend_of(server) as backend:
        summaries = list(backend.list())
    if as_json:
        print_json([one.model_dump(mode="json") for one in summaries])
    else:
        start = "run SPEC" if server is None else f"submit SPEC{at_server(server)}"
        print_sweeps(summaries, empty=f"no sweeps yet: start one with `lora-sweeps {start}`")


@click.command()
@SWEEP
@SERVER
@AS_JSON
def status(sweep: str, server: str | None, as_json: bool) -> None:
    """Show how a sweep stands."""
    from services.words import print_json, print_status

    with backend_of(server) as backend:
        found = backend.status(sweep)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_status(found)


@click.command()
@SWEEP
@SERVER
@AS_JSON
def watch(sweep: str, server: str | None, as_json: bool) -> None:
    """Watch a sweep until it has come to its end.

    Exits 0 if it has finished, 1 if it was paused or cancelled or has failed. Ctrl-C ends the watching only.
    """
    with backend_of(server) as backend:
        sys.exit(watched(backend, sweep, server, as_json=as_json))


def watched(backend: Backend, sweep: str, server: str | None, *, as_json: bool) -> int:
    """Shows progress until a sweep has come to its end, prints how it came out, and returns the exit code."""
    from services.outcome import Shown, print_shown
    from services.progress import Watcher
    from sweeps.records import fold

    watcher, records = Watcher(), list[Any]()
    try:
        sweep = backend.status(sweep).sweep
        for record in backend.events(sweep):
            records.append(record)
            _tell(watcher, sweep, record)
        found = backend.status(sweep)
    except KeyboardInterrupt:
        watcher.close()
        end = f"`lora-sweeps cancel {sweep}{at_server(server)}` ends it"
        click.echo(f"\nno longer watching; {sweep} goes on: {end}", err=True)
        return 128 + signal.SIGINT
    finally:
        watcher.close()
    shown = Shown(fold(sweep, records), found.state, found.seconds, found.mlflow.delivered, asked=at_server(server))
    print_shown(shown, as_json=as_json)
    return _told_how_to_go_on(found.state, found.reason, f"{sweep}{at_server(server)}", shown, by_hand=not found.owner)


def _tell(watcher: Any, sweep: str, record: Record) -> None:
    from services.words import with_reason
    from sweeps.events import QueueMoved

    if isinstance(record.event, QueueMoved):
        watcher.stage(f"{sweep}: {with_reason(record.event.state, record.event.reason)}")
    else:
        watcher.events(sweep, [record.event])


def _told_how_to_go_on(state: str, reason: str, sweep: str, shown: Any, *, by_hand: bool) -> int:
    if state == "finished":
        if not shown.delivered:
            click.echo("MLflow does not have everything yet; the rest waits in the ledger", err=True)
        return 0
    why = f": {reason}" if reason else ""
    click.echo(f"{state}{why}; go on with `lora-sweeps {'run --resume' if by_hand else 'resume'} {sweep}`", err=True)
    return 1


@click.command()
@SWEEP
@click.option("--follow", "-f", is_flag=True, help="Go on with what is added, until the sweep has come to its end.")
@click.option("--offset", type=click.IntRange(min=0), metavar="BYTE", help="Begin here (default: near the end).")
@SERVER
def logs(sweep: str, follow: bool, offset: int | None, server: str | None) -> None:
    """Print what the drivers of a sweep wrote that a service runs."""
    with backend_of(server) as backend:
        try:
            parts = backend.follow_logs(sweep, offset) if follow else [backend.logs(sweep, offset)]
            for part in parts:
                click.echo(part.text, nl=False)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)


@click.command()
@SWEEP
@SERVER
@AS_JSON
def best(sweep: str, server: str | None, as_json: bool) -> None:
    """Print the best point of a sweep."""
    from services.words import best_as_json, print_best, print_json

    with backend_of(server) as backend:
        found = backend.best(sweep)
    if as_json:
        print_json(best_as_json(found))
    else:
        print_best(found)


@click.command()
@SWEEP
@click.option("--format", "form", type=click.Choice(["md", "json", "html"]), default="md", help="Default: md.")
@SERVER
def report(sweep: str, form: Any, server: str | None) -> None:
    """Print the collapse report of a sweep."""
    with backend_of(server) as backend:
        click.echo(backend.report(sweep, form))
