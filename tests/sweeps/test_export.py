"""Exports: the point moved to default init, and the files as their trainers read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_core.adapter import LoraBank, Member
from lora_core.optimizers import PackOptimizer
from lora_core.train import lr_factor, train_pack
from sweeps.export import FORMATS
from sweeps.export.point import ExportPoint
from sweeps.recipe import losses_of, optimizer_of, schedule_of
from sweeps.reduction import Reduction
from sweeps.tasks import load_task
from tests.conftest import FinishedSweep
from tests.support import record_of, run_json

STEPS = 12


@pytest.fixture
def point(finished: FinishedSweep) -> ExportPoint:
    record = record_of(finished.cwd, finished.output["sweep"])
    assert record.best is not None
    return ExportPoint.of(record, record.best)


def test_export_moves_the_init_scale_into_alpha(finished: FinishedSweep, point: ExportPoint):
    best = finished.output["best"]
    c = best["init_scale"]
    assert point.alpha == pytest.approx(best["alpha"] * c**2)
    assert point.point.a.lr == pytest.approx(best["lr"] / c)
    assert point.point.a.eps == pytest.approx(best["eps"] * c)
    assert point.point.init_scale == 1.0


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_writes_json_below_its_directory_and_names_its_origin(
    form: str, finished: FinishedSweep, tmp_path: Path
):
    out = tmp_path / "deep" / form
    printed = run_json("export", "last", "--format", form, "--output", out, "--json", cwd=finished.cwd)
    files = [Path(name) for name in printed["files"]]
    assert files
    assert all(out in path.parents for path in files)
    texts = "".join(path.read_text() for path in files)
    assert printed["sweep"] in texts
    assert all(json.loads(path.read_text()) for path in files if path.suffix == ".json")


def test_peft_reads_the_config_and_has_our_scaling(point: ExportPoint, tmp_path: Path):
    FORMATS["peft"](point, tmp_path)
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert config.r == point.point.rank
    assert config.target_modules == {"fc1", "fc2"}
    model = get_peft_model(
        torch.nn.ModuleDict({"fc1": torch.nn.Linear(64, 64), "fc2": torch.nn.Linear(64, 64)}), config
    )
    assert model.base_model.model["fc1"].scaling["default"] == pytest.approx(point.point.scaling, rel=1e-12)


def test_unmodified_peft_with_the_exported_values_gives_the_loss_curve_of_our_trial(
    finished: FinishedSweep, point: ExportPoint, tmp_path: Path
):
    """The closing test: PEFT's own layers and torch's own AdamW, in the gauge of default init, from the same A."""
    record = record_of(finished.cwd, finished.output["sweep"])
    spec, best = record.spec, record.best
    assert best is not None
    task = load_task(spec, cache=finished.cwd / ".lora-sweeps" / "cache", device=torch.device("cpu"))
    losses_K = losses_of(spec, task, members=1)
    member = Member(Reduction.of(spec).point(best.configuration), spec.train.seed)
    with LoraBank.attach(task.model, spec.lora.target_modules, [member]) as bank:
        steps = train_pack(
            bank, PackOptimizer(bank, optimizer_of(spec)), losses_K, start=0, stop=STEPS, schedule=schedule_of(spec)
        )
        ours = [record.losses[0] for record in steps]

    FORMATS["peft"](point, tmp_path)
    training = json.loads((tmp_path / "training.json").read_text())
    with LoraBank.attach(task.model, spec.lora.target_modules, [Member(point.point, spec.train.seed)]) as bank:
        initial = bank.adapter(0)  # what PEFT's default init draws, from our seed in place of the global generator
    peft_model = get_peft_model(task.model, LoraConfig.from_pretrained(str(tmp_path)))
    for name, module in peft_model.base_model.model.named_modules():
        if f"{name}.lora_A" in initial:
            module.lora_A["default"].weight.data.copy_(initial[f"{name}.lora_A"])
            assert not module.lora_B["default"].weight.any()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in peft_model.parameters() if parameter.requires_grad],
        lr=training["learning_rate"],
        betas=(training["adam_beta1"], training["adam_beta2"]),
        eps=training["adam_epsilon"],
        weight_decay=training["weight_decay"],
    )
    theirs = []
    for step in range(STEPS):
        factor = lr_factor(
            training["lr_scheduler_type"], step, steps=training["max_steps"], warmup_steps=training["warmup_steps"]
        )
        optimizer.param_groups[0]["lr"] = training["learning_rate"] * factor
        optimizer.zero_grad()
        loss = losses_K(step).sum()
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    assert theirs == pytest.approx(ours, rel=1e-4)
    assert theirs[0] != pytest.approx(theirs[-1], rel=1e-2)
