"""The frozen layers that can carry adapters, seen alike.

    suffix  meaning
    I, O    a layer's input and output width; for an embedding I is the number of its rows (the vocabulary)

    kind       module                        its weight  computes                       adapter starts with
    linear     nn.Linear                     [O, I]      x W^T + bias                   A drawn, B = 0
    conv1d     transformers' Conv1D (GPT-2)  [I, O]      x W + bias                     A drawn, B = 0
    embedding  nn.Embedding                  [I, O]      W[ids], x W with one-hot rows  A = 0, B drawn

What an adapter starts with is PEFT's (`tuners/lora/layer.py`, `reset_lora_parameters`). An embedding's factors are
[r, I] and [O, r] as a linear layer's are, so the gauge moves them alike; but it is B that carries the init scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["linear", "conv1d", "embedding"]


@dataclass(frozen=True, slots=True)
class BaseLayer:
    """A frozen layer.

    Attributes:
        module: the layer itself.
        kind: see the table above.
    """

    module: nn.Module
    kind: Kind

    @property
    def weight(self) -> Tensor:
        """Its weight as the module has it."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def weight_OI(self) -> Tensor:
        """Its weight [O, I], as a view."""
        return self.as_OI(self.weight)

    @property
    def bias(self) -> Tensor | None:
        """Its bias [O]."""
        bias = getattr(self.module, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def in_features(self) -> int:
        """I."""
        return self.weight_OI.shape[1]

    @property
    def out_features(self) -> int:
        """O."""
        return self.weight_OI.shape[0]

    def as_OI(self, weight: Tensor) -> Tensor:
        """A weight in the module's own layout as [O, I], or the other way round."""
        return weight if self.kind == "linear" else weight.mT


def base_layer(module: nn.Module) -> BaseLayer | None:
    """Returns the module as a layer that can carry adapters; None if it is none.

    No subclasses: they may compute something else (quantised layers, scaled embeddings), or never be called at all
    (nn.MultiheadAttention reads the weights of its out_proj, so an adapter there would do nothing). transformers'
    Conv1D is known by its name and its shape, because this package does without transformers.
    """
    if type(module) is nn.Linear:
        return BaseLayer(module, "linear")
    if _is_conv1d(module):
        return BaseLayer(module, "conv1d")
    # The others change the table while it is read, or what its gradient is.
    if type(module) is nn.Embedding and not (module.max_norm or module.scale_grad_by_freq or module.sparse):
        return BaseLayer(module, "embedding")
    return None


def linear_layers(model: nn.Module) -> dict[str, BaseLayer]:
    """Returns all layers of a model that multiply by a matrix and can carry adapters, by full name and in its order."""
    found = {name: base_layer(module) for name, module in model.named_modules() if name}
    return {name: layer for name, layer in found.items() if layer is not None and layer.kind != "embedding"}


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype that autocast has layers on a kind of device compute in; None where it is off, or there is none."""
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def layer_widths(model: nn.Module, targets: Mapping[str, BaseLayer]) -> dict[str, tuple[int, int]]:
    """Returns (I, O) of every linear layer and of the target embeddings, in the model's order, as `cost` takes them."""
    layers = {**linear_layers(model), **targets}
    widths = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    return {name: widths[name] for name, _ in model.named_modules() if name in widths}


def _is_conv1d(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if type(module).__name__ != "Conv1D" or not isinstance(weight, Tensor) or weight.dim() != 2:
        return False
    return bool(getattr(module, "nf", None) == weight.shape[1])
