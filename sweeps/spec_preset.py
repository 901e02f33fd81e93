"""A preset in a spec: a published recipe for the hyperparameters that the spec does not write.

    preset: roberta-base-nlu, parameters: {lr: 1e-3}
        -> parameters: {lr: 1e-3, rank: 8, alpha: 16, weight_decay: 0.1}, lora: {...}, train: {...}

It is filled in before pydantic reads the sections, so that they may be incomplete and so that a spec that was read and
written out again stays what it is: everything then is written, and what is written wins. What depends on the length of
the training (steps, batch size, warm-up) is never filled in: the recipe's would be of its own data.
"""

from __future__ import annotations

from typing import Any

from lora_core.laws import LAWS
from lora_core.presets import PRESETS, Preset


def filled(raw: Any) -> Any:
    """Returns a spec as it was written with its preset filled in; anything that is no spec as it is."""
    if not isinstance(raw, dict) or raw.get("preset") is None:
        return raw
    name = raw["preset"]
    # A wrong name is one fault, and so what it would have filled in must not be missing as well.
    recipe = PRESETS[name if isinstance(name, str) and name in PRESETS else next(iter(PRESETS))]
    sections = {section: _completed(raw.get(section, {}), own) for section, own in _sections(raw, recipe).items()}
    return {**raw, **sections}


def _completed(written: Any, own: dict[str, Any]) -> Any:
    """What is no mapping is refused where the section is read."""
    return {**own, **written} if isinstance(written, dict) else written


def _sections(raw: dict[str, Any], recipe: Preset) -> dict[str, dict[str, Any]]:
    train: dict[str, Any] = {
        "optimizer": recipe.optimizer,
        "betas": recipe.betas,
        "eps": recipe.eps,
        "clip_norm": recipe.clip_norm,
        "schedule": recipe.schedule,
    }
    parameters: dict[str, Any] = {
        "rank": recipe.rank,
        "alpha": recipe.alpha,
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
    }
    law = LAWS[_optimizer(raw.get("train")) or recipe.optimizer]
    # Another optimizer is given only what it has, else it would be told of what its user never wrote.
    for name in ("betas", "eps"):
        if name not in law.options and name not in law.absolute:
            del train[name]
    if law.decay is None:
        del parameters["weight_decay"]
    lora: dict[str, Any] = {"target_modules": recipe.target_modules, "dropout": recipe.dropout}
    return {"lora": lora, "parameters": parameters, "train": train}


def _optimizer(train: Any) -> str | None:
    """The optimizer that is written, where there is one by that name."""
    name = train.get("optimizer") if isinstance(train, dict) else None
    return name if isinstance(name, str) and name in LAWS else None


FILLED = frozenset(
    (section, key) for recipe in PRESETS.values() for section, own in _sections({}, recipe).items() for key in own
)
"""Section and key of everything that a preset can fill in."""
