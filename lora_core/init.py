"""Where training starts: the initial factors of a member, the same wherever and with whomever it is trained.

    symbol  meaning
    r       rank
    c       init scale: multiplies the base draw

    suffix  meaning
    R       rank
    I, O    a layer's input and output width
    W       either of them

B starts at 0. Under an embedding it is the other way round, as in PEFT: A starts at 0, and c multiplies the draw of B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_core.gauge import Point
from lora_core.seeds import generator

Init = Literal["kaiming_uniform", "gaussian"]


@dataclass(frozen=True, slots=True)
class Member:
    """All that decides a member's trajectory besides the model, the data and the kind of optimizer.

    Attributes:
        point: hyperparameters.
        seed: seed of the adapter's initialisation and of its dropout.
        perturbation_seed: if given, each element of the initial A (of an embedding's B) moves by one unit in the last
            place, up or down by this seed: the control runs that a verdict measures rounding with.
        perturbation_dtype: the number format whose units these are, where training computes in a narrower one than the
            layer's (Muon).
    """

    point: Point
    seed: int
    perturbation_seed: int | None = None
    perturbation_dtype: torch.dtype | None = None


def initial_a(
    init: Init, member: Member, layer: str, d_in: int, dtype: torch.dtype, *, compute: torch.dtype | None = None
) -> Tensor:
    """Returns a member's initial A [r, d_in] for one layer, on the CPU.

    The base draw depends on the member's seed, the layer's name, r and d_in alone, and is made in float32 whatever the
    dtype, so twins start from the same one. `kaiming_uniform` is U(-1, 1) / sqrt(d_in), which is what PEFT's
    kaiming_uniform_(a=sqrt(5)) comes to; `gaussian` has standard deviation 1 / r.

    Args:
        init: the base draw.
        member: whose.
        layer: its full name.
        d_in: I.
        dtype: that A is kept in.
        compute: that the layer computes in, where it is narrower: a perturbation is one of its units in the last place,
            because a smaller one would be lost in the cast.
    """
    rank = member.point.rank
    draws, a_RI = _draws("lora_A", member, layer, d_in), torch.empty(rank, d_in)
    if init == "kaiming_uniform":
        a_RI.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=draws)
    else:
        a_RI.normal_(0.0, 1 / rank, generator=draws)
    return _scaled(a_RI, member, layer, dtype, compute)


def initial_b(
    member: Member, layer: str, d_out: int, dtype: torch.dtype, *, compute: torch.dtype | None = None
) -> Tensor:
    """Returns a member's initial B of an embedding, transposed, [r, d_out], on the CPU.

    Standard normal whatever the init is called, as in PEFT; drawn as A is, and with the arguments of `initial_a`.
    """
    b_RO = torch.randn(member.point.rank, d_out, generator=_draws("lora_embedding_B", member, layer, d_out))
    return _scaled(b_RO, member, layer, dtype, compute)


def _draws(factor: str, member: Member, layer: str, width: int) -> torch.Generator:
    return generator(factor, member.seed, layer, member.point.rank, width)


def _scaled(base_RW: Tensor, member: Member, layer: str, dtype: torch.dtype, compute: torch.dtype | None) -> Tensor:
    """A base draw in its dtype, times c, and perturbed for a control run."""
    value_RW = base_RW.to(dtype) * member.point.init_scale
    if member.perturbation_seed is None:
        return value_RW
    coins = generator("perturbation", member.perturbation_seed, layer, *value_RW.shape)
    up = torch.rand(value_RW.shape, generator=coins) < 0.5
    formats = [each for each in (dtype, compute, member.perturbation_dtype) if each is not None]
    narrow_RW = value_RW.to(max(formats, key=lambda each: torch.finfo(each).eps))
    infinity = torch.full_like(narrow_RW, math.inf)
    return torch.nextafter(narrow_RW, torch.where(up, infinity, -infinity)).to(dtype)
