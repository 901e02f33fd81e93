"""LoRA dropout for a pack: the mask of a member is the same wherever, and with whomever, it is trained.

    suffix  meaning
    K       members of the pack
    M       rows a member brings (batch, or batch x tokens)
    I       a layer's input width

    name      shape      meaning
    p         -          a member's probability that an element of its adapter's input is dropped
    keep_KMI  [K, M, I]  bool: the elements that are kept
    q_K11     [K, 1, 1]  1 / (1 - p): what is kept is scaled by it, so that the mean stays (inverted dropout)

A mask depends on the member's seed, the number of the batch and the layer's name only. So a forward pass that is done
again for the same batch, as gradient checkpointing does, sees the same mask, and so do two calls of one layer in one
forward pass. Twins have the same seed, and so the same masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.init import Member
from lora_core.seeds import stable_seed


class Mask(NamedTuple):
    """What dropout does to one layer's input for one batch."""

    keep_KMI: Tensor  # noqa: N815
    q_K11: Tensor  # noqa: N815

    def drop(self, x_KMI: Tensor) -> Tensor:
        """x_d = q keep x; linear and its own transpose, so the backward pass uses it as it is."""
        # q by itself, in place: as a mask of q's, 1 / (1 - p) would be rounded to the rows' dtype first.
        return (x_KMI * self.keep_KMI).mul_(self.q_K11)


class PackDropout:
    """The masks of a pack's members.

    Attributes:
        batch: the batch that is being trained on, counted from 0; None for evaluation, which drops nothing.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        """Takes seed and probability from each member.

        Raises:
            ValueError: a probability that is not in [0, 1).
        """
        self.batch: int | None = None
        self._members = [(member.seed, member.point.dropout) for member in members]
        for k, (_, p) in enumerate(self._members):
            if not 0 <= p < 1:
                raise ValueError(f"dropout must be at least 0 and below 1; found {p!r} for member {k}")
        self._any = any(p for _, p in self._members)
        self._q_K11: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def mask(self, layer: str, x_KMI: Tensor) -> Mask | None:
        """Draws the masks of a layer for the present batch; None, and nothing drawn, where nothing is dropped.

        The draws are made on the tensor's own device, in float32 whatever its dtype. So a run on a CUDA device sees
        other masks than the same run on the CPU: each repeats itself, and they agree in distribution only.
        """
        if self.batch is None or not self._any:
            return None
        keep_KMI = torch.ones(x_KMI.shape, dtype=torch.bool, device=x_KMI.device)
        uniforms: dict[int, Tensor] = {}  # members of one seed share their draws, whatever their p
        for k, (seed, p) in enumerate(self._members):
            if p:
                if seed not in uniforms:
                    uniforms[seed] = self._uniform_MI(seed, layer, x_KMI)
                torch.ge(uniforms[seed], p, out=keep_KMI[k])
        return Mask(keep_KMI, self._factors_K11(x_KMI))

    def _factors_K11(self, x_KMI: Tensor) -> Tensor:
        # Never in half precision, which would round q. Kept, because a copy to a CUDA device makes the host wait.
        place = x_KMI.device, torch.promote_types(x_KMI.dtype, torch.float32)
        if place not in self._q_K11:
            q_K = torch.tensor([1 / (1 - p) for _, p in self._members], dtype=place[1], device=place[0])
            self._q_K11[place] = q_K.view(-1, 1, 1)
        return self._q_K11[place]

    def _uniform_MI(self, seed: int, layer: str, x_KMI: Tensor) -> Tensor:
        if x_KMI.is_meta:
            return torch.rand(x_KMI.shape[1:], device=x_KMI.device)  # which has no generators, and no values
        draws = torch.Generator(x_KMI.device)
        draws.manual_seed(stable_seed("dropout", seed, int(self.batch or 0), layer))
        return torch.rand(x_KMI.shape[1:], generator=draws, device=x_KMI.device)
