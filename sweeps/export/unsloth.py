"""Unsloth: `unsloth.yaml`, the keyword arguments of `FastLanguageModel` and of the SFTConfig that its trainer takes.

Keys and what they do: Unsloth 2026.10.9, `models/loader.py`, `FastLlamaModel.get_peft_model` in `models/llama.py`,
`UnslothTrainer` in `trainer.py`; unsloth_zoo 2026.10.9, `dataset_utils.py`. The rest are TRL's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sweeps.export.hugging_face import loraplus_keys, optimizer_leftovers, refuse_float64, training_arguments
from sweeps.export.parts import Exported, leftovers_of, refusal, save, yaml_text
from sweeps.export.peft import INIT, whole
from sweeps.export.point import ExportPoint
from sweeps.export.task import data_leftovers, language_model, longest
from sweeps.export.trl import loss_leftovers, sft_data
from sweeps.spec_tasks import CausalLmTask

_USAGE = (
    "FastLanguageModel.from_pretrained({}**from_pretrained), FastLanguageModel.get_peft_model(model, "
    "**get_peft_model), {}."
)
_PLAIN = "SFTConfig(**sft_config)"
_LORAPLUS = "UnslothTrainingArguments(**sft_config) for UnslothTrainer"
_IN_FULL = ("embed_tokens", "lm_head")


def write(point: ExportPoint, directory: Path) -> Exported:
    """Writes the file.

    Raises:
        InputError: Unsloth cannot do the run.
    """
    refuse_float64(point, "Unsloth")
    lora, section = point.spec.lora, language_model(point)
    _check_targets(lora.target_modules)
    # Without the embeddings' learning rate: LoRA on embeddings is refused above.
    loraplus = {name: value for name, value in loraplus_keys(point).items() if name == "loraplus_lr_ratio"}
    values = {
        "from_pretrained": _from_pretrained(section) | {"dtype": point.spec.train.dtype, "load_in_4bit": False},
        "get_peft_model": {
            "r": point.point.rank,
            "lora_alpha": whole(point.alpha),
            "lora_dropout": lora.dropout,
            "target_modules": lora.target_modules
            if isinstance(lora.target_modules, str)
            else list(lora.target_modules),
            "use_rslora": lora.rslora,
            **({"use_dora": True} if lora.dora else {}),
            "init_lora_weights": INIT[lora.init],
            "bias": "none",
            "random_state": point.spec.train.seed,
            **({"use_gradient_checkpointing": section.gradient_checkpointing} if section else {}),
        },
        "sft_config": training_arguments(point, "Unsloth", loraplus=True) | loraplus | sft_data(section),
    }
    left = leftovers_of(point, "Unsloth") + optimizer_leftovers(point, "Unsloth")
    left += data_leftovers(point, "Unsloth", attentions=()) + loss_leftovers(section)
    usage = _USAGE.format("" if section else "MODEL, ", _LORAPLUS if loraplus else _PLAIN)
    return save(point, directory, {"unsloth.yaml": yaml_text(point, "Unsloth", usage, values, left)}, left)


def _from_pretrained(section: CausalLmTask | None) -> dict[str, Any]:
    if section is None:
        return {}
    return {
        "model_name": section.model,
        **({} if section.revision is None else {"revision": section.revision}),
        "use_exact_model_name": True,  # and not a copy of Unsloth's of it
        "max_seq_length": longest(section),
        "use_gradient_checkpointing": section.gradient_checkpointing,
    }


def _check_targets(targets: tuple[str, ...] | str) -> None:
    """Refuses adapters on the embeddings: of a list it trains these in full, and of an expression not at all."""
    if isinstance(targets, str):
        found = [name for name in _IN_FULL if targets != "all-linear" and re.fullmatch(targets, f"model.{name}")]
        found += ["lm_head"] if targets != "all-linear" and re.fullmatch(targets, "lm_head") else []
    else:
        found = [name for name in targets if name.rpartition(".")[2] in _IN_FULL]
    if found:
        required = "no adapter on embed_tokens or lm_head, for it trains these in full or not at all"
        raise refusal("Unsloth", required, f"target module {' and '.join(dict.fromkeys(found))}")
