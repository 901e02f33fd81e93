"""Models and tokenizers of Hugging Face transformers, whose only importer this is.

Nothing is ever executed or unpickled: `trust_remote_code` is off, and weights are read from safetensors. On the meta
device a model is made from its config alone: its weights must be there, and are not read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sweeps.errors import TaskError
from sweeps.spec_tasks import CausalLmTask
from sweeps.tasks.hub import hub_reachable

_Made = TypeVar("_Made")

_SMALL = {
    "num_hidden_layers": 1,
    "vocab_size": 8,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "n_inner": 8,
}
"""Of a config, what attention does not depend on."""


def load_causal_lm(section: CausalLmTask, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Loads a model, frozen and without dropout; on the meta device its structure alone.

    Raises:
        TaskError: there is none, it cannot be loaded as it is, or it has not what the section asks for.
    """
    how = {} if section.attention == "auto" else {"attn_implementation": section.attention}
    config = _causal_lm_config(section)
    if device.type == "meta":
        check_weights(section.model, section.revision)
        load = partial(_from_config, config, dtype=dtype, **how)
    else:
        load = partial(
            _transformers().AutoModelForCausalLM.from_pretrained,
            section.model,
            dtype=dtype,
            use_safetensors=True,
            **_source(section.model, section.revision),
            **how,
        )
    try:
        model: nn.Module = _loaded(section.model, load, "a causal language model with weights in safetensors")
    except (ImportError, NotImplementedError) as error:
        raise TaskError("attention", "an attention that runs here", _first_line(error), "leave it at auto") from None
    model = model.to(device).requires_grad_(False).eval()
    if section.gradient_checkpointing:
        _checkpoint_layers(model)
    return model


def small_causal_lm(section: CausalLmTask) -> nn.Module | None:
    """Returns a model of random weights that is the section's but for its size; None where none can be made so.

    One layer, few tokens and narrow in between: enough to see what its attention does.
    """
    config = _causal_lm_config(section)
    text = config.get_text_config()
    for name, size in _SMALL.items():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, size)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, 0)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    how = {} if section.attention == "auto" else {"attn_implementation": section.attention}
    make = _transformers().AutoModelForCausalLM.from_config
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = make(config, trust_remote_code=False, **how)
    # Every architecture has its own demands on its config, and its own ways to say so.
    except Exception:
        return None
    return model.requires_grad_(False).eval()


def base_bytes(section: CausalLmTask, dtype: torch.dtype) -> int:
    """Bytes that a model's weights take in a dtype, from its config alone.

    Raises:
        TaskError: see `load_causal_lm`.
    """
    make = partial(_from_config, _causal_lm_config(section), dtype=dtype)
    model: nn.Module = _loaded(section.model, make, "a causal language model")
    return sum(parameter.nbytes for parameter in model.parameters())


def check_weights(name: str, revision: str | None) -> None:
    """Makes sure that a model's weights are where they would be loaded from, without loading them.

    Raises:
        TaskError: no safetensors, or not all files of them.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, has_file

    source = _source(name, revision)
    where = {"revision": source["revision"], "local_files_only": source["local_files_only"]}
    required = "a causal language model with weights in safetensors"

    def missing() -> list[str]:
        if has_file(name, SAFE_WEIGHTS_NAME, **where):
            return []
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **where)
        if index is None:
            return [SAFE_WEIGHTS_NAME]
        files = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        return [file for file in files if not has_file(name, file, **where)]

    if lacking := _loaded(name, missing, required):
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise TaskError("model", required, f"no {lacking[0]}{more} in {name}")


def _causal_lm_config(section: CausalLmTask) -> Any:
    config = _loaded(section.model, partial(_config, section), "a causal language model")
    known = _transformers().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.model_type not in known:
        raise TaskError("model", "a causal language model", f"{section.model} is a {config.model_type} model")
    return config


def _from_config(config: Any, **how: Any) -> Any:
    with torch.device("meta"):
        return _transformers().AutoModelForCausalLM.from_config(config, trust_remote_code=False, **how)


def load_tokenizer(name: str, revision: str | None) -> Any:
    """Loads a model's tokenizer.

    Raises:
        TaskError: there is none.
    """
    load = partial(_transformers().AutoTokenizer.from_pretrained, name, **_source(name, revision))
    return _loaded(name, load, "a model with its tokenizer beside it")


def most_positions(section: CausalLmTask) -> int | None:
    """The longest sample that a model has positions for, as its config says; None where it does not say."""
    config = _loaded(section.model, partial(_config, section), "a causal language model")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


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
    return _transformers().AutoConfig.from_pretrained(section.model, **_source(section.model, section.revision))


def _source(name: str, revision: str | None) -> dict[str, Any]:
    """Where `from_pretrained` looks: not on a hub that does not answer, which it would ask for half a minute."""
    cached_only = not Path(name).is_absolute() and not hub_reachable()
    return {"revision": revision or "main", "trust_remote_code": False, "local_files_only": cached_only}


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
