"""`lora-sweeps drive-job`: the driver of a sweep that `run SPEC --address http://HEAD:8265` submitted as a Ray job."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

_HOME = Path("~/.lora-sweeps")
"""Where a head keeps sweeps whose environment does not say where."""


@click.command(hidden=True, name="drive-job")
@click.argument("spec", type=click.Path(path_type=Path), required=False)
@click.option("--sweep", help="The new sweep's id.")
@click.option("--name", help="Name of the new sweep, in place of the spec's own.")
@click.option("--resume", metavar="SWEEP", help="Go on with a sweep; takes no SPEC.")
@click.option("--trials", type=int, metavar="N", help="With --resume: train N trials in all.")
@click.option("--at", "at", required=True, help="What whoever submitted it calls the cluster.")
@click.option("--tracking", help="MLflow, where the environment here does not say where it is.")
def drive_job(
    spec: Path | None,
    sweep: str | None,
    name: str | None,
    resume: str | None,
    trials: int | None,
    at: str,
    tracking: str | None,
) -> None:
    """Run a sweep on the cluster that this job runs on, and end with an outcome that can be read back from the log."""
    from services.job_log import AS_JSON, BEGIN
    from services.job_place import check_has_files, check_lasts, kept_upload, settle
    from services.outcome import print_shown, shown_as_json
    from services.output import print_notes, shown_of, watching
    from sweeps import driver
    from sweeps.spec import load_spec

    if tracking and not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ["MLFLOW_TRACKING_URI"] = tracking
    with watching() as (progress, interrupts):
        home = settle(_HOME.expanduser())
        click.echo(f"state directory on the head: {home.path}", err=True)
        if spec is not None and sweep is not None:
            with kept_upload(home, sweep):
                document = load_spec(spec)
                check_lasts(home.path, document.spec.tracking.uri)
                outcome = driver.start(
                    document,
                    home,
                    name=name,
                    address="auto",
                    progress=progress,
                    interrupts=interrupts,
                    sweep=sweep,
                )
        else:
            check_has_files(home, resume or "", trials=trials)
            outcome = driver.resume(
                resume or "", home, address="auto", progress=progress, interrupts=interrupts, trials=trials
            )
    shown = shown_of(outcome)
    click.echo(BEGIN)
    print_shown(shown, as_json=False)
    click.echo(AS_JSON + json.dumps(shown_as_json(shown)))
    sys.exit(print_notes(outcome, at=at))
