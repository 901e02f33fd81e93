"""A model of transformers that lies on several GPUs of one worker (`compute.gpus_per_worker` above 1).

Each GPU has some of its layers, one after the other (transformers' `device_map`); accelerate's hooks bring activations
from one to the next. So one GPU computes while the others wait: it is for models that one GPU does not hold, and is no
faster than one. A pack's adapters lie beside their layers (lora_core/storage.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sweeps.spec import SweepSpec
from sweeps.spec_tasks import ModelTask

_FOR_WEIGHTS = 0.9
"""The share of a GPU's free memory that weights may take; what is left is for a member and its activations."""


def gpus_of(spec: SweepSpec, device: torch.device) -> int:
    """How many GPUs a spec's model is spread over when it is loaded for a device."""
    share = spec.compute.gpus_per_worker
    if device.type != "cuda" or not isinstance(spec.task, ModelTask) or share == "auto":
        return 1
    return max(1, int(share))


def free_bytes(gpus: int) -> list[int]:
    """What each of the first GPUs here has for a model's weights."""
    return [int(torch.cuda.mem_get_info(gpu)[0] * _FOR_WEIGHTS) for gpu in range(gpus)]


def bytes_by_gpu(model: nn.Module, places: Mapping[str, int]) -> dict[int, int]:
    """Bytes of parameters and buffers on each GPU.

    Args:
        model: it may be on the meta device.
        places: the GPU of each part (`pretrained.device_map`).
    """
    taken = dict.fromkeys(places.values(), 0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        part = max((each for each in places if not each or f"{name}.".startswith(f"{each}.")), key=len, default=None)
        if part is not None:
            taken[places[part]] += tensor.nbytes
    return taken


def device_of_answers(model: nn.Module, end: nn.Module | None) -> torch.device:
    """Where a task puts its batches, and computes its losses.

    That is where the model's last module lies. accelerate brings what a model is given to its first GPU, and its answer
    back to where that came from: so tokens travel, and logits, which are many times larger, stay where they are made.

    Args:
        model: of transformers.
        end: its last module, if it is known.
    """
    weights = model if end is None or not hasattr(model, "hf_device_map") else end
    return next(weights.parameters()).device
