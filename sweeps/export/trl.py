"""TRL: `trl_sft.yaml` for `trl sft --config`, read by `TrlParser` into SFTConfig and ModelConfig.

Keys: TRL 1.16.0, `trainer/model_config.py`, `trainer/sft_config.py`; what they do: `scripts/sft.py`,
`trainer/sft_trainer.py`. alpha is declared int there, but the parser passes a YAML float on to PEFT as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sweeps.export.hugging_face import optimizer_leftovers, refuse_float64, refuse_gaussian, training_arguments
from sweeps.export.parts import Exported, Leftover, leftovers_of, save, yaml_text
from sweeps.export.peft import whole
from sweeps.export.point import ExportPoint
from sweeps.export.task import attention, data_leftovers, language_model, longest
from sweeps.spec_tasks import CausalLmTask

_USAGE = "Add {}dataset_name, then: trl sft --config trl_sft.yaml"


def write(point: ExportPoint, directory: Path) -> Exported:
    """Writes the file.

    Raises:
        InputError: TRL cannot do the run.
    """
    refuse_gaussian(point, "TRL")
    refuse_float64(point, "TRL")
    arguments = training_arguments(point, "TRL", loraplus=False)
    lora, section = point.spec.lora, language_model(point)
    values = {
        **_model(section),
        "use_peft": True,
        "lora_r": point.point.rank,
        "lora_alpha": whole(point.alpha),
        "lora_dropout": lora.dropout,  # TRL's default is 0.05
        "lora_target_modules": _target_modules(lora.target_modules),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "dtype": point.spec.train.dtype,
        **arguments,  # bf16 with them, which TRL turns on by default
        **sft_data(section),
    }
    left = leftovers_of(point, "TRL") + optimizer_leftovers(point, "TRL")
    left += data_leftovers(point, "TRL") + loss_leftovers(section)
    usage = _USAGE.format("" if section else "model_name_or_path and ")
    return save(point, directory, {"trl_sft.yaml": yaml_text(point, "TRL", usage, values, left)}, left)


def sft_data(section: CausalLmTask | None) -> dict[str, Any]:
    """SFTConfig's keys for data; its defaults are checkpointing, and the loss on completions alone if there are any."""
    if section is None:
        return {}
    alone = section.loss == "completion"
    return {
        "max_length": longest(section),
        "packing": section.packing,
        "completion_only_loss": alone and section.data.format != "messages",
        "assistant_only_loss": alone and section.data.format == "messages",
        "gradient_checkpointing": section.gradient_checkpointing,
    }


def loss_leftovers(section: CausalLmTask | None) -> list[Leftover]:
    """Which of its two keys for the loss is meant depends on the data's columns, which the spec may leave open."""
    if section is None or section.loss == "all" or section.data.format is not None:
        return []
    text = "where the data are chats (a column messages), write completion_only_loss: false, assistant_only_loss: true"
    return [Leftover("loss", None, True, text)]


def _model(section: CausalLmTask | None) -> dict[str, Any]:
    if section is None:
        return {}
    found = {
        "model_name_or_path": section.model,
        "model_revision": section.revision,
        "attn_implementation": attention(section),
    }
    return {name: value for name, value in found.items() if value is not None}


def _target_modules(targets: tuple[str, ...] | str) -> list[str]:
    """A list of one is taken out of its list by TRL, and PEFT reads text as an expression for the whole name."""
    if isinstance(targets, str):
        return [targets]
    if len(targets) > 1:
        return list(targets)
    return [rf"(.*\.)?{re.escape(targets[0])}"]
