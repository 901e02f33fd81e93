from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_core.adapter import LoraBank, Member
from lora_core.checkpoint import export_peft_adapter, import_peft_adapter, load_member, save_member
from lora_core.dora import row_norms_KO, row_squares_O
from lora_core.gauge import Gauge, regauge
from lora_core.laws import law_of
from lora_core.optimizers import OptimizerConfig
from tests.lora_core.peft_reference import adamw_over, peft_model_of, peft_parameters, randomise, train_by_hand
from tests.lora_core.support import TARGETS, Mlp, Pack, losses_of, make_point, samples

RANKS = (2, 4, 8)
BOTH = ("lora_B", "magnitude")


def member(rank: int = 4, seed: int = 0, p: float = 0.0, **settings: float) -> Member:
    point = make_point(rank=rank, scaling=16 / rank, **settings)
    return Member(replace(point, dropout=p, magnitude=replace(point.a, lr=3 * point.a.lr)), seed)


def pack(p: float = 0.0, dtype: torch.dtype = torch.float64) -> tuple[Mlp, LoraBank]:
    """Three members of different ranks, far from where they would start; the middle one never has dropout."""
    model = Mlp(dtype)
    members = [member(rank, seed, p * (rank != 4), lr=1e-2) for seed, rank in enumerate(RANKS)]
    return model, randomise(LoraBank.attach(model, TARGETS, members), BOTH)


def weight_of(bank: LoraBank, k: int, layer: str) -> torch.Tensor:
    """W + s B A."""
    adapter = bank.adapter(k)
    delta = adapter[f"{layer}.lora_B"].mT @ adapter[f"{layer}.lora_A"]
    return bank.layers[layer].weight + bank.members[k].point.scaling * delta


# -- the storage -------------------------------------------------------------------------------------------------------


def test_the_magnitudes_lie_behind_a_and_b_and_start_at_the_norms_of_the_base_weights_rows():
    bank = LoraBank.attach(Mlp(), TARGETS, [member(rank) for rank in RANKS])
    plain = LoraBank.attach(Mlp(), TARGETS, [Member(make_point(rank=rank), 0) for rank in RANKS])
    assert (plain.split, plain.magnitudes) == (bank.split, bank.magnitudes)
    assert plain.magnitudes == plain.params_KP.shape[1]
    assert [slot.key for slot in bank.slots if slot.offset >= bank.magnitudes] == ["fc1.magnitude", "fc2.magnitude"]
    assert all(slot.offset % 32 == 0 for slot in bank.slots)
    assert bank.params_KP.shape[1] == bank.magnitudes + 2 * 32
    for k in range(3):
        views = bank.member_tensors(k)
        for name in TARGETS:
            view = views[f"{name}.magnitude"]
            assert view.shape == view.grad.shape == (1, 24)
            torch.testing.assert_close(view[0], bank.layers[name].weight.norm(dim=1), rtol=1e-6, atol=0)
        views["fc2.magnitude"].grad.fill_(5.0)
    assert bool((bank.layers["fc2"].m_KO.grad == 5).all())
    assert not bank.grads_KP[:, : bank.magnitudes].any()


def test_an_adapter_moves_to_another_pack_and_through_a_checkpoint(tmp_path):
    _, bank = pack()
    save_member(tmp_path, adapter=bank.adapter(1), optimizer={}, step=1, extra={})
    other = LoraBank.attach(Mlp(torch.float64), TARGETS, [member(8), member(4)])
    other.load_adapter(1, load_member(tmp_path).adapter)
    assert bank.adapter(1).keys() == {f"{name}.{factor}" for name in TARGETS for factor in ("lora_A", *BOTH)}
    assert all(torch.equal(value, other.adapter(1)[key]) for key, value in bank.adapter(1).items())
    plain = LoraBank.attach(Mlp(torch.float64), TARGETS, [Member(make_point(), 0)])
    with pytest.raises(ValueError, match=r"member 0 takes adapter tensors .*; found .*'fc1.magnitude': \(1, 24\)"):
        plain.load_adapter(0, bank.adapter(1))


def test_a_pack_of_some_with_dora_and_some_without_is_refused():
    members = [member(), Member(make_point(), 0), member()]
    model = Mlp()
    with pytest.raises(ValueError, match=r"DoRA all or none; found members \[0, 2\] with it and \[1\] without: train"):
        LoraBank.attach(model, TARGETS, members)
    assert isinstance(model.fc1, nn.Linear)


def test_a_row_of_zeros_is_refused():
    model = Mlp()
    model.fc2.weight.data[[3, 5]] = 0
    LoraBank.attach(model, TARGETS, [Member(make_point(), 0)]).detach()
    with pytest.raises(ValueError, match="found 2 rows of zeros in layer 'fc2': leave the layer out of target_modules"):
        LoraBank.attach(model, TARGETS, [member()])


# -- norms -------------------------------------------------------------------------------------------------------------


def test_row_norms_are_those_of_the_whole_weight():
    _, bank = pack()
    for name, layer in bank.layers.items():
        for k in range(3):
            expected = weight_of(bank, k, name).norm(dim=1)
            torch.testing.assert_close(layer.row_norms_KO()[k], expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factors", [(2.0, 2.0), (0.25, 0.5), (2.0**-20, 2.0**12)])
def test_row_norms_do_not_notice_a_gauge_of_powers_of_two(dtype, factors):
    a, b = factors
    layer = pack(dtype=dtype)[1].layers["fc2"]
    weight, squares = layer.weight, layer.squares_O
    moved = row_norms_KO(weight, squares, layer.a_KRI / a, layer.b_KRO / b, layer.s_K11 * (a * b))
    assert torch.equal(moved, layer.row_norms_KO())


def test_row_norms_are_not_computed_in_autocasts_dtype():
    layer = pack(dtype=torch.float32)[1].layers["fc2"]
    expected = layer.row_norms_KO()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.row_norms_KO(), expected)


def test_row_norms_of_a_weight_that_its_update_undoes_are_small_and_never_nan():
    draws = torch.Generator().manual_seed(0)
    a_KRI = torch.randn(1, 2, 64, generator=draws)
    b_KRO = torch.randn(1, 2, 500, generator=draws)
    weight_OI = -3 * (b_KRO[0].mT @ a_KRI[0])
    squares_O = row_squares_O(weight_OI, torch.float32)
    norms_KO = row_norms_KO(weight_OI, squares_O, a_KRI, b_KRO, torch.full((1, 1, 1), 3.0))
    assert bool((norms_KO[0] <= 3e-3 * squares_O.sqrt()).all())
    assert (norms_KO == 0).any(), "some sums must have come out negative for this test to show anything"


def test_a_layer_without_dora_has_no_row_norms():
    bank = LoraBank.attach(Mlp(), TARGETS, [Member(make_point(), 0)])
    with pytest.raises(ValueError, match="row norms belong to DoRA; found a layer without it"):
        bank.layers["fc1"].row_norms_KO()


# -- PEFT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("k", range(3))
def test_outputs_losses_and_gradients_are_pefts(k, p):
    model, bank = pack(p)
    bank.batch = 5
    losses = losses_of(model, 3, torch.float64)(5)
    losses.sum().backward()
    theirs = peft_model_of(bank, k, batch=5)
    expected = losses_of(theirs, 1, torch.float64)(5)
    expected.sum().backward()
    torch.testing.assert_close(losses[k], expected[0], rtol=1e-12, atol=1e-12)
    for key, (parameter, factor) in peft_parameters(theirs, bank.adapter(k)).items():
        ours = bank.member_tensors(k)[key].grad
        assert ours.any()
        grad = parameter.grad.mT if factor == "lora_B" else parameter.grad.view(ours.shape)
        torch.testing.assert_close(ours, grad, rtol=1e-12, atol=1e-12)
    bank.batch = None
    x = samples(torch.float64)[0]
    torch.testing.assert_close(model(x.repeat(3, 1)).view(3, len(x), -1)[k], theirs.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_training_is_pefts(p):
    model, bank = pack(p)
    theirs = peft_model_of(bank, 2, batch=0)
    keys = peft_parameters(theirs, bank.adapter(2))
    optimizer = adamw_over(LoraBank.attach(Mlp(torch.float64), TARGETS, [bank.members[2]]))
    groups = [
        group | {"params": [parameter]}
        for group, (parameter, _) in zip(optimizer.param_groups, keys.values(), strict=True)
    ]
    optimizer, losses_K = torch.optim.AdamW(groups), losses_of(theirs, 1, torch.float64)
    start = bank.adapter(2)
    for step, ours in enumerate(train_by_hand(model, bank, 8, torch.float64)):
        for module in theirs.modules():
            if hasattr(module, "dropout") and hasattr(module.dropout, "batch"):
                module.dropout.batch = step
        optimizer.zero_grad()
        loss = losses_K(step)
        loss.sum().backward()
        optimizer.step()
        torch.testing.assert_close(ours[2], loss[0], rtol=1e-10, atol=0)
    for key, (parameter, factor) in keys.items():
        ours = bank.adapter(2)[key]
        value = parameter.mT if factor == "lora_B" else parameter.view(ours.shape)
        torch.testing.assert_close(ours, value.detach(), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(ours, start[key], rtol=1e-2, atol=1e-3), "the steps must have led somewhere"


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_peft_loads_an_exported_adapter_and_it_comes_back(tmp_path, p):
    model, bank = pack(p)
    export_peft_adapter(
        tmp_path, bank.adapter(2), rank=8, alpha=16, target_modules=TARGETS, use_rslora=False, dropout=p
    )
    theirs = peft.PeftModel.from_pretrained(Mlp(torch.float64), tmp_path, autocast_adapter_dtype=False).eval()
    assert theirs.peft_config["default"].use_dora
    assert theirs.peft_config["default"].lora_dropout == p
    x = samples(torch.float64)[0]
    ours = model(x.repeat(3, 1)).view(3, len(x), -1)[2].detach()
    torch.testing.assert_close(theirs(x), ours, rtol=1e-12, atol=1e-12)
    plain = Mlp(torch.float64)(x).detach()
    assert float((ours - plain).abs().max()) > 0.1, "the adapter must matter"
    back = import_peft_adapter(tmp_path)
    assert (back.use_dora, back.dropout) == (True, p)
    assert back.tensors.keys() == bank.adapter(2).keys()
    assert all(torch.equal(value, bank.adapter(2)[key]) for key, value in back.tensors.items())


def test_an_exported_adapters_tensors_have_pefts_names_and_shapes(tmp_path):
    _, bank = pack()
    peft_model_of(bank, 2).save_pretrained(tmp_path / "theirs")
    export_peft_adapter(tmp_path / "ours", bank.adapter(2), rank=8, alpha=16, target_modules=TARGETS, use_rslora=False)
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_an_adapter_that_peft_wrote_is_read(tmp_path):
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=list(TARGETS), init_lora_weights=False, use_dora=True, lora_dropout=0.2
    )
    theirs = peft.get_peft_model(Mlp(torch.float64), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.linspace(0.5, 1.5, 24, dtype=torch.float64))
    theirs.save_pretrained(tmp_path)
    adapter = import_peft_adapter(tmp_path)
    assert (adapter.rank, adapter.alpha, adapter.use_dora, adapter.dropout) == (3, 6.0, True, 0.2)
    model = Mlp(torch.float64)
    point = replace(member(3).point, scaling=adapter.alpha / adapter.rank)
    bank = LoraBank.attach(model, adapter.target_modules, [Member(point, 0)])
    bank.load_adapter(0, adapter.tensors)
    x = samples(torch.float64)[0]
    torch.testing.assert_close(model(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


def test_a_merged_model_computes_what_its_member_and_peft_compute():
    model, bank = pack(0.3)
    x = samples(torch.float64)[0]
    packed = model(x.repeat(3, 1)).view(3, len(x), -1)
    for k in range(3):
        solo, theirs = Mlp(torch.float64), peft_model_of(bank, k).merge_and_unload()
        for name, weight in bank.merge(k).items():
            torch.testing.assert_close(weight, theirs.get_submodule(name).weight, rtol=1e-12, atol=1e-12)
            solo.get_submodule(name).weight.data.copy_(weight)
        torch.testing.assert_close(solo(x), packed[k], rtol=1e-12, atol=1e-12)


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("adapters", [None, torch.bfloat16])
def test_a_fresh_pack_computes_what_the_base_model_computes(base, adapters):
    x, _ = samples(base)
    model = Mlp(base)
    LoraBank.attach(model, TARGETS, [member(rank, p=0.5) for rank in RANKS], dtype=adapters)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if base == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(model(x.repeat(3, 1)), Mlp(base)(x).repeat(3, 1), **tolerance)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("way", ["autocast", "bfloat16 model", "bfloat16 adapters"])
def test_half_precision_stays_near_full_precision(way, p):
    exact, exact_bank = pack(p, torch.float64)
    dtype = torch.bfloat16 if way != "autocast" else torch.float32
    model = Mlp(dtype)
    adapters = torch.bfloat16 if way == "bfloat16 adapters" else None
    bank = LoraBank.attach(model, TARGETS, exact_bank.members, dtype=adapters)
    for k in range(3):
        bank.load_adapter(k, exact_bank.adapter(k))
    x = samples(torch.float64)[0].repeat(3, 1)
    exact_bank.batch = bank.batch = 0
    expected = exact(x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        out = model(x.to(dtype))
    (expected**2).mean().backward()
    (out.double() ** 2).mean().backward()
    assert out.dtype == torch.bfloat16
    assert float(((out - expected).norm() / expected.norm()).detach()) < 0.03
    for k in range(3):
        for key, view in bank.member_tensors(k).items():
            truth = exact_bank.member_tensors(k)[key].grad
            assert float((view.grad - truth).norm() / truth.norm()) < 0.06


# -- packs and twins ---------------------------------------------------------------------------------------------------


def trained(members: list[Member], dtype: torch.dtype, steps: int = 20) -> tuple[torch.Tensor, LoraBank]:
    """Losses [steps, K], and the bank at the end."""
    model = Mlp(dtype)
    bank = LoraBank.attach(model, TARGETS, members)
    return torch.stack(list(train_by_hand(model, bank, steps, dtype))), bank


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_a_packed_member_is_its_solo_run_whoever_its_pack_mates_are(dtype, rtol, p):
    subject = member(4, 11, p, weight_decay=0.05)
    losses, bank = trained([member(2, 1), subject, member(12, 2, 0.5, lr_b=4e-2)], dtype)
    alone, solo = trained([subject], dtype)
    torch.testing.assert_close(losses[:, 1], alone[:, 0], rtol=rtol, atol=0)
    for key, value in bank.adapter(1).items():
        other = solo.adapter(0)[key]
        assert float((value - other).norm() / other.norm()) <= rtol


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("factors", [(2.0, 2.0), (2.0, 1.0), (4.0, 0.5)])
def test_twins_are_bit_identical(factors, dtype, p):
    subject = member(4, 9, p, weight_decay=0.01)
    gauge = Gauge(*factors)
    twin = replace(subject, point=regauge(subject.point, gauge, law_of("adamw")))
    assert twin.point.magnitude == subject.point.magnitude
    (losses, bank), (their_losses, their_bank) = (trained([each], dtype, 40) for each in (subject, twin))
    assert torch.equal(losses, their_losses)
    assert torch.equal(bank.update_norms_KL(), their_bank.update_norms_KL())
    divisors = {"lora_A": gauge.a, "lora_B": gauge.b, "magnitude": 1.0}
    for key, value in bank.adapter(0).items():
        assert torch.equal(value / divisors[key.rpartition(".")[2]], their_bank.adapter(0)[key])
    fresh = LoraBank.attach(Mlp(dtype), TARGETS, [subject]).adapter(0)
    assert not torch.allclose(bank.adapter(0)["fc1.magnitude"], fresh["fc1.magnitude"], rtol=1e-2)


def test_scaling_the_magnitudes_lr_with_the_gauge_would_make_another_run():
    subject = member(4, 9)
    point = regauge(subject.point, Gauge(2.0, 2.0), law_of("adamw"))
    wrong = replace(point, magnitude=replace(point.magnitude, lr=point.magnitude.lr / 2))
    assert not torch.equal(
        trained([subject], torch.float64)[0], trained([replace(subject, point=wrong)], torch.float64)[0]
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_twins_under_a_clip_and_the_packs_own_optimizer_are_bit_identical(optimizer, dtype, p):
    subject = member(4, 9, p, weight_decay=0.01, clip_norm=0.1)
    twin = replace(subject, point=regauge(subject.point, Gauge.of_alpha(4), law_of(optimizer)))
    packs = [Pack([each], OptimizerConfig(optimizer), dtype=dtype) for each in (subject, twin)]
    one, other = (each.trajectories(0, 30)[0] for each in packs)
    assert torch.equal(one.losses, other.losses)
    assert torch.equal(one.update_norms, other.update_norms)
    magnitudes = [each.bank.params_KP[:, each.bank.magnitudes :] for each in packs]
    assert torch.equal(*magnitudes)
    fresh = Pack([subject], OptimizerConfig(optimizer), dtype=dtype).bank
    assert not torch.equal(magnitudes[0], fresh.params_KP[:, fresh.magnitudes :])


def test_a_resumed_member_is_the_uninterrupted_one(tmp_path):
    subject, config = member(4, 9, 0.3, weight_decay=0.01, clip_norm=0.1), OptimizerConfig("adamw")
    whole, first, second = (Pack([subject], config, dtype=torch.float64) for _ in range(3))
    losses = [record.losses for record in first.train(0, 7)]
    save_member(tmp_path, adapter=first.bank.adapter(0), optimizer=first.optimizer.state(0), step=7, extra={})
    state = load_member(tmp_path)
    second.bank.load_adapter(0, state.adapter)
    second.optimizer.load_state(0, state.optimizer)
    losses += [record.losses for record in second.train(7, 15)]
    assert losses == [record.losses for record in whole.train(0, 15)]
    assert torch.equal(second.bank.params_KP, whole.bank.params_KP)
