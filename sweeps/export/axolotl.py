"""Axolotl: `axolotl.yaml`, the part of a config that a sweep decides.

Keys and types: Axolotl 0.19.0, `utils/schemas/` (`peft.py`, `training.py`, `config.py`, `model.py`, `deprecated.py`);
what they do: `core/builders/base.py` and `causal.py`, `core/trainers/mixins/optimizer.py`, `utils/config/__init__.py`,
`utils/data/utils.py`. alpha is an int there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sweeps.export.hugging_face import loraplus_keys, optimizer_leftovers, refuse_float64, training_arguments
from sweeps.export.parts import Exported, Leftover, leftovers_of, refusal, save, yaml_text
from sweeps.export.peft import INIT
from sweeps.export.point import ExportPoint
from sweeps.export.task import attention, data_leftovers, language_model, longest
from sweeps.spec_tasks import CausalLmTask

_USAGE = "Add {}datasets, then: axolotl train axolotl.yaml"
_RENAMED = {
    "optim": "optimizer",
    "lr_scheduler_type": "lr_scheduler",
    "per_device_train_batch_size": "micro_batch_size",
}
_OVERLONG = {"refuse": "raise", "truncate": "truncate", "drop": "drop"}


def write(point: ExportPoint, directory: Path) -> Exported:
    """Writes the file.

    Raises:
        InputError: Axolotl cannot do the run.
    """
    point = point.with_whole_alpha("Axolotl")
    refuse_float64(point, "Axolotl")
    if point.spec.train.warmup_steps == 1:
        raise refusal("Axolotl", "no warm-up or one of at least 2 steps, for it makes 2 of 1", "train.warmup_steps: 1")
    lora, section = point.spec.lora, language_model(point)
    targets = lora.target_modules
    values: dict[str, Any] = {
        **_model(section),
        "adapter": "lora",
        "lora_r": point.point.rank,
        "lora_alpha": int(point.alpha),
        "lora_dropout": lora.dropout,
        # PEFT's own word for every linear layer, or an expression, is passed on to it as text.
        "lora_target_modules": targets if isinstance(targets, str) else list(targets),
        "peft_use_rslora": lora.rslora,
        "peft_use_dora": lora.dora,
        "peft_init_lora_weights": INIT[lora.init],
        **loraplus_keys(point),
    }
    arguments = training_arguments(point, "Axolotl", loraplus=True)
    if arguments.pop("train_sampling_strategy", None):
        values["group_by_length"] = True
    values |= {_RENAMED.get(name, name): value for name, value in arguments.items()} | _data(section)
    left = leftovers_of(point, "Axolotl") + optimizer_leftovers(point, "Axolotl") + _loraplus_leftovers(point)
    left += data_leftovers(point, "Axolotl", overlong=_OVERLONG)
    usage = _USAGE.format("" if section else "base_model and ")
    return save(point, directory, {"axolotl.yaml": yaml_text(point, "Axolotl", usage, values, left)}, left)


def _model(section: CausalLmTask | None) -> dict[str, Any]:
    if section is None:
        return {}
    # Without a name for its attention Axolotl lets packed samples see each other. sdpa is what transformers takes.
    named = attention(section) or ("sdpa" if section.packing else None)
    found = {"base_model": section.model, "revision_of_model": section.revision, "attn_implementation": named}
    return {name: value for name, value in found.items() if value is not None}


def _data(section: CausalLmTask | None) -> dict[str, Any]:
    """Its defaults are 512 tokens, longer samples dropped, and the loss on answers alone."""
    if section is None:
        return {}
    return {
        "sequence_len": longest(section),
        "excess_length_strategy": _OVERLONG[section.too_long],
        "sample_packing": section.packing,
        "train_on_inputs": section.loss == "all",
        "gradient_checkpointing": section.gradient_checkpointing,
    }


def _loraplus_leftovers(point: ExportPoint) -> list[Leftover]:
    if not (loraplus_keys(point) and point.point.a.weight_decay):
        return []
    text = "Axolotl 0.19.0 passes no weight decay on to LoRA+'s optimizer, and trains without; later ones may"
    return [Leftover("weight_decay", point.point.a.weight_decay, True, text)]
