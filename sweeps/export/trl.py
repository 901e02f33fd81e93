"""TRL: `trl_sft.yaml` for `trl sft --config`, read by `TrlParser` into SFTConfig and ModelConfig.

Keys: TRL 1.16, `trainer/model_config.py`, `trainer/sft_config.py`. alpha is declared int there, but the parser passes
a YAML float on to PEFT as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from sweeps.export.hugging_face import optimizer_leftovers, refuse_float64, refuse_gaussian, training_arguments
from sweeps.export.parts import Exported, leftovers_of, save, yaml_text
from sweeps.export.peft import whole
from sweeps.export.point import ExportPoint

_USAGE = "Add model_name_or_path and dataset_name, then: trl sft --config trl_sft.yaml"


def write(point: ExportPoint, directory: Path) -> Exported:
    """Writes the file.

    Raises:
        InputError: TRL cannot do the run.
    """
    refuse_gaussian(point, "TRL")
    refuse_float64(point, "TRL")
    arguments = training_arguments(point, "TRL", loraplus=False)
    lora = point.spec.lora
    values = {
        "use_peft": True,
        "lora_r": point.point.rank,
        "lora_alpha": whole(point.alpha),
        "lora_dropout": lora.dropout,  # TRL's default is 0.05
        "lora_target_modules": _target_modules(lora.target_modules),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "dtype": point.spec.train.dtype,
        **arguments,  # bf16 with them, which TRL turns on by default
    }
    left = leftovers_of(point, "TRL") + optimizer_leftovers(point, "TRL")
    return save(point, directory, {"trl_sft.yaml": yaml_text(point, "TRL", _USAGE, values, left)}, left)


def _target_modules(targets: tuple[str, ...] | str) -> list[str]:
    """A list of one is taken out of its list by TRL, and PEFT reads text as an expression for the whole name."""
    if isinstance(targets, str):
        return [targets]
    if len(targets) > 1:
        return list(targets)
    return [rf"(.*\.)?{re.escape(targets[0])}"]
