"""PEFT: `adapter_config.json` for `peft.LoraConfig.from_pretrained`, and the optimizer's side in `training.json`.

Keys: PEFT 0.21, `LoraConfig`; transformers 5, `TrainingArguments`, for the names in `training.json` that it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.gauge import FactorSettings
from sweeps.export.hugging_face import scheduler
from sweeps.export.parts import Exported, json_text, leftovers_of, save
from sweeps.export.point import ExportPoint
from sweeps.export.task import peft_task, task_settings

_ADAM = {"adam", "adamw"}
"""Their settings have names in `TrainingArguments`; other optimizers' have torch.optim's."""
INIT = {"kaiming_uniform": True, "gaussian": "gaussian"}
"""PEFT's names of the inits."""


def write(point: ExportPoint, directory: Path) -> Exported:
    """Writes the two files."""
    left = leftovers_of(point, "PEFT")
    said = training(point) | {"leftovers": {each.name: each.text for each in left}}
    return save(
        point,
        directory,
        {"adapter_config.json": json_text(adapter_config(point)), "training.json": json_text(said)},
        left,
    )


def adapter_config(point: ExportPoint) -> dict[str, Any]:
    """The keyword arguments of `peft.LoraConfig`."""
    targets = point.spec.lora.target_modules
    return {
        "peft_type": "LORA",
        **peft_task(point.spec.task),
        "r": point.point.rank,
        "lora_alpha": whole(point.alpha),
        "use_rslora": point.spec.lora.rslora,
        "init_lora_weights": INIT[point.spec.lora.init],
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "lora_dropout": point.spec.lora.dropout,
        "use_dora": point.spec.lora.dora,
        "bias": "none",
        # Beside those that PEFT takes by itself for the kind of task.
        **({"modules_to_save": list(head)} if (head := getattr(point.spec.task, "head", None)) else {}),
    }


def training(point: ExportPoint) -> dict[str, Any]:
    """What PEFT's config has no place for: the optimizer and its schedule, in the same gauge."""
    a, b, magnitude, train = point.point.a, point.point.b, point.point.magnitude, point.spec.train
    head = point.point.head
    own = _factor(a, train.optimizer)
    moved = ", ".join(own | ({"max_grad_norm": 0} if point.point.clip_norm else {}))
    return {
        "note": f"Exact in this gauge only: with another alpha, {moved} move too.",
        "optimizer": train.optimizer,
        **own,
        **_settings(train.settings, train.optimizer),
        **(_factor(b, train.optimizer, "_B") if a != b else {}),
        # Which no gauge moves, and which stand outside of the clip.
        **({} if magnitude is None else _factor(magnitude, train.optimizer, "_magnitude")),
        **({} if head is None else _factor(head, train.optimizer, "_head")),
        "max_grad_norm": point.point.clip_norm or 0.0,
        "lr_scheduler_type": scheduler(point),
        "warmup_steps": train.warmup_steps,
        "max_steps": train.steps,
        "per_device_train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "seed": train.seed,
        "dtype": train.dtype,
        **task_settings(point),
        "reached": point.metrics,
        "from": {"sweep": point.sweep, "trial": point.trial, "class": point.class_id},
    }


def _factor(settings: FactorSettings, optimizer: str, suffix: str = "") -> dict[str, Any]:
    """What one factor, or the magnitudes, are trained with."""
    eps = "adam_epsilon" if optimizer in _ADAM else "eps"
    constants = {eps if name == "eps" else name: value for name, value in settings.constants.items()}
    named = {"learning_rate": settings.lr, "weight_decay": settings.weight_decay, **constants}
    return {f"{name}{suffix}": value for name, value in named.items()}


def _settings(settings: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
    """The optimizer's own settings, Adam's under the names of `TrainingArguments`."""
    if optimizer not in _ADAM:
        return dict(settings)
    named = {name: value for name, value in settings.items() if name != "betas"}
    beta1, beta2 = settings["betas"]
    return {"adam_beta1": beta1, "adam_beta2": beta2} | named


def whole(alpha: float) -> float | int:
    """alpha as people write it: 16 and not 16.0."""
    return int(alpha) if alpha.is_integer() else alpha
