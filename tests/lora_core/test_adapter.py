import math
from dataclasses import replace

import peft
import pytest
import torch
from torch import nn

from lora_core.adapter import BankedLinear, LoraBank, Member, NoTargetError, RankError, find_targets
from lora_core.gauge import Gauge, regauge
from lora_core.init import initial_a
from lora_core.laws import LAWS
from tests.lora_core.support import TARGETS, Mlp, make_point, samples

RANKS = (2, 4, 8)


def members(*ranks: int, **settings: float) -> list[Member]:
    return [Member(make_point(rank=rank, scaling=16 / rank, **settings), seed) for seed, rank in enumerate(ranks)]


def with_random_b(bank: LoraBank) -> LoraBank:
    draws = torch.Generator().manual_seed(2)
    for k in range(len(bank.members)):
        tensors = bank.adapter(k)
        for name, value in tensors.items():
            if name.endswith("lora_B"):
                value.copy_(torch.randn(value.shape, generator=draws, dtype=torch.float64))
        bank.load_adapter(k, tensors)
    return bank


# -- targets -----------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "xq": nn.Linear(4, 4)}) for _ in range(2))
        self.norm = nn.LayerNorm(4)


@pytest.mark.parametrize(
    "target_modules",
    [["q"], ["q", "xq"], ["blocks.0.q"], ["0.q"], r".*\.q", r"q", r"blocks\.\d\..*q", r".*(q|xq)"],
)
def test_targets_are_matched_as_peft_matches_them(target_modules):
    config = peft.LoraConfig(target_modules=target_modules)
    theirs = set(peft.get_peft_model(Nested(), config).targeted_module_names)
    assert set(find_targets(Nested(), target_modules)) == theirs
    assert theirs


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (["q", "k_proj", "v_proj"], "no module is called 'k_proj', 'v_proj'; the linear layers are q, blocks.0.q"),
        ([], "target_modules is empty; the linear layers are q"),
        (r"blocks", "must be plain nn.Linear, Conv1D or nn.Embedding layers; 'blocks' is a ModuleList"),
        (r".*k", r"the regular expression '\.\*k' matches no module's full name; the linear layers are q"),
        (r"*q", "must be a list of names or a regular expression"),
        (["norm"], "nn.Embedding layers; 'norm' is a LayerNorm; the linear layers are q"),
    ],
)
def test_targets_that_carry_no_adapter_are_refused_with_those_that_do(target_modules, message):
    with pytest.raises(NoTargetError, match=message):
        find_targets(Nested(), target_modules)


def test_a_linear_layer_that_is_never_called_is_refused():
    with pytest.raises(NoTargetError, match="'out_proj' is a NonDynamicallyQuantizableLinear"):
        find_targets(nn.MultiheadAttention(4, 2), ["out_proj"])


# -- attach and detach -------------------------------------------------------------------------------------------------


def test_detach_gives_the_model_back_as_it_was():
    model = Mlp()
    model.fc1.bias.requires_grad_(False)
    x, _ = samples()
    before, modules = model(x), dict(model.named_modules())
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with LoraBank.attach(model, TARGETS, members(4)) as bank:
        assert isinstance(model.fc1, BankedLinear)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {f"{layer}.{factor}" for layer in TARGETS for factor in ("a_KRI", "b_KRO")}
    bank.detach()
    assert dict(model.named_modules()) == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert torch.equal(model(x), before)


def test_a_fresh_pack_computes_what_the_base_model_computes():
    x, _ = samples()
    expected = Mlp()(x)
    model = Mlp()
    LoraBank.attach(model, TARGETS, members(*RANKS))
    torch.testing.assert_close(model(x.repeat(3, 1)), expected.repeat(3, 1))


def test_a_rank_beyond_a_layers_width_is_refused_by_name():
    model = Mlp()
    with pytest.raises(RankError, match="layer 'fc1' takes ranks from 1 to its width 12; found rank 13"):
        LoraBank.attach(model, TARGETS, members(4, 13))
    assert isinstance(model.fc1, nn.Linear), "a refused pack must leave the model alone"


def test_an_empty_pack_is_refused():
    with pytest.raises(ValueError, match="at least one member; found none"):
        LoraBank.attach(Mlp(), TARGETS, [])


def test_a_batch_that_cannot_be_dealt_to_the_members_is_refused():
    model = Mlp()
    LoraBank.attach(model, TARGETS, members(*RANKS))
    with pytest.raises(ValueError, match="a pack of 3 needs a batch of 3 times the same rows; found 4 rows"):
        model(torch.zeros(4, 12))


def test_moving_an_attached_model_is_refused():
    model = Mlp()
    LoraBank.attach(model, TARGETS, members(4))
    model.to("cpu").float()  # where and what it is already: harmless
    with pytest.raises(RuntimeError, match="attached after the model is on its device and in its dtype"):
        model.double()


@pytest.mark.parametrize(
    ("base", "asked", "expected"),
    [
        (torch.float64, None, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapters_of_a_half_precision_model_are_float32_unless_asked(base, asked, expected):
    model = Mlp(base)
    bank = with_random_b(LoraBank.attach(model, TARGETS, members(4), dtype=asked))
    assert bank.params_KP.dtype == expected
    out = model(samples(base)[0])
    assert out.dtype == base
    out.float().sum().backward()
    assert bank.grads_KP.isfinite().all()
    assert bank.grads_KP.any()


# -- the layer against a naive reference -------------------------------------------------------------------------------


def test_a_pack_computes_each_members_formula_and_gradients():
    model = Mlp(torch.float64)
    bank = with_random_b(LoraBank.attach(model, TARGETS, members(*RANKS)))
    x = torch.randn(3 * 5, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))  # batch x tokens
    weights = torch.randn(3 * 5, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    out = model(x)
    (out * weights).sum().backward()
    reference = Mlp(torch.float64)
    for k, member in enumerate(bank.members):
        leaves = {key: view.detach().clone().requires_grad_() for key, view in bank.member_tensors(k).items()}

        def layer(name: str, h: torch.Tensor, leaves=leaves, member=member) -> torch.Tensor:
            delta = (h @ leaves[f"{name}.lora_A"].mT) @ leaves[f"{name}.lora_B"]
            return getattr(reference, name)(h) + member.point.scaling * delta

        rows = slice(5 * k, 5 * (k + 1))
        expected = reference.head(torch.relu(layer("fc2", torch.relu(layer("fc1", x[rows])))))
        torch.testing.assert_close(out[rows], expected, rtol=1e-12, atol=1e-12)
        (expected * weights[rows]).sum().backward()
        for key, view in bank.member_tensors(k).items():
            torch.testing.assert_close(view.grad, leaves[key].grad, rtol=1e-11, atol=1e-11)


def test_gradients_accumulate_until_they_are_zeroed():
    model = Mlp(torch.float64)
    bank = with_random_b(LoraBank.attach(model, TARGETS, members(*RANKS)))
    x = samples(torch.float64)[0][:6]
    model(x).sum().backward()
    once = bank.grads_KP.clone()
    assert once.any()
    model(x).sum().backward()
    torch.testing.assert_close(bank.grads_KP, 2 * once)
    bank.zero_grad()
    assert not bank.grads_KP.any()
    assert not bank.layers["fc1"].a_KRI.grad.any()


def test_the_base_weights_get_no_gradient_and_the_padding_none_either():
    model = Mlp()
    bank = with_random_b(LoraBank.attach(model, TARGETS, members(*RANKS)))
    model(samples()[0]).square().sum().backward()
    assert model.fc1.base.weight.grad is None
    assert model.head.weight.grad is None
    for layer in bank.layers.values():
        for k, member in enumerate(bank.members):
            for factor in (layer.a_KRI, layer.b_KRO):
                assert factor.grad[k, : member.point.rank].any()
                assert not factor.grad[k, member.point.rank :].any()
                assert not factor[k, member.point.rank :].any()


def test_autocast_computes_in_its_own_dtype_and_keeps_the_gradients_in_the_adapters():
    model = Mlp()
    bank = with_random_b(LoraBank.attach(model, TARGETS, members(*RANKS)))
    x = samples()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    out.float().sum().backward()
    found = bank.grads_KP.clone()
    bank.zero_grad()
    model(x).sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(found, bank.grads_KP, rtol=0.1, atol=0.02 * float(bank.grads_KP.abs().max()))


def test_member_tensors_are_views_of_weights_and_gradients():
    bank = LoraBank.attach(Mlp(), TARGETS, members(*RANKS))
    views = bank.member_tensors(1)
    assert {key: tuple(view.shape) for key, view in views.items()} == {
        "fc1.lora_A": (4, 12),
        "fc1.lora_B": (4, 24),
        "fc2.lora_A": (4, 24),
        "fc2.lora_B": (4, 24),
    }
    views["fc2.lora_B"].data.fill_(3.0)
    views["fc2.lora_B"].grad.fill_(5.0)
    assert bool((bank.layers["fc2"].b_KRO[1, :4] == 3).all())
    assert bool((bank.layers["fc2"].b_KRO.grad[1, :4] == 5).all())
    assert bank.params_KP[[0, 2], bank.split :].abs().sum() == 0
    assert all(view.is_contiguous() and view.grad.is_contiguous() for view in views.values())


def test_an_adapter_moves_to_another_place_in_another_pack():
    one = with_random_b(LoraBank.attach(Mlp(), TARGETS, members(2, 4)))
    other = LoraBank.attach(Mlp(), TARGETS, members(8, 2, 4))
    other.load_adapter(2, one.adapter(1))
    assert all(torch.equal(value, one.adapter(1)[key]) for key, value in other.adapter(2).items())
    with pytest.raises(
        ValueError, match=r"member 0 takes adapter tensors .*'fc1.lora_A': \(8, 12\).*; found .*\(4, 12\)"
    ):
        other.load_adapter(0, one.adapter(1))


# -- init --------------------------------------------------------------------------------------------------------------


def test_the_initial_a_depends_on_seed_layer_rank_and_width_only():
    alone = LoraBank.attach(Mlp(), ["fc2"], members(2, 4)[1:])
    packed = LoraBank.attach(Mlp(torch.float64), TARGETS, members(8, 4), dtype=torch.float64)
    assert torch.equal(alone.adapter(0)["fc2.lora_A"].double(), packed.adapter(1)["fc2.lora_A"])
    member = members(4)[0]
    base = initial_a("kaiming_uniform", member, "fc1", 12, torch.float32)
    for other in (
        initial_a("kaiming_uniform", replace(member, seed=1), "fc1", 12, torch.float32),
        initial_a("kaiming_uniform", member, "fc3", 12, torch.float32),
        initial_a("kaiming_uniform", members(5)[0], "fc1", 12, torch.float32)[:4],
        initial_a("kaiming_uniform", member, "fc1", 13, torch.float32)[:, :12],
    ):
        assert not torch.allclose(base, other)


def test_the_initial_a_is_the_same_everywhere_and_for_ever():
    # Checkpoints and ledgers of one version are resumed by the next, so the draw may not change.
    a_RI = initial_a("kaiming_uniform", members(1)[0], "fc1", 4, torch.float32)
    expected = [0.04779333, 0.39403927, 0.14817882, 0.04706597]
    torch.testing.assert_close(a_RI, torch.tensor([expected]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("init", "std"), [("kaiming_uniform", 1 / math.sqrt(3 * 500)), ("gaussian", 1 / 50)])
def test_init_has_pefts_standard_deviation_times_init_scale(init, std):
    layer = nn.Linear(500, 500)
    config = peft.LoraConfig(r=50, target_modules=["0"], init_lora_weights="gaussian" if init == "gaussian" else True)
    theirs = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0].lora_A["default"].weight.detach()
    ours = initial_a(init, Member(make_point(rank=50, init_scale=2.0), 0), "0", 500, torch.float32)
    assert float(theirs.std()) == pytest.approx(std, rel=0.03)
    assert float(ours.std()) == pytest.approx(2 * std, rel=0.03)
    if init == "kaiming_uniform":
        assert float(ours.abs().max()) <= 2 / math.sqrt(500)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_perturbation_moves_each_element_by_one_unit_in_the_last_place(dtype):
    member = Member(make_point(rank=8), seed=3)
    base = initial_a("kaiming_uniform", member, "fc1", 24, dtype)
    moved = [initial_a("kaiming_uniform", replace(member, perturbation_seed=seed), "fc1", 24, dtype) for seed in (0, 1)]
    up, down = (torch.nextafter(base, torch.full_like(base, sign * math.inf)) for sign in (1, -1))
    for each in moved:
        assert bool(((each == up) | (each == down)).all())
        assert (each == up).any()
        assert (each == down).any()
    assert not torch.equal(*moved)


# -- norms and merging -------------------------------------------------------------------------------------------------


def test_update_norms_are_the_frobenius_norms_of_the_updates():
    bank = with_random_b(LoraBank.attach(Mlp(), TARGETS, members(*RANKS)))
    norms_KL = bank.update_norms_KL()
    assert norms_KL.dtype == torch.float64
    for k in range(3):
        merged = bank.merge(k)
        for column, name in enumerate(TARGETS):
            update = merged[name].double() - bank.layers[name].weight.double()
            assert float(norms_KL[k, column]) == pytest.approx(float(update.norm()), rel=1e-5)


def test_update_norms_of_a_fresh_pack_are_zero():
    assert not LoraBank.attach(Mlp(), TARGETS, members(*RANKS)).update_norms_KL().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factors", [(2.0, 2.0), (0.25, 0.25), (4.0, 0.5), (2.0**-20, 2.0**12)])
def test_update_norms_do_not_notice_a_gauge_of_powers_of_two(dtype, factors):
    bank = with_random_b(LoraBank.attach(Mlp(dtype), TARGETS, members(*RANKS)))
    gauge = Gauge(*factors)
    twins = [replace(member, point=regauge(member.point, gauge, LAWS["adamw"])) for member in bank.members]
    other = LoraBank.attach(Mlp(dtype), TARGETS, twins)
    for k in range(3):
        divisors = {"lora_A": gauge.a, "lora_B": gauge.b}
        other.load_adapter(k, {key: value / divisors[key[4:]] for key, value in bank.adapter(k).items()})
    assert torch.equal(other.update_norms_KL(), bank.update_norms_KL())


def test_a_merged_model_computes_what_its_member_computes():
    model = Mlp(torch.float64)
    bank = with_random_b(LoraBank.attach(model, TARGETS, members(*RANKS)))
    x = samples(torch.float64)[0]
    packed = model(x.repeat(3, 1)).view(3, len(x), -1)
    for k in range(3):
        solo = Mlp(torch.float64)
        for name, weight in bank.merge(k).items():
            solo.get_submodule(name).weight.data.copy_(weight)
        torch.testing.assert_close(solo(x), packed[k], rtol=1e-12, atol=1e-12)
