"""Models of Hugging Face transformers with a classification head: classes, padding, and what the head is.

A checkpoint that was fine-tuned for the same number of classes keeps its head. Any other head is drawn, from a seed and
in float32, so that it is the same in every worker and whatever the model computes in. The head is to be trained beside
the adapter; whatever else a checkpoint lacks would stay as it was drawn and be in no file that a sweep writes, so it
must be part of the head too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.heads import find_heads, is_called
from lora_core.targets import heads_of
from sweeps.errors import TaskError
from sweeps.spec_tasks import SequenceClassificationTask as Section
from sweeps.tasks.pretrained import (
    CLASSIFIER,
    device_map,
    frozen,
    is_layer,
    load_model,
    outline,
    silence,
    without_weights,
)
from sweeps.tasks.spread import free_bytes


def own_classes(config: Any) -> tuple[str, ...] | None:
    """The classes that a checkpoint was fine-tuned for, in the order of their ids; None if it was not."""
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return None
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def set_up(config: Any, names: Collection[str], tokenizer: Any) -> int:
    """Tells a config its classes, and the padding token if it has none; returns that token.

    A model that reads the class off the last token finds it as the last one that is no padding, by its config.

    Raises:
        TaskError: neither the model nor its tokenizer have a token that could be padding.
    """
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "single_label_classification"
    text = config.get_text_config()
    candidates = (text.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    known = getattr(text, "vocab_size", math.inf)
    padding = next((token for token in candidates if isinstance(token, int) and 0 <= token < known), None)
    if padding is None:
        found = f"a {type(tokenizer).__name__} with neither that the model knows"
        raise TaskError("model", "a tokenizer with a padding token, or an end-of-sequence token in its place", found)
    text.pad_token_id = padding
    return padding


def load_classifier(
    section: Section, config: Any, *, device: torch.device, dtype: torch.dtype, seed: int, gpus: int = 1
) -> tuple[nn.Module, tuple[str, ...]]:
    """Loads a model with a head for the classes of its config, frozen and without dropout; on the meta device its
    structure alone.

    Args:
        section: which one.
        config: its own, set up for the classes.
        device: where it is put.
        dtype: what it computes in.
        seed: decides what of the head the checkpoint does not have.
        gpus: how many it is spread over.

    Returns:
        The model, and the full names of the modules that are its head.

    Raises:
        TaskError: it cannot be had, it has no such head, or its checkpoint lacks more than the head.
    """
    if device.type == "meta":
        bare: nn.Module = outline(section, CLASSIFIER, config, dtype=dtype)
        return frozen(bare, section, device), _heads(bare, section, ())
    # transformers draws what is missing from the global generator, and drawing it anew needs that too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        more: dict[str, Any] = {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
        if gpus > 1:
            more["device_map"] = device_map(without_weights(config, CLASSIFIER, dtype=dtype), free_bytes(gpus))
        with silence():  # what it would warn of is looked at here
            model, info = load_model(section, CLASSIFIER, dtype=dtype, **more)
        # Of another size than the checkpoint's, which is a head for other classes, or not in it at all.
        absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        heads = _heads(model, section, absent)
        _check_whole(model, heads, absent)
        torch.default_generator.manual_seed(seed)
        for name in heads:
            _draw(model, name, absent)
    return frozen(model, section, None if gpus > 1 else device), heads


def _heads(model: nn.Module, section: Section, absent: Iterable[str]) -> tuple[str, ...]:
    try:
        return tuple(find_heads(model, section.head))
    except ValueError as error:
        wanted = section.head or heads_of(model)
        unknown = [head for head in wanted if not any(is_called(name, head) for name, _ in model.named_modules())]
        if section.head and not unknown:
            raise TaskError("head", "modules with weights of their own", str(error)) from None
        required = "names of the model's modules" if section.head else f"a module called {' or '.join(wanted)}"
        what = f"no {', '.join(unknown)} in" if section.head else "none in"
        drawn = ", ".join(_parts(model, absent)) or "nothing: name the module that its classes come from"
        way_out = f"the checkpoint lacks {drawn}" if section.head else f"write task.head: [{drawn}]"
        raise TaskError("head", required, f"{what} a {type(model).__name__}", way_out) from None


def _check_whole(model: nn.Module, heads: Collection[str], absent: Iterable[str]) -> None:
    rest = [key for key in absent if not any(key.startswith(f"{head}.") for head in heads)]
    if not rest:
        return
    parts = _parts(model, rest)
    if any(is_layer(module) for part in parts for module in model.get_submodule(part).modules()):
        found = f"a checkpoint without {len(rest):,} of them, {min(rest)} among them"
        raise TaskError("model", f"all weights of a {type(model).__name__} but its head", found)
    names = [part.rpartition(".")[2] for part in (*parts, *heads)]
    found = f"a checkpoint without {', '.join(parts)}, which would stay as they are drawn"
    required = "names of all modules that the checkpoint does not have"
    raise TaskError("head", required, found, f"write task.head: [{', '.join(names)}]")


def _parts(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """The parts of a model, or of the model in it, that weights belong to."""
    base = f"{getattr(model, 'base_model_prefix', '')}."
    parts: dict[str, None] = {}
    for key in sorted(keys):
        inner = base if key.startswith(base) else ""
        parts[inner + key.removeprefix(inner).partition(".")[0]] = None
    return list(parts)


def _draw(model: Any, name: str, absent: Collection[str]) -> None:
    """Draws the weights of a module that the checkpoint does not have, as the model's own rule says."""
    head = model.get_submodule(name)
    fresh = deepcopy(head).float().cpu()  # wherever it is: a GPU would draw from a generator of its own
    for parameter in fresh.parameters():
        vars(parameter).pop("_is_hf_initialized", None)  # by which transformers leaves out what it has initialised
    for module in fresh.modules():
        model._init_weights(module)
    drawn: dict[str, Tensor] = fresh.state_dict()
    for key, weight in head.state_dict().items():
        if f"{name}.{key}" in absent:
            weight.copy_(drawn[key])
