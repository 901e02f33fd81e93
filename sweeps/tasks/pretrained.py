"""Models and tokenizers of Hugging Face transformers, whose only importer this is.

Nothing is ever executed or unpickled: `trust_remote_code` is off, and weights are read from safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sweeps.errors import TaskError
from sweeps.spec_tasks import CausalLmTask, ModelTask
from sweeps.tasks.hub import hub_reachable
from sweeps.tasks.spread import free_bytes

_Made = TypeVar("_Made")

_SMALL = {
    "num_hidden_layers": 1,
    "vocab_size": 8,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "n_inner": 8,
}
"""Of a config, what attention does not depend on."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of model.

    Attributes:
        words: what it is, for messages.
        loader: transformers' class that loads it.
        table: transformers' table of the model types that there are of it.
    """

    words: str
    loader: str
    table: str


CAUSAL_LM = Kind("a causal language model", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
CLASSIFIER = Kind(
    "a model that transformers can put a classification head on",
    "AutoModelForSequenceClassification",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
)


def load_causal_lm(section: CausalLmTask, *, device: torch.device, dtype: torch.dtype, gpus: int = 1) -> nn.Module:
    """Loads a model, frozen and without dropout; on the meta device its structure alone, on several GPUs spread over
    them.

    Raises:
        TaskError: there is none, it cannot be loaded as it is, or it has not what the section asks for.
    """
    config = load_config(section, CAUSAL_LM)
    if device.type == "meta":
        return frozen(outline(section, CAUSAL_LM, config, dtype=dtype), section, device)
    if gpus > 1:
        places = device_map(without_weights(config, CAUSAL_LM, dtype=dtype), free_bytes(gpus))
        return frozen(load_model(section, CAUSAL_LM, dtype=dtype, device_map=places), section, None)
    return frozen(load_model(section, CAUSAL_LM, dtype=dtype), section, device)


def load_config(section: ModelTask, kind: Kind) -> Any:
    """Loads a model's config.

    Raises:
        TaskError: there is none, or the model is of another kind.
    """
    config = _loaded(section.model, partial(_config, section), kind.words)
    if config.model_type not in getattr(_transformers().models.auto.modeling_auto, kind.table):
        raise TaskError("model", kind.words, f"{section.model} is a {config.model_type} model")
    return config


def load_model(section: ModelTask, kind: Kind, *, dtype: torch.dtype | Literal["auto"], **more: Any) -> Any:
    """Loads a model as it is, on the CPU unless told otherwise.

    Args:
        section: which one.
        kind: of which kind.
        dtype: of its weights; auto: as they were saved.
        more: what else transformers is told.

    Raises:
        TaskError: there is none, it cannot be loaded, or its attention does not run here.
    """
    load = getattr(_transformers(), kind.loader).from_pretrained
    how = {"dtype": dtype, "use_safetensors": True, **_source(section.model, section.revision), **more}
    return _attended(section, kind, partial(load, section.model, **how))


def outline(section: ModelTask, kind: Kind, config: Any, *, dtype: torch.dtype) -> Any:
    """A model on the meta device: all of it but its weights, which are only made sure to be there.

    Raises:
        TaskError: no weights, no such model, or its attention does not run here.
    """
    check_weights(section, kind)
    return _attended(section, kind, partial(without_weights, config, kind, dtype=dtype))


def _attended(section: ModelTask, kind: Kind, load: Callable[..., Any]) -> Any:
    """Loads a model with the section's attention."""
    how = {} if section.attention == "auto" else {"attn_implementation": section.attention}
    try:
        return _loaded(section.model, partial(load, **how), f"{kind.words} with weights in safetensors")
    except (ImportError, NotImplementedError) as error:
        raise TaskError("attention", "an attention that runs here", _first_line(error), "leave it at auto") from None


def device_map(model: Any, memory_bytes: Sequence[int]) -> dict[str, int]:
    """Which GPU each part of a model goes on: about as much on each, no layer in two.

    transformers' own `balanced`, from the sizes of the weights alone, so that GPUs alike have about as much left for
    members and activations: all but the last have up to one and a quarter of the largest part more than their share.

    Args:
        model: of transformers; it may be on the meta device.
        memory_bytes: what each GPU has for weights.

    Raises:
        TaskError: they do not hold it.
    """
    from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map

    whole: set[str] = set(model._no_split_modules or ())
    most = get_balanced_memory(model, dict(enumerate(memory_bytes)), whole)
    places = infer_auto_device_map(model, max_memory=most, no_split_module_classes=whole)
    if homeless := [name for name, place in places.items() if not isinstance(place, int)]:
        required = f"a model that {len(memory_bytes)} GPUs hold, each with {min(memory_bytes) / 1e9:.1f} GB for it"
        found = f"one of {total_bytes(model) / 1e9:.1f} GB, with no room for {homeless[0]}"
        raise TaskError("model", required, found, "raise compute.gpus_per_worker, or train in half precision")
    return {name: int(place) for name, place in places.items()}


def frozen(model: nn.Module, section: ModelTask, device: torch.device | None) -> nn.Module:
    """Makes a model frozen and without dropout, its layers checkpointed if the section asks for it.

    Args:
        model: of transformers.
        section: which one.
        device: where it is put; None for one that is where it belongs.

    Raises:
        TaskError: it has no layers that could be checkpointed.
    """
    model = (model if device is None else model.to(device)).requires_grad_(False).eval()
    if section.gradient_checkpointing:
        _checkpoint_layers(model)
    return model


def without_weights(config: Any, kind: Kind, **how: Any) -> Any:
    """The model of a config on the meta device: all of it but values."""
    with torch.device("meta"):
        return getattr(_transformers(), kind.loader).from_config(config, trust_remote_code=False, **how)


def small_causal_lm(section: CausalLmTask) -> nn.Module | None:
    """Returns a model of random weights that is the section's but for its size; None where none can be made so.

    One layer, few tokens and narrow in between: enough to see what its attention does.
    """
    config = load_config(section, CAUSAL_LM)
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


def base_bytes(section: ModelTask, kind: Kind, dtype: torch.dtype) -> int:
    """Bytes that a model's weights take in a dtype, from its config alone.

    Raises:
        TaskError: there is no such model.
    """
    make = partial(without_weights, load_config(section, kind), kind, dtype=dtype)
    model: nn.Module = _loaded(section.model, make, kind.words)
    return total_bytes(model)


def total_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def saved_dtype(section: ModelTask, kind: Kind) -> str:
    """The dtype that a model was saved in, by torch's name: of its config, else of its weights, as transformers'
    `dtype="auto"` has it.

    Raises:
        TaskError: there is none, or it cannot be loaded as it is.
    """
    dtype = getattr(load_config(section, kind), "dtype", None)
    if dtype is None:
        model: nn.Module = load_model(section, kind, dtype="auto")
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return str(dtype).removeprefix("torch.")


def check_weights(section: ModelTask, kind: Kind) -> None:
    """Makes sure that a model's weights are where they would be loaded from, without loading them.

    Raises:
        TaskError: no safetensors, or not all files of them.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, has_file

    name = section.model
    source = _source(name, section.revision)
    where = {"revision": source["revision"], "local_files_only": source["local_files_only"]}
    required = f"{kind.words} with weights in safetensors"

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


def load_tokenizer(name: str, revision: str | None) -> Any:
    """Loads a model's tokenizer.

    Raises:
        TaskError: there is none.
    """
    load = partial(_transformers().AutoTokenizer.from_pretrained, name, **_source(name, revision))
    tokenizer = _loaded(name, load, (required := "a model with its tokenizer beside it"))
    # Where its files are missing, transformers makes some models' tokenizers up: out of special tokens, and a T5's of a
    # space too.
    special = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    if tokenizer.is_fast and len(tokenizer.get_vocab().keys() - special) < 2:
        raise TaskError("model", required, f"no tokenizer in {name}")
    return tokenizer


def most_positions(config: Any, kind: Kind) -> int | None:
    """The longest sample that a model has positions for, as its config says; None where it does not say."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    for name, module in without_weights(config, kind).named_modules():
        # RoBERTa and its kin count positions from behind the padding token.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return positions - int(module.padding_idx) - 1
    return positions


def check_vocabulary(model: nn.Module, token: int) -> None:
    """Checks that a model knows a token, the largest of those that its tokenizer made.

    Raises:
        TaskError: it does not.
    """
    if token >= (known := vocabulary(model)):
        found = f"token {token}, and a model that knows {known}"
        raise TaskError("model", "a tokenizer that is the model's own", found)


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


def _config(section: ModelTask) -> Any:
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


@contextmanager
def silence() -> Iterator[None]:
    """Lets transformers warn of nothing."""
    logging = _transformers().utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _checkpoint_layers(model: nn.Module) -> None:
    # transformers' own switch is on in training mode only, which would switch the base model's dropout on too.
    layers = [module for module in model.modules() if is_layer(module)]
    if not layers:
        required = "a model whose layers transformers can checkpoint"
        raise TaskError("gradient_checkpointing", required, type(model).__name__, "set it to false")
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward)


def is_layer(module: nn.Module) -> bool:
    """Whether it is one of the layers that a transformer is a stack of."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Nothing is drawn in a layer: base dropout is off, and an adapter's is a function of the batch's number.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
