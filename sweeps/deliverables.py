"""What a sweep leaves on disk: its report, the export of its best point, and that trial's trained adapter."""

from __future__ import annotations

from pathlib import Path

from lora_core.checkpoint import export_peft_adapter, load_member
from sweeps import report
from sweeps.export import FORMATS
from sweeps.export.point import ExportPoint
from sweeps.home import Home
from sweeps.records import SweepRecord, TrialRecord


def write_report(record: SweepRecord, home: Home) -> Path:
    """Writes a sweep's report, the export of its best point, and that trial's adapter; returns their directory."""
    directory = home.report(record.id)
    report.write(report.build(record), directory)
    best = record.best
    if best is not None:
        for name, write in FORMATS.items():
            write(ExportPoint.of(record, best), directory / "export" / name)
        _write_adapter(record, best, home, directory / "adapter")
    return directory


def _write_adapter(record: SweepRecord, trial: TrialRecord, home: Home, directory: Path) -> None:
    """The trained adapter as a PEFT folder, in the gauge in which it was trained."""
    checkpoint = trial.rungs[-1].checkpoint
    assert checkpoint is not None, "a trial that finished has left its state"
    lora = record.spec.lora
    export_peft_adapter(
        directory,
        load_member(home.checkpoints(record.id) / checkpoint).adapter,
        rank=trial.configuration.rank,
        alpha=trial.configuration.alpha,
        target_modules=lora.target_modules,
        use_rslora=lora.rslora,
        dropout=lora.dropout,
    )
