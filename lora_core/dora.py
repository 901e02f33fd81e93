"""DoRA for a pack: each row of a layer's weight W + s B A is brought to a trained length.

    suffix  meaning
    K       members of the pack
    M       rows a member brings (batch, or batch x tokens)
    R       the pack's rank
    I, O    the layer's input and output width

    name  shape      meaning
    m     [K, O]     magnitudes, trained; they start at the norms of W's rows, because B starts at 0
    n     [K, O]     norms of the rows of W + s B A, constants to the backward pass
    c     [K, O]     m / n
    x_d   [K, M, I]  x after dropout (dropout.py), x itself where there is none
    D     -          what turns x into x_d

    forward                                 backward, with g_KMO the gradient of the output
    h = s x_d A^T                [K, M, R]  g' = c g             [K, M, O]
    v = x_d W^T + h B^T          [K, M, O]  u = s g' B           [K, M, R]
    y = (x - x_d) W^T + bias + c v          g_A += u^T x_d       g_B += h^T g'       g_m += sum_M(g v) / n
                                            g_x = g W + D((g' - g) W + u A), without dropout g' W + u A

As in PEFT 0.21 (`tuners/lora/dora.py`, `variants.py`), after Liu et al. 2024, section 4.3 for the constant norm. A
gauge of powers of two leaves n and g_m as they are, bit for bit, and moves h, u, g_A and g_B by powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_core.dropout import Mask


def row_squares_O(weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the squared norms of a weight's rows [O]."""
    return weight_OI.detach().to(dtype).square().sum(dim=1)


def check_rows(weights_OI: Mapping[str, Tensor]) -> None:
    """Checks that DoRA can divide by the norms of all rows of the layers' weights.

    Raises:
        ValueError: a layer's weight has a row of zeros, where PEFT computes 0 / 0.
    """
    for name, weight_OI in weights_OI.items():
        if weight_OI.is_meta:
            continue  # it has no values to look at
        if zeros := int((~weight_OI.any(dim=1)).sum()):
            raise ValueError(
                f"DoRA divides by the norm of each row of a weight; found {zeros} rows of zeros in layer {name!r}: "
                "leave the layer out of target_modules, or train without DoRA"
            )


@torch.no_grad()
def row_norms_KO(weight_OI: Tensor, squares_O: Tensor, a_KRI: Tensor, b_KRO: Tensor, s_K11: Tensor) -> Tensor:
    """Returns n, without a [K, O, I] tensor, in the dtype of `squares_O`, in which it computes.

        n_o^2 = ||W_o||^2 + 2 s (W A^T)_o . B_o + s^2 B_o (A A^T) B_o^T

    The terms cancel where s B A undoes a row of W: n is then good to sqrt(eps) ||W_o|| only, and a sum that rounding
    made negative counts as 0. While B is 0 the result is the root of `squares_O` to the last bit.

    Args:
        weight_OI: W.
        squares_O: ||W_o||^2, as `row_squares_O` has it: computed once, because W is frozen.
        a_KRI: factor A.
        b_KRO: factor B, transposed.
        s_K11: scalings.
    """
    dtype = squares_O.dtype
    kind = weight_OI.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        a_KRI, b_KRO, s_K1 = a_KRI.to(dtype), b_KRO.to(dtype), s_K11.to(dtype)[:, 0]
        cross_KO = (torch.matmul(a_KRI, weight_OI.to(dtype).mT) * b_KRO).sum(dim=1)
        square_KO = (torch.bmm(torch.bmm(a_KRI, a_KRI.mT), b_KRO) * b_KRO).sum(dim=1)
        norms_KO: Tensor = (squares_O + s_K1 * (2 * cross_KO + s_K1 * square_KO)).clamp(min=0).sqrt()
    return norms_KO


class DoraProduct(torch.autograd.Function):
    """y of the table above; its gradients go straight into the bank's storage."""

    @staticmethod
    def forward(
        ctx: Any,
        x_KMI: Tensor,
        a_KRI: Tensor,
        b_KRO: Tensor,
        s_K11: Tensor,
        base: tuple[Tensor, Tensor | None],
        grads: tuple[Tensor, Tensor, Tensor],
        mask: Mask | None,
        magnitudes: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Takes m and n as `magnitudes`, both [K, O]; the rest as the plain product in layer.py."""
        weight_OI, bias_O = base
        m_KO, n_KO = magnitudes
        wide = torch.promote_types(m_KO.dtype, torch.float32)  # in half precision c would be off by up to 0.4%
        c_K1O = (m_KO.to(wide) / n_KO.to(wide))[:, None]
        dropped_KMI = x_KMI if mask is None else mask.drop(x_KMI)
        h_KMR = torch.bmm(dropped_KMI, a_KRI.mT).mul_(s_K11)
        v_KMO = functional.linear(dropped_KMI, weight_OI).baddbmm_(h_KMR, b_KRO)
        keep_KMI, q_K11 = mask or (None, None)
        ctx.save_for_backward(dropped_KMI, a_KRI, b_KRO, s_K11, h_KMR, weight_OI, v_KMO, c_K1O, n_KO, keep_KMI, q_K11)
        ctx.grads = grads
        y_KMO = _scaled(v_KMO, c_K1O)
        if mask is not None:
            return y_KMO.add_(functional.linear(x_KMI - dropped_KMI, weight_OI, bias_O))
        return y_KMO if bias_O is None else y_KMO.add_(bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_KMO: Tensor) -> tuple[Tensor | None, ...]:
        """The right side of the table above."""
        dropped_KMI, a_KRI, b_KRO, s_K11, h_KMR, weight_OI, v_KMO, c_K1O, n_KO, keep_KMI, q_K11 = ctx.saved_tensors
        grad_a_KRI, grad_b_KRO, grad_m_KO = ctx.grads
        grad_m_KO.add_((g_KMO * v_KMO).sum(dim=1, dtype=n_KO.dtype) / n_KO)
        scaled_KMO = _scaled(g_KMO, c_K1O)
        u_KMR = torch.bmm(scaled_KMO, b_KRO.mT).mul_(s_K11)
        grad_a_KRI.add_(torch.bmm(u_KMR.mT, dropped_KMI))
        grad_b_KRO.add_(torch.bmm(h_KMR.mT, scaled_KMO))
        g_x_KMI = None
        if ctx.needs_input_grad[0] and keep_KMI is None:
            g_x_KMI = torch.matmul(scaled_KMO, weight_OI).baddbmm_(u_KMR, a_KRI)
        elif ctx.needs_input_grad[0]:
            g_dropped_KMI = torch.matmul(scaled_KMO.sub_(g_KMO), weight_OI).baddbmm_(u_KMR, a_KRI)
            g_x_KMI = Mask(keep_KMI, q_K11).drop(g_dropped_KMI).add_(torch.matmul(g_KMO, weight_OI))
        return g_x_KMI, None, None, None, None, None, None, None


def _scaled(rows_KMO: Tensor, c_K1O: Tensor) -> Tensor:
    """c times the rows, in the rows' dtype."""
    out_KMO = torch.empty(rows_KMO.shape, dtype=rows_KMO.dtype, device=rows_KMO.device)
    return torch.mul(rows_KMO, c_K1O, out=out_KMO)
