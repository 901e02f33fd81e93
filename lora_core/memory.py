"""What one more member of a pack takes: the bytes that live at once while it trains, counted, not derived.

    name        meaning
    fixed       its adapter's weights and their gradients, a row each of the bank's storage
    optimizer   its optimizer's state: whole tensors of the size of its weights
    training    the most that lives at once in a forward and a backward pass beside the base model, `fixed` included
    evaluation  the same in a forward pass without a graph

Every tensor that an operator hands out is counted from its making until its storage is freed, views once. So the loss
over a vocabulary, attention, and whatever a model does between its layers are in it; what a kernel takes inside of
itself is not. The numbers are the same on every device: on the meta device nothing is computed and nothing allocated,
and a model that no memory here could hold is measured in a second.

Two things a meta tensor would do otherwise than a tensor with values, and does here as that would:

- attention by `scaled_dot_product_attention` is a fused kernel's, which keeps no scores;
- what reads a value to decide by it is told 0 and False. transformers asks whether no samples are packed: a mask that
  might not be needed is counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_core.adapter import LoraBank


@dataclass(frozen=True, slots=True)
class MemberBytes:
    """Bytes that one more member adds to a pack; see the table above."""

    fixed: int
    optimizer: int
    training: int
    evaluation: int

    @property
    def total(self) -> int:
        """The most that it takes at once."""
        return max(self.training, self.evaluation) + self.optimizer


def measure_member(
    bank: LoraBank, losses_K: Callable[[], Tensor], *, optimizer_states: int, most_rows: int, widest: bool
) -> MemberBytes:
    """Trains one member on one batch, evaluates it on the same, and counts.

    Args:
        bank: of one member, of the pack's largest rank; on several devices all of them are counted together. The
            frozen model's own parameters and buffers are not counted; it may be on the meta device.
        losses_K: of one batch [1], with the graph to the member's weights.
        optimizer_states: tensors of a weight's size that the optimizer keeps for it (`OptimizerLaw.states_with`).
        most_rows: rows that a member brings to a layer at most, in training or in evaluation; what was counted for
            fewer is scaled up.
        widest: whether no batch of training brings more rows than this one.

    Raises:
        NotImplementedError, RuntimeError: on the meta device, a model that looks at values.
    """
    weights = sum(storage.params_KP.nbytes for storage in bank.storages)
    fixed = 2 * weights  # and as many gradients
    rows = _Rows(bank)

    def train() -> None:
        bank.batch = 0
        losses_K().sum().backward()  # type: ignore[no-untyped-call]
        bank.batch = None

    def evaluate() -> None:
        with torch.no_grad():
            losses_K()

    training = peak_bytes(train)
    evaluation = peak_bytes(evaluate)
    scale = max(1.0, most_rows / max(1, rows.close()))
    return MemberBytes(
        fixed=fixed,
        optimizer=optimizer_states * weights,
        training=fixed + round(training * (1.0 if widest else scale)),
        evaluation=fixed + round(evaluation * scale),
    )


def pack_limit(memory_bytes: int, *, base_bytes: int, member: MemberBytes, reserve: float = 0.1) -> int:
    """Returns how many members fit in memory; 0 where not even one does.

    Args:
        memory_bytes: what the device has.
        base_bytes: weights and buffers of the base model.
        member: what each member adds.
        reserve: share of the memory left alone, for an allocator loses some to its own doings.

    Raises:
        ValueError: a reserve outside [0, 1).
    """
    if not 0 <= reserve < 1:
        raise ValueError(f"reserve must be a share of the memory, from 0 to below 1; found {reserve!r}")
    free = int(memory_bytes * (1 - reserve)) - base_bytes
    return max(0, free // member.total)


def base_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def peak_bytes(work: Callable[[], object]) -> int:
    """Does some work and returns the most bytes that lived at once of what was made in it."""
    live = _LiveBytes()
    with _fused_on_meta(), _AnsweringOnMeta(), live:
        work()
    return live.peak


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that are made while it is on, from their making until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._now = 0
        self._alive: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor, given)
        return out

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        # A view, or what was written to in place, was there before.
        if storage._cdata in self._alive or storage._cdata in given:
            return
        size = storage.nbytes()
        self._alive[storage._cdata] = weakref.finalize(storage, self._free, storage._cdata, size)
        self._now += size
        self.peak = max(self.peak, self._now)

    def _free(self, storage: int, size: int) -> None:
        del self._alive[storage]
        self._now -= size


_ANSWERS = {Tensor.item: 0, Tensor.__int__: 0, Tensor.__float__: 0.0, Tensor.__bool__: False}


class _AnsweringOnMeta(TorchFunctionMode):
    """Answers what is read of meta tensors, which have no values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _ANSWERS and args[0].is_meta:
            return _ANSWERS[func]
        return func(*args, **(kwargs or {}))


@contextmanager
def _fused_on_meta() -> Iterator[None]:
    """Has attention done by a fused kernel on meta tensors too, for as long as the context lasts."""
    # Replaced by name: a function mode is off in a backward pass, where layers may be computed again.
    usual = functional.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (_fused_attention if query.is_meta else usual)(query, *args, **kwargs)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # the kernel sees for itself
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)  # kernels take one that is added
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out


class _Rows:
    """Sees the most rows that come to a layer of a bank."""

    def __init__(self, bank: LoraBank) -> None:
        self._most = 0
        self._hooks = [layer.register_forward_pre_hook(self._see) for layer in bank.layers.values()]

    def close(self) -> int:
        """Stops, and returns them."""
        for hook in self._hooks:
            hook.remove()
        return self._most

    def _see(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        self._most = max(self._most, x.numel() // (x.shape[-1] if x.is_floating_point() else 1))
