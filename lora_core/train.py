"""Trains the members of a pack from one step to another.

    suffix  meaning
    K       members of the pack, k one of them
    S       samples of the training set

Steps are counted from 0 while they are to be done (schedules, data order) and from 1 once they are done (records).
A step takes one batch of data, or as many as are accumulated: step n of `accumulation` batches takes those from
n * accumulation on.

The members share one backward pass of the sum of their losses. No row of one member meets a row of another, so the
gradient of each is that of its own loss; the same holds for a member whose loss is not finite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_core.adapter import LoraBank
from lora_core.optimizers import PackOptimizer
from lora_core.seeds import generator

ScheduleKind = Literal["constant", "linear", "cosine"]


def lr_factor(schedule: ScheduleKind, step: int, *, steps: int, warmup_steps: int) -> float:
    """Returns the factor on the learning rate for a step, counted from 0.

    transformers' `get_constant_schedule_with_warmup` and its linear and cosine kin, to the last bit: the first step
    of a warm-up has factor 0, and none has an absolute floor, which would break the law.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if schedule == "constant":
        return 1.0
    remaining = max(1, steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, (steps - step) / remaining)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup_steps) / remaining))))


@dataclass(frozen=True, slots=True)
class Schedule:
    """A learning-rate schedule over the whole of training, whichever part of it a job does."""

    kind: ScheduleKind
    steps: int
    warmup_steps: int = 0

    def factor(self, step: int) -> float:
        """The factor on the learning rate for a step, counted from 0."""
        return lr_factor(self.kind, step, steps=self.steps, warmup_steps=self.warmup_steps)


def batch_indices(
    n_samples: int, batch_size: int, step: int, seed: int, *, lengths_S: Tensor | None = None, accumulation: int = 1
) -> Tensor:
    """Returns the samples of a batch [batch_size], int64, on the CPU: the same for every member (common random
    numbers).

    Each epoch is a permutation drawn from (seed, epoch) and cut into batches; what does not fill a batch is dropped.
    Nothing is remembered between steps, so a resumed job sees what the interrupted one would have seen.

    Args:
        n_samples: S, size of the data.
        batch_size: samples of a batch.
        step: number of the batch, from 0.
        seed: of the order.
        lengths_S: of the samples; given, an epoch's permutation is rearranged so that a batch has samples of like
            length (`group_by_length`).
        accumulation: batches a step, which go by length together.

    Raises:
        ValueError: the batch is larger than the data, or there is not one length a sample.
    """
    if not 1 <= batch_size <= n_samples:
        raise ValueError(f"batch_size must be between 1 and the number of samples, {n_samples}; found {batch_size}")
    if lengths_S is not None and lengths_S.shape != (n_samples,):
        raise ValueError(f"lengths must be one a sample, shape ({n_samples},); found {tuple(lengths_S.shape)}")
    epoch, batch = divmod(step, n_samples // batch_size)
    order_S = _epoch_order(n_samples, epoch, seed, lengths_S, batch_size * accumulation)
    return order_S[batch * batch_size : (batch + 1) * batch_size].clone()


# Of a pure function: an epoch's steps ask for the same permutation, which can be long. Tensors are told apart by
# identity here, and a caller gives the same one each time.
@functools.lru_cache(maxsize=2)
def _epoch_order(n_samples: int, epoch: int, seed: int, lengths_S: Tensor | None, rows: int) -> Tensor:
    order_S = torch.randperm(n_samples, generator=generator("data order", seed, epoch))
    return order_S if lengths_S is None else group_by_length(order_S, lengths_S, rows)


_MOST_GROUPED = 50
"""Steps whose samples are sorted by length together."""


def group_by_length(order_S: Tensor, lengths_S: Tensor, rows: int) -> Tensor:
    """Rearranges a permutation so that samples of like length are neighbours, and some randomness stays.

    transformers' `get_length_grouped_indices` (trainer_pt_utils.py), which draws the permutation itself: stretches of
    50 steps, or a quarter of the data where that is less, each sorted from long to short; then the longest sample of
    all comes first, so that memory runs out at once if it does.

    Args:
        order_S: the permutation [S].
        lengths_S: of the samples [S].
        rows: samples of a step.
    """
    stretch = rows * max(1, min(len(order_S) // (4 * rows), _MOST_GROUPED))
    order_S = torch.cat(
        [part[lengths_S[part].argsort(descending=True, stable=True)] for part in torch.split(order_S, stretch)]
    )
    longest = stretch * int(lengths_S[order_S[::stretch]].argmax())
    order_S[[0, longest]] = order_S[[longest, 0]]
    return order_S


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step of a pack showed.

    Attributes:
        step: steps done, this one included.
        losses: each member's loss before the update, in nats or whatever the task measures; NaN once a member has
        diverged.
        diverged: the members that have diverged so far: their loss or gradient was not finite.
    """

    step: int
    losses: tuple[float, ...]
    diverged: frozenset[int]


def train_pack(
    bank: LoraBank,
    optimizer: PackOptimizer,
    losses_K: Callable[[int], Tensor],
    *,
    start: int,
    stop: int,
    schedule: Schedule,
    accumulation: int = 1,
) -> Iterator[StepRecord]:
    """Does the steps start, ..., stop - 1, and yields a record after each.

    A member that diverges is frozen before it takes the step that would spoil it, and its pack-mates go on. It ends
    early when all have diverged.

    Args:
        bank: the pack.
        optimizer: over that bank.
        losses_K: given the number of a batch (from 0), returns each member's mean loss [K], with the graph to the
            bank's weights. `bank.batch` is that number while it runs and while its graph is gone back through, and
            None otherwise, so what is evaluated between steps has no dropout.
        start: steps that have been done.
        stop: steps that will have been done.
        schedule: of the learning rate.
        accumulation: batches a step; its gradient and its recorded loss are the means over them.

    Raises:
        ValueError: the optimizer is of another bank, `losses_K` returned another shape than [K], or accumulation is
            below 1.
    """
    if accumulation < 1:
        raise ValueError(f"accumulation must be at least 1 batch a step; found {accumulation!r}")
    if optimizer.bank is not bank:
        raise ValueError("the optimizer must be made over the bank that is trained; found another bank's")
    for step in range(start, stop):
        batches = range(step * accumulation, (step + 1) * accumulation)
        record = _step(optimizer, _accumulate(bank, losses_K, batches), step, schedule)
        yield record
        if len(record.diverged) == len(record.losses):
            return


def _accumulate(bank: LoraBank, losses_K: Callable[[int], Tensor], batches: range) -> Tensor:
    """Leaves the mean gradient over some batches in the bank and returns their mean losses [K], in float64."""
    bank.zero_grad()
    shares = []
    try:
        for batch in batches:
            bank.batch = batch
            losses = losses_K(batch)
            if losses.shape != (len(bank.members),):
                required = f"the loss must have one entry a member, shape ({len(bank.members)},)"
                raise ValueError(f"{required}; found {tuple(losses.shape)}")
            share = losses if len(batches) == 1 else losses / len(batches)
            share.sum().backward()  # type: ignore[no-untyped-call]
            shares.append(losses.detach().double())
    finally:
        bank.batch = None
    return shares[0] if len(shares) == 1 else torch.stack(shares).mean(dim=0)


def _step(optimizer: PackOptimizer, losses: Tensor, step: int, schedule: Schedule) -> StepRecord:
    """Clips, freezes who has diverged, and steps, with the gradients in the bank and the losses [K] in float64."""
    seen_2K = losses_and_norms(optimizer, losses)
    before = optimizer.frozen
    # The one time a step that the host waits for the device.
    losses_host, norms_host = seen_2K.tolist()
    for k, (loss, norm) in enumerate(zip(losses_host, norms_host, strict=True)):
        if k not in before and not (math.isfinite(loss) and math.isfinite(norm)):
            optimizer.freeze(k)
    optimizer.step(schedule.factor(step))
    shown = tuple(math.nan if k in before else loss for k, loss in enumerate(losses_host))
    return StepRecord(step + 1, shown, optimizer.frozen)


def losses_and_norms(optimizer: PackOptimizer, losses: Tensor) -> Tensor:
    """Clips, and returns what tells whether a member diverges: its loss and its gradient's norm, [2, K], float64."""
    norms = optimizer.clip()
    # What is outside of the clip counts too: magnitudes and heads.
    outside = optimizer.norms_outside_clip()
    # The losses are where the model ends, the norms where its first target layer is.
    return torch.stack([losses.to(norms.device), (norms + outside).double()])
