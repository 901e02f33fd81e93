"""Points to export, made without running a sweep; and what each format wrote, read back as one thing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sweeps.events import RungReported
from sweeps.export.point import ExportPoint
from sweeps.home import Home
from sweeps.jobs import JobOrder, MemberOrder
from sweeps.records import SweepRecord, TrialRecord
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SweepSpec, parse_spec
from sweeps.training import JobRunner
from tests.sweeps.support import make_created

ALPHA = 16.0


DIGITS = "{type: digits}"


def spec_of(
    *,
    optimizer: str = "adamw",
    train: str = "",
    lora: str = "",
    parameters: str = "",
    steps: int = 24,
    task: str = DIGITS,
    targets: str = "[fc1, fc2]",
) -> SweepSpec:
    """A spec, over the digits unless told otherwise; the pieces are the inside of YAML flow mappings, after a comma."""
    return parse_spec(
        f"""\
name: exported
task: {task}
lora: {{target_modules: {targets}{lora}}}
parameters: {{rank: 4, lr: {{min: 1e-4, max: 1}}, init_scale: {{min: 0.0625, max: 16}}, alpha: 16{parameters}}}
train: {{optimizer: {optimizer}, steps: {steps}, batch_size: 16{train}}}
""",
        "exported.yaml",
    ).spec


def record_of_one(spec: SweepSpec, configuration: Configuration) -> tuple[SweepRecord, TrialRecord]:
    """A sweep with that configuration as its one trial."""
    trial = TrialRecord(7, {}, configuration, Reduction.of(spec).class_id(configuration), None, 0.0, state="finished")
    return SweepRecord("exported-000000", make_created(spec), 0.0, trials={7: trial}), trial


def trained(spec: SweepSpec, configuration: Configuration, home: Home) -> tuple[SweepRecord, TrialRecord]:
    """A sweep of one trial that was really trained and has left its state."""
    record, trial = record_of_one(spec, configuration)
    order = JobOrder(
        job=0,
        work="train",
        spec=spec.model_dump(mode="json"),
        cache=str(home.cache),
        checkpoints=str(home.checkpoints(record.id)),
        members=(MemberOrder(trial=trial.number, configuration=configuration, class_id=""),),
        start=0,
        stop=spec.train.steps,
    )
    result = JobRunner().run(order)
    assert result.error is None, result.detail
    (member,) = result.members
    trial.rungs.append(
        RungReported(trial=trial.number, job=0, step=order.stop, metrics=member.metrics, checkpoint=member.checkpoint)
    )
    return record, trial


def point_of(
    *,
    lr: float = 0.02,
    init_scale: float = 2.0,
    lr_ratio: float = 1.0,
    weight_decay: float = 0.0,
    head_lr: float = 0.0,
    alpha: float | str | None = None,
    **pieces: Any,
) -> ExportPoint:
    """The export of one configuration at rank 4 and alpha 16."""
    spec = spec_of(**pieces)
    configuration = Configuration(4, ALPHA, lr, init_scale, lr_ratio, weight_decay, head_lr)
    return ExportPoint.of(*record_of_one(spec, configuration), alpha)


def lm_point_of(task: str = "", data: str = "format: completion", **pieces: Any) -> ExportPoint:
    """The same over a language model; the pieces of the task are the insides of flow mappings, after a comma."""
    section = f"{{type: causal_lm, model: org/model, data: {{train: org/data, {data}}}{task}}}"
    return point_of(task=section, targets="[q_proj, v_proj]", **pieces)


@dataclass(frozen=True)
class Read:
    """What a trainer reads of an export, under one set of names; None where the format leaves it to other keys."""

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    targets: Any
    lr: float
    lr_ratio: float
    weight_decay: float
    eps: float | None
    clip_norm: float
    schedule: str
    warmup_steps: int
    steps: int
    batch_size: int
    accumulation: int
    seed: int


def read(form: str, directory: Path) -> Read:
    """Reads an export back as its trainer's own parser would: JSON, or YAML by PyYAML."""
    return _READERS[form](directory)


def _yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def _trainer(arguments: dict[str, Any], **more: Any) -> Read:
    return Read(
        lr=arguments["learning_rate"],
        lr_ratio=more.pop("lr_ratio", arguments.get("loraplus_lr_ratio", 1.0)),
        weight_decay=arguments["weight_decay"],
        eps=arguments.get("adam_epsilon"),
        clip_norm=arguments["max_grad_norm"],
        schedule=arguments["lr_scheduler_type"],
        warmup_steps=arguments["warmup_steps"],
        steps=arguments["max_steps"],
        batch_size=arguments["per_device_train_batch_size"],
        accumulation=arguments["gradient_accumulation_steps"],
        seed=arguments["seed"],
        **more,
    )


def _adapter(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "rslora": config["use_rslora"],
        "dropout": config["lora_dropout"],
        "targets": config["target_modules"],
    }


def _peft(directory: Path) -> Read:
    training = json.loads((directory / "training.json").read_text())
    ratio = training.get("learning_rate_B", training["learning_rate"]) / training["learning_rate"]
    adapter = _adapter(json.loads((directory / "adapter_config.json").read_text()))
    return _trainer(training, **adapter, lr_ratio=ratio)


def _hf_trainer(directory: Path) -> Read:
    adapter = _adapter(json.loads((directory / "adapter_config.json").read_text()))
    loraplus = directory / "loraplus.yaml"
    ratio = _yaml(loraplus)["arguments"]["loraplus_lr_ratio"] if loraplus.exists() else 1.0
    return _trainer(_yaml(directory / "training_args.yaml"), **adapter, lr_ratio=ratio)


def _trl(directory: Path) -> Read:
    config = _yaml(directory / "trl_sft.yaml")
    own = {"r": "lora_r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "lora_dropout": "lora_dropout"}
    adapter = {name: config[key] for name, key in own.items()} | {"target_modules": config["lora_target_modules"]}
    return _trainer(config, **_adapter(adapter))


def _axolotl(directory: Path) -> Read:
    config = _yaml(directory / "axolotl.yaml")
    renamed = {"lr_scheduler_type": "lr_scheduler", "per_device_train_batch_size": "micro_batch_size"}
    arguments = config | {name: config[key] for name, key in renamed.items()}
    adapter = {"r": config["lora_r"], "use_rslora": config["peft_use_rslora"]}
    adapter |= {"target_modules": config["lora_target_modules"]}
    return _trainer(arguments, **_adapter(config | adapter))


def _llamafactory(directory: Path) -> Read:
    config = _yaml(directory / "llamafactory.yaml")
    adapter = {"r": config["lora_rank"], "target_modules": config["lora_target"].split(",")}
    return _trainer(config, **_adapter(config | adapter))


def _unsloth(directory: Path) -> Read:
    config = _yaml(directory / "unsloth.yaml")
    return _trainer(config["sft_config"], **_adapter(config["get_peft_model"]))


def _loralib(directory: Path) -> Read:
    config = json.loads((directory / "loralib.json").read_text())
    a, b = config["lora_A"], config["lora_B"]
    arguments = {
        "learning_rate": a["lr"],
        "weight_decay": a.get("weight_decay", 0.0),
        "adam_epsilon": a.get("eps"),
        "max_grad_norm": config["clip_norm"] or 0.0,
        "lr_scheduler_type": config["schedule"],
        "max_steps": config["steps"],
        "per_device_train_batch_size": config["batch_size"],
        "gradient_accumulation_steps": config["accumulation"],
    }
    adapter = config["linear"] | {"use_rslora": False, "target_modules": config["target_modules"]}
    return _trainer(config | arguments, **_adapter(adapter), lr_ratio=b["lr"] / a["lr"])


_READERS = {
    "peft": _peft,
    "trl": _trl,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "unsloth": _unsloth,
    "hf_trainer": _hf_trainer,
    "loralib": _loralib,
}
