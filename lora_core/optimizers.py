"""Stock torch.optim for the members of a pack, and a clip that is exact a member.

    suffix  meaning
    K       members of the pack, k one of them
    P       elements of a member's row in the bank's storage
    R       a member's rank
    I, O    a layer's input and output width

An optimizer that works element by element need not know where one layer ends and the next begins: each member's row
goes to torch.optim as one tensor, its padding with gradient 0, or as several, where A, B, DoRA's magnitudes and heads
have settings of their own. One that works on whole matrices (Muon) gets each layer's A [R, I] and B [O, R], as a stock
trainer would give them. Each tensor has a parameter group of its own, and so each group one device: what a bank has
on several devices is as many stretches, each beside its weights.

The clip is min(1, clip / norm) with nothing added to the norm: torch.nn.utils adds 1e-6, an absolute constant that no
gauge scales, so it would break the law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_core.adapter import LoraBank, Slot
from lora_core.gauge import FactorSettings, Point
from lora_core.laws import Kernel, law_of
from lora_core.storage import Storage


class OptimizerKind(Protocol):
    """What a `PackOptimizer` must know of an optimizer: `OptimizerConfig`'s, or one that the table does not have."""

    @property
    def matrices(self) -> bool:
        """Whether it works on whole matrices; else element by element."""

    @property
    def constants_at_construction(self) -> frozenset[str]:
        """Constants that it reads when it is made, so that members who differ in them need one each."""

    def group(self, settings: FactorSettings) -> dict[str, Any]:
        """What a parameter group holds of a factor's settings; ValueError where it does not take them."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Makes the optimizer with as many parameter groups, in this order; each of these has one parameter."""


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """The kind of optimizer: what all members of a pack share.

    Attributes:
        name: one of `laws.LAWS`.
        options: settings that no gauge moves, by torch's keyword; those left out have torch's defaults.
        kernel: None takes the fused one where torch has it, else torch's own choice.

    Raises:
        NoLawError: the name has no law.
        ValueError: options that this optimizer does not have or take.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    kernel: Kernel | None = None

    def __post_init__(self) -> None:
        law = law_of(self.name)
        law.settings(self.options)
        kernels = law.kernels
        if self.kernel is not None and self.kernel not in kernels:
            raise ValueError(f"{self.name} has the kernels {', '.join(kernels)}; found {self.kernel!r}")

    @property
    def matrices(self) -> bool:
        """Whether it works on whole matrices; else element by element."""
        return law_of(self.name).matrices

    @property
    def constants_at_construction(self) -> frozenset[str]:
        """Constants that torch reads when the optimizer is made, so that members who differ in them need one each."""
        return frozenset(name for name, constant in law_of(self.name).absolute.items() if constant.at_construction)

    def group(self, settings: FactorSettings) -> dict[str, Any]:
        """What a parameter group holds of a factor's settings.

        Raises:
            ValueError: one of the optimizer's constants is missing, or it has no weight decay and one is asked for.
        """
        law = law_of(self.name)
        if missing := law.absolute.keys() - settings.constants.keys():
            raise ValueError(
                f"{self.name} needs the constants {', '.join(law.absolute)}; found no {', '.join(missing)}"
            )
        group: dict[str, Any] = {"lr": settings.lr} | {name: settings.constants[name] for name in law.absolute}
        if law.decay is not None:
            group["weight_decay"] = settings.weight_decay
        elif settings.weight_decay:
            raise ValueError(
                f"{self.name} has no weight decay; found weight_decay={settings.weight_decay!r}: set it to 0"
            )
        return group

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Makes the torch optimizer.

        Raises:
            ValueError: options with which torch is wrong in the weights' number format.
        """
        law, settings = law_of(self.name), law_of(self.name).settings(self.options)
        half = groups[0]["params"][0].dtype.itemsize < 4
        if half:
            law.check_half_precision(settings)
        if half and self.kernel == "fused" and law.fused == "exact":
            raise ValueError(f"torch's fused {law.kind} is wrong in half precision: use another kernel")
        kernel = self.kernel or ("fused" if law.fused is True or (law.fused and not half) else None)
        how: dict[str, Any] = {"fused": True} if kernel == "fused" else {}
        if kernel in ("foreach", "loop") and not law.matrices:  # matrices are always taken one by one
            how = {"foreach": kernel == "foreach"} | ({"fused": False} if law.fused else {})
        at_construction = {name: groups[0][name] for name in self.constants_at_construction}
        make: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, law.kind)
        return make(groups, **settings, **law.fixed, **at_construction, **how)


@dataclass(slots=True)
class _Part:
    """What one parameter group holds: weights of member k that share their settings.

    Attributes:
        k: the member.
        param: a view of its weights: a stretch of its row, or one matrix.
        slots: the factors in it.
        start: where in the row the stretch begins; None for a matrix.
        group: its parameter group.
    """

    k: int
    param: nn.Parameter
    slots: tuple[Slot, ...]
    start: int | None
    group: dict[str, Any]

    def cut(self, like_param: Tensor, slot: Slot, rank: int) -> Tensor:
        """The part of a tensor of the parameter's shape that belongs to a slot, [r, width], as a view."""
        if self.start is None:
            return like_param.mT if slot.factor == "lora_B" else like_param
        return replace(slot, offset=slot.offset - self.start).of_member(like_param, rank)


class PackOptimizer:
    """Stock optimizers over the members of a bank, each with its own settings, clip and life.

    Attributes:
        bank: what it trains.
        config: the kind of optimizer.
    """

    def __init__(self, bank: LoraBank, config: OptimizerKind) -> None:
        """Takes every member's settings from its point.

        Raises:
            ValueError: a clip norm that is not positive, or settings that the optimizer does not have or take.
        """
        self.bank = bank
        self.config = config
        self._frozen: set[int] = set()
        self._parts = [
            _Part(k, param, slots, start, config.group(settings) | {"params": [param]})
            for k, param, slots, start, settings in _views(bank, matrices=config.matrices)
        ]
        self._lrs = [part.group["lr"] for part in self._parts]
        self._optimizer_of = _build(config, self._parts)
        self._optimizers = list({id(each): each for each in self._optimizer_of}.values())
        self._clip_K = _clip_norms(bank)

    @property
    def frozen(self) -> frozenset[int]:
        """The members that take no more steps."""
        return frozenset(self._frozen)

    def freeze(self, k: int) -> None:
        """Member k takes no more steps; its weights and optimizer state stay as they are."""
        self._frozen.add(k)
        for part in self._parts:
            if part.k == k:
                part.param.grad = None  # torch.optim passes over what has no gradient

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Clips each member's gradient to its own norm and returns the norms before that, [K], on the device of the
        bank's first storage.

        The norm is over A and B of all layers on all devices, and not over DoRA's magnitudes or heads, whose gradients
        no gauge moves. A norm of zero is left alone.
        """
        norms_K = norms_of_rows([storage.clipped_KP for storage in self.bank.storages])
        if self._clip_K is not None:
            # clip / 0 is infinite and so becomes 1.
            factors_K1 = (self._clip_K / norms_K).clamp(max=1.0)[:, None]
            for storage in self.bank.storages:
                storage.clipped_KP.mul_(factors_K1.to(storage.device))
        return norms_K

    @torch.no_grad()
    def norms_outside_clip(self) -> Tensor:
        """Returns the norms of what `clip` leaves alone, magnitudes and heads, [K], on the same device."""
        return norms_of_rows([storage.unclipped_KP for storage in self.bank.storages])

    def step(self, lr_factor: float) -> None:
        """One step of every member that is not frozen, with lr_factor times its learning rates."""
        for part, lr in zip(self._parts, self._lrs, strict=True):
            part.group["lr"] = lr * lr_factor
        for optimizer in self._optimizers:
            optimizer.step()

    def state(self, k: int) -> dict[str, Tensor]:
        """Returns a copy of member k's optimizer state, cut by layer: `fc1.lora_A/exp_avg` [r, I], `fc1.lora_A/step`
        [].

        Whatever tensors torch.optim keeps are in it, so it does not depend on the optimizer. Empty before the first
        step, but for optimizers that begin with one (Adagrad).
        """
        rank, tensors = self.bank.members[k].point.rank, {}
        for part, optimizer in self._parts_of(k):
            for entry, value in optimizer.state.get(part.param, {}).items():
                if not isinstance(value, Tensor):
                    continue
                for slot in part.slots:
                    piece = part.cut(value, slot, rank) if value.shape == part.param.shape else value
                    tensors[f"{slot.key}/{entry}"] = piece.detach().clone(memory_format=torch.contiguous_format)
        return tensors

    def load_state(self, k: int, tensors: dict[str, Tensor]) -> None:
        """Sets member k's optimizer state from what `state` returned, of this pack or another.

        Raises:
            ValueError: the tensors' names or shapes are not this member's.
        """
        rank = self.bank.members[k].point.rank
        known = {slot.key for slot in self.bank.slots}
        if unknown := sorted({key.rpartition("/")[0] for key in tensors} - known):
            raise ValueError(f"optimizer state must be of {', '.join(sorted(known))}; found {', '.join(unknown)}")
        for part, optimizer in self._parts_of(k):
            entries = {key.rpartition("/")[2] for key in tensors if key.rpartition("/")[0] == part.slots[0].key}
            state = {entry: _assemble(entry, part, rank, tensors) for entry in sorted(entries)}
            optimizer.state.pop(part.param, None)
            if state:
                optimizer.state[part.param] = state

    def _parts_of(self, k: int) -> Iterator[tuple[_Part, torch.optim.Optimizer]]:
        return (pair for pair in zip(self._parts, self._optimizer_of, strict=True) if pair[0].k == k)


_View = tuple[int, nn.Parameter, tuple[Slot, ...], int | None, FactorSettings]


def _views(bank: LoraBank, *, matrices: bool) -> Iterator[_View]:
    """Member, parameter, slots, start and settings of each parameter group.

    Raises:
        ValueError: magnitudes or heads under an optimizer that takes matrices only.
    """
    if matrices and bank.dora:
        raise ValueError(
            "this optimizer takes matrices, and DoRA's magnitudes are vectors; found both: use another one"
        )
    if matrices and bank.heads:
        raise ValueError(
            f"this optimizer takes matrices, and the head {next(iter(bank.heads))!r} has vectors; found both: use "
            "another one"
        )
    for k, member in enumerate(bank.members):
        for storage in bank.storages:
            yield from (_matrices if matrices else _stretches)(storage, k, member.point)


def _stretches(storage: Storage, k: int, point: Point) -> Iterator[_View]:
    """A and B together where their settings are the same, else apart; magnitudes and heads always apart."""
    ends = (0, storage.split, storage.magnitudes, storage.head_start, storage.params_KP.shape[1])
    stretches: list[tuple[int, int, tuple[str, ...], FactorSettings]]
    if point.a == point.b:
        stretches = [(ends[0], ends[2], ("lora_A", "lora_B"), point.a)]
    else:
        stretches = [(ends[0], ends[1], ("lora_A",), point.a), (ends[1], ends[2], ("lora_B",), point.b)]
    if point.magnitude is not None:
        stretches.append((ends[2], ends[3], ("magnitude",), point.magnitude))
    if point.head is not None:
        stretches.append((ends[3], ends[4], ("head",), point.head))
    for start, stop, factors, settings in stretches:
        slots = tuple(slot for slot in storage.slots if slot.factor in factors)
        if slots:  # a device may have a head alone, or layers alone
            param = _parameter(storage.params_KP[k, start:stop], storage.grads_KP[k, start:stop])
            yield k, param, slots, start, settings


def _matrices(storage: Storage, k: int, point: Point) -> Iterator[_View]:
    for slot in storage.slots:
        weight, grad = (slot.of_member(stack_KP[k], point.rank) for stack_KP in (storage.params_KP, storage.grads_KP))
        if slot.factor == "lora_B":  # stored as [R, O]; the rest of the world has [O, R], and Muon sees the difference
            weight, grad = weight.mT, grad.mT
        yield k, _parameter(weight, grad), (slot,), None, point.a if slot.factor == "lora_A" else point.b


def _parameter(weight: Tensor, grad: Tensor) -> nn.Parameter:
    param = nn.Parameter(weight)
    param.grad = grad
    return param


def _build(config: OptimizerKind, parts: Iterable[_Part]) -> list[torch.optim.Optimizer]:
    """The optimizer of each part: the same one, but where constants differ that torch reads at construction."""
    alike: dict[tuple[Any, ...], list[_Part]] = {}
    for part in parts:
        alike.setdefault(tuple(part.group[name] for name in sorted(config.constants_at_construction)), []).append(part)
    made: dict[int, torch.optim.Optimizer] = {}
    for members in alike.values():
        optimizer = config.build([part.group for part in members])
        made |= {id(part): optimizer for part in members}
        for part, group in zip(members, optimizer.param_groups, strict=True):
            part.group = group
    return [made[id(part)] for part in parts]


def _clip_norms(bank: LoraBank) -> Tensor | None:
    """Each member's clip norm [K], infinite for none; None where no member clips."""
    norms = [math.inf if member.point.clip_norm is None else member.point.clip_norm for member in bank.members]
    for k, norm in enumerate(norms):
        if not norm > 0:
            raise ValueError(f"clip_norm must be positive; found {norm!r} for member {k}: use null for no clipping")
    if all(math.isinf(norm) for norm in norms):
        return None
    grads_KP = bank.storages[0].grads_KP
    return torch.tensor(norms, dtype=grads_KP.dtype, device=grads_KP.device)


def norms_of_rows(parts: Sequence[Tensor]) -> Tensor:
    """The norms of members' rows, each of which is in one part a device, on the first one's device."""
    norms: list[Tensor] = [torch.linalg.vector_norm(part_KP, dim=1) for part_KP in parts]
    if len(norms) == 1:
        return norms[0]
    # Put together in the parts' order whichever device is done first, so that a run repeats itself.
    whole_K: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), dim=0)
    return whole_K


def _assemble(entry: str, part: _Part, rank: int, tensors: dict[str, Tensor]) -> Tensor:
    first = tensors[f"{part.slots[0].key}/{entry}"]
    if first.dim() == 0:  # a step count: fused optimizers want it beside the weights, in its own dtype
        return first.detach().clone().to(part.param.device)
    whole = torch.zeros_like(part.param, requires_grad=False)
    for slot in part.slots:
        piece, place = tensors.get(f"{slot.key}/{entry}"), part.cut(whole, slot, rank)
        if piece is None or piece.shape != place.shape:
            found = "nothing" if piece is None else tuple(piece.shape)
            raise ValueError(f"optimizer state {slot.key}/{entry} must have shape {tuple(place.shape)}; found {found}")
        place.copy_(piece)
    return whole
