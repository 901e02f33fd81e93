"""A frozen linear layer under K adapters: one product forward, one backward, gradients straight into the bank's
storage.

    suffix  meaning
    K       members of the pack
    M       rows a member brings (batch, or batch x tokens)
    R       the pack's rank
    I, O    the layer's input and output width

    forward                           backward, with g_KMO the gradient of the output
    h = s x A^T          [K, M, R]    u = s g B          [K, M, R]
    y = x W^T + bias + h B^T          g_A += u^T x       g_B += h^T g       g_x = g W + u A

B is stored transposed, b_KRO. Written out by hand, because autograd would take one more pass over the rows to add up
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
    ) -> Tensor:
        h_KMR = torch.bmm(x_KMI, a_KRI.mT).mul_(s_K11)
        weight_OI, bias_O = base
        ctx.save_for_backward(x_KMI, a_KRI, b_KRO, s_K11, h_KMR, weight_OI)
        ctx.grads = grads
        return functional.linear(x_KMI, weight_OI, bias_O).baddbmm_(h_KMR, b_KRO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_KMO: Tensor) -> tuple[Tensor | None, ...]:
        x_KMI, a_KRI, b_KRO, s_K11, h_KMR, weight_OI = ctx.saved_tensors
        grad_a_KRI, grad_b_KRO = ctx.grads
        u_KMR = torch.bmm(g_KMO, b_KRO.mT).mul_(s_K11)
        grad_a_KRI.add_(torch.bmm(u_KMR.mT, x_KMI))
        grad_b_KRO.add_(torch.bmm(h_KMR.mT, g_KMO))
        g_x_KMI = torch.matmul(g_KMO, weight_OI).baddbmm_(u_KMR, a_KRI) if ctx.needs_input_grad[0] else None
        return g_x_KMI, None, None, None, None, None


class BankedLinear(nn.Module):
    """K adapters over one frozen `nn.Linear`.

    The leading dimension of its input is K*N, member-major: the N rows of member 0 first. It computes in its input's
    dtype (autocast's, under autocast), whatever dtype the adapters are kept in.

    Attributes:
        base: the frozen layer.
        a_KRI: factor A of all members, a view of the bank's storage; its `.grad` is one of the bank's gradients.
        b_KRO: factor B, transposed, likewise.
    """

    s_K11: Tensor  # noqa: N815

    def __init__(
        self, base: nn.Linear, factors: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor], s_K: Sequence[float]
    ):
        super().__init__()
        self.base = base
        self.a_KRI, self.b_KRO = (nn.Parameter(factor) for factor in factors)
        self.a_KRI.grad, self.b_KRO.grad = grads
        self._grads = grads
        # Never in half precision: rounded to bfloat16, s would be off by up to 0.4%.
        dtype = torch.promote_types(factors[0].dtype, torch.float32)
        s_K11 = torch.tensor(s_K, dtype=dtype, device=factors[0].device).view(-1, 1, 1)
        self.register_buffer("s_K11", s_K11, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The base weight [O, I]; some models look at a layer's weight for its dtype."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias [O]."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """[K*N, ..., I] -> [K*N, ..., O].

        Raises:
            ValueError: the leading dimension is not a multiple of K.
        """
        members = self.a_KRI.shape[0]
        if x.shape[0] % members:
            raise ValueError(
                f"a pack of {members} needs a batch of {members} times the same rows; found {x.shape[0]} rows"
            )
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = self.base.bias
        out_KMO: Tensor = _AdaptedProduct.apply(  # type: ignore[no-untyped-call]
            x.to(dtype).reshape(members, -1, x.shape[-1]),
            self.a_KRI.to(dtype),
            self.b_KRO.to(dtype),
            self.s_K11,
            (self.base.weight.to(dtype), None if bias is None else bias.to(dtype)),
            self._grads,
        )
        return out_KMO.view(*x.shape[:-1], out_KMO.shape[-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BankedLinear:
        # .to(device), .half() and the like give parameters a storage of their own: training would go on in the old one,
        # and the model would silently never learn.
        before = self.a_KRI.data_ptr()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.a_KRI.data_ptr() != before:
            raise RuntimeError(
                "adapters must be attached after the model is on its device and in its dtype: detach first"
            )
        return self
