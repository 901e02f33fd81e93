import math
from dataclasses import replace

import pytest
import torch

from lora_core.adapter import LoraBank, Member
from lora_core.laws import NoLawError
from lora_core.optimizers import OptimizerConfig, PackOptimizer
from tests.lora_core.support import TARGETS, Mlp, make_point

CONFIGS = {
    "sgd": OptimizerConfig("sgd"),
    "sgd+momentum": OptimizerConfig("sgd", {"momentum": 0.9}),
    "adam": OptimizerConfig("adam", {"betas": (0.8, 0.95)}),
    "adamw": OptimizerConfig("adamw", {"betas": (0.8, 0.95)}),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def pack(config: OptimizerConfig, *points) -> tuple[LoraBank, PackOptimizer]:
    bank = LoraBank.attach(Mlp(torch.float64), TARGETS, [Member(point, seed) for seed, point in enumerate(points)])
    return bank, PackOptimizer(bank, config)


def set_gradients(bank: LoraBank, step: int) -> list[dict[str, torch.Tensor]]:
    """Gives each member gradients that depend on the step and the member, and returns them."""
    draws = torch.Generator().manual_seed(step)
    bank.zero_grad()
    for k in range(len(bank.members)):
        for view in bank.member_tensors(k).values():
            view.grad.copy_(torch.randn(view.shape, generator=draws, dtype=torch.float64))
    return [{key: view.grad.clone() for key, view in bank.member_tensors(k).items()} for k in range(len(bank.members))]


def naive_step(config, settings, weight, grad, state, lr):
    """One step by the book: PyTorch's own formulas, nothing fused."""
    t = state["t"] = state.get("t", 0) + 1
    if config.name == "adamw":
        weight = weight * (1 - lr * settings.weight_decay)
    else:
        grad = grad + settings.weight_decay * weight
    if config.name == "sgd":
        velocity = state["v"] = config.options.get("momentum", 0.0) * state["v"] + grad if t > 1 else grad
        return weight - lr * velocity
    beta1, beta2 = config.options["betas"]
    m = state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * grad
    v = state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * grad**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return weight - lr * m_hat / (v_hat.sqrt() + settings.eps)


@configs
def test_each_member_steps_by_the_book_with_its_own_settings(config):
    points = [
        make_point(rank=2, lr=0.1, weight_decay=0.1, eps=1e-3),
        make_point(rank=8, lr=0.01, weight_decay=0.0),
        make_point(rank=4, lr=0.02, lr_b=0.2, weight_decay=0.3),
    ]
    bank, optimizer = pack(config, *points)
    weights = [bank.adapter(k) for k in range(3)]
    states = [{key: {} for key in each} for each in weights]
    for step, factor in enumerate((1.0, 0.5, 0.25)):
        grads = set_gradients(bank, step)
        optimizer.step(factor)
        for k, point in enumerate(points):
            for key, value in weights[k].items():
                settings = point.a if key.endswith("lora_A") else point.b
                lr = settings.lr * factor
                weights[k][key] = naive_step(config, settings, value, grads[k][key], states[k][key], lr)
    for k in range(3):
        for key, value in bank.adapter(k).items():
            torch.testing.assert_close(value, weights[k][key], rtol=1e-12, atol=1e-14)
    padding = [layer.a_KRI[0, 2:] for layer in bank.layers.values()]
    assert not any(part.any() for part in padding)


def test_the_clip_is_exact_a_member_over_all_its_adapters():
    clips = (0.5, 1e6, None, 2.0)
    bank, optimizer = pack(CONFIGS["sgd"], *[make_point(rank=2 + k, clip_norm=clip) for k, clip in enumerate(clips)])
    grads = set_gradients(bank, 0)
    expected = [math.sqrt(sum(float(value.square().sum()) for value in each.values())) for each in grads]
    norms = optimizer.clip()
    assert norms.tolist() == pytest.approx(expected, rel=1e-13)
    for k, clip in enumerate(clips):
        factor = 1.0 if clip is None else min(1.0, clip / expected[k])
        for key, view in bank.member_tensors(k).items():
            torch.testing.assert_close(view.grad, grads[k][key] * factor, rtol=1e-13, atol=0)
    assert optimizer.clip().tolist() == pytest.approx([0.5, expected[1], expected[2], 2.0], rel=1e-13)


def test_a_gradient_within_its_clip_norm_is_left_alone_to_the_last_bit():
    bank, optimizer = pack(CONFIGS["sgd"], make_point(clip_norm=1e6), make_point(clip_norm=1e-3))
    before = set_gradients(bank, 0)[0]
    optimizer.clip()
    assert all(torch.equal(view.grad, before[key]) for key, view in bank.member_tensors(0).items())


def test_a_zero_gradient_is_left_alone_by_the_clip():
    bank, optimizer = pack(CONFIGS["sgd"], make_point(clip_norm=1.0), make_point())
    bank.zero_grad()
    assert optimizer.clip().tolist() == [0.0, 0.0]
    assert not bank.grads_KP.any()


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan])
def test_a_clip_norm_that_is_not_positive_is_refused(clip_norm):
    with pytest.raises(
        ValueError, match=r"clip_norm must be positive; found .* for member 1: use null for no clipping"
    ):
        pack(CONFIGS["sgd"], make_point(), make_point(clip_norm=clip_norm))


@configs
def test_a_frozen_member_stands_still_and_the_others_go_on(config):
    points = [make_point(rank=rank, weight_decay=0.1) for rank in (2, 4)]
    bank, optimizer = pack(config, *points)
    set_gradients(bank, 0)
    optimizer.step(1.0)
    weights, state = [bank.adapter(k) for k in (0, 1)], optimizer.state(0)
    optimizer.freeze(0)
    set_gradients(bank, 1)
    optimizer.step(1.0)
    assert optimizer.frozen == {0}
    assert all(torch.equal(value, weights[0][key]) for key, value in bank.adapter(0).items())
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state(0).items())
    assert not any(torch.equal(value, weights[1][key]) for key, value in bank.adapter(1).items())


@configs
@pytest.mark.parametrize("lr_b", [None, 0.05])
def test_state_moves_to_another_place_in_another_pack(config, lr_b):
    point = make_point(rank=4, weight_decay=0.1, lr_b=lr_b)
    other_point = make_point(rank=8)
    bank, optimizer = pack(config, point, other_point)
    for step in range(3):
        set_gradients(bank, step)
        optimizer.step(1.0)
    moved_bank, moved = pack(config, other_point, make_point(rank=2), point)
    moved_bank.load_adapter(2, bank.adapter(0))
    moved.load_state(2, optimizer.state(0))
    assert moved.state(2).keys() == optimizer.state(0).keys()
    assert all(torch.equal(value, moved.state(2)[key]) for key, value in optimizer.state(0).items())
    grads = set_gradients(bank, 3)[0]
    for key, view in moved_bank.member_tensors(2).items():
        view.grad.copy_(grads[key])
    optimizer.step(1.0)
    moved.step(1.0)
    assert all(torch.equal(value, moved_bank.adapter(2)[key]) for key, value in bank.adapter(0).items())


def test_state_names_every_tensor_that_the_optimizer_keeps():
    bank, optimizer = pack(CONFIGS["adamw"], make_point(rank=4))
    assert optimizer.state(0) == {}
    set_gradients(bank, 0)
    optimizer.step(1.0)
    shapes = {key: tuple(value.shape) for key, value in optimizer.state(0).items() if key.startswith("fc1")}
    assert shapes == {
        "fc1.lora_A/exp_avg": (4, 12),
        "fc1.lora_A/exp_avg_sq": (4, 12),
        "fc1.lora_A/step": (),
        "fc1.lora_B/exp_avg": (4, 24),
        "fc1.lora_B/exp_avg_sq": (4, 24),
        "fc1.lora_B/step": (),
    }


def test_an_empty_state_starts_the_optimizer_afresh():
    bank, optimizer = pack(CONFIGS["adamw"], make_point())
    set_gradients(bank, 0)
    optimizer.step(1.0)
    optimizer.load_state(0, {})
    assert optimizer.state(0) == {}


def test_state_of_another_shape_or_layer_is_refused():
    bank, optimizer = pack(CONFIGS["adamw"], make_point(rank=4), make_point(rank=8))
    set_gradients(bank, 0)
    optimizer.step(1.0)
    state = optimizer.state(0)
    with pytest.raises(ValueError, match=r"fc1.lora_A/exp_avg must have shape \(8, 12\); found \(4, 12\)"):
        optimizer.load_state(1, state)
    missing = {key: value for key, value in state.items() if key != "fc2.lora_B/exp_avg"}
    with pytest.raises(ValueError, match=r"fc2.lora_B/exp_avg must have shape .*; found nothing"):
        optimizer.load_state(0, missing)
    with pytest.raises(ValueError, match=r"optimizer state must be of fc1.lora_A, .*; found fc9.lora_A"):
        optimizer.load_state(0, {"fc9.lora_A/exp_avg": torch.zeros(4, 12)})


def test_a_config_refuses_what_its_optimizer_does_not_have():
    with pytest.raises(NoLawError, match="radam has no alpha equivalence"):
        OptimizerConfig("radam")
    with pytest.raises(ValueError, match=r"adamw has the options betas, amsgrad; found momentum=0\.9"):
        replace(CONFIGS["adamw"], options={"momentum": 0.9})
