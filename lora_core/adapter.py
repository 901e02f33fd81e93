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
    params_KP   [K, P]     every adapter weight of the pack on one device, a row a member (storage.py)
    grads_KP    [K, P]     their gradients, in the same places
    a_KRI       [K, R, I]  view of params_KP: factor A of one layer
    b_KRO       [K, R, O]  view of params_KP: factor B of one layer, transposed, so that [k, :r] is contiguous
    m_KO        [K, O]     view of params_KP: DoRA's magnitudes of one layer (dora.py)

Rows of a_KRI and b_KRO beyond a member's rank are zero; each is the other's only factor in their gradients
(layer.py), so these stay zero too and the padding is exact.

The one row a member is what makes a pack cheap to train: a norm, a clip or an optimizer step is one pass over one
tensor, whatever the number of layers. The price: the bank owns that storage, so the model must be on its device
before the adapters are attached. A model that lies on several devices has a storage on each, with what belongs to the
layers there; a layer brings its input to its own device, so activations may come from another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.base import BaseLayer
from lora_core.dropout import PackDropout
from lora_core.embedding import BankedEmbedding
from lora_core.heads import BankedHead, find_heads
from lora_core.init import Init, Member, initial_a, initial_b
from lora_core.layer import BankedLayer, BankedLinear
from lora_core.packable import NotPackableError, RankError, check_members, check_own_weights, check_packable
from lora_core.storage import Slot, Storage, make_storages
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


class LoraBank:
    """The adapters of a pack, attached to one model. Made by `attach`; also a context manager that detaches.

    Attributes:
        members: the pack, in order.
        rank: R.
        layers: the adapted layers by name.
        dora: whether the members have magnitudes (all of them or none).
        heads: the modules that are trained whole, by name; empty where the members have no settings for them.
        storages: of the weights and their gradients, one a device.
        slots: where each factor of each layer lies in its storage.
    """

    def __init__(
        self,
        members: Sequence[Member],
        bases: dict[str, BaseLayer],
        heads: dict[str, nn.Module],
        *,
        dtype: torch.dtype,
        device: torch.device | None,
    ) -> None:
        self.members = tuple(members)
        self.rank = max(member.point.rank for member in members)
        self.dora = members[0].point.magnitude is not None
        self.storages = make_storages(
            bases, heads, members=len(members), rank=self.rank, dora=self.dora, dtype=dtype, device=device
        )
        self.slots = tuple(slot for storage in self.storages for slot in storage.slots)
        self._storage_of = {slot.layer: storage for storage in self.storages for slot in storage.slots}
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
            ValueError: no members, some with DoRA or a head and some without, a dropout that is no probability, a head
                on several devices, a row of zeros under DoRA, tied weights, settings for a head that the model does
                not have, or an embedding that cannot be adapted faithfully (packable.py).
        """
        bases = find_targets(model, target_modules, heads=heads)
        check_members(members, bases)
        whole = find_heads(model, heads) if members[0].point.head is not None else {}
        check_own_weights(model, bases)
        if len(members) > 1:
            check_packable(model, bases.keys())
        weights = [base.weight for base in bases.values()]
        if dtype is None:
            dtype = torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32
        bank = cls(members, bases, whole, dtype=dtype, device=None if device is None else torch.device(device))
        bank._initialise(init)
        bank._install(model)
        return bank

    @property
    def params_KP(self) -> Tensor:
        """Storage of the weights, of a bank that has one."""
        return self._one_storage.params_KP

    @property
    def grads_KP(self) -> Tensor:
        """Storage of the gradients, of a bank that has one."""
        return self._one_storage.grads_KP

    @property
    def split(self) -> int:
        """Where B begins in a row of the storage, of a bank that has one."""
        return self._one_storage.split

    @property
    def magnitudes(self) -> int:
        """Where the magnitudes begin; or what comes after them, without DoRA. Of a bank that has one storage."""
        return self._one_storage.magnitudes

    @property
    def head_start(self) -> int:
        """Where the heads begin; the row's length without any. Of a bank that has one storage."""
        return self._one_storage.head_start

    @property
    def _one_storage(self) -> Storage:
        if len(self.storages) > 1:
            devices = ", ".join(str(storage.device) for storage in self.storages)
            raise ValueError(f"only a bank on one device has one storage; found {devices}: look at its `storages`")
        return self.storages[0]

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
        for storage in self.storages:
            storage.grads_KP.zero_()

    def member_tensors(self, k: int) -> dict[str, nn.Parameter]:
        """Views of member k: `fc1.lora_A` [r, I], `fc1.lora_B` [r, O] and with DoRA `fc1.magnitude` [1, O], or
        `wte.lora_embedding_A` and `wte.lora_embedding_B`, and a head's own parameters, such as `classifier.weight`;
        their `.grad` are views of the storages' gradients."""
        rank = self.members[k].point.rank
        views: dict[str, nn.Parameter] = {}
        for storage in self.storages:
            for slot in storage.slots:
                view = nn.Parameter(slot.of_member(storage.params_KP[k], rank))
                view.grad = slot.of_member(storage.grads_KP[k], rank)
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
        """Returns the Frobenius norm of s B A, a row a member and a column a layer, in float64, on the first storage's
        device; the same under DoRA, whose magnitudes it does not look at.

        ||BA||^2 = tr((A A^T) (B^T B)), so two R x R Gram matrices do for an O x I product. A gauge of powers of two
        moves every number here by a power of two, so it leaves the result as it is, bit for bit.
        """
        norms_LK = []
        for layer in self.layers.values():
            a_KRI, b_KRO = layer.a_KRI.double(), layer.b_KRO.double()
            squares_KRR = torch.bmm(a_KRI, a_KRI.mT) * torch.bmm(b_KRO, b_KRO.mT)
            norms_LK.append(squares_KRR.sum(dim=(1, 2)).clamp(min=0).sqrt().to(self.storages[0].device))
        s_K = torch.tensor([member.point.scaling for member in self.members], dtype=torch.float64)
        return torch.stack(norms_LK, dim=1) * s_K.to(self.storages[0].device)[:, None]

    def merge(self, k: int) -> dict[str, Tensor]:
        """Returns W + s B A for each layer, its rows [O] brought to their magnitudes under DoRA, in the base weight's
        own layout and dtype."""
        merged, scaling, rank = {}, self.members[k].point.scaling, self.members[k].point.rank
        for name, layer in self.layers.items():
            params_P = self._storage_of[name].params_KP[k]
            a_RI, b_RO, *rest = (slot.of_member(params_P, rank) for slot in self._slots_of(name))
            merged[name] = layer.merged(a_RI, b_RO, rest[0] if rest else None, scaling)
        return merged

    def merged_weights(self, k: int) -> dict[str, Tensor]:
        """Returns what `merge` does under the names of the model's own parameters, and member k's heads, in the base
        module's dtype."""
        weights = {f"{name}.weight": weight for name, weight in self.merge(k).items()}
        for slot in self.slots:
            if slot.factor == "head":
                value = slot.of_member(self._storage_of[slot.layer].params_KP[k], self.rank).clone()
                weights[slot.key] = value.to(self.heads[slot.layer].base.get_parameter(slot.parameter).dtype)
        return weights

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether a target layer is a Conv1D: PEFT's setting of that name, which its config should have."""
        return any(base.kind == "conv1d" for base in self._bases.values())

    def _banked(self, name: str, base: BaseLayer) -> BankedLayer:
        storage = self._storage_of[name]
        factors, grads = self._factors(name, storage.params_KP), self._factors(name, storage.grads_KP)
        s_K = [member.point.scaling for member in self.members]
        if base.kind == "embedding":
            return BankedEmbedding(base, factors, grads, s_K)
        return BankedLinear(base, factors, grads, s_K, partial(self._dropout.mask, name))

    def _banked_head(self, name: str, module: nn.Module) -> BankedHead:
        slots, storage = self._slots_of(name), self._storage_of[name]
        values, grads = (
            {slot.parameter: slot.of_pack(stack_KP, self.rank) for slot in slots}
            for stack_KP in (storage.params_KP, storage.grads_KP)
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
                    params_KP = self._storage_of[slot.layer].params_KP
                    compute, place = self.layers[slot.layer].weight.dtype, (member, slot.layer, slot.width)
                    if slot.embedding:
                        value_RW = initial_b(*place, params_KP.dtype, compute=compute)
                    else:
                        value_RW = initial_a(init, *place, params_KP.dtype, compute=compute)
                    slot.of_member(params_KP[k], member.point.rank).copy_(value_RW)
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
