"""The command line. Results go to stdout, progress and messages to stderr; a wrong request exits 2, a fault of ours 1.

Every command imports what it needs when it runs, so that `--help` and the light ones answer at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lora_core import __version__
from services.certifying import certify
from services.doctor import doctor
from services.driving import drive
from services.exporting import export
from services.job_driver import drive_job
from services.options import AS_JSON
from services.serving import serve
from services.showing import best, list_sweeps, logs, report, status, watch
from services.submitting import cancel, extend, resume, submit
from services.tokens import login, token
from services.translating import translate
from sweeps.errors import InputError, SpecError

_SPEC = click.argument("spec", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lora-sweeps")
def cli() -> None:
    """Sweeps LoRA hyperparameters, knowing that alpha is a gauge and not one of them.

    SPEC is a YAML file; SWEEP is a sweep's id, its name, or `last`.
    """


@cli.command()
@click.argument("spec", type=click.Path(path_type=Path), required=False)
@click.option("--name", help="Name of the sweep, in place of the spec's own.")
@click.option(
    "--address",
    help="A running Ray cluster. auto or HOST:PORT: driven from here, a node of it. http://HEAD:8265 (its dashboard) "
    "or ray://HEAD:10001: submitted as a Ray job, driven there. Without it a cluster is started on this machine.",
)
@click.option("--resume", metavar="SWEEP", help="Go on with an interrupted sweep; takes no SPEC.")
@click.option("--trials", type=int, metavar="N", help="With --resume: train N trials in all, also if it had finished.")
@click.option(
    "--working-dir",
    "directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="With a Ray job: send this directory, which has SPEC and the code and data that it names.",
)
@click.option("--detach", is_flag=True, help="With a Ray job: submit it, and do not follow it.")
@AS_JSON
def run(
    spec: Path | None,
    name: str | None,
    address: str | None,
    resume: str | None,
    trials: int | None,
    directory: Path | None,
    detach: bool,
    as_json: bool,
) -> None:
    """Run a sweep: search, certificates, report, export.

    A sweep that was submitted as a Ray job goes on when you press Ctrl-C, or close the laptop.
    """
    from services.job_place import check_has_files, check_lasts
    from services.output import print_outcome, watching
    from sweeps import driver
    from sweeps.home import Home
    from sweeps.spec import load_spec

    if (spec is None) == (resume is None):
        raise click.UsageError("run takes either a SPEC or --resume SWEEP.")
    if resume is not None and name is not None:
        raise click.UsageError("--name names a new sweep; a resumed one keeps its name.")
    if resume is None and trials is not None:
        raise click.UsageError("--trials goes with --resume; a new sweep has them in its SPEC, as search.trials.")
    if resume is not None and directory is not None:
        raise click.UsageError("--working-dir goes with a SPEC; a resumed sweep has its files on the cluster.")
    if address is not None and address.startswith(("http://", "https://", "ray://")):
        from services.remote_run import run_remotely

        code = run_remotely(
            address,
            spec=spec,
            name=name,
            resume=resume,
            trials=trials,
            directory=directory,
            detach=detach,
            as_json=as_json,
        )
        sys.exit(code)
    if directory is not None or detach:
        raise click.UsageError("--working-dir and --detach go with --address http://HEAD:8265.")
    with watching() as (progress, interrupts):
        document = None if spec is None else load_spec(spec)
        check_lasts(Home.locate().path, document.spec.tracking.uri if document else None)
        home = Home.open()
        if document is not None:
            outcome = driver.start(document, home, name=name, address=address, progress=progress, interrupts=interrupts)
        else:
            check_has_files(home, resume or "", trials=trials)
            outcome = driver.resume(
                resume or "", home, address=address, progress=progress, interrupts=interrupts, trials=trials
            )
    sys.exit(print_outcome(outcome, as_json=as_json))


@cli.command()
@_SPEC
@click.option("--classes", is_flag=True, help="With --json: list every class with its configurations.")
@click.option("--time/--no-time", "timed", default=True, help="Run a few steps to estimate the time (the default).")
@AS_JSON
def plan(spec: Path, classes: bool, timed: bool, as_json: bool) -> None:
    """Show what a spec would run, before it runs."""
    from services.words import classes_of, print_json, print_plan
    from sweeps.home import Home
    from sweeps.planning import plan_sweep
    from sweeps.spec import load_spec

    if classes and not as_json:
        raise click.UsageError("--classes goes with --json.")
    document = load_spec(spec)
    made = plan_sweep(document, Home.open(), timed=timed)
    if as_json:
        listed = {"classes_with_members": classes_of(document.spec)} if classes else {}
        print_json(made.model_dump(mode="json") | listed)
    else:
        print_plan(made)


@cli.command()
@_SPEC
@AS_JSON
def validate(spec: Path, as_json: bool) -> None:
    """Check a spec, and name every fault with its line."""
    from services.words import print_json
    from sweeps.spec import load_spec

    try:
        document = load_spec(spec)
    except SpecError as error:
        if as_json:
            faults = [
                {key: getattr(f, key) for key in ("path", "line", "required", "found", "hint")} for f in error.faults
            ]
            print_json({"valid": False, "faults": faults})
        raise
    if as_json:
        print_json({"valid": True, "faults": []})
    else:
        click.echo(f"{document.source}: valid")


@cli.command()
@click.argument("what", type=click.Choice(["spec", "certificate"]), default="spec")
def schema(what: str) -> None:
    """Print the JSON schema of a spec (the default), for editors, or of a certificate."""
    from services.words import print_json
    from sweeps import certificates, spec

    print_json(certificates.json_schema() if what == "certificate" else spec.json_schema())


@cli.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("sweep.yaml"))
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def init(path: Path, force: bool) -> None:
    """Write a commented spec to start from (default: sweep.yaml)."""
    from sweeps.spec import template

    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(template())
    except FileExistsError:
        raise InputError(f"init writes a new file; {path} is there already; name another or add --force") from None
    except OSError as error:
        raise InputError(f"init must be able to write {path}; it cannot: {error.strerror}") from None
    click.echo(f"wrote {path}: edit it, then `lora-sweeps run {path}`")


for _command in (
    certify,
    doctor,
    drive,
    drive_job,
    serve,
    submit,
    list_sweeps,
    status,
    watch,
    logs,
    cancel,
    resume,
    extend,
    best,
    report,
    export,
    translate,
    token,
    login,
):
    cli.add_command(_command)


def main() -> None:
    """Runs the command line."""
    try:
        cli(standalone_mode=True)
    except SpecError as error:
        count = len(error.faults)
        click.echo(f"error: {error}" if count == 1 else f"error: {count} faults\n{error}", err=True)
        sys.exit(2)
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
