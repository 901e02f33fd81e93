"""K LoRA adapters over one frozen model.

    suffix  meaning
    K       members of the pack, k one of them
    R       the pack's rank: the largest of its members' ranks r
    I, O    a layer's input and output width; for an embedding I is the number of its rows
    W       width of a factor: I or O
    L       adapted layers
    M       rows a member brings (batch, or batch x tokens)
    P       elements of a member's row in the storage

    name        shape      meaning
    params_KP   [K, P]     every adapter weight of the pack, a row a member: A of all layers, then B of all layers,
                           then, with DoRA, the magnitudes of all layers
    grads_KP    [K, P]     their gradients, in the same places
    a_KRI       [K, R, I]  view of params_KP: factor A of one layer
    b_KRO       [K, R, O]  view of params_KP: factor B of one layer, transposed, so that [k, :r] is contiguous
    m_KO        [K, O]     view of params_KP: DoRA's magnitudes of one layer (dora.py)

Rows of a_KRI and b_KRO beyond a member's rank are zero; each is the other's only factor in their gradients
(layer.py), so these stay zero too and the padding is exact.

The one row a member is what makes a pack cheap to train: a norm, a clip or an optimizer step is one pass over one
tensor, whatever the number of layers. The price: the bank owns that storage, so the model must be on its device
before the adapters are attached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_core.base import BaseLayer
from lora_core.dropout import PackDropout
from lora_core.embedding import BankedEmbedding
from lora_core.init import Init, Member, initial_a, initial_b
from lora_core.layer import BankedLayer, BankedLinear
from lora_core.packable import NotPackableError, RankError, check_members, check_own_weights, check_packable
from lora_core.targets import NoTargetError, find_targets

__all__ = [
    "BankedEmbedding",
    "BankedLayer",
    "BankedLinear",
    "Init",
    "LoraBank",
    "Member",
    "NoTargetError",
    "NotPackableError",
    "RankError",
    "Slot",
    "find_targets",
]

# Every factor starts at a multiple of this many elements: 64 bytes at two bytes an element. Kernels pick their code
# path by alignment, and a member must get the same one wherever it stands in a pack.
_ALIGNMENT = 32


Factor = Literal["lora_A", "lora_B", "magnitude"]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one factor of one layer lies in a member's row of the storage: [R, width] elements from `offset` on, or
    [1, width] for magnitudes. `embedding` says whether the layer is one."""

    layer: str
    factor: Factor
    width: int
    offset: int
    embedding: bool = False

    @property
    def key(self) -> str:
        """`fc1.lora_A`; for an embedding PEFT's `wte.lora_embedding_A`."""
        factor = self.factor.replace("lora_", "lora_embedding_") if self.embedding else self.factor
        return f"{self.layer}.{factor}"

    @property
    def drawn(self) -> bool:
        """Whether the factor starts from a draw, and so carries the init scale; the other factor starts at 0."""
        return self.factor == ("lora_B" if self.embedding else "lora_A")

    def rows(self, rank: int) -> int:
        """How many rows the factor has at a rank: as many as the rank, one for magnitudes."""
        return 1 if self.factor == "magnitude" else rank

    def of_member(self, row_P: Tensor, rank: int) -> Tensor:
        """The [rows, width] part that belongs to a member of that rank, as a contiguous view."""
        rows = self.rows(rank)
        return row_P[self.offset : self.offset + rows * self.width].view(rows, self.width)

    def of_pack(self, stack_KP: Tensor, rank: int) -> Tensor:
        """The [K, rows, width] part, as a view."""
        rows = self.rows(rank)
        return stack_KP[:, self.offset : self.offset + rows * self.width].view(-1, rows, self.width)


class LoraBank:
    """The adapters of a pack, attached to one model. Made by `attach`; also a context manager that detaches.

    Attributes:
        members: the pack, in order.
        rank: R.
        layers: the adapted layers by name.
        dora: whether the members have magnitudes (all of them or none).
        slots: where each factor of each layer lies; all of A, then all of B, then all magnitudes.
        split: where B begins in a row of the storage.
        magnitudes: where the magnitudes begin; the row's length without DoRA.
        params_KP: storage of the weights.
        grads_KP: storage of the gradients.
    """

    def __init__(
        self, members: Sequence[Member], bases: dict[str, BaseLayer], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.members = tuple(members)
        self.rank = max(member.point.rank for member in members)
        self.dora = members[0].point.magnitude is not None
        self.slots, self.split, self.magnitudes, length = _lay_out(bases, self.rank, dora=self.dora)
        self.params_KP = torch.zeros(len(members), length, dtype=dtype, device=device)
        self.grads_KP = torch.zeros_like(self.params_KP)
        self._dropout = PackDropout(members)
        self._bases = dict(bases)
        self.layers = {name: self._banked(name, base) for name, base in bases.items()}
        self._undo: list[Callable[[], Any]] = []

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        target_modules: Sequence[str] | str,
        members: Sequence[Member],
        *,
        init: Init = "kaiming_uniform",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        heads: Sequence[str] | None = None,
    ) -> LoraBank:
        """Freezes a model and puts a pack of freshly initialised adapters over its target layers.

        Args:
            model: any module; already on its device and in its dtype.
            target_modules: see `find_targets`.
            members: the pack, at least one.
            init: base initialisation of A, as PEFT names it; B starts at zero. An embedding has its own (init.py).
            dtype: of the adapters; by default the layers' own, float32 for half-precision layers (PEFT's choice too).
            device: of the adapters; by default the layers' own.
            heads: modules that are trained whole and so get no adapter, see `find_targets`. They too are frozen here:
                whoever trains them makes them trainable afterwards.

        Raises:
            NoTargetError: see `find_targets`.
            RankError: a member's rank exceeds a target layer's width.
            NotPackableError: several members, and a model that cannot be packed, see `check_packable`.
            ValueError: no members, some with DoRA and some without, a dropout that is no probability, target layers
                on different devices, a row of zeros under DoRA, tied weights, or an embedding that cannot be adapted
                faithfully (packable.py).
        """
        bases = find_targets(model, target_modules, heads=heads)
        check_members(members, bases)
        check_own_weights(model, bases)
        if len(members) > 1:
            check_packable(model, bases.keys())
        weights = [base.weight for base in bases.values()]
        if device is None and len({weight.device for weight in weights}) > 1:
            raise ValueError("a pack needs all target layers on one device; found them on several")
        if dtype is None:
            dtype = torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32
        bank = cls(members, bases, dtype=dtype, device=torch.device(device or weights[0].device))
        bank._initialise(init)
        bank._install(model)
        return bank

    def detach(self) -> None:
        """Gives the model its own layers and `requires_grad` flags back. Doing it twice does no harm."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> LoraBank:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def batch(self) -> int | None:
        """The batch that is being trained on, which decides the dropout masks; None, as it begins, for evaluation,
        which drops nothing. Whoever trains sets it, for the forward and the backward pass of each batch."""
        return self._dropout.batch

    @batch.setter
    def batch(self, batch: int | None) -> None:
        self._dropout.batch = batch

    def zero_grad(self) -> None:
        """Zeroes all gradients, in place."""
        self.grads_KP.zero_()

    def member_tensors(self, k: int) -> dict[str, nn.Parameter]:
        """Views of member k: `fc1.lora_A` [r, I], `fc1.lora_B` [r, O] and with DoRA `fc1.magnitude` [1, O], or
        `wte.lora_embedding_A` and `wte.lora_embedding_B`; their `.grad` are views of `grads_KP`."""
        rank = self.members[k].point.rank
        views: dict[str, nn.Parameter] = {}
        for slot in self.slots:
            view = nn.Parameter(slot.of_member(self.params_KP[k], rank))
            view.grad = slot.of_member(self.grads_KP[k], rank)
            views[slot.key] = view
        return views

    def adapter(self, k: int) -> dict[str, Tensor]:
        """A copy of member k's weights, under the names and shapes of `member_tensors`."""
        return {key: view.detach().clone() for key, view in self.member_tensors(k).items()}

    def load_adapter(self, k: int, tensors: dict[str, Tensor]) -> None:
        """Sets member k's weights from what `adapter` returned, of this bank or another.

        Raises:
            ValueError: the tensors' names or shapes are not this member's.
        """
        views = {key: view.detach() for key, view in self.member_tensors(k).items()}
        expected, found = ({key: tuple(value.shape) for key, value in each.items()} for each in (views, tensors))
        if expected != found:
            raise ValueError(f"member {k} takes adapter tensors {expected}; found {found}")
        for key, view in views.items():
            view.copy_(tensors[key])

    @torch.no_grad()
    def update_norms_KL(self) -> Tensor:
        """Returns the Frobenius norm of s B A, a row a member and a column a layer, in float64; the same under DoRA,
        whose magnitudes it does not look at.

        ||BA||^2 = tr((A A^T) (B^T B)), so two R x R Gram matrices do for an O x I product. A gauge of powers of two
        moves every number here by a power of two, so it leaves the result as it is, bit for bit.
        """
        norms_LK = []
        for layer in self.layers.values():
            a_KRI, b_KRO = layer.a_KRI.double(), layer.b_KRO.double()
            squares_KRR = torch.bmm(a_KRI, a_KRI.mT) * torch.bmm(b_KRO, b_KRO.mT)
            norms_LK.append(squares_KRR.sum(dim=(1, 2)).clamp(min=0).sqrt())
        s_K = torch.tensor([member.point.scaling for member in self.members], dtype=torch.float64)
        return torch.stack(norms_LK, dim=1) * s_K.to(self.params_KP.device)[:, None]

    def merge(self, k: int) -> dict[str, Tensor]:
        """Returns W + s B A for each layer, its rows [O] brought to their magnitudes under DoRA, in the base weight's
        own layout and dtype."""
        merged, scaling, rank = {}, self.members[k].point.scaling, self.members[k].point.rank
        for name, layer in self.layers.items():
            slots = [slot for slot in self.slots if slot.layer == name]
            a_RI, b_RO, *rest = (slot.of_member(self.params_KP[k], rank) for slot in slots)
            merged[name] = layer.merged(a_RI, b_RO, rest[0] if rest else None, scaling)
        return merged

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether a target layer is a Conv1D: PEFT's setting of that name, which its config should have."""
        return any(base.kind == "conv1d" for base in self._bases.values())

    def _banked(self, name: str, base: BaseLayer) -> BankedLayer:
        factors, grads = self._factors(name, self.params_KP), self._factors(name, self.grads_KP)
        s_K = [member.point.scaling for member in self.members]
        if base.kind == "embedding":
            return BankedEmbedding(base, factors, grads, s_K)
        return BankedLinear(base, factors, grads, s_K, partial(self._dropout.mask, name))

    def _factors(self, layer: str, stack_KP: Tensor) -> tuple[Tensor, ...]:
        """The [K, R, I] and [K, R, O] parts of a stack that belong to a layer, and its [K, 1, O] part with DoRA."""
        return tuple(slot.of_pack(stack_KP, self.rank) for slot in self.slots if slot.layer == layer)

    @torch.no_grad()
    def _initialise(self, init: Init) -> None:
        for k, member in enumerate(self.members):
            for slot in self.slots:
                if slot.drawn:
                    compute, place = self.layers[slot.layer].weight.dtype, (member, slot.layer, slot.width)
                    if slot.embedding:
                        value_RW = initial_b(*place, self.params_KP.dtype, compute=compute)
                    else:
                        value_RW = initial_a(init, *place, self.params_KP.dtype, compute=compute)
                    slot.of_member(self.params_KP[k], member.point.rank).copy_(value_RW)
        for layer in self.layers.values():
            if isinstance(layer, BankedLinear) and layer.m_KO is not None:
                layer.m_KO.copy_(layer.row_norms_KO())

    def _install(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._undo.append(partial(parameter.requires_grad_, True))
        for name, layer in self.layers.items():
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, layer)
            self._undo.append(partial(setattr, owner, child, layer.base))


def _lay_out(bases: dict[str, BaseLayer], rank: int, *, dora: bool) -> tuple[tuple[Slot, ...], int, int, int]:
    """Returns the slots of a row, where B and the magnitudes begin in it, and its length."""
    slots: list[Slot] = []
    starts: list[int] = []
    offset = 0
    factors: tuple[Factor, ...] = ("lora_A", "lora_B", "magnitude")
    for factor in factors:
        starts.append(offset)
        if factor == "magnitude" and not dora:
            continue
        for name, base in bases.items():
            width = base.in_features if factor == "lora_A" else base.out_features
            slot = Slot(name, factor, width, offset, base.kind == "embedding")
            slots.append(slot)
            offset += math.ceil(slot.rows(rank) * slot.width / _ALIGNMENT) * _ALIGNMENT
    return tuple(slots), starts[1], starts[2], offset
