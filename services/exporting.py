"""`lora-sweeps export`: the click command, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_DEFLATED, ZipFile

import click

from sweeps.errors import InputError, SweepNotFoundError

if TYPE_CHECKING:
    from services.schemas import Export
    from sweeps.export.parts import Exported
    from sweeps.home import Home
    from sweeps.records import SweepRecord, TrialRecord


@click.command()
@click.argument("sweep")
@click.option(
    "--format",
    "form",
    metavar="NAME",
    help="A trainer's config: peft, trl, axolotl, llamafactory, unsloth, hf_trainer or loralib.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Directory for --format (default: SWEEP-FORMAT).")
@click.option("--alpha", metavar="NUMBER", help='With this alpha, or by a rule ("2*rank"), and an init scale by hand.')
@click.option("--default-init", is_flag=True, help="With the alpha at which the init scale is 1 (the default).")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="DIR", help="Write the trained adapter for PEFT.")
@click.option("--merge", type=click.Path(path_type=Path), metavar="DIR", help="Write the model, adapter merged in.")
@click.option("--trial", "number", type=int, metavar="NUMBER", help="This trial and not the best one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def export(
    sweep: str,
    form: str | None,
    output: Path | None,
    alpha: str | None,
    default_init: bool,
    adapter: Path | None,
    merge: Path | None,
    number: int | None,
    as_json: bool,
) -> None:
    """Write the best point in a trainer's config format, in the gauge of its default init; or what was trained."""
    if form is None and adapter is None and merge is None:
        raise click.UsageError("export needs something to write: --format NAME, --adapter DIR or --merge DIR.")
    if form is None and (output is not None or alpha is not None or default_init):
        raise click.UsageError("--output, --alpha and --default-init go with --format.")
    if alpha is not None and default_init:
        raise click.UsageError("--alpha and --default-init contradict each other: leave one out.")
    if form is not None:
        _check_format(form)
    record, home = _find(sweep)
    trial = trial_of(record, number)
    printed: dict[str, Any] = {"sweep": record.id, "trial": trial.number}
    files: list[Path] = []
    if form is not None:
        exported = _write_format(record, trial, form, output or Path(f"{record.id}-{form}"), alpha)
        printed |= {"format": form, "alpha": exported.alpha, "init_scale": exported.init_scale}
        printed["leftovers"] = [
            {"name": each.name, "value": each.value, "warns": each.warns, "text": each.text}
            for each in exported.leftovers
        ]
        files += exported.files
        for each in exported.leftovers:
            click.echo(f"{'warning' if each.warns else 'note'}: {each.text}", err=True)
    files += _write_trained(record, trial, home, adapter, merge)
    if as_json:
        click.echo(json.dumps(printed | {"files": [str(path) for path in files]}, indent=2))
    else:
        click.echo("\n".join(map(str, files)))


def _check_format(form: str) -> None:
    from sweeps.export import FORMATS

    if form not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}; found {form!r}")


def _find(sweep: str) -> tuple[SweepRecord, Home]:
    from sweeps.home import Home
    from sweeps.records import read_sweep

    home = Home.locate()
    if not home.has_ledger:
        raise SweepNotFoundError(f"{home.path} has no sweeps yet: start one with `lora-sweeps run SPEC`")
    with home.ledger() as ledger:
        return read_sweep(ledger, ledger.find(sweep).id), home


def trial_of(record: SweepRecord, number: int | None) -> TrialRecord:
    """The trial that is to be exported: the best one where no number is given.

    Raises:
        InputError: there is none.
    """
    if number is None:
        if record.best is None:
            raise InputError(f"an export needs a finished trial; {record.id} is {record.state} and has none")
        return record.best
    trial = record.trials.get(number)
    if trial is None:
        known = f"0 to {max(record.trials)}" if record.trials else "none yet"
        raise InputError(f"--trial must be one of {record.id}'s ({known}); found {number}")
    # A duplicate is the same run as the trial that was trained in its place.
    return trial if trial.duplicate_of is None else record.trials[trial.duplicate_of]


def _write_format(record: SweepRecord, trial: TrialRecord, form: str, directory: Path, alpha: str | None) -> Exported:
    from sweeps.export import FORMATS
    from sweeps.export.point import ExportPoint

    point = ExportPoint.of(record, trial, alpha)
    try:
        return FORMATS[form](point, directory)
    except OSError as error:
        raise _unwritable("--output", directory, error) from None


def _write_trained(
    record: SweepRecord, trial: TrialRecord, home: Home, adapter: Path | None, merge: Path | None
) -> list[Path]:
    files: list[Path] = []
    if adapter is None and merge is None:
        return files
    from sweeps.deliverables import write_adapter, write_merged  # torch takes its time to load

    for option, directory, write in (("--adapter", adapter, write_adapter), ("--merge", merge, write_merged)):
        if directory is not None:
            try:
                files += write(record, trial, home, directory)
            except OSError as error:
                raise _unwritable(option, directory, error) from None
    return files


def _unwritable(option: str, directory: Path, error: OSError) -> InputError:
    return InputError(f"{option} must be a directory that can be written; {directory} cannot: {error.strerror}")


# -- for those who want it in hand and not on disk ---------------------------------------------------------------------


def export_of(record: SweepRecord, trial: TrialRecord, form: str, alpha: str | None, scratch: Path) -> Export:
    """A trial in a trainer's config format, with the texts of its files.

    Args:
        record: the sweep.
        trial: one of its trials.
        form: name of the format.
        alpha: a number or a rule; None: that of the trainer's default init.
        scratch: a directory to write in for a moment.

    Raises:
        InputError: there is no such format, or it cannot say what was trained.
    """
    from services.schemas import Export, Leftover
    from sweeps.export import FORMATS
    from sweeps.export.point import ExportPoint

    _check_format(form)
    with TemporaryDirectory(dir=scratch) as directory:
        written = FORMATS[form](ExportPoint.of(record, trial, alpha), Path(directory))
        files = {path.name: path.read_text(encoding="utf-8") for path in written.files}
    leftovers = tuple(Leftover(name=e.name, value=e.value, warns=e.warns, text=e.text) for e in written.leftovers)
    return Export(
        sweep=record.id,
        trial=trial.number,
        format=form,
        alpha=written.alpha,
        init_scale=written.init_scale,
        leftovers=leftovers,
        files=files,
    )


def packed(files: Mapping[str, str]) -> bytes:
    """Files as a ZIP archive."""
    archive = BytesIO()
    with ZipFile(archive, "w", ZIP_DEFLATED) as packing:
        for name, text in files.items():
            packing.writestr(name, text)
    return archive.getvalue()
