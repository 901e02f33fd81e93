"""A trial as it is handed out: which one, and in a trainer's config format, with the texts of its files."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from zipfile import ZIP_DEFLATED, ZipFile

from sweeps.errors import InputError

if TYPE_CHECKING:
    from services.schemas import Export
    from sweeps.records import SweepRecord, TrialRecord


def check_format(form: str) -> None:
    """Refuses a format that there is not."""
    from sweeps.export import FORMATS

    if form not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}; found {form!r}")


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

    check_format(form)
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
