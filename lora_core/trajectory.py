"""Are two training runs the same? The verdict on a twin, measured against rounding itself.

    suffix  meaning
    T       steps
    L       adapted layers
    Q       quantities followed: the loss and the update norm of each layer, 1 + L
    C       control runs

Training amplifies rounding: two runs that are equal in exact arithmetic part exponentially, and how fast depends on the
model, the data and the learning rate. So no fixed tolerance tells "same up to rounding" from "different". Control
runs do: the representative again, each element of its initial A and each of its constants moved by one unit in the
last place (`control_of`). What rounding can do by step t is their envelope, for each quantity apart:

    deviation_TQ = |run - representative| / |representative|
    envelope_TQ  = eps + max over controls and over steps up to t of deviation_TQ

A twin that stays within `threshold` envelopes is identical up to rounding.

Four controls are a small sample. Where rounding decides on which side of a kink (a ReLU's, say) a run falls, all of
them may fall on one side and a true twin on the other. The remedy is to ask the twin as well: before it is called
different it gets control runs of its own (`twin_controls`), and the envelope takes in how far rounding takes them from
the twin. If rounding sends a fraction p of all runs to the one side, the chance of such an alarm was
p (1 - p)**(1 + C) + p**(1 + C) (1 - p), 7% at worst with four controls; with four more of the twin it is
2 (p (1 - p))**(1 + C), 0.2% at worst. A twin that is off gains little: its own controls are off with it.

Where rounding alone has moved a quantity by a tenth (`HORIZON`), ten envelopes are as much as the quantity itself: from
there on it tells nothing. A run that blows up may reach that within steps; the verdict is on what came before, and says
where that ended. And where both losses have left all bounds (`SPENT` times where they began), the next thing to happen
is an overflow, which comes at another step in another gauge: the comparison ends there, and the verdict says so too.

`benchmarks/verdicts.py` measures both error rates, docs/LOG.md has them; the threshold of 10 is from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_core.adapter import LoraBank, Member
from lora_core.gauge import FactorSettings, VerdictKind
from lora_core.seeds import stable_seed
from lora_core.train import StepRecord

FLOAT32_EPS = 2.0**-23
THRESHOLD = 10.0
HORIZON = 0.1
SPENT = 2.0**40


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
        first_difference: the first step (from 1) of those compared at which any bit of any quantity followed differs;
            None if and only if bit-identical.
        max_deviation: the largest relative deviation over steps and quantities; 0 if bit-identical.
        envelope: the largest over steps and quantities: how far rounding alone took the controls, floor included.
        horizon: the first step (from 1) at which rounding alone decides one of the quantities, which is not judged from
            there on; None if there is none.
        compared_steps: how many steps were compared: all, or those before both losses left all bounds.
    """

    kind: VerdictKind
    max_ratio: float
    first_step: int | None = None
    first_difference: int | None = None
    max_deviation: float = 0.0
    envelope: float = FLOAT32_EPS
    horizon: int | None = None
    compared_steps: int = 0


@dataclass(frozen=True)
class Comparison:
    """A twin beside its representative, step by step.

    Attributes:
        deviation_TQ: of the twin from its representative, relative.
        envelope_TQ: what rounding can do by then.
        first_difference: see `Verdict`.
    """

    deviation_TQ: Tensor  # noqa: N815
    envelope_TQ: Tensor  # noqa: N815
    first_difference: int | None

    @property
    def ratio_T(self) -> Tensor:
        """The largest deviation of each step in envelopes."""
        return self._ratio_TQ.amax(dim=1)

    @property
    def deviation_T(self) -> Tensor:
        """The deviation, at each step, of the quantity that deviates most envelopes."""
        return self._of_the_farthest(self.deviation_TQ)

    @property
    def envelope_T(self) -> Tensor:
        """The envelope of the same quantity: deviation_T / envelope_T is ratio_T."""
        return self._of_the_farthest(self.envelope_TQ)

    def verdict(self, threshold: float = THRESHOLD) -> Verdict:
        """The verdict, with that many envelopes counting as rounding."""
        outside = (self.ratio_T > threshold).nonzero().flatten().tolist()
        beyond = (self.envelope_TQ >= HORIZON).any(dim=1).nonzero().flatten().tolist()
        kind: VerdictKind = "different" if outside else "identical up to rounding"
        return Verdict(
            kind if self.first_difference else "bit-identical",
            max_ratio=float(self.ratio_T.max()),
            first_step=int(outside[0]) + 1 if outside else None,
            first_difference=self.first_difference,
            max_deviation=float(self.deviation_TQ.max()),
            envelope=float(self.envelope_TQ.max()),
            horizon=int(beyond[0]) + 1 if beyond else None,
            compared_steps=len(self.ratio_T),
        )

    @property
    def _ratio_TQ(self) -> Tensor:
        """0 / 0 is 0; infinite / infinite just reaches the envelope, 1, as all does that lies beyond the horizon."""
        ratio_TQ = (self.deviation_TQ / self.envelope_TQ).masked_fill(self.deviation_TQ == 0, 0.0)
        ratio_TQ = ratio_TQ.masked_fill(self.deviation_TQ.isinf() & self.envelope_TQ.isinf(), 1.0)
        return torch.where(self.envelope_TQ < HORIZON, ratio_TQ, ratio_TQ.clamp(max=1.0))

    def _of_the_farthest(self, values_TQ: Tensor) -> Tensor:
        farthest_T1 = self._ratio_TQ.argmax(dim=1, keepdim=True)
        return values_TQ.gather(1, farthest_T1).squeeze(1)


def control_of(member: Member, seed: int, *, eps: float = FLOAT32_EPS, arithmetic: torch.dtype | None = None) -> Member:
    """Returns a member's control run: its initial A and its constants moved by one unit in the last place.

    Constants that a gauge moves are moved too (so not those of magnitudes or a head), because a gauge rounds them anew,
    each in one direction for the whole run. That adds up along the weights as the rounding of single elements of A does
    not.

    Args:
        member: a representative, or a twin.
        seed: of the control: which way each number moves.
        eps: precision of the constants as training reads them.
        arithmetic: the narrowest number format that training computes in, where that is not the layers' own: what is
            less than one of its units would be lost before it could do anything.
    """

    def moved(name: str, value: float) -> float:
        return value * (1 + eps if stable_seed("control", seed, name, repr(value)) % 2 else 1 - eps)

    def settings(factor: FactorSettings) -> FactorSettings:
        constants = {
            name: tuple(moved(name, each) for each in value) if isinstance(value, tuple) else moved(name, value)
            for name, value in factor.constants.items()
        }
        lr, weight_decay = moved("lr", factor.lr), moved("weight decay", factor.weight_decay)
        return replace(factor, lr=lr, weight_decay=weight_decay, constants=constants)

    point = member.point
    point = replace(
        point,
        scaling=moved("scaling", point.scaling),
        init_scale=moved("init scale", point.init_scale),
        a=settings(point.a),
        b=settings(point.b),
        clip_norm=None if point.clip_norm is None else moved("clip norm", point.clip_norm),
    )
    return replace(member, point=point, perturbation_seed=seed, perturbation_dtype=arithmetic)


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
    twin_controls: Sequence[Trajectory] = (),
    eps: float = FLOAT32_EPS,
    threshold: float = THRESHOLD,
) -> Verdict:
    """Gives the verdict on a twin.

    Args:
        representative: the run that stands for the class.
        twin: another configuration of the class, really trained.
        controls: runs of the representative's `control_of`. May be empty where the gauge is exact in binary and nothing
            but bit-identity is expected.
        twin_controls: runs of the twin's `control_of`. Needed only for a twin that would be different without them. One
            that ends early leaves the rest of the run out of the verdict.
        eps: floor of the envelope: the precision of training's numbers, 2**-23 for float32.
        threshold: how many envelopes still count as rounding.

    Raises:
        ValueError: the runs do not follow the same layers, or the twin is not bit-identical and there are no controls.
    """
    comparison = align(representative, twin, controls, twin_controls=twin_controls, eps=eps)
    if comparison.first_difference is not None and not controls:
        raise ValueError("a twin that is not bit-identical is judged by control runs; found none: train at least one")
    return comparison.verdict(threshold)


def align(
    representative: Trajectory,
    twin: Trajectory,
    controls: Sequence[Trajectory],
    *,
    twin_controls: Sequence[Trajectory] = (),
    eps: float = FLOAT32_EPS,
) -> Comparison:
    """Puts a twin beside its representative, step by step; the arguments are those of `compare`.

    Non-finite values count as equal where both runs have the same ones at the same places, else as infinitely far
    apart; a run that ended early counts as NaN from there on. From where both losses are 2**40 times what they began
    with (or 1, if that is more), or not numbers, nothing is compared. Where a control parts from its run in this way,
    rounding alone makes the difference between diverging now and a step later, so the envelope is infinite from there
    on.
    Without controls the envelope is its floor.

    Raises:
        ValueError: the runs do not follow the same layers.
    """
    runs = (representative, twin, *controls, *twin_controls)
    if any(run.update_norms.shape[1] != representative.update_norms.shape[1] for run in runs):
        raise ValueError("trajectories must follow the same layers; found different numbers of them")
    steps = max(len(representative.losses), len(twin.losses))
    steps = _steps_within_bounds(representative, twin, steps)
    base_TQ, twin_TQ, *others = (_ended(run.quantities_TQ, steps) for run in runs)
    spreads = [_deviation(base_TQ, control_TQ) for control_TQ in others[: len(controls)]]
    spreads += [_deviation(twin_TQ, control_TQ) for control_TQ in others[len(controls) :]]
    widest_TQ = torch.stack([torch.zeros_like(base_TQ), *spreads]).amax(dim=0)
    unequal = (~_same(base_TQ, twin_TQ).all(dim=1)).nonzero().flatten().tolist()
    return Comparison(
        deviation_TQ=_deviation(base_TQ, twin_TQ),
        envelope_TQ=eps + widest_TQ.cummax(dim=0).values,
        first_difference=int(unequal[0]) + 1 if unequal else None,
    )


def _steps_within_bounds(one: Trajectory, other: Trajectory, steps: int) -> int:
    """Steps, at least one, before both losses are beyond all bounds, or not numbers."""
    losses_2T = torch.stack([_ended(run.losses[:, None], steps)[:, 0] for run in (one, other)])
    bounds_21 = SPENT * losses_2T[:, :1].abs().nan_to_num(0.0, 0.0, 0.0).clamp(min=1.0)
    spent = (~(losses_2T.abs() < bounds_21)).all(dim=0).nonzero().flatten().tolist()
    return max(1, int(spent[0])) if spent else steps


def _ended(run_TQ: Tensor, steps: int) -> Tensor:
    """A run of that many steps; one that ended early had diverged, and all that could have followed is NaN."""
    missing = max(0, steps - len(run_TQ))
    return torch.cat([run_TQ, run_TQ.new_full((missing, run_TQ.shape[1]), math.nan)])[:steps]


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
