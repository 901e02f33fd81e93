"""Exports: the point moved to default init, and the files as their trainers read them."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lora_core.adapter import LoraBank, Member
from lora_core.gauge import scaling_of
from lora_core.optimizers import PackOptimizer
from lora_core.train import lr_factor, train_pack
from services.cli import cli
from sweeps.deliverables import write_exports, write_merged
from sweeps.errors import InputError
from sweeps.export import FORMATS
from sweeps.export.point import ExportPoint
from sweeps.home import Home
from sweeps.recipe import losses_of, optimizer_of, schedule_of
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import Choice
from sweeps.tasks import load_task
from sweeps.tasks.digits import DigitsNet, DigitsTask
from tests.conftest import FinishedSweep
from tests.support import record_of, run_cli, run_json
from tests.sweeps.export_points import record_of_one, spec_of

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


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 7, 8, 48])
def test_at_powers_of_two_alpha_is_exact_at_any_rank(rank: int, rslora: bool):
    spec = spec_of(lora=", rslora: true" if rslora else "")
    spec = spec.model_copy(update={"parameters": spec.parameters.model_copy(update={"rank": Choice((rank,))})})
    point = ExportPoint.of(*record_of_one(spec, Configuration(rank, 16.0, 1e-2, 0.5)))
    assert point.alpha == 4.0
    assert point.point.scaling == scaling_of(4.0, rank, rslora=rslora)
    assert point.with_whole_alpha("Axolotl").alpha == 4.0


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


# -- the command -------------------------------------------------------------------------------------------------------


def logits_of(model: torch.nn.Module, task: DigitsTask) -> torch.Tensor:
    with torch.no_grad():
        return model(task.data["held-out images"])


def test_adapter_and_merged_model_give_the_trials_own_metrics(finished: FinishedSweep, tmp_path: Path):
    arguments = ("--adapter", tmp_path / "adapter", "--merge", tmp_path / "merged")
    printed = run_json("export", "last", *arguments, "--json", cwd=finished.cwd)
    assert printed["trial"] == finished.output["best"]["trial"]
    names = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "merged/model.safetensors"]
    assert printed["files"] == [str(tmp_path / name) for name in names]
    spec = record_of(finished.cwd, finished.output["sweep"]).spec
    task = load_task(spec, cache=finished.cwd / ".lora-sweeps" / "cache", device=torch.device("cpu"))
    merged = type(task.model)()
    merged.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    found = logits_of(merged, task)
    adapted = PeftModel.from_pretrained(task.model, str(tmp_path / "adapter"))
    torch.testing.assert_close(found, logits_of(adapted, task), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, logits_of(adapted.merge_and_unload(), task), rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(found, task.data["held-out labels"]).item()
    assert loss == pytest.approx(printed_metric(finished), rel=1e-5)


def printed_metric(finished: FinishedSweep) -> float:
    return finished.output["best"]["metrics"]["eval/loss"]


def test_another_trial_than_the_best(finished: FinishedSweep, tmp_path: Path):
    record = record_of(finished.cwd, finished.output["sweep"])
    pruned = next(trial for trial in record.trained if trial.state == "pruned")
    out = tmp_path / "out"
    arguments = ("--format", "peft", "--output", out, "--trial", str(pruned.number), "--adapter", tmp_path / "adapter")
    printed = run_json("export", "last", *arguments, "--json", cwd=finished.cwd)
    assert printed["trial"] == pruned.number
    assert json.loads((out / "training.json").read_text())["from"]["trial"] == pruned.number
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == pruned.configuration.rank


def test_a_chosen_alpha_names_the_init_scale_that_is_left(finished: FinishedSweep, tmp_path: Path):
    arguments = ("--format", "peft", "--output", tmp_path, "--alpha", "2*rank", "--json")
    done = run_cli("export", "last", *arguments, cwd=finished.cwd)
    printed, best = json.loads(done.stdout), finished.output["best"]
    assert printed["alpha"] == 2 * best["rank"]
    (left,) = printed["leftovers"]
    assert left["value"] == printed["init_scale"]
    assert left["value"] == pytest.approx(best["init_scale"] * (best["alpha"] / printed["alpha"]) ** 0.5)
    assert f"warning: {left['text']}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--format NAME, --adapter DIR or --merge DIR"),
        (("--format", "tlr"), "--format must be one of peft, trl"),
        (("--adapter", "a", "--alpha", "16"), "go with --format"),
        (("--format", "peft", "--alpha", "16", "--default-init"), "contradict each other"),
        (("--format", "peft", "--alpha", "rank+1"), "alpha must be a positive number"),
        (("--format", "peft", "--alpha", "1e308*rank"), "a float holds"),
        (("--format", "peft", "--trial", "99"), r"--trial must be one of .* \(0 to 23\); found 99"),
        (("--adapter", "file/below"), "--adapter must be a directory that can be written"),
        (("--format", "trl", "--output", "file/below"), "--output must be a directory that can be written"),
        (("--merge", "file/below"), "--merge must be a directory that can be written"),
    ],
)
def test_a_wrong_request_is_said(
    arguments: tuple[str, ...],
    words: str,
    finished: FinishedSweep,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """In this process, for speed; `main` makes both kinds exit with 2."""
    (tmp_path / "file").write_text("")
    absolute = [str(tmp_path / each) if each == "file/below" else each for each in arguments]
    monkeypatch.setenv("LORA_SWEEPS_HOME", str(finished.cwd / ".lora-sweeps"))
    with pytest.raises((InputError, click.UsageError), match=words):
        cli(["export", "last", *absolute], standalone_mode=False)


def test_a_wrong_request_exits_2(finished: FinishedSweep):
    assert run_cli("export", "last", cwd=finished.cwd).returncode == 2
    assert run_cli("export", "last", "--format", "tlr", cwd=finished.cwd).returncode == 2


def test_a_sweep_leaves_every_format_beside_its_report(finished: FinishedSweep):
    exports = Home(finished.cwd / ".lora-sweeps").report(finished.output["sweep"]) / "export"
    assert {path.name for path in exports.iterdir()} == set(FORMATS)
    assert not list(exports.glob("*/refused.txt"))


def test_a_format_that_cannot_do_the_run_says_so_in_its_place(tmp_path: Path):
    record, trial = record_of_one(spec_of(optimizer="muon"), Configuration(4, 16.0, 1e-2, 2.0))
    write_exports(record, trial, tmp_path)
    assert "found muon" in (tmp_path / "trl" / "refused.txt").read_text()
    assert (tmp_path / "peft" / "training.json").exists()


def test_a_model_that_saves_itself_is_asked_to(
    finished: FinishedSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The hook for transformers' models: `save_pretrained(directory, state_dict=merged)`."""
    record = record_of(finished.cwd, finished.output["sweep"])
    home = Home(finished.cwd / ".lora-sweeps")
    assert record.best is not None
    (plain,) = write_merged(record, record.best, home, tmp_path / "plain")

    def save_pretrained(self: torch.nn.Module, directory: Path, *, state_dict: dict[str, torch.Tensor]) -> None:
        save_file(state_dict, directory / "own.safetensors")

    monkeypatch.setattr(DigitsNet, "save_pretrained", save_pretrained, raising=False)
    (own,) = write_merged(record, record.best, home, tmp_path / "own")
    assert own.name == "own.safetensors"
    expected = load_file(plain)
    assert all(torch.equal(value, expected[name]) for name, value in load_file(own).items())
