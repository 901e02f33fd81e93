"""The closing test: the exported values, run in the trainer that they are for, are our trial.

On the one side a trial as a sweep trains it, at its own alpha and init scale. On the other unmodified PEFT and
transformers' Trainer, which read the exported files and know nothing of init scales. Shared are the frozen network, the
order of the data, and the initial A: PEFT draws it from torch's global generator, so what our seed draws in its place
(the same distribution, init scale 1) is copied in.

Rounding: in default init at a power of two our own run and the Trainer's are each the same as at the trial's own alpha,
bit for bit. Between our layer and PEFT's the last bit differs whatever the gauge, because they sum in another order; so
across the two, and at any other factor, the verdict is the one that certificates use: within the envelope of rounding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from lora_core.adapter import LoraBank, Member
from lora_core.gauge import Point
from lora_core.optimizers import PackOptimizer
from lora_core.train import batch_indices, lr_factor, train_pack
from lora_core.trajectory import Trajectory, compare, control_of, record_trajectories
from sweeps.export import FORMATS
from sweeps.export.point import ExportPoint
from sweeps.recipe import losses_of, optimizer_of, schedule_of
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SweepSpec
from sweeps.tasks.digits import DigitsTask
from tests.sweeps.export_points import ALPHA, read, record_of_one, spec_of

pytestmark = pytest.mark.usefixtures("one_thread")

CONTROLS = 4


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> DigitsTask:
    return DigitsTask.load(0, cache=tmp_path_factory.mktemp("cache"), device=torch.device("cpu"), dtype=torch.float32)


# -- our side ----------------------------------------------------------------------------------------------------------


def ours(spec: SweepSpec, task: DigitsTask, members: list[Member]) -> tuple[Trajectory, ...]:
    """Members of one trial each, as a sweep trains them."""
    found = []
    for member in members:
        with LoraBank.attach(task.model, spec.lora.target_modules, [member], init=spec.lora.init) as bank:
            steps = train_pack(
                bank,
                PackOptimizer(bank, optimizer_of(spec)),
                losses_of(spec, task, members=1),
                start=0,
                stop=spec.train.steps,
                schedule=schedule_of(spec),
                accumulation=spec.train.accumulation,
            )
            found += record_trajectories(bank, steps)
    return tuple(found)


def initial_adapter(spec: SweepSpec, task: DigitsTask, point: Point) -> dict[str, Tensor]:
    with LoraBank.attach(
        task.model, spec.lora.target_modules, [Member(point, spec.train.seed)], init=spec.lora.init
    ) as bank:
        return bank.adapter(0)


# -- the trainer's side ------------------------------------------------------------------------------------------------


class ForTrainer(nn.Module):
    """The network as the Trainer calls models."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.losses: list[float] = []

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(images)
        loss = nn.functional.cross_entropy(logits, labels)
        self.losses.append(loss.item())
        return {"loss": loss, "logits": logits}


class InOurOrder(IterableDataset[dict[str, Tensor]]):
    """The samples in the order in which a sweep's trials see them."""

    def __init__(self, spec: SweepSpec, task: DigitsTask) -> None:
        self.spec, self.task = spec, task

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        train, data = self.spec.train, self.task.data
        for batch in range(train.steps * train.accumulation):
            for index in batch_indices(self.task.n_samples, train.batch_size, batch, train.seed).tolist():
                yield {"images": data["images"][index], "labels": data["labels"][index]}


@dataclass
class Norms(TrainerCallback):
    """The Frobenius norm of s B A of every layer, after each step."""

    model: PeftModel
    rows: list[list[float]]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        row = []
        for module in self.model.modules():
            if hasattr(module, "lora_A") and hasattr(module, "scaling"):
                a, b = (getattr(module, name)["default"].weight.detach().double() for name in ("lora_A", "lora_B"))
                row.append(float(torch.linalg.matrix_norm(module.scaling["default"] * (b @ a))))
        self.rows.append(row)


def trainers(spec: SweepSpec, task: DigitsTask, directory: Path, initial: dict[str, Tensor]) -> Trajectory:
    """Runs what `--format hf_trainer` wrote; nothing of it is changed but where the Trainer puts its own files."""
    here = {"use_cpu": True, "report_to": [], "output_dir": str(directory / "out"), "save_strategy": "no"}
    here |= {"disable_tqdm": True, "dataloader_pin_memory": False, "logging_strategy": "no"}
    written = yaml.safe_load((directory / "training_args.yaml").read_text())
    assert not here.keys() & written.keys()
    (arguments,) = HfArgumentParser(TrainingArguments).parse_dict(written | here)
    wrapped = ForTrainer(task.model)
    model = get_peft_model(wrapped, LoraConfig.from_pretrained(str(directory)))
    try:
        for name, module in wrapped.network.named_modules():
            if f"{name}.lora_A" in initial:
                module.lora_A["default"].weight.data.copy_(initial[f"{name}.lora_A"])
                assert not module.lora_B["default"].weight.any()
        norms = Norms(model, [])
        optimizer = None
        if (directory / "loraplus.yaml").exists():
            loraplus = yaml.safe_load((directory / "loraplus.yaml").read_text())
            kind = getattr(torch.optim, loraplus["optimizer_class"].removeprefix("torch.optim."))
            optimizer = create_loraplus_optimizer(model, kind, **loraplus["arguments"])
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=InOurOrder(spec, task),
            callbacks=[norms],
            optimizers=(optimizer, None),
        )
        trainer.train()
    finally:
        model.unload()
    losses = torch.tensor(wrapped.losses, dtype=torch.float64).view(-1, spec.train.accumulation).mean(dim=1)
    return Trajectory(losses, torch.tensor(norms.rows, dtype=torch.float64))


# -- the test ----------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"train": ", warmup_steps: 4"},
    "adamw, rsLoRA, decay, accumulation": {
        "lora": ", rslora: true",
        "parameters": ", weight_decay: 0.1",
        "train": ", schedule: constant, warmup_steps: 4, accumulation: 2, seed: 3",
    },
    "adamw, eps and betas that matter": {"train": ", eps: 1e-3, betas: [0.8, 0.95], schedule: linear"},
    "adamw, clipped": {"train": ", clip_norm: 0.1"},
    "adamw, LoRA+": {"parameters": ", lr_ratio: 4"},
    "adamw, lr ratio searched": {"parameters": ", lr_ratio: {min: 1, max: 16}"},
    "adam": {"optimizer": "adam"},
    "sgd": {
        "optimizer": "sgd",
        "train": ", momentum: 0.9, options: {nesterov: true}",
        "parameters": ", weight_decay: 0.1",
    },
    "rmsprop": {"optimizer": "rmsprop", "train": ", momentum: 0.5"},
    "adagrad": {"optimizer": "adagrad", "train": ", options: {lr_decay: 0.01}"},
}


def trial_of(name: str, init_scale: float) -> tuple[SweepSpec, Configuration]:
    spec = spec_of(**RUNS[name])
    lr = {"sgd": 2e-3, "rmsprop": 2e-3}.get(spec.train.optimizer, 1e-2)
    ratio = 4.0 if "lr_ratio" in RUNS[name].get("parameters", "") else 1.0
    decay = 0.1 if "weight_decay" in RUNS[name].get("parameters", "") else 0.0
    return spec, Configuration(4, ALPHA, lr, init_scale, ratio, decay)


@pytest.mark.parametrize("init_scale", [2.0, 3.0])
@pytest.mark.parametrize("name", RUNS)
def test_the_exported_values_in_unmodified_peft_and_trainer_are_our_trial(
    name: str, init_scale: float, task: DigitsTask, tmp_path: Path
):
    spec, configuration = trial_of(name, init_scale)
    point = ExportPoint.of(*record_of_one(spec, configuration))
    FORMATS["hf_trainer"](point, tmp_path)
    initial = initial_adapter(spec, task, point.point)
    theirs = trainers(spec, task, tmp_path, initial)

    member = Member(Reduction.of(spec).point(configuration), spec.train.seed)
    trial, *controls = ours(spec, task, [member, *(control_of(member, seed) for seed in range(CONTROLS))])
    assert trial.losses[-1] < 0.9 * trial.losses[0], "it trains"
    # torch's clip adds 1e-6 to the norm.
    verdict = compare(trial, theirs, controls, eps=1e-5 if "clipped" in name else 2.0**-23)
    assert verdict.kind != "different", verdict

    if init_scale != 3.0 and "searched" not in name:
        (twin,) = ours(spec, task, [Member(point.point, spec.train.seed)])
        assert compare(trial, twin, []).kind == "bit-identical"


@pytest.mark.parametrize("name", ["adamw", "adamw, rsLoRA, decay, accumulation", "adamw, LoRA+", "sgd", "rmsprop"])
def test_the_trainer_itself_sees_no_difference_at_a_power_of_two(name: str, task: DigitsTask, tmp_path: Path):
    """Default init, and the trial's own alpha with its init scale multiplied in by hand, as the export says."""
    spec, configuration = trial_of(name, 2.0)
    record, trial = record_of_one(spec, configuration)
    exported = ExportPoint.of(record, trial)
    at_own_alpha = ExportPoint.of(record, trial, ALPHA)
    assert at_own_alpha.point.init_scale == 2.0
    found = []
    for part, point in (("default", exported), ("own", at_own_alpha)):
        FORMATS["hf_trainer"](point, tmp_path / part)
        found.append(trainers(spec, task, tmp_path / part, initial_adapter(spec, task, point.point)))
    assert read("hf_trainer", tmp_path / "default").alpha == 64
    assert read("hf_trainer", tmp_path / "own").alpha == 16
    assert compare(*found, []).kind == "bit-identical"


@pytest.mark.parametrize("form", ["axolotl", "llamafactory"])
def test_a_whole_alpha_with_the_stated_init_scale_is_our_trial(form: str, task: DigitsTask, tmp_path: Path):
    """Alpha 18.49 as 18: its lr solved anew, and what is left over multiplied into A by hand."""
    spec, configuration = trial_of("adamw", 1.075)
    point = ExportPoint.of(*record_of_one(spec, configuration))
    exported = FORMATS[form](point, tmp_path)
    whole = point.with_whole_alpha(form)
    assert (exported.alpha, read(form, tmp_path).lr) == (18, whole.point.a.lr)
    (left,) = exported.leftovers
    assert left.warns  # 1.4 %
    FORMATS["hf_trainer"](replace(whole, exact_alpha=None), tmp_path)
    plain = initial_adapter(spec, task, replace(whole.point, init_scale=1.0))
    by_hand = {key: value * left.value if key.endswith("lora_A") else value for key, value in plain.items()}
    theirs = trainers(spec, task, tmp_path, by_hand)
    member = Member(Reduction.of(spec).point(configuration), spec.train.seed)
    trial, *controls = ours(spec, task, [member, *(control_of(member, seed) for seed in range(CONTROLS))])
    assert compare(trial, theirs, controls).kind != "different"
    # Left undone it is another run.
    undone = trainers(spec, task, tmp_path, plain)
    assert compare(trial, undone, controls).kind == "different"


def test_loralib_with_a_loop_of_its_users_is_our_trial(task: DigitsTask, tmp_path: Path):
    """rsLoRA, LoRA+ and an optimizer that no trainer has: loralib's user writes the loop, so all of it is possible."""
    spec = spec_of(
        optimizer="nadam", lora=", rslora: true", parameters=", lr_ratio: 4", train=", warmup_steps: 4, eps: 1e-5"
    )
    configuration = Configuration(4, ALPHA, 5e-3, 3.0, 4.0)
    point = ExportPoint.of(*record_of_one(spec, configuration))
    FORMATS["loralib"](point, tmp_path)
    written = json.loads((tmp_path / "loralib.json").read_text())
    initial = initial_adapter(spec, task, point.point)

    network = type(task.model)()
    for name in written["target_modules"]:
        base = getattr(network, name)
        setattr(network, name, loralib.Linear(base.in_features, base.out_features, **written["linear"]))
    network.load_state_dict(task.model.state_dict(), strict=False)
    loralib.mark_only_lora_as_trainable(network)
    groups = []
    for factor in ("lora_A", "lora_B"):
        weights = {name: getattr(getattr(network, name), factor) for name in written["target_modules"]}
        if factor == "lora_A":
            for name, weight in weights.items():
                weight.data.copy_(initial[f"{name}.lora_A"])
        groups.append({"params": list(weights.values()), **written[factor]})
    kind = getattr(torch.optim, written["optimizer"].removeprefix("torch.optim."))
    optimizer = kind(groups, **written["arguments"])
    losses, norms = [], []
    for step in range(written["steps"]):
        factor = lr_factor(written["schedule"], step, steps=written["steps"], warmup_steps=written["warmup_steps"])
        for group, peak in zip(optimizer.param_groups, ("lora_A", "lora_B"), strict=True):
            group["lr"] = written[peak]["lr"] * factor
        indices = batch_indices(task.n_samples, written["batch_size"], step, written["seed"])
        loss = nn.functional.cross_entropy(network(task.data["images"][indices]), task.data["labels"][indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        layers = [getattr(network, name) for name in written["target_modules"]]
        norms.append([(x.scaling * x.lora_B.double() @ x.lora_A.double()).norm().item() for x in layers])
    theirs = Trajectory(torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64))
    member = Member(Reduction.of(spec).point(configuration), spec.train.seed)
    trial, *controls = ours(spec, task, [member, *(control_of(member, seed) for seed in range(CONTROLS))])
    assert compare(trial, theirs, controls).kind != "different"
