"""Axolotl: `axolotl.yaml`, the part of a config that a sweep decides.

Keys and types: axolotl-ai-cloud/axolotl, `src/axolotl/utils/schemas/peft.py` (00564c8) and `training.py` (002a637);
what they do: `core/builders/base.py` (ceda25b), `core/trainers/mixins/optimizer.py` (0e4982e). alpha is an int there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sweeps.export.hugging_face import loraplus_keys, optimizer_leftovers, refuse_float64, training_arguments
from sweeps.export.parts import Exported, leftovers_of, refusal, save, yaml_text
from sweeps.export.peft import INIT
from sweeps.export.point import ExportPoint

_USAGE = "Add base_model and datasets, then: axolotl train axolotl.yaml"
_RENAMED = {
    "optim": "optimizer",
    "lr_scheduler_type": "lr_scheduler",
    "per_device_train_batch_size": "micro_batch_size",
}


def write(point: ExportPoint, directory: Path) -> Exported:
    """Writes the file.

    Raises:
        InputError: Axolotl cannot do the run.
    """
    point = point.with_whole_alpha("Axolotl")
    refuse_float64(point, "Axolotl")
    if point.spec.train.warmup_steps == 1:
        raise refusal("Axolotl", "no warm-up or one of at least 2 steps, for it makes 2 of 1", "train.warmup_steps: 1")
    lora = point.spec.lora
    targets = lora.target_modules
    values: dict[str, Any] = {
        "adapter": "lora",
        "lora_r": point.point.rank,
        "lora_alpha": int(point.alpha),
        "lora_dropout": lora.dropout,
        # Axolotl reads PEFT's own word for every linear layer as a key of its own.
        **(
            {"lora_target_linear": True}
            if targets == "all-linear"
            else {"lora_target_modules": targets if isinstance(targets, str) else list(targets)}
        ),
        "peft_use_rslora": lora.rslora,
        "peft_use_dora": lora.dora,
        "peft_init_lora_weights": INIT[lora.init],
        **loraplus_keys(point),
    }
    arguments = training_arguments(point, "Axolotl", loraplus=True)
    if arguments.pop("train_sampling_strategy", None):
        values["group_by_length"] = True
    values |= {_RENAMED.get(name, name): value for name, value in arguments.items()}
    left = leftovers_of(point, "Axolotl") + optimizer_leftovers(point, "Axolotl")
    return save(point, directory, {"axolotl.yaml": yaml_text(point, "Axolotl", _USAGE, values, left)}, left)
