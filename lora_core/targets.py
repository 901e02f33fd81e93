"""Which layers of a model get an adapter, named as PEFT names them.

A transformers model is known by what it has (`get_output_embeddings`, `config`) and by its class's name: this package
does without transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from lora_core.base import BaseLayer, base_layer, linear_layers

ALL_LINEAR = "all-linear"
"""PEFT's word for all linear layers but the output."""

_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
_HEADS = ("classifier", "score")

# Their fused kernels read these weights past the layer (PEFT's list, `_check_lora_target_modules_mamba`).
_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_NEVER_CALLED_IN_MAMBA = {"out_proj", "conv1d"}


class NoTargetError(ValueError):
    """Target modules that name no layer which can carry an adapter; the message lists those that can."""


def find_targets(
    model: nn.Module, target_modules: Sequence[str] | str, *, heads: Sequence[str] | None = None
) -> dict[str, BaseLayer]:
    """Returns the target layers by full name, in the model's order.

    Args:
        model: where to look.
        target_modules: PEFT's: in a list, each name matches a module's full name or its end after a dot; a single
            string is a regular expression matched against the whole name, and `all-linear` is every linear layer but
            the output embeddings.
        heads: PEFT's `modules_to_save`: neither these modules nor what is in them gets an adapter, because they are
            trained whole. By default those that PEFT takes for the model (`heads_of`).

    Raises:
        NoTargetError: nothing matches, a name of the list matches nothing, or a match cannot carry an adapter.
    """
    heads = heads_of(model) if heads is None else heads
    names = [name for name, _ in model.named_modules() if name and not _is_in(name, heads)]
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        matched = _match_all_linear(model, names)
    elif isinstance(target_modules, str):
        matched = _match_pattern(model, names, target_modules)
    else:
        matched = _match_list(model, names, target_modules)
    targets: dict[str, BaseLayer] = {}
    for name in names:
        if name not in matched:
            continue
        module = model.get_submodule(name)
        layer = base_layer(module)
        if layer is None:
            kind = type(module).__name__
            raise NoTargetError(
                f"target modules must be plain nn.Linear, Conv1D or nn.Embedding layers; {name!r} is a {kind}; "
                f"{_valid_names(model)}"
            )
        _check_called(model, name)
        targets[name] = layer
    return targets


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the modules that PEFT trains whole beside the adapter: a classification model's head.

    As PEFT does for the task types SEQ_CLS and TOKEN_CLS, which here the name of the model's class tells.
    """
    return _HEADS if type(model).__name__.endswith(_CLASSIFIERS) else ()


def _is_in(name: str, heads: Sequence[str]) -> bool:
    return any(re.match(rf"(^|.*\.){re.escape(head)}($|\..*)", name) for head in heads)


def _match_all_linear(model: nn.Module, names: list[str]) -> set[str]:
    # Subclasses too, as PEFT matches them: one that cannot carry an adapter is an error and not passed over.
    kinds = set(linear_layers(model))
    matched = {name for name in names if name in kinds or isinstance(model.get_submodule(name), nn.Linear)}
    find_output = getattr(model, "get_output_embeddings", None)
    output = find_output() if callable(find_output) else None
    matched -= {name for name in matched if output is not None and model.get_submodule(name) is output}
    if not matched:
        raise NoTargetError(f"{ALL_LINEAR} takes every linear layer but the output; found none; {_valid_names(model)}")
    return matched


def _match_pattern(model: nn.Module, names: list[str], pattern: str) -> set[str]:
    try:
        matched = {name for name in names if re.fullmatch(pattern, name)}
    except re.error as error:
        raise NoTargetError(
            f"target_modules must be a list of names or a regular expression; {pattern!r}: {error}"
        ) from None
    if not matched:
        raise NoTargetError(f"the regular expression {pattern!r} matches no module's full name; {_valid_names(model)}")
    return matched


def _match_list(model: nn.Module, names: list[str], targets: Sequence[str]) -> set[str]:
    found = {target: {name for name in names if name == target or name.endswith(f".{target}")} for target in targets}
    missing = [target for target in targets if not found[target]]
    if missing or not found:
        what = f"no module is called {', '.join(map(repr, missing))}" if missing else "target_modules is empty"
        raise NoTargetError(f"{what}; {_valid_names(model)}")
    return set().union(*found.values())


def _check_called(model: nn.Module, name: str) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _MAMBA and name.rpartition(".")[2] in _NEVER_CALLED_IN_MAMBA:
        raise NoTargetError(
            f"an adapter works only on a layer that is called; {name!r} of a {kind} model is not, its weight is read "
            "directly: leave it out of target_modules"
        )


def _valid_names(model: nn.Module) -> str:
    return f"the linear layers are {', '.join(linear_layers(model)) or 'none'}"
