"""Heads: modules that each member trains whole, beside its adapter."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch
from torch import nn

from lora_core.adapter import LoraBank, Member
from lora_core.checkpoint import load_member, save_member
from lora_core.gauge import FactorSettings, Gauge, regauge
from lora_core.heads import find_heads
from lora_core.laws import law_of
from lora_core.optimizers import OptimizerConfig, PackOptimizer
from tests.lora_core.support import TARGETS, WIDTH, Mlp, Pack, losses_of, make_point

ADAMW = OptimizerConfig("adamw")


class Classifier(nn.Module):
    """A head of two layers, as RoBERTa's."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, 8, dtype=dtype)
        self.dropout = nn.Dropout(0.5)
        self.out_proj = nn.Linear(8, 5, dtype=dtype)
        draws = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64) / 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(features)))))


def model_of(dtype: torch.dtype = torch.float64) -> Mlp:
    model = Mlp(dtype)
    model.head = Classifier(dtype)
    return model.eval()


def member(rank: int = 4, seed: int = 0, head_lr: float = 3e-2, **point) -> Member:
    stated = make_point(rank=rank, **point)
    return Member(replace(stated, head=FactorSettings(head_lr, 0.0, stated.a.constants)), seed)


def pack_of(members: list[Member], config: OptimizerConfig = ADAMW, dtype: torch.dtype = torch.float64) -> Pack:
    return Pack(members, config, dtype=dtype, model=model_of(dtype), heads=["head"])


def test_every_copy_starts_as_the_models_own_head_and_lies_behind_the_adapters():
    bank = pack_of([member(2), member(4)]).bank
    own = {f"head.{name}": value for name, value in model_of().head.named_parameters()}
    for k in range(2):
        tensors = bank.adapter(k)
        assert [key for key in tensors if key.startswith("head.")] == list(own)
        assert all(torch.equal(tensors[key], value) for key, value in own.items())
    assert [slot.factor for slot in bank.slots if slot.offset >= bank.head_start] == ["head"] * len(own)
    assert bank.magnitudes == bank.head_start < bank.params_KP.shape[1]
    without = LoraBank.attach(Mlp(), TARGETS, [Member(make_point(), 0)])
    assert without.heads == {}
    assert without.head_start == without.params_KP.shape[1]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
def test_a_packed_member_equals_its_solo_run_whoever_its_pack_mates_are(dtype, rtol):
    subject = member(4, 7, clip_norm=0.5, weight_decay=0.02)
    packed = pack_of([member(8, 1, 1e-1), subject, member(2, 2, 1e-3)], dtype=dtype)
    solo = pack_of([subject], dtype=dtype)
    together, alone = ([record.losses for record in each.train(0, 30)] for each in (packed, solo))
    torch.testing.assert_close(
        torch.tensor(together)[:, 1], torch.tensor(alone)[:, 0], rtol=rtol, atol=0, check_dtype=False
    )
    theirs = solo.bank.adapter(0)
    for key, value in packed.bank.adapter(1).items():
        assert float((value - theirs[key]).norm() / theirs[key].norm()) <= 10 * rtol


def test_a_member_does_what_peft_does_with_modules_to_save():
    subject = member(4, 5)
    pack = pack_of([subject])
    config = peft.LoraConfig(
        r=4, lora_alpha=subject.point.scaling * 4, target_modules=list(TARGETS), modules_to_save=["head"]
    )
    theirs = peft.get_peft_model(model_of(), config)
    named = dict(theirs.named_parameters())
    trained = {}
    for key, value in pack.bank.adapter(0).items():
        layer, _, factor = key.rpartition(".")
        if key.startswith("head."):
            place = f"base_model.model.head.modules_to_save.default.{key.removeprefix('head.')}"
        else:
            place = f"base_model.model.{layer}.{factor}.default.weight"
        trained[key] = named[place]
        trained[key].data.copy_(value.mT if factor == "lora_B" else value)
    assert {id(parameter) for parameter in trained.values()} == {
        id(parameter) for parameter in theirs.parameters() if parameter.requires_grad
    }
    point = subject.point
    lrs = {key: point.head.lr if key.startswith("head.") else point.a.lr for key in trained}
    optimizer = torch.optim.AdamW(
        [{"params": [value], "lr": lrs[key]} for key, value in trained.items()], eps=1e-8, weight_decay=0.0
    )
    loss_of, expected = losses_of(theirs.eval(), 1, torch.float64), []
    for step in range(50):
        for group, lr in zip(optimizer.param_groups, lrs.values(), strict=True):
            group["lr"] = lr * pack.schedule.factor(step)
        optimizer.zero_grad()
        loss = loss_of(step).sum()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    found = [record.losses[0] for record in pack.train(0, 50)]
    assert found[-1] < 0.9 * found[0]
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "nadam", "rmsprop", "adagrad", "adadelta", "rprop"])
def test_twins_are_bit_identical_where_the_head_keeps_its_learning_rate(optimizer):
    law = law_of(optimizer)
    constants = {name: constant.default for name, constant in law.absolute.items()}
    point = replace(make_point(weight_decay=0.01 if law.decay else 0.0, clip_norm=0.3), head=None)
    point = replace(point, a=replace(point.a, constants=constants), b=replace(point.b, constants=constants))
    subject = Member(replace(point, head=FactorSettings(2e-2, 0.0, constants)), 3)
    twin = replace(subject, point=regauge(subject.point, Gauge.of_alpha(16), law))
    assert twin.point.head == subject.point.head
    one, other = (
        pack_of([each], OptimizerConfig(optimizer), torch.float32).trajectories(0, 30)[0] for each in (subject, twin)
    )
    assert torch.equal(one.losses, other.losses)
    assert torch.equal(one.update_norms, other.update_norms)


def test_a_head_that_shares_the_adapters_learning_rate_makes_another_run():
    subject = member(4, 3)
    point = regauge(subject.point, Gauge.of_alpha(4), law_of("adamw"))
    sharing = replace(subject, point=replace(point, head=replace(point.head, lr=point.head.lr / 2)))
    one, other = (pack_of([each]).trajectories(0, 10)[0].losses for each in (subject, sharing))
    assert not torch.allclose(one, other, rtol=1e-3)


def test_the_clip_is_over_the_adapters_alone():
    pack = pack_of([member(4, 1, clip_norm=1e-3)])
    pack.losses_K(0).sum().backward()
    before = pack.bank.grads_KP.clone()
    (norm,) = pack.optimizer.clip().tolist()
    start = pack.bank.head_start
    assert norm == pytest.approx(float(before[0, :start].norm()))
    assert norm > 1e-3
    assert before[0, start:].any()
    assert torch.equal(pack.bank.grads_KP[0, start:], before[0, start:])
    assert float(pack.bank.grads_KP[0, :start].norm()) == pytest.approx(1e-3)


def test_a_run_goes_on_from_a_checkpoint_with_its_head(tmp_path):
    members = [member(4, 1), member(2, 2, 1e-1)]
    whole = pack_of(members)
    expected = [record.losses for record in whole.train(0, 20)]
    first = pack_of(members)
    first.train(0, 8)
    second = pack_of(members)
    for k in range(2):
        save_member(
            tmp_path / str(k), adapter=first.bank.adapter(k), optimizer=first.optimizer.state(k), step=8, extra={}
        )
        state = load_member(tmp_path / str(k))
        second.bank.load_adapter(k, state.adapter)
        second.optimizer.load_state(k, state.optimizer)
    assert [record.losses for record in second.train(8, 20)] == expected[8:]


def test_detaching_gives_the_model_its_own_head_back():
    model = model_of()
    own, before = model.head, [parameter.clone() for parameter in model.head.parameters()]
    pack = Pack([member()], ADAMW, dtype=torch.float64, model=model, heads=["head"])
    assert model.head is pack.bank.heads["head"]
    pack.train(0, 3)
    pack.bank.detach()
    assert model.head is own
    assert all(torch.equal(now, then) for now, then in zip(own.parameters(), before, strict=True))
    assert all(parameter.requires_grad for parameter in own.parameters())


def test_a_head_without_settings_stays_frozen():
    bank = LoraBank.attach(model_of(), "all-linear", [Member(make_point(), 0)], heads=["head"])
    assert sorted(bank.layers) == ["fc1", "fc2"]
    assert bank.heads == {}


def test_over_a_half_precision_model_heads_are_kept_in_float32_and_compute_in_its_dtype():
    model, x = model_of(torch.bfloat16), torch.linspace(-1, 1, 48).view(4, 12).to(torch.bfloat16)
    reference = model_of(torch.bfloat16)
    reference(x).float().square().sum().backward()
    bank = LoraBank.attach(model, TARGETS, [member(), member(2)], heads=["head"])
    assert bank.params_KP.dtype == torch.float32
    out = model(x.repeat(2, 1))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for k in range(2):
        tensors = bank.member_tensors(k)
        for name, parameter in reference.head.named_parameters():
            found, expected = tensors[f"head.{name}"].grad, parameter.grad.float()
            assert float((found - expected).norm() / expected.norm()) < 2e-2
    merged = bank.merged_weights(0)
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    assert {f"head.{name}" for name, _ in reference.head.named_parameters()} < set(merged)


def test_a_model_must_not_be_moved_while_heads_are_attached():
    model = model_of()
    LoraBank.attach(model, TARGETS, [member()], heads=["head"])
    with pytest.raises(RuntimeError, match="detach first"):
        model.head.float()


def test_an_embedding_can_be_a_head_and_looks_up_each_members_own():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 12, dtype=torch.float64)
            self.net = model_of()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.net(self.words(ids))

    torch.manual_seed(0)
    model, ids = Words(), torch.tensor([0, 3, 3, 6])
    expected = model(ids)
    bank = LoraBank.attach(model, TARGETS, [member(), member(2)], heads=["words"])
    found = model(ids.repeat(2))
    torch.testing.assert_close(found, expected.repeat(2, 1))
    found.square().sum().backward()
    grads = [bank.member_tensors(k)["words.weight"].grad for k in range(2)]
    assert all(grad[[0, 3, 6]].any(dim=1).all() and not grad[[1, 2, 4, 5]].any() for grad in grads)


def test_a_head_that_explodes_is_frozen_before_it_takes_the_step():
    pack = pack_of([member(4, 1), member(4, 2)])
    head = pack.bank.member_tensors(0)["head.out_proj.weight"]
    before = head.detach().clone()
    losses_K = pack.losses_K

    def overflowing(step: int) -> torch.Tensor:
        losses = losses_K(step)
        pack.bank.grads_KP[0, pack.bank.head_start] = torch.inf
        return losses

    pack.losses_K = overflowing
    (record,) = pack.train(0, 1)
    assert record.diverged == {0}
    assert torch.equal(head, before)


def test_heads_are_found_by_the_ends_of_their_names_and_the_outer_one_counts():
    model = nn.ModuleDict({"net": nn.ModuleDict({"head": nn.ModuleDict({"head": nn.Linear(2, 2)})})})
    assert list(find_heads(model, ["head"])) == ["net.head"]
    assert list(find_heads(model, ["net.head"])) == ["net.head"]


def test_what_cannot_be_a_head_is_refused():
    with pytest.raises(ValueError, match=r"a module that is trained whole, called score or rank; found none in this"):
        LoraBank.attach(model_of(), TARGETS, [member()], heads=["score", "rank"])
    with pytest.raises(ValueError, match=r"called haed; found none in this"):
        LoraBank.attach(model_of(), TARGETS, [member()], heads=["head", "haed"])
    with pytest.raises(ValueError, match=r"must be a list; found the text 'head': write \[head\]"):
        LoraBank.attach(model_of(), TARGETS, [member()], heads="head")
    with pytest.raises(ValueError, match=r"by some name; found none"):
        LoraBank.attach(model_of(), TARGETS, [member()])
    with pytest.raises(ValueError, match=r"train a head all or none; found both"):
        LoraBank.attach(model_of(), TARGETS, [member(), Member(make_point(), 0)], heads=["head"])
    with pytest.raises(ValueError, match=r"parameters to train; found none in 'head.dropout'"):
        LoraBank.attach(model_of(), TARGETS, [member()], heads=["dropout"])
    tied = model_of()
    tied.other = nn.Linear(WIDTH, 8, dtype=torch.float64)
    tied.other.weight = tied.head.dense.weight
    with pytest.raises(ValueError, match=r"'head' shares one with 'other.weight'"):
        LoraBank.attach(tied, TARGETS, [member()], heads=["head"])
    bank = LoraBank.attach(model_of(), TARGETS, [member()], heads=["head"])
    with pytest.raises(ValueError, match=r"takes matrices, and the head 'head' has vectors"):
        PackOptimizer(bank, OptimizerConfig("muon"))
    two = LoraBank.attach(model_of(), TARGETS, [member(), member()], heads=["head"])
    with pytest.raises(ValueError, match=r"a pack of 2 needs a batch of 2 times the same rows; found 3 rows"):
        two.heads["head"](torch.ones(3, WIDTH, dtype=torch.float64))
