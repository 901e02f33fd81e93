"""Which layers of a model get an adapter, named as PEFT names them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn


class NoTargetError(ValueError):
    """Target modules that name no layer which can carry an adapter; the message lists those that can."""


def find_targets(model: nn.Module, target_modules: Sequence[str] | str) -> dict[str, nn.Linear]:
    """Returns the target layers by full name, in the model's order.

    Args:
        model: where to look.
        target_modules: PEFT's: in a list, each name matches a module's full name or its end after a dot; a single
            string is a regular expression matched against the whole name.

    Raises:
        NoTargetError: nothing matches, a name of the list matches nothing, or a match is no `nn.Linear`.
    """
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(target_modules, str):
        matched = _match_pattern(model, names, target_modules)
    else:
        matched = _match_list(model, names, target_modules)
    targets: dict[str, nn.Linear] = {}
    for name in names:
        if name not in matched:
            continue
        module = model.get_submodule(name)
        if not _carries_adapter(module):
            kind = type(module).__name__
            raise NoTargetError(
                f"target modules must be plain nn.Linear layers; {name!r} is a {kind}; {_valid_names(model)}"
            )
        assert isinstance(module, nn.Linear)
        targets[name] = module
    return targets


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


def _carries_adapter(module: nn.Module) -> bool:
    # No subclasses: they may compute something else than x W^T + bias (quantised layers), or never be called at all
    # (nn.MultiheadAttention reads the weights of its out_proj, so an adapter there would do nothing).
    return type(module) is nn.Linear


def _valid_names(model: nn.Module) -> str:
    linear = [name for name, module in model.named_modules() if name and _carries_adapter(module)]
    return f"the linear layers are {', '.join(linear) or 'none'}"
