"""LLaMA-Factory: `llamafactory.yaml` for `llamafactory-cli train`.

Keys and types: LLaMA-Factory 0.9.5, `hparams/` (`finetuning_args.py`, `model_args.py`, `data_args.py`) and
transformers' `TrainingArguments`; what they do: `hparams/parser.py`, `train/trainer_utils.py`, `model/loader.py`,
`data/processor/supervised.py` and `pretrain.py`. alpha is an int there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sweeps.export.hugging_face import (
    loraplus_keys,
    optimizer_leftovers,
    refuse_float64,
    refuse_gaussian,
    training_arguments,
)
from sweeps.export.parts import Exported, Leftover, leftovers_of, refusal, save, yaml_text
from sweeps.export.point import ExportPoint
from sweeps.export.task import data_leftovers, language_model, longest
from sweeps.spec_tasks import CausalLmTask

_NAME = "LLaMA-Factory"
_USAGE = "Add {}dataset, template and output_dir, then: llamafactory-cli train llamafactory.yaml"
_ATTENTIONS = {"auto": "auto", "eager": "disabled", "sdpa": "sdpa", "flash_attention_2": "fa2"}


def write(point: ExportPoint, directory: Path) -> Exported:
    """Writes the file.

    Raises:
        InputError: LLaMA-Factory cannot do the run.
    """
    point = point.with_whole_alpha(_NAME)
    refuse_gaussian(point, _NAME)
    refuse_float64(point, _NAME)
    lora, section = point.spec.lora, language_model(point)
    values = {
        **_model(section),
        "stage": "pt" if section and section.data.format == "text" else "sft",
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
        **_data(section),
    }
    left = leftovers_of(point, _NAME) + optimizer_leftovers(point, _NAME)
    left += data_leftovers(point, _NAME, overlong=_overlong(section), attentions=_ATTENTIONS)
    left += _leftovers(point, section)
    usage = _USAGE.format("" if section else "model_name_or_path, ")
    return save(point, directory, {"llamafactory.yaml": yaml_text(point, _NAME, usage, values, left)}, left)


def _model(section: CausalLmTask | None) -> dict[str, Any]:
    if section is None:
        return {}
    found = {
        "model_name_or_path": section.model,
        "model_revision": section.revision,
        "flash_attn": _ATTENTIONS.get(section.attention),
    }
    return {name: value for name, value in found.items() if value is not None}


def _data(section: CausalLmTask | None) -> dict[str, Any]:
    """Its defaults are 2048 tokens, checkpointing, the loss on answers alone, and texts cut anywhere to be packed."""
    if section is None:
        return {}
    stated: dict[str, Any] = {"disable_gradient_checkpointing": not section.gradient_checkpointing}
    if section.data.format == "text":  # the stage pt, where the loss is on all tokens
        return {"cutoff_len": longest(section) + section.packing, "packing": section.packing} | stated
    return {
        # It takes one off when it packs.
        "cutoff_len": longest(section) + section.packing,
        "packing": section.packing,
        "neat_packing": section.packing,  # without it packed samples see each other
        "train_on_prompt": section.loss == "all",
    } | stated


def _overlong(section: CausalLmTask | None) -> tuple[str, ...]:
    """In the stage sft a cut is shared between prompt and answer."""
    return ("truncate",) if section and section.data.format == "text" else ()


def _leftovers(point: ExportPoint, section: CausalLmTask | None) -> list[Leftover]:
    if section is None:
        return []
    dtype = point.spec.train.dtype
    text = f"{_NAME} loads the weights in the dtype that they were saved in: save the model in {dtype} for the same run"
    found = [Leftover("dtype", None, True, text)]
    if section.data.format is None and section.loss == "all":
        text = (
            "where the data are texts (a column text), write stage: pt, and leave train_on_prompt and neat_packing out"
        )
        found.append(Leftover("format", None, True, text))
    if section.data.format == "text" and section.packing:
        text = f"{_NAME} cuts the joined texts every cutoff_len tokens, and they see each other: the sweep's did not"
        found.append(Leftover("packing", None, True, text))
    return found


def _target(targets: tuple[str, ...] | str) -> str:
    if targets == "all-linear":
        return "all"
    if isinstance(targets, str) or any("," in name for name in targets):
        raise refusal(_NAME, "target modules by name", f"the regular expression {targets!r}")
    return ",".join(targets)
