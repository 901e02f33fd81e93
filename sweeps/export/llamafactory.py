"""LLaMA-Factory: `llamafactory.yaml` for `llamafactory-cli train`.

Keys and types: hiyouga/LLaMA-Factory, `src/llamafactory/hparams/finetuning_args.py` (00577a8) and transformers'
`TrainingArguments`; what they do: `train/trainer_utils.py` (002f58e). alpha is an int there.
"""

from __future__ import annotations

from pathlib import Path

from sweeps.export.hugging_face import (
    loraplus_keys,
    optimizer_leftovers,
    refuse_float64,
    refuse_gaussian,
    training_arguments,
)
from sweeps.export.parts import Exported, leftovers_of, refusal, save, yaml_text
from sweeps.export.point import ExportPoint

_NAME = "LLaMA-Factory"
_USAGE = "Add model_name_or_path, dataset, template and output_dir, then: llamafactory-cli train llamafactory.yaml"


def write(point: ExportPoint, directory: Path) -> Exported:
    """Writes the file.

    Raises:
        InputError: LLaMA-Factory cannot do the run.
    """
    point = point.with_whole_alpha(_NAME)
    refuse_gaussian(point, _NAME)
    refuse_float64(point, _NAME)
    lora = point.spec.lora
    values = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": point.point.rank,
        "lora_alpha": int(point.alpha),
        "lora_dropout": lora.dropout,
        "lora_target": _target(lora.target_modules),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        **loraplus_keys(point),
        **training_arguments(point, _NAME, loraplus=True),
    }
    left = leftovers_of(point, _NAME) + optimizer_leftovers(point, _NAME)
    return save(point, directory, {"llamafactory.yaml": yaml_text(point, _NAME, _USAGE, values, left)}, left)


def _target(targets: tuple[str, ...] | str) -> str:
    if targets == "all-linear":
        return "all"
    if isinstance(targets, str) or any("," in name for name in targets):
        raise refusal(_NAME, "target modules by name", f"the regular expression {targets!r}")
    return ",".join(targets)
