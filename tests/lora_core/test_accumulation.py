import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_core.adapter import Member
from lora_core.gauge import Gauge, regauge
from lora_core.laws import law_of
from lora_core.optimizers import OptimizerConfig
from lora_core.train import Schedule, StepRecord, train_pack
from tests.lora_core.support import Pack, make_point

SUBJECT = Member(make_point(rank=4, lr=2e-2, weight_decay=0.05, clip_norm=0.5), seed=11)
SMALL = Member(make_point(rank=2, lr=1e-2), seed=12)


def steps(pack: Pack, stop: int, accumulation: int, start: int = 0, losses_K=None) -> list[StepRecord]:
    return list(
        train_pack(
            pack.bank,
            pack.optimizer,
            losses_K or pack.losses_K,
            start=start,
            stop=stop,
            schedule=pack.schedule,
            accumulation=accumulation,
        )
    )


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_gradient_over_parts_is_that_of_the_whole_batch(parts):
    members = [SMALL, replace(SMALL, point=replace(SMALL.point, rank=4))]
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(12, 12, generator=draws, dtype=torch.float64)
    y = torch.randint(0, 5, (12,), generator=draws)

    def run(parts: int) -> tuple[Pack, list[StepRecord]]:
        pack = Pack(members, OptimizerConfig("sgd"), dtype=torch.float64, schedule=Schedule("constant", 3))

        def losses_K(batch: int) -> torch.Tensor:
            rows = torch.arange(12).chunk(parts)[batch % parts]
            nats = nn.functional.cross_entropy(pack.model(x[rows].repeat(2, 1)), y[rows].repeat(2), reduction="none")
            return nats.view(2, -1).mean(dim=1)

        return pack, steps(pack, 3, parts, losses_K=losses_K)

    (whole, their_records), (cut, records) = run(1), run(parts)
    for theirs, ours in zip(their_records, records, strict=True):
        assert theirs.losses == pytest.approx(ours.losses, rel=1e-12)
    torch.testing.assert_close(whole.bank.grads_KP, cut.bank.grads_KP, rtol=1e-12, atol=1e-12)  # of the last step
    assert whole.bank.grads_KP.any()


def test_one_batch_a_step_is_a_step_as_it_is_written_down():
    pack, naive = (Pack([SUBJECT, SMALL], OptimizerConfig("adamw")) for _ in range(2))
    records = steps(pack, 10, 1)
    for step, record in enumerate(records):
        losses = naive.losses_K(step)
        naive.bank.zero_grad()
        losses.sum().backward()
        naive.optimizer.clip()
        naive.optimizer.step(naive.schedule.factor(step))
        assert record.losses == tuple(losses.tolist())
    assert torch.equal(pack.bank.params_KP, naive.bank.params_KP)


def test_a_step_takes_the_batches_that_follow_and_records_their_mean_loss():
    pack, seen = Pack([SMALL], OptimizerConfig("sgd"), dtype=torch.float64), []

    def watching(batch: int) -> torch.Tensor:
        losses = pack.losses_K(batch)
        seen.append((batch, pack.bank.batch, float(losses.detach())))
        return losses

    records = steps(pack, 4, 3, start=2, losses_K=watching)
    assert [record.step for record in records] == [3, 4]
    assert [batch for batch, _, _ in seen] == [number for _, number, _ in seen] == list(range(6, 12))
    for i, record in enumerate(records):
        assert record.losses[0] == pytest.approx(sum(loss for _, _, loss in seen[3 * i : 3 * i + 3]) / 3, rel=1e-15)
    assert pack.bank.batch is None


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("accumulation", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_twins_are_bit_identical_whatever_is_accumulated(optimizer, dtype, accumulation, p):
    subject = replace(SUBJECT, point=replace(SUBJECT.point, dropout=p))
    twin = replace(subject, point=regauge(subject.point, Gauge.of_alpha(4), law_of(optimizer)))
    packs = [Pack([each], OptimizerConfig(optimizer), dtype=dtype) for each in (subject, twin)]
    one, other = (steps(pack, 20, accumulation) for pack in packs)
    assert [record.losses for record in one] == [record.losses for record in other]
    assert torch.equal(packs[0].bank.update_norms_KL(), packs[1].bank.update_norms_KL())
    assert packs[0].bank.update_norms_KL().all()


def test_a_member_diverges_by_any_of_its_batches_before_it_steps():
    pack = Pack([SUBJECT, SMALL], OptimizerConfig("adamw"))

    def poisoned(batch: int) -> torch.Tensor:
        return pack.losses_K(batch) + torch.tensor([0.0, math.inf if batch == 4 else 0.0])

    records = steps(pack, 5, 3, losses_K=poisoned)
    assert [sorted(record.diverged) for record in records] == [[], [1], [1], [1], [1]]
    assert pack.optimizer.frozen == {1}
    alone = Pack([SMALL], OptimizerConfig("adamw"))
    steps(alone, 1, 3)
    for key, value in pack.bank.adapter(1).items():
        torch.testing.assert_close(value, alone.bank.adapter(0)[key])


@pytest.mark.parametrize("accumulation", [0, -2])
def test_less_than_a_batch_a_step_is_refused(accumulation):
    with pytest.raises(ValueError, match=f"accumulation must be at least 1 batch a step; found {accumulation}"):
        steps(Pack([SMALL], OptimizerConfig("sgd")), 1, accumulation)
