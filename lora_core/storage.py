"""Where the weights of a pack lie: a row a member, on each device that has target layers or heads.

    suffix  meaning
    K       members of the pack, k one of them
    R       the pack's rank: the largest of its members' ranks r
    P       elements of a member's row in a storage

A row has A of all layers of its device, then B of all of them, then, with DoRA, their magnitudes, then the heads. A
model on one device has one storage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lora_core.base import BaseLayer

# Every factor starts at a multiple of this many elements: 64 bytes at two bytes an element. Kernels pick their code
# path by alignment, and a member must get the same one wherever it stands in a pack.
_ALIGNMENT = 32


Factor = Literal["lora_A", "lora_B", "magnitude", "head"]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one factor of one layer lies in a member's row of the storage: [R, width] elements from `offset` on, or
    [1, width] for magnitudes. `embedding` says whether the layer is one. A parameter of a head has a name and a shape
    of its own."""

    layer: str
    factor: Factor
    width: int
    offset: int
    embedding: bool = False
    parameter: str = ""
    whole: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """`fc1.lora_A`; for an embedding PEFT's `wte.lora_embedding_A`; for a head `classifier.dense.weight`."""
        if self.factor == "head":
            return f"{self.layer}.{self.parameter}"
        factor = self.factor.replace("lora_", "lora_embedding_") if self.embedding else self.factor
        return f"{self.layer}.{factor}"

    @property
    def drawn(self) -> bool:
        """Whether the factor starts from a draw, and so carries the init scale; the other factor starts at 0."""
        return self.factor == ("lora_B" if self.embedding else "lora_A")

    def shape(self, rank: int) -> tuple[int, ...]:
        """[rows, width], with as many rows as the rank, or one for magnitudes; a head's parameter has its own."""
        if self.factor == "head":
            return self.whole
        return (1 if self.factor == "magnitude" else rank), self.width

    def of_member(self, row_P: Tensor, rank: int) -> Tensor:
        """The part that belongs to a member of that rank, as a contiguous view of the slot's shape."""
        shape = self.shape(rank)
        return row_P[self.offset : self.offset + math.prod(shape)].view(shape)

    def of_pack(self, stack_KP: Tensor, rank: int) -> Tensor:
        """The part of all members, [K, ...], as a view."""
        shape = self.shape(rank)
        return stack_KP[:, self.offset : self.offset + math.prod(shape)].view(-1, *shape)


@dataclass(frozen=True, slots=True)
class Storage:
    """The weights of a pack that lie on one device, and their gradients.

    Attributes:
        slots: where each factor of each layer lies; all of A, then all of B, then all magnitudes, then the heads.
        split: where B begins in a row.
        magnitudes: where the magnitudes begin; or what comes after them, without DoRA.
        head_start: where the heads begin; the row's length without any.
        params_KP: the weights.
        grads_KP: their gradients, in the same places.
    """

    slots: tuple[Slot, ...]
    split: int
    magnitudes: int
    head_start: int
    params_KP: Tensor  # noqa: N815
    grads_KP: Tensor  # noqa: N815

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.params_KP.device

    @property
    def clipped_KP(self) -> Tensor:
        """Gradients of A and B, which are clipped."""
        return self.grads_KP[:, : self.magnitudes]

    @property
    def unclipped_KP(self) -> Tensor:
        """Gradients of magnitudes and heads, which are not."""
        return self.grads_KP[:, self.magnitudes :]


def make_storages(
    bases: Mapping[str, BaseLayer],
    heads: Mapping[str, nn.Module],
    *,
    members: int,
    rank: int,
    dora: bool,
    dtype: torch.dtype,
    device: torch.device | None,
) -> tuple[Storage, ...]:
    """Makes a storage of zeros for each device that has target layers or heads, in the order in which they come.

    Args:
        bases: the target layers by name.
        heads: the modules that are trained whole by name.
        members: K.
        rank: R.
        dora: whether there are magnitudes.
        dtype: of the weights.
        device: that all of it is put on; None for each layer's own.

    Raises:
        ValueError: a head with parameters on several devices.
    """
    places = {name: base.weight.device for name, base in bases.items()}
    places |= {name: _device_of(name, head) for name, head in heads.items()}
    made = []
    for place in dict.fromkeys([device] if device is not None else places.values()):
        here = [name for name, each in places.items() if device is not None or each == place]
        slots, (split, magnitudes, head_start, length) = _lay_out(
            {name: bases[name] for name in here if name in bases},
            {name: heads[name] for name in here if name in heads},
            rank,
            dora=dora,
        )
        params_KP = torch.zeros(members, length, dtype=dtype, device=place)
        made.append(Storage(slots, split, magnitudes, head_start, params_KP, torch.zeros_like(params_KP)))
    return tuple(made)


def _device_of(name: str, head: nn.Module) -> torch.device:
    devices = list(dict.fromkeys(parameter.device for parameter in head.parameters()))
    if len(devices) > 1:
        found = ", ".join(map(str, devices))
        raise ValueError(f"a head must be on one device; found {name!r} on {found}: move it to one of them")
    return devices[0]


def _lay_out(
    bases: Mapping[str, BaseLayer], heads: Mapping[str, nn.Module], rank: int, *, dora: bool
) -> tuple[tuple[Slot, ...], tuple[int, int, int, int]]:
    """Returns the slots of a row, and where A, B, the magnitudes and the heads end in it."""
    slots: list[Slot] = []
    ends: list[int] = []
    offset = 0
    for part in _parts(bases, heads, dora=dora):
        for slot in part:
            slots.append(replace(slot, offset=offset))
            offset += math.ceil(math.prod(slot.shape(rank)) / _ALIGNMENT) * _ALIGNMENT
        ends.append(offset)
    end_of_a, end_of_b, end_of_magnitudes, end = ends
    return tuple(slots), (end_of_a, end_of_b, end_of_magnitudes, end)


def _parts(bases: Mapping[str, BaseLayer], heads: Mapping[str, nn.Module], *, dora: bool) -> Iterator[list[Slot]]:
    """The slots of each part of a row, in order; their offsets are still to be found."""
    embeddings = {name for name, base in bases.items() if base.kind == "embedding"}
    yield [Slot(name, "lora_A", base.in_features, 0, name in embeddings) for name, base in bases.items()]
    yield [Slot(name, "lora_B", base.out_features, 0, name in embeddings) for name, base in bases.items()]
    yield [Slot(name, "magnitude", base.out_features, 0) for name, base in bases.items() if dora]
    yield [
        Slot(name, "head", value.numel(), 0, parameter=parameter, whole=tuple(value.shape))
        for name, module in heads.items()
        for parameter, value in module.named_parameters()
    ]
