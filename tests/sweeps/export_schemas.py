"""What each trainer takes: PEFT's, transformers' and loralib's own schemas are asked, and the keys and types of the
others stand in tables, with the release that they were read from.

Where a trainer itself is installed, `test_export_trainers.py` asks it too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loralib
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, Trainer, TrainingArguments

NUMBER = (int, float)

AXOLOTL: dict[str, Any] = {
    # Axolotl 0.19.0, axolotl/utils/schemas/peft.py
    "adapter": str,
    "lora_r": int,
    "lora_alpha": int,
    "lora_dropout": float,
    "lora_target_modules": (str, list),
    "peft_use_dora": bool,
    "peft_use_rslora": bool,
    "peft_init_lora_weights": (bool, str),
    "loraplus_lr_ratio": float,
    "loraplus_lr_embedding": float,
    # schemas/training.py
    "gradient_accumulation_steps": int,
    "micro_batch_size": int,
    "learning_rate": float,
    "weight_decay": float,
    "optimizer": str,
    "optim_args": (str, dict),
    "lr_scheduler": str,
    "adam_epsilon": float,
    "adam_beta1": float,
    "adam_beta2": float,
    "group_by_length": bool,
    "max_grad_norm": float,
    "train_on_inputs": bool,
    # schemas/config.py
    "warmup_steps": int,
    "max_steps": int,
    "dataloader_drop_last": bool,
    "seed": int,
    "bf16": (bool, str),
    "fp16": bool,
    "sequence_len": int,
    "excess_length_strategy": str,
    "sample_packing": bool,
    "gradient_checkpointing": (bool, str),
    "attn_implementation": str,
    # schemas/model.py, and schemas/deprecated.py for the revision
    "base_model": str,
    "revision_of_model": str,
}
LLAMAFACTORY: dict[str, Any] = {
    # LLaMA-Factory 0.9.5, llamafactory/hparams/finetuning_args.py; what is in no table is of TrainingArguments
    "stage": str,
    "finetuning_type": str,
    "lora_rank": int,
    "lora_alpha": int,
    "lora_dropout": float,
    "lora_target": str,
    "use_rslora": bool,
    "use_dora": bool,
    "loraplus_lr_ratio": float,
    "loraplus_lr_embedding": float,
    # hparams/model_args.py
    "model_name_or_path": str,
    "model_revision": str,
    "flash_attn": str,
    "disable_gradient_checkpointing": bool,
    # hparams/data_args.py
    "cutoff_len": int,
    "packing": bool,
    "neat_packing": bool,
    "train_on_prompt": bool,
}
UNSLOTH: dict[str, Any] = {
    # Unsloth 2026.10.9, FastLlamaModel.get_peft_model in unsloth/models/llama.py; use_dora goes on to PEFT
    "r": int,
    "lora_alpha": NUMBER,
    "lora_dropout": float,
    "target_modules": (list, str),
    "use_rslora": bool,
    "use_dora": bool,
    "init_lora_weights": (bool, str),
    "bias": str,
    "random_state": int,
    "use_gradient_checkpointing": (bool, str),
}
UNSLOTH_LOADER: dict[str, Any] = {
    # FastLanguageModel.from_pretrained in unsloth/models/loader.py
    "model_name": str,
    "revision": str,
    "use_exact_model_name": bool,
    "max_seq_length": int,
    "use_gradient_checkpointing": (bool, str),
    "dtype": str,
    "load_in_4bit": bool,
}
TRL: dict[str, Any] = {
    # TRL 1.16.0, trl/trainer/model_config.py. alpha: see `test_trl_itself_reads_the_file`
    "model_name_or_path": str,
    "model_revision": str,
    "attn_implementation": str,
    "use_peft": bool,
    "lora_r": int,
    "lora_alpha": NUMBER,
    "lora_dropout": float,
    "lora_target_modules": list,
    "use_rslora": bool,
    "use_dora": bool,
    "dtype": str,
}
SFT_CONFIG: dict[str, Any] = {
    # trl/trainer/sft_config.py; the rest is TrainingArguments
    "max_length": int,
    "packing": bool,
    "completion_only_loss": bool,
    "assistant_only_loss": bool,
}


def check_table(values: dict[str, Any], table: dict[str, Any]) -> None:
    for key, value in values.items():
        assert key in table, f"{key} is no key of it"
        kinds = table[key] if isinstance(table[key], tuple) else (table[key],)
        assert type(value) in kinds, f"{key}: {value!r}"  # True is an int to isinstance


def check_training_arguments(values: dict[str, Any]) -> TrainingArguments:
    here = {"use_cpu": True, "report_to": [], "bf16": False}
    (read_back,) = HfArgumentParser(TrainingArguments).parse_dict(values | here)
    layer = torch.nn.Linear(2, 2)
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(read_back, layer)
    kind(layer.parameters(), **keywords)
    return read_back


def split(values: dict[str, Any], table: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of a table, and the others."""
    return {k: v for k, v in values.items() if k in table}, {k: v for k, v in values.items() if k not in table}


def check_schema(form: str, directory: Path) -> None:
    if form in ("peft", "hf_trainer"):
        config = LoraConfig.from_pretrained(str(directory))
        layers = torch.nn.ModuleDict({"fc1": torch.nn.Linear(64, 64), "fc2": torch.nn.Linear(64, 64)})
        get_peft_model(layers, config)
    if form == "hf_trainer":
        check_training_arguments(yaml.safe_load((directory / "training_args.yaml").read_text()))
    if form == "trl":
        own, rest = split(yaml.safe_load((directory / "trl_sft.yaml").read_text()), TRL | SFT_CONFIG)
        check_table(own, TRL | SFT_CONFIG)
        check_training_arguments(rest)
    if form == "axolotl":
        check_table(yaml.safe_load((directory / "axolotl.yaml").read_text()), AXOLOTL)
    if form == "llamafactory":
        own, rest = split(yaml.safe_load((directory / "llamafactory.yaml").read_text()), LLAMAFACTORY)
        check_table(own, LLAMAFACTORY)
        assert rest.pop("do_train") is True
        check_training_arguments(rest)
    if form == "unsloth":
        values = yaml.safe_load((directory / "unsloth.yaml").read_text())
        assert values.keys() == {"from_pretrained", "get_peft_model", "sft_config"}
        check_table(values["from_pretrained"], UNSLOTH_LOADER)
        check_table(values["get_peft_model"], UNSLOTH)
        own, rest = split(values["sft_config"], SFT_CONFIG | {"loraplus_lr_ratio": float})
        check_table(own, SFT_CONFIG | {"loraplus_lr_ratio": float})
        check_training_arguments(rest)
    if form == "loralib":
        values = json.loads((directory / "loralib.json").read_text())
        layer = loralib.Linear(64, 64, **values["linear"])
        groups = [{"params": [getattr(layer, name)], **values[name]} for name in ("lora_A", "lora_B")]
        accumulator = groups[0].pop("initial_accumulator_value", None)
        groups[1].pop("initial_accumulator_value", None)
        kind = getattr(torch.optim, values["optimizer"].removeprefix("torch.optim."))
        kind(
            groups, **values["arguments"], **({} if accumulator is None else {"initial_accumulator_value": accumulator})
        )
