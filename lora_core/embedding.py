"""A frozen embedding under K adapters, gradients straight into the bank's storage.

    suffix  meaning
    K       members of the pack
    M       tokens a member brings (batch x tokens)
    R       the pack's rank
    I, O    rows of the table (the vocabulary) and width of its rows

    forward                          backward, with g_KMO the gradient of the output
    h = s A^T[ids]      [K, M, R]    u = s g B                        [K, M, R]
    y = W[ids] + h B^T  [K, M, O]    g_A[:, ids] += u                 g_B += h^T g

That is LoRA with one-hot rows in place of x, as in PEFT 0.21 (`tuners/lora/layer.py`, class Embedding): a padding
token gives A no gradient, and LoRA dropout drops nothing here. The adapter starts with A = 0 (base.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_core.base import autocast_dtype
from lora_core.layer import BankedLayer


class _LookedUpProduct(torch.autograd.Function):
    """h B^T of the table above."""

    @staticmethod
    def forward(
        ctx: Any,
        ids_KM: Tensor,
        a_KRI: Tensor,
        b_KRO: Tensor,
        s_K11: Tensor,
        grads: tuple[Tensor, Tensor],
        padding: int | None,
    ) -> Tensor:
        places_KRM = ids_KM[:, None].expand(-1, a_KRI.shape[1], -1)
        h_KMR = a_KRI.gather(2, places_KRM).mT.mul(s_K11).to(a_KRI.dtype)
        ctx.save_for_backward(ids_KM, b_KRO, s_K11, h_KMR)
        ctx.grads, ctx.padding, ctx.rows = grads, padding, a_KRI.shape[2]
        return torch.bmm(h_KMR, b_KRO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_KMO: Tensor) -> tuple[Tensor | None, ...]:
        ids_KM, b_KRO, s_K11, h_KMR = ctx.saved_tensors
        grad_a_KRI, grad_b_KRO = ctx.grads
        u_KMR = torch.bmm(g_KMO, b_KRO.mT).mul_(s_K11)
        if ctx.padding is not None:
            u_KMR.masked_fill_((ids_KM == ctx.padding)[..., None], 0)
        # By the kernel that an embedding's own backward pass has, over all members' tables one below the other: unlike
        # scatter_add_ it adds in the same order every time on a CUDA device too.
        members, rank, rows = len(ids_KM), b_KRO.shape[1], ctx.rows
        places = ids_KM + rows * torch.arange(members, device=ids_KM.device)[:, None]
        grad_VR = torch.ops.aten.embedding_dense_backward(
            u_KMR.reshape(-1, rank), places.flatten(), members * rows, -1, False
        )
        grad_a_KRI.add_(grad_VR.view(members, rows, rank).mT)
        grad_b_KRO.add_(torch.bmm(h_KMR.mT, g_KMO))
        return None, None, None, None, None, None


class BankedEmbedding(BankedLayer):
    """K adapters over one frozen `nn.Embedding`.

    What it adds is computed in the embedding's dtype (autocast's, under autocast).
    """

    def forward(self, ids: Tensor) -> Tensor:
        """[K*N, ...] -> [K*N, ..., O].

        Raises:
            ValueError: the leading dimension is not a multiple of K.
        """
        members, ids, base = self._members_of(ids), self._brought_here(ids), self.base
        assert isinstance(base, nn.Embedding)
        dtype = autocast_dtype(ids.device.type) or base.weight.dtype
        delta_KMO: Tensor = _LookedUpProduct.apply(  # type: ignore[no-untyped-call]
            ids.reshape(members, -1),
            self.a_KRI.to(dtype),
            self.b_KRO.to(dtype),
            self.s_K11,
            self._grads,
            base.padding_idx,
        )
        looked_up = functional.embedding(ids, base.weight)
        return looked_up + delta_KMO.view(looked_up.shape).to(looked_up.dtype)
