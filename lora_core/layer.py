"""A frozen linear layer under K adapters: one product forward, one backward, gradients straight into the bank's
storage. GPT-2's Conv1D is one with a transposed weight (base.py); embedding.py has embeddings.

    suffix  meaning
    K       members of the pack
    M       rows a member brings (batch, or batch x tokens)
    R       the pack's rank
    I, O    the layer's input and output width

    forward                           backward, with g_KMO the gradient of the output
    h = s x_d A^T        [K, M, R]    u = s g B          [K, M, R]
    y = x W^T + bias + h B^T          g_A += u^T x_d     g_B += h^T g       g_x = g W + D(u A)

x_d = D(x) is x after dropout (dropout.py), x itself where there is none. B is stored transposed, b_KRO. This is plain
LoRA; dora.py has DoRA's table. Written out by hand, because autograd would take one more pass over the rows to add up
each of y and g_x, and because its accumulation wants a dense tensor a layer where the bank has a dense row a member.
Gradients of gradients are not to be had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_core.banked import BankedModule
from lora_core.base import BaseLayer
from lora_core.dora import DoraProduct, row_norms_KO, row_squares_O
from lora_core.dropout import Mask


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_KMI: Tensor,
        a_KRI: Tensor,
        b_KRO: Tensor,
        s_K11: Tensor,
        base: tuple[Tensor, Tensor | None],
        grads: tuple[Tensor, Tensor],
        mask: Mask | None,
    ) -> Tensor:
        dropped_KMI = x_KMI if mask is None else mask.drop(x_KMI)
        h_KMR = torch.bmm(dropped_KMI, a_KRI.mT).mul_(s_K11)
        weight_OI, bias_O = base
        # By this way and no other, or gradient checkpointing could not let go of the mask.
        keep_KMI, q_K11 = mask or (None, None)
        ctx.save_for_backward(dropped_KMI, a_KRI, b_KRO, s_K11, h_KMR, weight_OI, keep_KMI, q_K11)
        ctx.grads = grads
        return functional.linear(x_KMI, weight_OI, bias_O).baddbmm_(h_KMR, b_KRO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_KMO: Tensor) -> tuple[Tensor | None, ...]:
        dropped_KMI, a_KRI, b_KRO, s_K11, h_KMR, weight_OI, keep_KMI, q_K11 = ctx.saved_tensors
        grad_a_KRI, grad_b_KRO = ctx.grads
        u_KMR = torch.bmm(g_KMO, b_KRO.mT).mul_(s_K11)
        grad_a_KRI.add_(torch.bmm(u_KMR.mT, dropped_KMI))
        grad_b_KRO.add_(torch.bmm(h_KMR.mT, g_KMO))
        g_x_KMI = None
        if ctx.needs_input_grad[0]:
            g_x_KMI = torch.matmul(g_KMO, weight_OI)
            if keep_KMI is None:
                g_x_KMI.baddbmm_(u_KMR, a_KRI)
            else:
                g_x_KMI.add_(Mask(keep_KMI, q_K11).drop(torch.bmm(u_KMR, a_KRI)))
        return g_x_KMI, None, None, None, None, None, None


class BankedLayer(BankedModule):
    """K adapters over one frozen layer.

    The leading dimension of its input is K*N, member-major: the N rows of member 0 first.

    Attributes:
        base: the frozen layer.
        a_KRI: factor A of all members, a view of the bank's storage; its `.grad` is one of the bank's gradients.
        b_KRO: factor B, transposed, likewise.
        m_KO: DoRA's magnitudes, likewise; None without DoRA.
    """

    s_K11: Tensor  # noqa: N815

    def __init__(self, base: BaseLayer, factors: Sequence[Tensor], grads: Sequence[Tensor], s_K: Sequence[float]):
        """Takes views of the bank's storage.

        Args:
            base: the frozen layer.
            factors: [K, R, I] and [K, R, O], and [K, 1, O] for DoRA.
            grads: of the factors, in their shapes.
            s_K: scalings.
        """
        super().__init__()
        self._layer, self.base = base, base.module
        self.a_KRI, self.b_KRO = (nn.Parameter(factor) for factor in factors[:2])
        self.a_KRI.grad, self.b_KRO.grad = grads[:2]
        self.m_KO, self._grads = None, tuple(grads)
        if len(factors) == 3:
            self.m_KO = nn.Parameter(factors[2][:, 0])
            self.m_KO.grad = grads[2][:, 0]
            self._grads = (*grads[:2], grads[2][:, 0])
        # Never in half precision: rounded to bfloat16, s would be off by up to 0.4%.
        dtype = torch.promote_types(factors[0].dtype, torch.float32)
        s_K11 = torch.tensor(s_K, dtype=dtype, device=factors[0].device).view(-1, 1, 1)
        self.register_buffer("s_K11", s_K11, persistent=False)

    @property
    def stored_K(self) -> Tensor:
        """One of the views."""
        return self.a_KRI

    @property
    def weight(self) -> Tensor:
        """The base weight, as the base layer has it; some models look at a layer's weight for its dtype."""
        return self._layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias [O]."""
        return self._layer.bias

    @torch.no_grad()
    def merged(self, a_RI: Tensor, b_RO: Tensor, m_1O: Tensor | None, scaling: float) -> Tensor:
        """Returns W + s B A for one member's factors, its rows [O] brought to their magnitudes under DoRA, in the base
        weight's own layout and dtype."""
        merged_OI = self._layer.weight_OI + scaling * (b_RO.mT @ a_RI)
        if m_1O is not None:
            merged_OI = m_1O.mT / torch.linalg.vector_norm(merged_OI, dim=1, keepdim=True) * merged_OI
        return self._layer.as_OI(merged_OI).to(self.weight.dtype)


class BankedLinear(BankedLayer):
    """K adapters over one frozen `nn.Linear` or Conv1D.

    It computes in its input's dtype (autocast's, under autocast), whatever dtype the adapters are kept in. Whether it
    drops anything does not depend on `training`: the bank says so.
    """

    squares_O: Tensor | None  # noqa: N815

    def __init__(
        self,
        base: BaseLayer,
        factors: Sequence[Tensor],
        grads: Sequence[Tensor],
        s_K: Sequence[float],
        draw_mask: Callable[[Tensor], Mask | None],
    ):
        """Takes what every layer does, and from the rows [K, M, I] what dropout does to them; None for nothing."""
        super().__init__(base, factors, grads, s_K)
        self._draw_mask = draw_mask
        squares_O = None
        if self.m_KO is not None:
            squares_O = row_squares_O(base.weight_OI, self.s_K11.dtype).to(self.s_K11.device)
        self.register_buffer("squares_O", squares_O, persistent=False)

    @property
    def in_features(self) -> int:
        """I."""
        return self._layer.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self._layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[K*N, ..., I] -> [K*N, ..., O].

        Raises:
            ValueError: the leading dimension is not a multiple of K.
        """
        members, x = self._members_of(x), self._brought_here(x)
        dtype = self._computes_in(x)
        bias = self.bias
        x_KMI = x.to(dtype).reshape(members, -1, x.shape[-1])
        arguments = (
            x_KMI,
            self.a_KRI.to(dtype),
            self.b_KRO.to(dtype),
            self.s_K11,
            (self._layer.weight_OI.to(dtype), None if bias is None else bias.to(dtype)),
            self._grads,
            self._draw_mask(x_KMI),
        )
        out_KMO: Tensor
        if self.m_KO is None:
            out_KMO = _AdaptedProduct.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            magnitudes = self.m_KO, self.row_norms_KO()
            out_KMO = DoraProduct.apply(*arguments, magnitudes)  # type: ignore[no-untyped-call]
        return out_KMO.view(*x.shape[:-1], out_KMO.shape[-1])

    def row_norms_KO(self) -> Tensor:
        """DoRA: the norms of the rows of W + s B A, in the adapters' dtype.

        Raises:
            ValueError: the layer has no DoRA.
        """
        if self.squares_O is None:
            raise ValueError("row norms belong to DoRA; found a layer without it: give the members magnitude settings")
        norms_KO = row_norms_KO(self._layer.weight_OI, self.squares_O, self.a_KRI, self.b_KRO, self.s_K11)
        # As PEFT rounds them: with magnitudes rounded alike, their ratio is exactly 1 at the start.
        return norms_KO.to(self.a_KRI.dtype)
