"""Stock torch.optim for the members of a pack, and a clip that is exact a member.

    suffix  meaning
    K       members of the pack, k one of them
    P       elements of a member's row in the bank's storage

The optimizers here work element by element, so they need not know where one layer ends and the next begins: each
member's row goes to torch.optim as one tensor (two, A and B, where their settings differ), one parameter group each.
Its padding has gradient 0 and stays 0.

The clip is min(1, clip / norm) with nothing added to the norm: torch.nn.utils adds 1e-6, an absolute constant that no
gauge scales, so it would break the law.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_core import gauge
from lora_core.adapter import LoraBank, Slot


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """The kind of optimizer: what all members of a pack share.

    Attributes:
        name: one of `gauge.LAWS`.
        betas: decay rates of Adam's and AdamW's moments.
        momentum: of SGD.

    Raises:
        NoLawError: the name has no law.
        ValueError: momentum for an optimizer that has none.
    """

    name: str
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0

    def __post_init__(self) -> None:
        gauge.law_of(self.name)
        if self.momentum and self.name != "sgd":
            raise ValueError(f"momentum belongs to sgd; found momentum={self.momentum!r} for {self.name}: use betas")


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of member k's row that shares its settings: what one parameter group holds."""

    k: int
    param: nn.Parameter
    start: int
    slots: tuple[Slot, ...]


class PackOptimizer:
    """One stock optimizer over the members of a bank, each with its own settings, clip and life.

    Attributes:
        bank: what it trains.
        config: the kind of optimizer.
    """

    def __init__(self, bank: LoraBank, config: OptimizerConfig) -> None:
        """Takes every member's settings from its point.

        Raises:
            ValueError: a clip norm that is not positive, or settings that torch.optim refuses.
        """
        self.bank = bank
        self.config = config
        self._frozen: set[int] = set()
        has_eps = gauge.law_of(config.name).has_eps
        self._parts: list[_Part] = []
        groups: list[dict[str, object]] = []
        for part, settings in _parts(bank):
            self._parts.append(part)
            group = {"params": [part.param], "lr": settings.lr, "weight_decay": settings.weight_decay}
            groups.append(group | ({"eps": settings.eps} if has_eps else {}))
        self._lrs = [float(str(group["lr"])) for group in groups]
        self._optimizer = _build(config, groups)
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
        """Clips each member's gradient to its own norm and returns the norms before that, [K], on the bank's device.

        The norm is over all of a member's adapter weights. A norm of zero is left alone.
        """
        norms_K: Tensor = torch.linalg.vector_norm(self.bank.grads_KP, dim=1)
        if self._clip_K is not None:
            # clip / 0 is infinite and so becomes 1.
            self.bank.grads_KP.mul_((self._clip_K / norms_K).clamp(max=1.0)[:, None])
        return norms_K

    def step(self, lr_factor: float) -> None:
        """One step of every member that is not frozen, with lr_factor times its learning rates."""
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * lr_factor
        self._optimizer.step()

    def state(self, k: int) -> dict[str, Tensor]:
        """Returns a copy of member k's optimizer state, cut by layer: `fc1.lora_A/exp_avg` [r, I], `fc1.lora_A/step`
        [].

        Whatever tensors torch.optim keeps are in it, so it does not depend on the optimizer. Empty before the first
        step.
        """
        rank, tensors = self.bank.members[k].point.rank, {}
        for part in self._parts_of(k):
            for entry, value in self._optimizer.state.get(part.param, {}).items():
                if not isinstance(value, Tensor):
                    continue
                for slot in part.slots:
                    whole = value.shape != part.param.shape
                    piece = value if whole else _relative(slot, part).of_member(value, rank)
                    tensors[f"{slot.key}/{entry}"] = piece.detach().clone()
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
        for part in self._parts_of(k):
            entries = {key.rpartition("/")[2] for key in tensors if key.rpartition("/")[0] == part.slots[0].key}
            state = {entry: _assemble(entry, part, rank, tensors) for entry in sorted(entries)}
            self._optimizer.state.pop(part.param, None)
            if state:
                self._optimizer.state[part.param] = state

    def _parts_of(self, k: int) -> list[_Part]:
        return [part for part in self._parts if part.k == k]


def _parts(bank: LoraBank) -> Iterator[tuple[_Part, gauge.FactorSettings]]:
    ends = {"lora_A": (0, bank.split), "lora_B": (bank.split, bank.params_KP.shape[1])}
    for k, member in enumerate(bank.members):
        if member.point.a == member.point.b:
            stretches = [(0, ends["lora_B"][1], bank.slots, member.point.a)]
        else:
            stretches = [
                (*ends[factor], tuple(slot for slot in bank.slots if slot.factor == factor), settings)
                for factor, settings in (("lora_A", member.point.a), ("lora_B", member.point.b))
            ]
        for start, stop, slots, settings in stretches:
            param = nn.Parameter(bank.params_KP[k, start:stop])
            param.grad = bank.grads_KP[k, start:stop]
            yield _Part(k, param, start, slots), settings


def _build(config: OptimizerConfig, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    # fused: one kernel a group on CUDA, one pass over the weights on the CPU.
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, fused=True)
    kind: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return kind(groups, betas=config.betas, fused=True)


def _clip_norms(bank: LoraBank) -> Tensor | None:
    """Each member's clip norm [K], infinite for none; None where no member clips."""
    norms = [math.inf if member.point.clip_norm is None else member.point.clip_norm for member in bank.members]
    for k, norm in enumerate(norms):
        if not norm > 0:
            raise ValueError(f"clip_norm must be positive; found {norm!r} for member {k}: use null for no clipping")
    if all(math.isinf(norm) for norm in norms):
        return None
    return torch.tensor(norms, dtype=bank.grads_KP.dtype, device=bank.grads_KP.device)


def _relative(slot: Slot, part: _Part) -> Slot:
    """The slot as counted from the start of its part."""
    return Slot(slot.layer, slot.factor, slot.width, slot.offset - part.start)


def _assemble(entry: str, part: _Part, rank: int, tensors: dict[str, Tensor]) -> Tensor:
    first = tensors[f"{part.slots[0].key}/{entry}"]
    if first.dim() == 0:  # a step count: fused optimizers want it beside the weights, in its own dtype
        return first.detach().clone().to(part.param.device)
    whole_P = torch.zeros_like(part.param, requires_grad=False)
    for slot in part.slots:
        piece, expected = tensors.get(f"{slot.key}/{entry}"), (rank, slot.width)
        if piece is None or piece.shape != expected:
            found = "nothing" if piece is None else tuple(piece.shape)
            raise ValueError(f"optimizer state {slot.key}/{entry} must have shape {expected}; found {found}")
        _relative(slot, part).of_member(whole_P, rank).copy_(piece)
    return whole_P
