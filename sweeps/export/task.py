"""What a task's section says that PEFT or a trainer has keys for, and what trainers do with data another way.

A sweep over a language model fixes more of a run than its optimizer: the model, how long samples are and what happens
to longer ones, what is learned of them, and whether they are packed. Each format says that in its own words; data sets
are left to the user, who has them in his trainer's own form.
"""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from sweeps.export.parts import Leftover
from sweeps.export.point import ExportPoint
from sweeps.spec_tasks import DEFAULT_LENGTH, CausalLmTask, ModelTask, Task

_PEFT_TYPES = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}
_EVERY_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def peft_task(task: Task) -> dict[str, Any]:
    """PEFT's keys for the base model, `LoraConfig` has them; empty for a task that transformers has no class for."""
    kind = _PEFT_TYPES.get(task.type)
    if kind is None:
        return {}
    found = {"task_type": kind, "base_model_name_or_path": getattr(task, "model", None)}
    revision = getattr(task, "revision", None)
    return found if revision is None else found | {"revision": revision}


def language_model(point: ExportPoint) -> CausalLmTask | None:
    """The section of a causal language model; None for another task."""
    task = point.spec.task
    return task if isinstance(task, CausalLmTask) else None


def longest(section: ModelTask) -> int:
    """The most tokens of a sample, or of a row of several."""
    return section.max_length or DEFAULT_LENGTH


def attention(section: ModelTask) -> str | None:
    """transformers' name of the attention; None where it is left to transformers."""
    return None if section.attention == "auto" else section.attention


def task_settings(point: ExportPoint) -> dict[str, Any]:
    """The section in the spec's own words but for its data, for files that no trainer reads; empty where there is no
    model of transformers."""
    section = point.spec.task
    if not isinstance(section, ModelTask):
        return {}
    return {"task": section.model_dump(mode="json", exclude={"data", "torch_compile", "group_by_length"})}


def data_leftovers(
    point: ExportPoint,
    trainer: str,
    *,
    overlong: Container[str] = ("truncate",),
    attentions: Container[str] = _EVERY_ATTENTION,
) -> list[Leftover]:
    """What of a model's data a trainer does another way; nothing for a task without a model of transformers.

    Args:
        point: the run.
        trainer: its name, for messages.
        overlong: the words of `too_long` that it can do.
        attentions: the implementations of attention that it has names for.
    """
    section = point.spec.task
    if not isinstance(section, ModelTask):
        return []
    found = []
    packing = isinstance(section, CausalLmTask) and section.packing
    most = longest(section)
    if section.too_long != "refuse" and section.too_long not in overlong:
        did = "left them out" if section.too_long == "drop" else f"kept their first {most:,}"
        text = (
            f"{trainer} shortens samples of more than {most:,} tokens its own way; the sweep {did}: do so in the data"
        )
        found.append(Leftover("too_long", most, True, text))
    if section.max_length is None and (packing or section.too_long != "refuse"):
        text = (
            f"max_length was null: {most:,}, or what the model has positions for if that is less, and then write that"
        )
        found.append(Leftover("max_length", most, True, text))
    if packing:
        text = f"which samples share a row is {trainer}'s own choice: alike in distribution only"
        found.append(Leftover("packing", None, False, text))
    if section.attention != "auto" and section.attention not in attentions:
        text = f"{trainer} has no name for attention {section.attention} and takes its own: the same up to rounding"
        found.append(Leftover("attention", None, False, text))
    found += _base_dropout(section, trainer)
    if point.spec.train.accumulation > 1 and not isinstance(section, CausalLmTask):
        text = (
            "transformers 5's Trainer adds the losses of accumulated batches up, where it takes them for parts of one "
            "mean, as it does for many classifiers; the sweep averaged them: accumulate nothing, or compare the "
            "gradient's norm first"
        )
        found.append(Leftover("accumulation", None, True, text))
    if point.spec.train.accumulation > 1 and isinstance(section, CausalLmTask):
        text = (
            f"the loss of a step is the mean over all its tokens in {trainer}, and was the mean of its batches' means: "
            "batches with more tokens weigh more"
        )
        found.append(Leftover("accumulation", None, True, text))
    return found


def _base_dropout(section: ModelTask, trainer: str) -> list[Leftover]:
    """A trainer puts the model into training mode, and with it the base model's own dropout."""
    rest = f"{trainer} has it on: set it to 0 in the model's config"
    try:
        config = json.loads((Path(section.model) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        text = f"the base model's own dropout, if its config has any, was off in the sweep, and {rest}"
        return [Leftover("base_dropout", None, False, text)]
    names = [name for name, value in config.items() if _drops(name, value)]
    if not names:
        return []
    text = f"the base model's own dropout ({', '.join(names)}) was off in the sweep, and {rest}"
    return [Leftover("base_dropout", 0.0, True, text)]


def _drops(name: str, value: object) -> bool:
    return "drop" in name and isinstance(value, float) and value > 0
