import math
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from transformers.trainer_pt_utils import get_length_grouped_indices

from lora_core.adapter import Member
from lora_core.optimizers import OptimizerConfig
from lora_core.seeds import generator
from lora_core.train import Schedule, batch_indices, lr_factor, train_pack
from tests.lora_core.support import Pack, make_point

CONFIGS = [
    OptimizerConfig("sgd"),
    OptimizerConfig("sgd", {"momentum": 0.9}),
    OptimizerConfig("adam"),
    OptimizerConfig("adamw"),
]
TOLERANCES = [(torch.float32, 1e-5), (torch.float64, 1e-12)]
STEPS = 40

# -- schedules and data order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_are_transformers_own_to_the_last_bit(kind, warmup_steps):
    steps = 30
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    sizes = {} if kind == "constant" else {"num_training_steps": steps}
    get = getattr(transformers, f"get_{kind}_schedule_with_warmup")
    theirs = get(optimizer, num_warmup_steps=warmup_steps, **sizes).lr_lambdas[0]
    for step in range(steps + 3):
        assert lr_factor(kind, step, steps=steps, warmup_steps=warmup_steps) == theirs(step)


def test_the_first_step_of_a_warm_up_has_factor_zero():
    assert [Schedule("linear", 10, 2).factor(step) for step in (0, 1, 2, 10)] == [0.0, 0.5, 1.0, 0.0]


def test_an_epoch_visits_every_sample_once_and_the_next_in_another_order():
    epochs = [torch.cat([batch_indices(20, 5, step, 0) for step in range(e * 4, e * 4 + 4)]) for e in (0, 1)]
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist()) == list(range(20))
    assert epochs[0].tolist() != epochs[1].tolist()
    assert epochs[0].dtype == torch.int64


def test_what_does_not_fill_a_batch_is_dropped():
    first = torch.cat([batch_indices(22, 5, step, 0) for step in range(4)])
    assert len(set(first.tolist())) == 20
    assert len(batch_indices(22, 5, 4, 0)) == 5


def test_data_order_depends_on_seed_and_step_only():
    batch = batch_indices(50, 10, 17, seed=3)
    batch.zero_()  # a caller may do with a batch what it likes
    assert torch.equal(batch_indices(50, 10, 17, seed=3), batch_indices(50, 10, 17, seed=3))
    assert batch_indices(50, 10, 17, seed=3).any()
    assert not torch.equal(batch_indices(50, 10, 17, seed=3), batch_indices(50, 10, 17, seed=4))


@pytest.mark.parametrize("batch_size", [0, 21])
def test_a_batch_larger_than_the_data_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"between 1 and the number of samples, 20; found {batch_size}"):
        batch_indices(20, batch_size, 0, 0)


@pytest.mark.parametrize(
    ("n_samples", "batch_size", "accumulation"), [(2000, 4, 1), (2000, 4, 3), (1003, 8, 1), (23, 5, 1), (20, 20, 1)]
)
def test_grouped_by_length_an_epoch_is_in_transformers_own_order(n_samples, batch_size, accumulation):
    lengths = torch.randint(1, 30, (n_samples,), generator=torch.Generator().manual_seed(0))  # many are alike
    batches = n_samples // batch_size
    for epoch in (0, 1):
        theirs = get_length_grouped_indices(
            lengths.tolist(), batch_size * accumulation, generator=generator("data order", 3, epoch)
        )
        ours = [
            batch_indices(n_samples, batch_size, step, 3, lengths_S=lengths, accumulation=accumulation)
            for step in range(epoch * batches, (epoch + 1) * batches)
        ]
        assert torch.cat(ours).tolist() == theirs[: batches * batch_size]


def test_lengths_that_are_not_one_a_sample_are_refused():
    with pytest.raises(ValueError, match=r"one a sample, shape \(20,\); found \(19,\)"):
        batch_indices(20, 5, 0, 0, lengths_S=torch.ones(19))


# -- a packed member is its solo run -----------------------------------------------------------------------------------

SUBJECT = Member(make_point(rank=4, lr=2e-2, weight_decay=0.05, clip_norm=0.5), seed=11)
SMALL = Member(make_point(rank=2, lr=1e-2), seed=12)
LARGE = Member(make_point(rank=12, lr=5e-3, lr_b=4e-2, init_scale=2.0), seed=13)
DIVERGING = Member(make_point(rank=8, lr=1e160, scaling=1e6), seed=14)


def assert_same_run(pack: Pack, k: int, solo: Pack, *, rtol: float) -> None:
    packed, alone = pack.trajectories(0, STEPS)[k], solo.trajectories(0, STEPS)[0]
    torch.testing.assert_close(packed.losses, alone.losses, rtol=rtol, atol=0)
    torch.testing.assert_close(packed.update_norms, alone.update_norms, rtol=rtol, atol=0)
    for key, value in pack.bank.adapter(k).items():
        other = solo.bank.adapter(0)[key]
        assert float((value - other).norm() / other.norm()) <= rtol


@pytest.mark.parametrize(("dtype", "rtol"), TOLERANCES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    ("pack_mates", "place"),
    [([SMALL], 1), ([LARGE, SMALL, DIVERGING], 0), ([DIVERGING, LARGE, SMALL, LARGE], 3)],
)
def test_a_packed_member_is_its_solo_run_whoever_its_pack_mates_are(config, dtype, rtol, pack_mates, place):
    members = [*pack_mates[:place], SUBJECT, *pack_mates[place:]]
    pack = Pack(members, config, dtype=dtype)
    assert_same_run(pack, place, Pack([SUBJECT], config, dtype=dtype), rtol=rtol)
    diverging = {k for k, member in enumerate(members) if member is DIVERGING}
    assert pack.optimizer.frozen == diverging


@pytest.mark.parametrize("member", [SMALL, LARGE], ids=["small", "large"])
def test_members_of_any_rank_are_their_solo_runs(member):
    config = OptimizerConfig("adamw")
    pack = Pack([SUBJECT, member, SMALL, LARGE], config, dtype=torch.float64)
    assert_same_run(pack, 1, Pack([member], config, dtype=torch.float64), rtol=1e-12)


def test_members_learn():
    pack = Pack([SUBJECT, LARGE], OptimizerConfig("adamw"), schedule=Schedule("constant", 200))
    records = pack.train(0, 200)
    for k in (0, 1):
        assert sum(record.losses[k] for record in records[-6:]) < 0.7 * sum(record.losses[k] for record in records[:6])


def test_frozen_base_weights_stay_as_they_are():
    pack = Pack([SUBJECT, LARGE], OptimizerConfig("adamw"))
    before = {name: value.clone() for name, value in pack.model.state_dict().items() if "_K" not in name}
    pack.train(0, 5)
    assert all(torch.equal(pack.model.state_dict()[name], value) for name, value in before.items())


# -- divergence --------------------------------------------------------------------------------------------------------


def test_a_diverging_member_is_frozen_reported_and_does_no_harm():
    pack = Pack([SUBJECT, DIVERGING], OptimizerConfig("sgd"), schedule=Schedule("constant", STEPS))
    records = pack.train(0, STEPS)
    assert len(records) == STEPS
    first = next(record.step for record in records if record.diverged)
    assert all(record.diverged == (frozenset({1}) if record.step >= first else frozenset()) for record in records)
    assert all(math.isfinite(record.losses[1]) for record in records[: first - 1])
    assert all(math.isnan(record.losses[1]) for record in records[first:])
    assert all(math.isfinite(record.losses[0]) for record in records)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_member_diverges_by_its_loss_or_its_gradient_before_it_steps(poison):
    pack = Pack([SUBJECT, SMALL], OptimizerConfig("adamw"))
    losses_K = pack.losses_K

    def poisoned(step: int) -> torch.Tensor:
        losses = losses_K(step)
        if step == 3 and poison == "loss":
            return losses + torch.tensor([0.0, math.inf])
        if step == 3:
            losses.register_hook(lambda g: g * torch.tensor([1.0, math.nan]))
        return losses

    before = {}
    for record in train_pack(pack.bank, pack.optimizer, poisoned, start=0, stop=6, schedule=pack.schedule):
        if record.step == 3:
            before = pack.bank.adapter(1)
    assert pack.optimizer.frozen == {1}
    assert all(torch.equal(value, before[key]) for key, value in pack.bank.adapter(1).items())


def test_training_ends_when_all_members_have_diverged():
    pack = Pack([DIVERGING, replace(DIVERGING, seed=1)], OptimizerConfig("sgd"), schedule=Schedule("constant", STEPS))
    records = pack.train(0, STEPS)
    assert len(records) < STEPS
    assert records[-1].diverged == {0, 1}


# -- edges -------------------------------------------------------------------------------------------------------------


def test_records_count_the_steps_done():
    pack = Pack([SUBJECT], OptimizerConfig("adamw"))
    assert [record.step for record in pack.train(3, 6)] == [4, 5, 6]
    assert pack.train(6, 6) == []


def test_a_loss_without_an_entry_a_member_is_refused():
    pack = Pack([SUBJECT, SMALL], OptimizerConfig("adamw"))
    with pytest.raises(ValueError, match=r"one entry a member, shape \(2,\); found \(\)"):
        list(train_pack(pack.bank, pack.optimizer, lambda _: torch.zeros(()), start=0, stop=1, schedule=pack.schedule))


def test_an_optimizer_of_another_bank_is_refused():
    one, other = (Pack([SUBJECT], OptimizerConfig("adamw")) for _ in range(2))
    with pytest.raises(ValueError, match="the optimizer must be made over the bank that is trained"):
        list(train_pack(one.bank, other.optimizer, one.losses_K, start=0, stop=1, schedule=one.schedule))
