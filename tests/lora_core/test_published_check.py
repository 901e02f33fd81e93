"""The published sanity check of "scaling alpha by k", with the real loralib and with a bank.

It trains loralib's Linear, N = 4 and M = 16, rank 2, for five steps on an l1 loss, once for each of six values of
alpha, with A / sqrt(alpha) and lr 0.1 / alpha, and finds the six losses equal. Source of the rule and the check: "What
LoRA alpha actually does (in theory)", civitai.com/articles/2125. The layer is taken both ways round, N -> M and
M -> N; all runs start from one seed.

For SGD the rule is the law. For AdamW it is not: there the lr moves with sqrt(alpha), and eps and weight decay as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import loralib
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from lora_core.adapter import LoraBank, Member
from lora_core.gauge import Gauge, Point, regauge
from lora_core.laws import LAWS
from lora_core.optimizers import OptimizerConfig, PackOptimizer
from lora_core.train import Schedule, train_pack
from tests.lora_core.support import make_point

N, M, RANK, ROWS, STEPS = 4, 16, 2, 8, 5
ALPHAS = (1 / 4, 1, 4, 16, 64, 256)
SHAPES = [(N, M), (M, N)]

Losses = list[float]
"""Of one run: before each of the five steps, and after the last."""

Runner = Callable[[Sequence[Point], str, tuple[int, int]], list[Losses]]


def base_point(optimizer: str) -> Point:
    """The run at alpha = 1."""
    return make_point(rank=RANK, scaling=1 / RANK, lr=0.1, weight_decay=0.0 if optimizer == "sgd" else 0.01)


def published_rule(point: Point, alpha: float) -> Point:
    lr = point.a.lr / alpha
    return replace(
        point,
        scaling=point.scaling * alpha,
        init_scale=point.init_scale / math.sqrt(alpha),
        a=replace(point.a, lr=lr),
        b=replace(point.b, lr=lr),
    )


def by_published_rule(optimizer: str) -> list[Point]:
    return [published_rule(base_point(optimizer), alpha) for alpha in ALPHAS]


def by_law(optimizer: str) -> list[Point]:
    return [regauge(base_point(optimizer), Gauge.of_alpha(alpha), LAWS[optimizer]) for alpha in ALPHAS]


def seeded(shape: tuple[int, int], alpha: float) -> tuple[loralib.Linear, Tensor, Tensor]:
    """loralib's layer, inputs and targets; what alpha is does not change the draws."""
    with torch.random.fork_rng(devices=[]):  # loralib draws from the global generator
        torch.manual_seed(0)
        layer = loralib.Linear(*shape, r=RANK, lora_alpha=alpha)
        return layer, torch.randn(ROWS, shape[0]), torch.randn(ROWS, shape[1])


def with_loralib(
    points: Sequence[Point], optimizer: str, shape: tuple[int, int], *, train_bias: bool = False
) -> list[Losses]:
    return [_with_loralib(point, optimizer, shape, train_bias=train_bias) for point in points]


def _with_loralib(point: Point, optimizer: str, shape: tuple[int, int], *, train_bias: bool) -> Losses:
    layer, x, y = seeded(shape, point.scaling * RANK)
    if not train_bias:
        loralib.mark_only_lora_as_trainable(layer)
    with torch.no_grad():
        layer.lora_A.mul_(point.init_scale)
    constants = {"lr": point.a.lr, "weight_decay": point.a.weight_decay}
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    stepper: torch.optim.Optimizer
    if optimizer == "sgd":
        stepper = torch.optim.SGD(trained, **constants)
    else:
        stepper = torch.optim.AdamW(trained, **constants, eps=point.a.eps)
    losses = []
    for _ in range(STEPS):
        stepper.zero_grad()
        loss = l1_loss(layer(x), y)
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    return [*losses, l1_loss(layer(x), y).item()]


def in_one_pack(points: Sequence[Point], optimizer: str, shape: tuple[int, int]) -> list[Losses]:
    layer, x, y = seeded(shape, 1.0)
    model = nn.Sequential(nn.Linear(*shape))
    with torch.no_grad():
        model[0].weight.copy_(layer.weight)
        model[0].bias.copy_(layer.bias)
    with LoraBank.attach(model, ["0"], [Member(point, seed=0) for point in points]) as bank:
        for k, point in enumerate(points):
            a_RI, b_RO = layer.lora_A.detach() * point.init_scale, layer.lora_B.detach().mT
            bank.load_adapter(k, {"0.lora_A": a_RI, "0.lora_B": b_RO})

        def losses_K(step: int) -> Tensor:
            outputs_KNO = model(x.repeat(len(points), 1)).view(len(points), ROWS, -1)
            return torch.stack([l1_loss(outputs_NO, y) for outputs_NO in outputs_KNO])

        stepper = PackOptimizer(bank, OptimizerConfig(optimizer))
        schedule = Schedule("constant", steps=STEPS)
        records = list(train_pack(bank, stepper, losses_K, start=0, stop=STEPS, schedule=schedule))
        rows = [record.losses for record in records] + [tuple(losses_K(STEPS).tolist())]
    return [list(column) for column in zip(*rows, strict=True)]


def one_by_one(points: Sequence[Point], optimizer: str, shape: tuple[int, int]) -> list[Losses]:
    return [in_one_pack([point], optimizer, shape)[0] for point in points]


RUNNERS = [with_loralib, one_by_one, in_one_pack]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("run", RUNNERS)
def test_sgd_gives_six_bit_identical_losses_by_the_published_rule(run: Runner, shape: tuple[int, int]):
    losses = run(by_published_rule("sgd"), "sgd", shape)
    assert len(losses) == 6
    assert all(each == losses[0] for each in losses)
    assert losses[0][-1] < losses[0][0]


def test_for_sgd_the_published_rule_is_the_law():
    assert by_published_rule("sgd") == by_law("sgd")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("run", RUNNERS)
def test_adamw_gives_different_losses_by_the_published_rule(run: Runner, shape: tuple[int, int]):
    losses = run(by_published_rule("adamw"), "adamw", shape)
    reference = losses[ALPHAS.index(1)]
    for alpha, each in zip(ALPHAS, losses, strict=True):
        if alpha != 1:
            assert abs(each[-1] / reference[-1] - 1) > 0.01, f"alpha {alpha}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("run", RUNNERS)
def test_adamw_gives_six_bit_identical_losses_by_the_law(run: Runner, shape: tuple[int, int]):
    losses = run(by_law("adamw"), "adamw", shape)
    assert len(losses) == 6
    assert all(each == losses[0] for each in losses)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_bank_trains_as_loralib_does(optimizer: str, shape: tuple[int, int]):
    """Up to rounding: they add the base product and the low-rank one in another order."""
    points = by_law(optimizer)
    theirs, solo, packed = (torch.tensor(run(points, optimizer, shape)) for run in RUNNERS)
    torch.testing.assert_close(solo, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(packed, theirs, rtol=1e-6, atol=0)


def test_a_bias_trained_along_breaks_the_published_check():
    """loralib freezes the weight and leaves the bias trained, with the lr that only A and B may have."""
    losses = with_loralib(by_published_rule("sgd"), "sgd", (N, M), train_bias=True)
    assert all(each != losses[0] for each in losses[1:])
