"""What a step of a pack costs in FLOPs: derived, not measured. Bytes are counted, in memory.py.

    symbol  meaning
    K       members of the pack
    R       the pack's rank (its largest; smaller ones are padded to it)
    M       rows a member brings to a layer: batch, or batch x tokens
    I, O    a layer's input and output width; for an adapted embedding I is the number of its rows

FLOPs of one step of one layer, a multiply-add counted as two:

    base, forward                     2 K M I O
    base, backward to the input       2 K M I O      where anything before the layer is trained
    base, backward to the weight      0              it is frozen
    adapter, forward                  2 K M R (I + O)
    adapter, backward to A and B      2 K M R (I + O)
    adapter, backward to h = x A^T    2 K M R O
    adapter, backward to the input    2 K M R I      where anything before the layer is trained

An adapted embedding looks its rows up: it has the parts with O alone, 2 K M R O three times.

Assumptions, each on the safe side or small unless said otherwise:

- Layers run in the order given, each once a step. Only linear layers are counted: no attention scores, norms,
  activation functions, embeddings or loss (so real steps take more FLOPs than this).
- DoRA's row norms take 2 K R I O FLOPs more, and DoRA with LoRA dropout takes the base's forward product twice;
  neither is counted.

Pure arithmetic: no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A linear layer, or an adapted embedding, as cost sees it.

    Attributes:
        d_in: I.
        d_out: O.
        adapted: whether it carries adapters.
        input_trained: whether its input depends on anything trained, so that the backward pass must reach it.
        lookup: whether it is an embedding.
    """

    d_in: int
    d_out: int
    adapted: bool
    input_trained: bool
    lookup: bool = False

    @property
    def multiplied_in(self) -> int:
        """Width of the input that it multiplies."""
        return 0 if self.lookup else self.d_in


def layer_shapes(
    widths: Mapping[str, tuple[int, int]], targets: Collection[str], lookups: Collection[str] = ()
) -> tuple[LayerShape, ...]:
    """Returns the layers of a model in order.

    Args:
        widths: (d_in, d_out) of every linear layer and adapted embedding by name, in the order in which they run.
        targets: names of the adapted ones.
        lookups: names of the embeddings among them.

    Raises:
        ValueError: a target is no layer.
    """
    if unknown := sorted(set(targets) - set(widths)):
        raise ValueError(f"targets must be among the layers {', '.join(widths)}; found {', '.join(unknown)}")
    shapes, trained = [], False
    for name, (d_in, d_out) in widths.items():
        shapes.append(LayerShape(d_in, d_out, name in targets, trained, name in lookups))
        trained = trained or name in targets
    return tuple(shapes)


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of one step of a pack, the base model's and the adapters' apart."""

    base: int
    adapters: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.base + self.adapters

    @property
    def base_fraction(self) -> float:
        """The most that (time of the bare frozen base) / (time of the packed step) can reach at equal FLOPs a
        second."""
        return self.base / self.total


def step_flops(layers: Sequence[LayerShape], *, members: int, rank: int, rows: int) -> StepFlops:
    """FLOPs of one training step.

    Args:
        layers: the model.
        members: K.
        rank: R.
        rows: M.
    """
    base = adapters = 0
    for layer in layers:
        passes = 2 if layer.input_trained else 1
        base += passes * 2 * members * rows * layer.multiplied_in * layer.d_out
        if layer.adapted:
            to_input = layer.multiplied_in if layer.input_trained else 0
            adapters += 2 * members * rows * rank * (2 * (layer.multiplied_in + layer.d_out) + layer.d_out + to_input)
    return StepFlops(base, adapters)
