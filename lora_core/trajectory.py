"""Are two training runs the same? The verdict on a twin, measured against rounding itself.

    suffix  meaning
    T       steps
    L       adapted layers
    Q       quantities followed: the loss and the update norm of each layer, 1 + L
    C       control runs

Training amplifies rounding: two runs that are equal in exact arithmetic part exponentially, and how fast depends on the
model, the data and the learning rate. So no fixed tolerance tells "same up to rounding" from "different". Control
runs do: the representative again, each element of its initial A moved by one unit in the last place. What rounding
can do by step t is their envelope, for each quantity apart:

    deviation_TQ = |run - representative| / |representative|
    envelope_TQ  = eps + max over controls and over steps up to t of deviation_TQ

A twin that stays within `threshold` envelopes is identical up to rounding. Measured on 40 true twins of 400 steps with
3 controls each (SGD, Adam and AdamW, k from 0.5 to 8, some of them diverging): 3.4 envelopes at worst, while a learning
rate off by 1% reached 67,000 at least; hence the threshold of 10.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.adapter import LoraBank
from lora_core.gauge import VerdictKind
from lora_core.train import StepRecord

FLOAT32_EPS = 2.0**-23
THRESHOLD = 10.0


@dataclass(frozen=True)
class Trajectory:
    """What one member did, in float64, which holds every narrower value exactly.

    Attributes:
        losses: the loss before each step [T].
        update_norms: Frobenius norm of s B A after each step, a column a layer [T, L].
    """

    losses: Tensor
    update_norms: Tensor

    def __post_init__(self) -> None:
        shapes = tuple(self.losses.shape), tuple(self.update_norms.shape)
        if self.losses.dim() != 1 or self.update_norms.dim() != 2 or len(self.losses) != len(self.update_norms):
            raise ValueError(
                f"a trajectory takes losses [T] and update norms [T, L]; found {shapes[0]} and {shapes[1]}"
            )

    @property
    def quantities_TQ(self) -> Tensor:
        """Losses and update norms side by side."""
        return torch.cat([self.losses[:, None], self.update_norms], dim=1)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a twin.

    Attributes:
        kind: one of the three words.
        max_ratio: the largest deviation in units of the envelope; 0 if bit-identical.
        first_step: the first step (from 1) outside the envelope; None unless different.
    """

    kind: VerdictKind
    max_ratio: float
    first_step: int | None = None


def record_trajectories(bank: LoraBank, steps: Iterable[StepRecord]) -> tuple[Trajectory, ...]:
    """Runs `steps` (from `train_pack`) to their end and returns the trajectory of each member, on the CPU.

    Raises:
        ValueError: there were no steps.
    """
    losses_TK, norms_TKL = [], []
    for record in steps:
        losses_TK.append(record.losses)
        norms_TKL.append(bank.update_norms_KL())
    if not norms_TKL:
        raise ValueError("a trajectory needs at least one step; found none")
    losses, norms = torch.tensor(losses_TK, dtype=torch.float64), torch.stack(norms_TKL).cpu()
    return tuple(Trajectory(losses[:, k].clone(), norms[:, k].clone()) for k in range(len(bank.members)))


def compare(
    representative: Trajectory,
    twin: Trajectory,
    controls: Sequence[Trajectory],
    *,
    eps: float = FLOAT32_EPS,
    threshold: float = THRESHOLD,
) -> Verdict:
    """Gives the verdict on a twin.

    Non-finite values count as equal where both runs have the same ones at the same places, else as infinitely far
    apart; a run that ended early counts as NaN from there on. Where a control parts from the representative in this
    way, rounding alone makes the difference between diverging now and a step later, so the envelope is infinite from
    there on.

    Args:
        representative: the run that stands for the class.
        twin: another configuration of the class, really trained.
        controls: the representative with its initial A perturbed by one unit in the last place. May be empty where the
            gauge is exact in binary and nothing but bit-identity is expected.
        eps: floor of the envelope: the precision of training's numbers, 2**-23 for float32.
        threshold: how many envelopes still count as rounding.

    Raises:
        ValueError: the runs do not follow the same layers, or the twin is not bit-identical and there are no controls.
    """
    base_TQ, twin_TQ = representative.quantities_TQ, twin.quantities_TQ
    if any(run.update_norms.shape[1] != representative.update_norms.shape[1] for run in (twin, *controls)):
        raise ValueError("trajectories must follow the same layers; found different numbers of them")
    if base_TQ.shape == twin_TQ.shape and bool(_same(base_TQ, twin_TQ).all()):
        return Verdict("bit-identical", 0.0)
    if not controls:
        raise ValueError("a twin that is not bit-identical is judged by control runs; found none: train at least one")
    steps = max(len(base_TQ), len(twin_TQ))
    base_TQ, twin_TQ = _ended(base_TQ, steps), _ended(twin_TQ, steps)
    controls_TQ = [_ended(control.quantities_TQ, steps) for control in controls]
    ratio_T = _ratios(_deviation(base_TQ, twin_TQ), _envelope(base_TQ, controls_TQ, eps))
    outside = (ratio_T > threshold).nonzero().flatten().tolist()
    if outside:
        return Verdict("different", float(ratio_T.max()), int(outside[0]) + 1)
    return Verdict("identical up to rounding", float(ratio_T.max()))


def _ended(run_TQ: Tensor, steps: int) -> Tensor:
    """A run of that many steps; one that ended early had diverged, and all that could have followed is NaN."""
    missing = max(0, steps - len(run_TQ))
    return torch.cat([run_TQ, run_TQ.new_full((missing, run_TQ.shape[1]), math.nan)])[:steps]


def _ratios(deviation_TQ: Tensor, envelope_TQ: Tensor) -> Tensor:
    """The largest deviation of each step in envelopes [T]; 0 / 0 is 0, and infinite / infinite just reaches it: 1."""
    ratio_TQ = (deviation_TQ / envelope_TQ).masked_fill(deviation_TQ == 0, 0.0)
    return ratio_TQ.masked_fill(deviation_TQ.isinf() & envelope_TQ.isinf(), 1.0).amax(dim=1)


def _deviation(base_TQ: Tensor, run_TQ: Tensor) -> Tensor:
    """Relative to the representative, or to the run itself where the representative is 0 (so 1 there, unless both are).

    Infinite where one is not finite and the other differs from it.
    """
    scale_TQ = torch.where(base_TQ == 0, run_TQ.abs(), base_TQ.abs())
    relative_TQ = (run_TQ - base_TQ).abs() / scale_TQ
    finite_TQ = base_TQ.isfinite() & run_TQ.isfinite()
    return torch.where(finite_TQ, relative_TQ, math.inf).masked_fill(_same(base_TQ, run_TQ), 0.0)


def _same(base_TQ: Tensor, run_TQ: Tensor) -> Tensor:
    return (base_TQ == run_TQ) | (base_TQ.isnan() & run_TQ.isnan())


def _envelope(base_TQ: Tensor, controls: Sequence[Tensor], eps: float) -> Tensor:
    widest_TQ = torch.stack([_deviation(base_TQ, control_TQ) for control_TQ in controls]).amax(dim=0)
    return eps + widest_TQ.cummax(dim=0).values
