"""`lora-sweeps submit`, `cancel`, `resume`, `extend`: what a service is asked to do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from services.options import AS_JSON, SERVER, SWEEP, at_server, backend_of

if TYPE_CHECKING:
    from services.schemas import SweepStatus


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@SERVER
@click.option("--name", help="Name of the sweep, in place of the spec's own.")
@click.option(
    "--priority",
    type=click.IntRange(-100, 100),
    default=0,
    help="Below 0: after your others. Above 0: before everybody's, which takes scope admin.",
)
@click.option("--shared", is_flag=True, help="Let every user see the sweep.")
@click.option("--wait", is_flag=True, help="Watch it until it has come to its end; exits as `watch` does.")
@AS_JSON
def submit(
    spec: Path, server: str | None, name: str | None, priority: int, shared: bool, wait: bool, as_json: bool
) -> None:
    """Submit a spec to a service, which queues and runs it."""
    from services.showing import watched
    from services.words import print_accepted, print_json

    with backend_of(server) as backend:
        accepted = backend.submit(spec, name=name, priority=priority, shared=shared)
        if not as_json:
            print_accepted(accepted, server=at_server(server))
        elif not wait:
            print_json(accepted.model_dump(mode="json"))
        if wait:
            sys.exit(watched(backend, accepted.sweep, server, as_json=as_json))


@click.command()
@SWEEP
@SERVER
@AS_JSON
def cancel(sweep: str, server: str | None, as_json: bool) -> None:
    """Cancel a sweep: it ends in order, with a report of what it has, and may be resumed."""
    with backend_of(server) as backend:
        _print(backend.cancel(sweep), server, as_json=as_json, asked="asked to end, which takes a moment")


@click.command()
@SWEEP
@SERVER
@AS_JSON
def resume(sweep: str, server: str | None, as_json: bool) -> None:
    """Queue a sweep again that was paused, failed or cancelled; it goes on where it left off."""
    with backend_of(server) as backend:
        _print(backend.resume(sweep), server, as_json=as_json)


@click.command()
@SWEEP
@click.option("--trials", type=click.IntRange(min=1), metavar="N", required=True, help="Train N trials in all.")
@SERVER
@AS_JSON
def extend(sweep: str, trials: int, server: str | None, as_json: bool) -> None:
    """Give a sweep more trials, and queue it again."""
    with backend_of(server) as backend:
        _print(backend.extend(sweep, trials), server, as_json=as_json)


def _print(found: SweepStatus, server: str | None, *, as_json: bool, asked: str = "") -> None:
    from services.schemas import ENDED
    from services.words import print_json, print_lines, with_reason

    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    over = found.state in ENDED
    print_lines("sweep", [f"{found.sweep}: {with_reason(found.state, '' if over else asked or found.reason)}"])
    if not over:
        print_lines("watch", [f"lora-sweeps watch {found.sweep}{at_server(server)}"])
