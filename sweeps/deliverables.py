"""What a sweep leaves on disk: its report, exports, and a trial's trained adapter, alone or merged into its model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from lora_core.adapter import Member
from lora_core.checkpoint import (
    CheckpointError,
    MemberState,
    export_peft_adapter,
    load_member,
    split_saved_modules,
)
from lora_core.files import write_atomically
from sweeps import report
from sweeps.errors import InputError
from sweeps.export import FORMATS
from sweeps.export.point import ExportPoint
from sweeps.export.task import peft_task
from sweeps.home import Home
from sweeps.recipe import bank_of
from sweeps.records import SweepRecord, TrialRecord
from sweeps.reduction import Reduction
from sweeps.spec_tasks import ModelTask
from sweeps.storage import files_in, place_of
from sweeps.tasks import load_task, save_tokenizer


def write_report(record: SweepRecord, home: Home) -> Path:
    """Writes a sweep's report, the exports of its best point, and that trial's adapter; returns their directory."""
    directory = home.report(record.id)
    report.write(report.build(record), directory)
    best = record.best
    if best is not None:
        write_exports(record, best, directory / "export")
        write_adapter(record, best, home, directory / "adapter")
    return directory


def write_exports(record: SweepRecord, trial: TrialRecord, directory: Path) -> None:
    """Writes a trial in every format, each in a directory of its own; one that cannot do the run says why."""
    point = ExportPoint.of(record, trial)
    for name, write in FORMATS.items():
        try:
            write(point, directory / name)
        except InputError as error:
            (directory / name).mkdir(parents=True, exist_ok=True)
            write_atomically(directory / name / "refused.txt", f"{error}\n".encode())


def write_adapter(record: SweepRecord, trial: TrialRecord, home: Home, directory: Path) -> tuple[Path, ...]:
    """Writes the trained adapter as a PEFT folder, in the gauge in which it was trained; returns its files.

    The folder names the task's model, where there is one that PEFT can load, and holds what was trained whole, such as
    the head of a classifier, as PEFT's `modules_to_save`.

    Raises:
        InputError: the trial has left no state.
        OSError: the disk refused.
    """
    lora, state = record.spec.lora, _state(record, trial, home)
    adapter, saved_modules = split_saved_modules(state.adapter, json.loads(state.extra.get("heads", "[]")))
    base = peft_task(record.spec.task)
    export_peft_adapter(
        directory,
        adapter,
        rank=trial.configuration.rank,
        alpha=trial.configuration.alpha,
        target_modules=lora.target_modules,
        use_rslora=lora.rslora,
        dropout=lora.dropout,
        base_model=base.get("base_model_name_or_path"),
        revision=base.get("revision"),
        task_type=base.get("task_type"),
        # States of earlier releases do not say it; then PEFT finds it out and warns that it did.
        fan_in_fan_out=state.extra.get("fan_in_fan_out") == "true",
        saved_modules=saved_modules,
    )
    return directory / "adapter_config.json", directory / "adapter_model.safetensors"


def write_merged(record: SweepRecord, trial: TrialRecord, home: Home, directory: Path) -> tuple[Path, ...]:
    """Writes the task's model with the trained adapter merged into its weights; returns the files.

    A model that knows how to save itself, as transformers' do, is asked to: `model.save_pretrained(directory,
    state_dict=merged)`, with the state dict under the model's own names; and the tokenizer of a model of transformers
    is put beside it. Any other one becomes that state dict as `model.safetensors`. A task needs nothing for this but
    its `model`.

    Raises:
        InputError: the trial has left no state.
        OSError: the disk refused.
    """
    spec, state = record.spec, _state(record, trial, home)
    task = load_task(spec, cache=home.cache, device=torch.device("cpu"))
    member = Member(Reduction.of(spec).point(trial.configuration), spec.train.seed)
    with bank_of(spec, task, [member]) as bank:
        bank.load_adapter(0, state.adapter)
        weights = bank.merged_weights(0)
    merged: dict[str, Tensor] = dict(task.model.state_dict()) | weights
    directory.mkdir(parents=True, exist_ok=True)
    save_pretrained = getattr(task.model, "save_pretrained", None)
    if save_pretrained is not None:
        save_pretrained(directory, state_dict=merged)
        if isinstance(spec.task, ModelTask):
            save_tokenizer(spec.task, directory)
        return tuple(sorted(path for path in directory.iterdir() if path.is_file()))
    path = directory / "model.safetensors"
    write_atomically(path, serialise({name: value.contiguous() for name, value in merged.items()}))
    return (path,)


def _state(record: SweepRecord, trial: TrialRecord, home: Home) -> MemberState:
    """What the trial left at its last rung."""
    checkpoint = trial.rungs[-1].checkpoint if trial.rungs else None
    if checkpoint is None:
        have = [str(each.number) for each in record.trained if each.rungs and each.rungs[-1].checkpoint]
        raise InputError(
            f"a trained adapter needs a trial that has left its state; found trial {trial.number}, which is "
            f"{trial.state}: take one of {', '.join(have) or 'another sweep'}"
        )
    try:
        return load_member(files_in(place_of(home, record.id, record.created.checkpoints), checkpoint))
    except CheckpointError as error:
        raise InputError(str(error)) from None
