"""What a pack costs: FLOPs of a step, bytes of memory, and how many members fit. Derived, not measured.

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

An adapted embedding looks its rows up: it has the parts with O alone, 2 K M R O three times, and keeps no input. Its
gradient is summed over the tokens in a table of its own, R I elements, before it is added.

Assumptions, each on the safe side or small unless said otherwise:

- Layers run in the order given, each once a step. Only linear layers are counted: no attention scores, norms,
  activation functions, embeddings or loss (so real steps take more FLOPs than this).
- DoRA keeps one more output of each adapted layer, and its row norms take 2 K R I O FLOPs more; LoRA dropout keeps a
  mask of one byte an element; both together take the base's forward product twice. `step_flops` counts none of these.
- An adapted layer keeps its input for the backward pass, its own copy (layers that share an input, such as q, k and
  v, share that copy in truth). What follows a layer keeps that layer's output once; where it is fused or recomputed
  it keeps less.
- Beside what is kept, the widest layer needs two more tensors of its width at a time.
- An allocator loses a share of the memory to its own doings: `reserve`.

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
    def kept_in(self) -> int:
        """Width of the input that it keeps."""
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
        base += passes * 2 * members * rows * layer.kept_in * layer.d_out
        if layer.adapted:
            to_input = layer.kept_in if layer.input_trained else 0
            adapters += 2 * members * rows * rank * (2 * (layer.kept_in + layer.d_out) + layer.d_out + to_input)
    return StepFlops(base, adapters)


@dataclass(frozen=True, slots=True)
class MemberBytes:
    """Bytes that one more member adds to a pack.

    Attributes:
        weights: of its adapters.
        gradients: of its adapters.
        optimizer: its optimizer state.
        activations: kept by one forward pass for the backward pass.
        transient: at the widest layer and at an adapted embedding, beside what is kept.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    transient: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.transient


def member_bytes(
    layers: Sequence[LayerShape],
    *,
    rank: int,
    rows: int,
    optimizer_states: int,
    adapter_itemsize: int = 4,
    activation_itemsize: int = 4,
    dora: bool = False,
    dropout: bool = False,
) -> MemberBytes:
    """Bytes that one more member of rank R with M rows adds.

    Args:
        layers: the model.
        rank: R.
        rows: M.
        optimizer_states: tensors of a weight's size that the optimizer keeps for it (`OptimizerLaw.states_with`).
        adapter_itemsize: bytes of an adapter weight, and of what the adapters' own path keeps.
        activation_itemsize: bytes of an activation of the base model.
        dora: whether it has magnitudes.
        dropout: whether its inputs are dropped.
    """
    adapted = [layer for layer in layers if layer.adapted]
    d_in, kept_in, d_out = (sum(getattr(layer, side) for layer in adapted) for side in ("d_in", "kept_in", "d_out"))
    weights = (rank * (d_in + d_out) + dora * d_out) * adapter_itemsize
    kept_by_adapters = (kept_in + rank * len(adapted) + dora * d_out) * adapter_itemsize + dropout * kept_in
    kept_by_base = sum(layer.d_out for layer in layers) * activation_itemsize
    widest = max(max(layer.kept_in, layer.d_out) for layer in layers)
    table = max((layer.d_in for layer in adapted if layer.lookup), default=0)
    return MemberBytes(
        weights=weights,
        gradients=weights,
        optimizer=optimizer_states * weights,
        activations=rows * (kept_by_adapters + kept_by_base),
        transient=2 * rows * widest * activation_itemsize + table * rank * adapter_itemsize,
    )


def pack_bytes(base_bytes: int, member: MemberBytes, members: int) -> int:
    """Bytes of a whole pack: one frozen base model, without gradients or optimizer state, and K members."""
    return base_bytes + members * member.total


def pack_limit(memory_bytes: int, *, base_bytes: int, member: MemberBytes, reserve: float = 0.1) -> int:
    """Returns how many members fit in memory; 0 where not even one does.

    Args:
        memory_bytes: what the device has.
        base_bytes: weights and buffers of the base model.
        member: what each member adds.
        reserve: share of the memory left alone.

    Raises:
        ValueError: a reserve outside [0, 1).
    """
    if not 0 <= reserve < 1:
        raise ValueError(f"reserve must be a share of the memory, from 0 to below 1; found {reserve!r}")
    free = int(memory_bytes * (1 - reserve)) - base_bytes
    return max(0, free // member.total)
