"""Models and tokenizers of Hugging Face transformers, whose only importer this is.

Nothing is ever executed or unpickled: `trust_remote_code` is off, and weights are read from safetensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sweeps.errors import TaskError
from sweeps.spec_tasks import CausalLmTask

_Made = TypeVar("_Made")


def load_causal_lm(section: CausalLmTask, *, device: torch.device, dtype: torch.dtype | Literal["auto"]) -> nn.Module:
    """Loads a model, frozen and without dropout.

    Raises:
        TaskError: there is none, it cannot be loaded as it is, or it has not what the section asks for.
    """
    transformers = _transformers()
    how = {} if section.attention == "auto" else {"attn_implementation": section.attention}
    load = partial(
        transformers.AutoModelForCausalLM.from_pretrained,
        section.model,
        revision=section.revision or "main",
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        **how,
    )
    config = _loaded(section.model, partial(_config, section), "a causal language model")
    if config.model_type not in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise TaskError("model", "a causal language model", f"{section.model} is a {config.model_type} model")
    try:
        model: nn.Module = _loaded(section.model, load, "a causal language model with weights in safetensors")
    except (ImportError, NotImplementedError) as error:
        raise TaskError("attention", "an attention that runs here", _first_line(error), "leave it at auto") from None
    model = model.to(device).requires_grad_(False).eval()
    if section.gradient_checkpointing:
        _checkpoint_layers(model)
    return model


def load_tokenizer(name: str, revision: str | None) -> Any:
    """Loads a model's tokenizer.

    Raises:
        TaskError: there is none.
    """
    load = partial(
        _transformers().AutoTokenizer.from_pretrained, name, revision=revision or "main", trust_remote_code=False
    )
    return _loaded(name, load, "a model with its tokenizer beside it")


def most_positions(section: CausalLmTask) -> int | None:
    """The longest sample that a model has positions for, as its config says; None where it does not say."""
    config = _loaded(section.model, partial(_config, section), "a causal language model")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def saved_dtype(section: CausalLmTask) -> str:
    """The dtype that a model was saved in, by torch's name: of its config, else of its weights, as transformers'
    `dtype="auto"` has it.

    Raises:
        TaskError: there is none, or it cannot be loaded as it is.
    """
    config = _loaded(section.model, partial(_config, section), "a causal language model")
    dtype = getattr(config, "dtype", None)
    if dtype is None:
        model = load_causal_lm(section, device=torch.device("cpu"), dtype="auto")
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return str(dtype).removeprefix("torch.")


def vocabulary(model: nn.Module) -> int:
    """How many tokens a model knows."""
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    weight = embeddings.weight
    assert isinstance(weight, Tensor)
    return len(weight)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        way_out = "pip install 'lora-sweeps[hf]'"
        raise TaskError("type", "the package transformers", "it is not installed", way_out) from None
    return transformers


def _config(section: CausalLmTask) -> Any:
    load = _transformers().AutoConfig.from_pretrained
    return load(section.model, revision=section.revision or "main", trust_remote_code=False)


def _loaded(name: str, load: Callable[[], _Made], required: str) -> _Made:
    path = Path(name)
    if path.is_absolute() and not os.path.isdir(name):
        raise TaskError("model", "a model's directory, or its id on the Hugging Face hub", f"no directory {name}")
    if path.is_absolute() and not (path / "config.json").is_file():
        raise TaskError("model", "a model's directory", f"no config.json in {name}")
    try:
        with _without_progress_bars():
            return load()
    except (ImportError, NotImplementedError):
        raise
    # Hub, config, weights and tokenizer raise OSError, ValueError, KeyError and kinds of their own; that a model cannot
    # be had is what all of them say.
    except Exception as error:
        way_out = None if path.is_absolute() else "download it where there is a network, or name a directory"
        raise TaskError("model", required, f"{name}: {_first_line(error)}", way_out) from None


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    logging = _transformers().utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _checkpoint_layers(model: nn.Module) -> None:
    # transformers' own switch is on in training mode only, which would switch the base model's dropout on too.
    layers = [module for module in model.modules() if _is_layer(module)]
    if not layers:
        required = "a model whose layers transformers can checkpoint"
        raise TaskError("gradient_checkpointing", required, type(model).__name__, "set it to false")
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward)


def _is_layer(module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Nothing is drawn in a layer: base dropout is off, and an adapter's is a function of the batch's number.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
