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
                           then, with DoRA, the magnitudes of all layers, then the heads (heads.py)
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_core.base import BaseLayer
from lora_core.dropout import PackDropout
from lora_core.embedding import BankedEmbedding
from lora_core.heads import BankedHead, find_heads
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


class LoraBank:
    """The adapters of a pack, attached to one model. Made by `attach`; also a context manager that detaches.

    Attributes:
        members: the pack, in order.
        rank: R.
        layers: the adapted layers by name.
        dora: whether the members have magnitudes (all of them or none).
        heads: the modules that are trained whole, by name; empty where the members have no settings for them.
        slots: where each factor of each layer lies; all of A, then all of B, then all magnitudes, then the heads.
        split: where B begins in a row of the storage.
        magnitudes: where the magnitudes begin; or what comes after them, without DoRA.
        head_start: where the heads begin; the row's length without any.
        params_KP: storage of the weights.
        grads_KP: storage of the gradients.
    """

    def __init__(
        self,
        members: Sequence[Member],
        bases: dict[str, BaseLayer],
        heads: dict[str, nn.Module],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.members = tuple(members)
        self.rank = max(member.point.rank for member in members)
        self.dora = members[0].point.magnitude is not None
        self.slots, (self.split, self.magnitudes, self.head_start, length) = _lay_out(
            bases, heads, self.rank, dora=self.dora
        )
        self.params_KP = torch.zeros(len(members), length, dtype=dtype, device=device)
        self.grads_KP = torch.zeros_like(self.params_KP)
        self._dropout = PackDropout(members)
        self._bases = dict(bases)
        self.layers = {name: self._banked(name, base) for name, base in bases.items()}
        self.heads = {name: self._banked_head(name, module) for name, module in heads.items()}
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
            heads: modules that are trained whole and so get no adapter, see `find_targets`. Where the members have
                settings for them (`Point.head`) each trains a copy of its own, which starts as the model's; else they
                are frozen like the rest.

        Raises:
            NoTargetError: see `find_targets`.
            RankError: a member's rank exceeds a target layer's width.
            NotPackableError: several members, and a model that cannot be packed, see `check_packable`.
            ValueError: no members, some with DoRA or a head and some without, a dropout that is no probability, target
                layers on different devices, a row of zeros under DoRA, tied weights, settings for a head that the
                model does not have, or an embedding that cannot be adapted faithfully (packable.py).
        """
        bases = find_targets(model, target_modules, heads=heads)
        check_members(members, bases)
        whole = find_heads(model, heads) if members[0].point.head is not None else {}
        check_own_weights(model, bases)
        if len(members) > 1:
            check_packable(model, bases.keys())
        weights = [base.weight for base in bases.values()]
        if device is None and len({weight.device for weight in weights}) > 1:
            raise ValueError("a pack needs all target layers on one device; found them on several")
        if dtype is None:
            dtype = torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32
        bank = cls(members, bases, whole, dtype=dtype, device=torch.device(device or weights[0].device))
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
        `wte.lora_embedding_A` and `wte.lora_embedding_B`, and a head's own parameters, such as `classifier.weight`;
        their `.grad` are views of `grads_KP`."""
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
            slots = self._slots_of(name)
            a_RI, b_RO, *rest = (slot.of_member(self.params_KP[k], rank) for slot in slots)
            merged[name] = layer.merged(a_RI, b_RO, rest[0] if rest else None, scaling)
        return merged

    def merged_weights(self, k: int) -> dict[str, Tensor]:
        """Returns what `merge` does under the names of the model's own parameters, and member k's heads, in the base
        module's dtype."""
        weights = {f"{name}.weight": weight for name, weight in self.merge(k).items()}
        for slot in self.slots:
            if slot.factor == "head":
                value = slot.of_member(self.params_KP[k], self.rank).clone()
                weights[slot.key] = value.to(self.heads[slot.layer].base.get_parameter(slot.parameter).dtype)
        return weights

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

    def _banked_head(self, name: str, module: nn.Module) -> BankedHead:
        slots = self._slots_of(name)
        values, grads = (
            {slot.parameter: slot.of_pack(stack_KP, self.rank) for slot in slots}
            for stack_KP in (self.params_KP, self.grads_KP)
        )
        return BankedHead(module, values, grads)

    def _slots_of(self, layer: str) -> list[Slot]:
        return [slot for slot in self.slots if slot.layer == layer]

    def _factors(self, layer: str, stack_KP: Tensor) -> tuple[Tensor, ...]:
        """The [K, R, I] and [K, R, O] parts of a stack that belong to a layer, and its [K, 1, O] part with DoRA."""
        return tuple(slot.of_pack(stack_KP, self.rank) for slot in self._slots_of(layer))

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
        for head in self.heads.values():
            head.reset()

    def _install(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._undo.append(partial(parameter.requires_grad_, True))
        compiled = getattr(model, "_compiled_call_impl", None) is not None
        replacements: dict[str, BankedLayer | BankedHead] = {**self.layers, **self.heads}
        for name, module in replacements.items():
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            if compiled:  # a model that is compiled goes around what adds to the bank's gradients as a side effect
                vars(module)["forward"] = torch.compiler.disable(module.forward)  # type: ignore[no-untyped-call]
            setattr(owner, child, module)
            self._undo.append(partial(setattr, owner, child, module.base))


def _lay_out(
    bases: dict[str, BaseLayer], heads: dict[str, nn.Module], rank: int, *, dora: bool
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


def _parts(bases: dict[str, BaseLayer], heads: dict[str, nn.Module], *, dora: bool) -> Iterator[list[Slot]]:
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
