"""Unsloth: `unsloth.yaml`, the keyword arguments of `FastLanguageModel` and of the SFTConfig that its trainer takes.

Keys and what they do: unslothai/unsloth, `FastLlamaModel.get_peft_model` in `models/llama.py` (9fbe0b6) and
`trainer.py` (0024bb0), whose arguments are TRL's SFTConfig.
"""

from __future__ import annotations

from pathlib import Path

from sweeps.export.hugging_face import optimizer_leftovers, refuse_float64, training_arguments
from sweeps.export.parts import Exported, leftovers_of, refusal, save, yaml_text
from sweeps.export.peft import INIT, whole
from sweeps.export.point import ExportPoint

_USAGE = (
    "FastLanguageModel.from_pretrained(MODEL, **from_pretrained), FastLanguageModel.get_peft_model(model, "
    "**get_peft_model), SFTConfig(**sft_config)."
)


def write(point: ExportPoint, directory: Path) -> Exported:
    """Writes the file.

    Raises:
        InputError: Unsloth cannot do the run.
    """
    refuse_float64(point, "Unsloth")
    lora = point.spec.lora
    if lora.dora:
        raise refusal("Unsloth", "no DoRA, for get_peft_model has no key for it", "lora.dora: true")
    if isinstance(lora.target_modules, str):
        raise refusal("Unsloth", "target modules by name", f"the regular expression {lora.target_modules!r}")
    in_full = [name for name in lora.target_modules if name in ("embed_tokens", "lm_head")]
    if in_full:
        required = "no adapter on embed_tokens or lm_head, for it trains these in full instead"
        raise refusal("Unsloth", required, f"target module {' and '.join(in_full)}")
    values = {
        "from_pretrained": {"dtype": point.spec.train.dtype, "load_in_4bit": False},
        "get_peft_model": {
            "r": point.point.rank,
            "lora_alpha": whole(point.alpha),
            "lora_dropout": lora.dropout,
            "target_modules": list(lora.target_modules),
            "use_rslora": lora.rslora,
            "init_lora_weights": INIT[lora.init],
            "bias": "none",
            "random_state": point.spec.train.seed,
        },
        "sft_config": training_arguments(point, "Unsloth", loraplus=False),
    }
    left = leftovers_of(point, "Unsloth") + optimizer_leftovers(point, "Unsloth")
    return save(point, directory, {"unsloth.yaml": yaml_text(point, "Unsloth", _USAGE, values, left)}, left)
