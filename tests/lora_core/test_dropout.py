from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_core.adapter import LoraBank, Member
from lora_core.dropout import PackDropout
from lora_core.gauge import Gauge, regauge
from lora_core.laws import law_of
from lora_core.optimizers import OptimizerConfig
from tests.lora_core.peft_reference import peft_model_of, peft_parameters, randomise
from tests.lora_core.support import BATCH, TARGETS, Mlp, Pack, losses_of, make_point, samples

CONFIGS = [OptimizerConfig("sgd", {"momentum": 0.9}), OptimizerConfig("adamw")]


def member(seed: int = 0, p: float = 0.3, rank: int = 4, **settings: float) -> Member:
    return Member(replace(make_point(rank=rank, scaling=16 / rank, **settings), dropout=p), seed)


def keep(members: list[Member], *, batch: int = 0, layer: str = "fc1", rows: int = 50, width: int = 40) -> torch.Tensor:
    dropout = PackDropout(members)
    dropout.batch = batch
    mask = dropout.mask(layer, torch.zeros(len(members), rows, width))
    assert mask is not None
    return mask.keep_KMI


# -- masks -------------------------------------------------------------------------------------------------------------


def test_a_mask_depends_on_seed_batch_and_layer_and_on_nothing_else():
    alone = keep([member(7)])[0]
    packed = keep([member(3), member(7, rank=1), member(5, p=0.0), member(7, rank=12)])
    assert torch.equal(packed[1], alone)
    assert torch.equal(packed[3], alone)
    assert torch.equal(keep([member(7), member(3)])[0], alone)
    for other in (packed[0], keep([member(7)], batch=1)[0], keep([member(7)], layer="fc2")[0]):
        assert 0.1 < float((other != alone).float().mean()) < 0.9


def test_a_mask_is_the_same_everywhere_and_for_ever():
    # A resumed run must see the masks that the interrupted one would have seen, and the next version may resume it.
    assert keep([member(7, p=0.5)], batch=3, rows=1, width=12).int().flatten().tolist() == [
        1,
        0,
        0,
        0,
        1,
        1,
        0,
        1,
        0,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p_and_the_mean_stays(p):
    dropout = PackDropout([member(p=p), member(p=0.0)])
    dropout.batch = 0
    x_KMI = torch.ones(2, 400, 1000, dtype=torch.float64)
    mask = dropout.mask("fc1", x_KMI)
    assert float((~mask.keep_KMI[0]).double().mean()) == pytest.approx(p, abs=0.005)
    dropped_KMI = mask.drop(x_KMI)
    assert float(dropped_KMI[0].mean()) == pytest.approx(1.0, abs=0.02)
    assert sorted(set(dropped_KMI[0].flatten().tolist())) == pytest.approx([0, 1 / (1 - p)], rel=1e-15)
    assert torch.equal(dropped_KMI[1], x_KMI[1])


def test_half_precision_does_not_round_the_factor():
    dropout = PackDropout([member(p=0.1)])
    dropout.batch = 0
    x_KMI = torch.linspace(1, 2, 1000, dtype=torch.float64).bfloat16().view(1, 1, -1)
    mask = dropout.mask("fc1", x_KMI)
    kept = mask.keep_KMI
    assert mask.drop(x_KMI).dtype == torch.bfloat16
    assert torch.equal(mask.drop(x_KMI)[kept], (x_KMI.float() / 0.9).bfloat16()[kept])
    rounded = torch.tensor(1 / 0.9, dtype=torch.bfloat16)
    assert not torch.equal(mask.drop(x_KMI)[kept], (x_KMI * rounded)[kept]), "the test must be able to fail"


def test_no_mask_is_drawn_where_nothing_is_dropped(monkeypatch):
    monkeypatch.setattr(torch, "rand", None)
    none, some = PackDropout([member(p=0.0)]), PackDropout([member(p=0.5)])
    none.batch = 3
    assert none.mask("fc1", torch.zeros(1, 2, 3)) is None
    assert some.batch is None
    assert some.mask("fc1", torch.zeros(1, 2, 3)) is None


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match=rf"dropout must be at least 0 and below 1; found {p} for member 1"):
        LoraBank.attach(Mlp(), TARGETS, [member(), member(p=p)])


# -- what it does to a model -------------------------------------------------------------------------------------------

MIXED = [member(1, 0.3, 2), member(2, 0.0, 4), member(3, 0.6, 8)]


@pytest.mark.parametrize("k", range(3))
def test_a_member_with_dropout_is_pefts_under_the_same_mask(k):
    model = Mlp(torch.float64)
    bank = randomise(LoraBank.attach(model, TARGETS, MIXED))
    bank.batch = 5
    losses = losses_of(model, 3, torch.float64)(5)
    losses.sum().backward()
    theirs = peft_model_of(bank, k, batch=5)
    expected = losses_of(theirs, 1, torch.float64)(5)
    expected.sum().backward()
    torch.testing.assert_close(losses[k], expected[0], rtol=1e-12, atol=1e-12)
    for key, (parameter, factor) in peft_parameters(theirs, bank.adapter(k)).items():
        grad = parameter.grad.mT if factor == "lora_B" else parameter.grad
        torch.testing.assert_close(bank.member_tensors(k)[key].grad, grad, rtol=1e-12, atol=1e-12)


def test_evaluation_drops_nothing():
    model, plain = Mlp(torch.float64), Mlp(torch.float64)
    bank = randomise(LoraBank.attach(model, TARGETS, MIXED))
    other = [replace(each, point=replace(each.point, dropout=0.0)) for each in MIXED]
    randomise(LoraBank.attach(plain, TARGETS, other))
    x = samples(torch.float64)[0].repeat(3, 1)
    assert torch.equal(model(x), plain(x))
    bank.batch = 0
    outputs = model(x).view(3, -1), plain(x).view(3, -1)
    assert [torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True)] == [False, True, False]
    bank.batch = None
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_pass_sees_the_same_mask(reentrant):
    model = Mlp(torch.float64)
    bank = randomise(LoraBank.attach(model, TARGETS, MIXED))
    x, y = samples(torch.float64)
    x = x[:BATCH].repeat(3, 1).requires_grad_()
    y = y[:BATCH].repeat(3)
    found = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        bank.zero_grad()
        bank.batch = 4
        torch.nn.functional.cross_entropy(forward(x), y).backward()
        bank.batch = None
        found.append(bank.grads_KP.clone())
    assert found[0].any()
    assert torch.equal(*found)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("k", range(3))
def test_a_packed_member_with_dropout_is_its_solo_run(k, dtype, rtol, config):
    pack, solo = Pack(MIXED, config, dtype=dtype), Pack([MIXED[k]], config, dtype=dtype)
    packed, alone = pack.trajectories(0, 20)[k], solo.trajectories(0, 20)[0]
    torch.testing.assert_close(packed.losses, alone.losses, rtol=rtol, atol=0)
    torch.testing.assert_close(packed.update_norms, alone.update_norms, rtol=rtol, atol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("factors", [(2.0, 2.0), (2.0, 1.0), (4.0, 0.5)])
def test_twins_with_dropout_are_bit_identical(factors, dtype, config):
    subject = member(9, 0.25, weight_decay=0.01)
    twin = replace(subject, point=regauge(subject.point, Gauge(*factors), law_of(config.name)))
    one, other = (Pack([each], config, dtype=dtype).trajectories(0, 20)[0] for each in (subject, twin))
    assert torch.equal(one.losses, other.losses)
    assert torch.equal(one.update_norms, other.update_norms)
    undropped = replace(subject, point=replace(subject.point, dropout=0.0))
    assert not torch.equal(one.losses, Pack([undropped], config, dtype=dtype).trajectories(0, 20)[0].losses)


def test_training_tells_the_bank_its_batch_and_leaves_none_behind():
    pack = Pack([member()], OptimizerConfig("adamw"))
    losses_K, seen = pack.losses_K, []

    def watching(batch: int) -> torch.Tensor:
        seen.append((batch, pack.bank.batch))
        if batch == 5:
            raise RuntimeError("the data ran out")
        losses = losses_K(batch)
        losses.register_hook(lambda _: seen.append((batch, pack.bank.batch)))  # on the way back
        return losses

    pack.losses_K = watching
    for record in pack._steps(2, 5):
        assert pack.bank.batch is None
        assert seen[-2:] == [(record.step - 1, record.step - 1)] * 2
    with pytest.raises(RuntimeError, match="the data ran out"):
        pack.train(5, 6)
    assert pack.bank.batch is None
