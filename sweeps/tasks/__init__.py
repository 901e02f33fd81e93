"""What is trained: a frozen model, data, and what they are measured by.

A task is built from its section of the spec by `load_task`. To add one: a model in the union of `sweeps/spec_tasks.py`,
a file here with a class that follows `Task`, and a line in `load_task`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sweeps.spec import SweepSpec
from sweeps.spec_tasks import CausalLmTask, DigitsTask, ModelTask, PythonTask, SequenceClassificationTask
from sweeps.spec_tasks import Task as Section
from sweeps.tasks.protocol import Task
from sweeps.tasks.spread import bytes_by_gpu, gpus_of

if TYPE_CHECKING:
    from sweeps.tasks.pretrained import Kind

__all__ = ["Task", "base_bytes", "load_task", "most_on_one_gpu", "save_tokenizer", "saved_dtype"]


def base_bytes(spec: SweepSpec) -> int | None:
    """Bytes of a task's base model before it is loaded; None where that is not to be known, and no meta device either.

    Raises:
        TaskError: there is no such model.
    """
    if not isinstance(spec.task, ModelTask):
        return None
    from sweeps.tasks import pretrained

    return pretrained.base_bytes(spec.task, _kind(spec.task), getattr(torch, spec.train.dtype))


def most_on_one_gpu(model: nn.Module, memory_bytes: Sequence[int]) -> int:
    """Bytes of a model of transformers on that GPU which has the most of it, where it is spread over several.

    Args:
        model: loaded, or on the meta device.
        memory_bytes: what each GPU has for weights; not looked at if the model is loaded.

    Raises:
        TaskError: they do not hold it.
    """
    from sweeps.tasks import pretrained

    places = getattr(model, "hf_device_map", None) or pretrained.device_map(model, memory_bytes)
    return max(bytes_by_gpu(model, places).values())


def saved_dtype(section: Section) -> str:
    """The dtype that a task's model was saved in, by torch's name; float32 for a task without a saved model.

    Raises:
        TaskError: there is no such model.
    """
    if not isinstance(section, ModelTask):
        return "float32"
    from sweeps.tasks import pretrained

    return pretrained.saved_dtype(section, _kind(section))


def save_tokenizer(section: ModelTask, directory: Path) -> None:
    """Writes a model's tokenizer beside it, without which nobody could use it.

    Raises:
        TaskError: there is none.
    """
    from sweeps.tasks import pretrained

    pretrained.load_tokenizer(section.model, section.revision).save_pretrained(directory)


def _kind(section: ModelTask) -> Kind:
    from sweeps.tasks import pretrained

    return pretrained.CAUSAL_LM if isinstance(section, CausalLmTask) else pretrained.CLASSIFIER


def load_task(spec: SweepSpec, *, cache: Path, device: torch.device) -> Task:
    """Builds the task of a spec.

    Args:
        spec: the sweep's spec.
        cache: directory for what is costly to make and can be made again.
        device: where the model and the data are put; where that is a GPU, and the spec has several for a worker, the
            model is spread over as many. On `meta` a task that `base_bytes` knows has its model's structure
            and no weights: enough to look at the model, and to count memory.

    Raises:
        TaskError: the model or the data do not have what the spec asks for.
    """
    dtype: torch.dtype = getattr(torch, spec.train.dtype)
    match spec.task:
        case DigitsTask(base_seed=seed):
            from sweeps.tasks.digits import DigitsTask as Digits

            return Digits.load(seed, cache=cache, device=device, dtype=dtype)
        case CausalLmTask() as section:
            from sweeps.tasks.causal_lm import CausalLmTask as CausalLm

            gpus = gpus_of(spec, device)
            return CausalLm.load(section, cache=cache, device=device, dtype=dtype, gpus=gpus)
        case SequenceClassificationTask() as section:
            from sweeps.tasks.sequence_classification import SequenceClassificationTask as Classification

            how = {"seed": spec.train.seed, "gpus": gpus_of(spec, device)}
            return Classification.load(section, cache=cache, device=device, dtype=dtype, **how)
        case PythonTask() as section:
            from sweeps.tasks.entrypoint import load_entrypoint

            return load_entrypoint(section, cache=cache, device=device, dtype=dtype)
