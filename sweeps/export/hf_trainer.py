"""transformers' Trainer: `training_args.yaml` for `HfArgumentParser`, and PEFT's `adapter_config.json`.

Keys: transformers 5.23, `TrainingArguments`; PEFT 0.21, `LoraConfig` and `create_loraplus_optimizer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_core.gauge import FactorSettings
from sweeps.export.hugging_face import loraplus_keys, optimizer_leftovers, training_arguments
from sweeps.export.parts import Exported, Leftover, json_text, leftovers_of, save, torch_group, yaml_text
from sweeps.export.peft import adapter_config
from sweeps.export.point import ExportPoint
from sweeps.export.task import attention, data_leftovers, longest
from sweeps.spec_tasks import CausalLmTask, ModelTask, SequenceClassificationTask

_NAME = "transformers' Trainer"
_USAGE = (
    "HfArgumentParser(TrainingArguments).parse_yaml_file(...) reads this; get_peft_model(model, "
    "LoraConfig.from_pretrained(...)) the adapter_config.json beside it."
)
_USAGE_LORAPLUS = (
    "Trainer(optimizers=(create_loraplus_optimizer(model, OPTIMIZER_CLASS, **ARGUMENTS), None)) with the class and the "
    "arguments below; create_loraplus_optimizer is in peft.optimizers."
)


_USAGE_GROUPS = (
    "Trainer(optimizers=(OPTIMIZER_CLASS(groups, **ARGUMENTS), None)) with the class and the arguments below, and "
    '[{"params": [p for name, p in model.named_parameters() if p.requires_grad and re.search(pattern, name)], '
    "**settings} for pattern, settings in GROUPS.items()] as groups."
)


def write(point: ExportPoint, directory: Path) -> Exported:
    """Writes the files; with LoRA+ `loraplus.yaml` too, or with a head `parameter_groups.yaml`, for the Trainer has no
    keys for them.

    Raises:
        InputError: the Trainer cannot do the run.
    """
    left = leftovers_of(point, _NAME) + optimizer_leftovers(point, _NAME)
    head = point.point.head
    extra = _loraplus(point) if head is None else {}
    if extra:
        text = "the Trainer has no key for lr of B: pass it the optimizer of loraplus.yaml, or B trains with lr of A"
        left.append(Leftover("lr_ratio", point.lr_ratio, True, text))
    if head is not None:
        text = "the Trainer has one lr: pass it the optimizer of parameter_groups.yaml, or the head trains with lr of A"
        left.append(Leftover("head_lr", head.lr, True, text))
    arguments = training_arguments(point, _NAME, loraplus=True, heads=True)
    section = point.spec.task
    if isinstance(section, ModelTask):
        # The older name, which all releases know; 5.23 warns that it is one.
        arguments |= {"gradient_checkpointing": True} if section.gradient_checkpointing else {}
        left += [*data_leftovers(point, _NAME, overlong=("truncate", "drop")), _by_hand(point, section)]
    texts = {
        "adapter_config.json": json_text(adapter_config(point)),
        "training_args.yaml": yaml_text(point, _NAME, _USAGE, arguments, left),
    }
    if extra:
        texts["loraplus.yaml"] = yaml_text(point, _NAME, _USAGE_LORAPLUS, extra, left)
    if head is not None:
        texts["parameter_groups.yaml"] = yaml_text(point, _NAME, _USAGE_GROUPS, _groups(point, head), left)
    return save(point, directory, texts, left)


def _by_hand(point: ExportPoint, section: ModelTask) -> Leftover:
    """The model and the data, for which `TrainingArguments` has no keys."""
    loaded = [f"dtype {point.spec.train.dtype}", *([f"attention {named}"] if (named := attention(section)) else [])]
    data = [f"samples of at most {longest(section):,} tokens (longer ones: {section.too_long})"]
    if isinstance(section, CausalLmTask):
        data.append("the loss on completions alone" if section.loss == "completion" else "the loss on all tokens")
        data += ["packed"] if section.packing else []
    if isinstance(section, SequenceClassificationTask):
        data.append(f"labels {', '.join(section.labels)} in this order" if section.labels else "labels as they are")
    text = f"{_NAME} has no keys for the model ({section.model}, {', '.join(loaded)}) and the data ({', '.join(data)})"
    return Leftover("task", None, False, text)


def _groups(point: ExportPoint, head: FactorSettings) -> dict[str, Any]:
    """torch.optim's own words for A, B and the head, each with a pattern for PEFT's names of its parameters."""
    decays = point.law.decay is not None
    settings = {"lora_(embedding_)?A": point.point.a, "lora_(embedding_)?B": point.point.b, "modules_to_save": head}
    if point.point.magnitude is not None:
        settings["lora_magnitude_vector"] = point.point.magnitude
    return {
        "optimizer_class": f"torch.optim.{point.law.kind}",
        "arguments": {**point.spec.train.settings, **point.law.fixed},
        "groups": {pattern: torch_group(each, decays=decays) for pattern, each in settings.items()},
    }


def _loraplus(point: ExportPoint) -> dict[str, Any]:
    keys = loraplus_keys(point)
    if not keys:
        return {}
    constants = {name: value for name, value in point.point.a.constants.items() if name != "initial_accumulator_value"}
    arguments = {
        "lr": point.point.a.lr,
        **keys,
        "loraplus_weight_decay": point.point.a.weight_decay,
        **point.spec.train.settings,
        **constants,
    }
    return {"optimizer_class": f"torch.optim.{point.law.kind}", "arguments": arguments}
