"""How often the verdict errs: known twins and near-twins, really trained. Used by a test and by benchmarks/verdicts.py.

    symbol  meaning
    s       scaling
    wd      weight decay
    k       the factor on alpha between a representative and its twin; never a power of 4, so never bit-identical

A *case* is a representative drawn at random, its twins, and its near-twins: twins with one quantity multiplied by 1.01
or by 1.0001. All are trained in one pack with the representative's controls; those that come out as different are
heard again, with controls of their own.

The population, over a small ReLU network in float32 (every seventh case float64): SGD with and without momentum, Adam,
AdamW; rank 1 to 12; s, init scale, eps, schedule and, for half of them, clip norm at random; a third with
lr_B = 4 lr_A; k from 1/16 to 16. Learning rates reach from those that hardly learn to those whose one-ulp controls
part completely within 200 steps, and to SGD that blows up: its ReLUs die, or its loss is no number any more.

Weight decay is drawn so that it matters: where it does nothing, nothing can show that it is off. The share of the
weights that it takes each step, lr x wd, is 0.5% to 5%, which makes 1 to 10 over the run; 0.01% of that is 4 to 40
units in the last place of float32 a step. Adam's, which goes through its gradient, has no such share: there wd is
0.003 s to 0.1 s. One case in four has a hundredth of that or none, and no near-twins in weight decay. `weak_decay`
draws from the range between.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from lora_core.adapter import Member
from lora_core.gauge import Gauge, Point, regauge
from lora_core.laws import LAWS
from lora_core.optimizers import OptimizerConfig
from lora_core.train import Schedule
from lora_core.trajectory import THRESHOLD, Trajectory, Verdict, compare, control_of
from tests.lora_core.support import Pack, make_point

STEPS, CONTROLS = 200, 4
HEARING = 20
"""Steps after which a near-twin is mostly far outside already, so that its own controls need not be trained further."""
QUANTITIES = ("lr", "init scale", "weight decay", "alpha")
SIZES = (0.01, 0.0001)

CONFIGS = (
    OptimizerConfig("sgd"),
    OptimizerConfig("sgd", {"momentum": 0.9}),
    OptimizerConfig("adam"),
    OptimizerConfig("adamw"),
    OptimizerConfig("adamw"),
)
PACE = {"sgd": (0.01, 30.0), "adam": (1e-3, 1.0), "adamw": (1e-3, 1.0)}
"""lr in the gauge where s = 1."""


@dataclass(frozen=True)
class Case:
    """A representative, and how it is trained."""

    seed: int
    config: OptimizerConfig
    point: Point
    schedule: Schedule
    dtype: torch.dtype
    decays: bool

    @property
    def kinds(self) -> list[tuple[str, float]]:
        """What its near-twins have wrong, and by how much."""
        quantities = [name for name in QUANTITIES if self.decays or name != "weight decay"]
        return [(name, size) for name in quantities for size in SIZES]


@dataclass(frozen=True)
class Judged:
    """A twin (quantity None) or near-twin, and all that the verdict on it rests on."""

    case: Case
    quantity: str | None
    size: float
    representative: Trajectory
    run: Trajectory
    controls: tuple[Trajectory, ...]
    run_controls: tuple[Trajectory, ...] = ()

    def verdict(self, *, threshold: float = THRESHOLD, heard: bool = True) -> Verdict:
        """The verdict; that before it was heard again, if not `heard`."""
        eps = torch.finfo(self.case.dtype).eps
        own = self.run_controls if heard else ()
        return compare(self.representative, self.run, self.controls, twin_controls=own, eps=eps, threshold=threshold)


def draw_case(seed: int, *, share: tuple[float, float] = (1.0, 10.0), decays: bool | None = None) -> Case:
    """Draws a case; `share` is the range of lr x wd x steps."""
    draws = random.Random(seed)

    def log_uniform(low: float, high: float) -> float:
        return math.exp(draws.uniform(math.log(low), math.log(high)))

    config = CONFIGS[seed % len(CONFIGS)]
    decays = seed % 4 != 3 if decays is None else decays
    scaling = log_uniform(0.5, 8.0)
    root = math.sqrt(scaling)
    still = 1 - config.options.get("momentum", 0.0)  # momentum makes each step 1 / (1 - momentum) steps
    lr = log_uniform(*PACE[config.name]) * (still / scaling if config.name == "sgd" else 1 / root)
    decay = log_uniform(*share) * still / (lr * STEPS)
    if config.name == "adam":
        decay = log_uniform(0.003, 0.1) * scaling
    if not decays:
        decay *= draws.choice([0.0, 0.01])
    point = make_point(
        rank=draws.randint(1, 12),
        scaling=scaling,
        init_scale=log_uniform(0.25, 4.0) / root,
        lr=lr,
        lr_b=lr * draws.choice([1.0, 1.0, 4.0]),
        eps=log_uniform(1e-10, 1e-5) * root,
        weight_decay=decay,
        clip_norm=draws.choice([None, log_uniform(0.1, 2.0) * root]),
    )
    schedule = Schedule(draws.choice(["constant", "linear", "cosine"]), STEPS, draws.choice([0, 10]))
    dtype = torch.float64 if seed % 7 == 6 else torch.float32
    return Case(seed, config, point, schedule, dtype, decays)


def weak_decay(number: int, share: tuple[float, float], dtype: torch.dtype) -> Case:
    """A case of SGD or AdamW with that range of lr x wd x steps."""
    shares = [place for place, config in enumerate(CONFIGS) if config.name != "adam"]
    round_number, place = divmod(number, len(shares))
    return replace(draw_case(round_number * len(CONFIGS) + shares[place], share=share, decays=True), dtype=dtype)


def run_case(case: Case, *, twins: int, kinds: Sequence[tuple[str, float]] | None = None) -> Iterator[Judged]:
    """Trains a case and judges all of it: so many twins, and near-twins of those kinds (by default all its own)."""
    labels: list[tuple[str | None, float]] = [(None, 0.0)] * twins + list(case.kinds if kinds is None else kinds)
    draws = random.Random(f"gauges of {case.seed}")
    points = [_off(_twin(case, draws), quantity, 1 + size) for quantity, size in labels]
    eps = torch.finfo(case.dtype).eps

    def controls_of(point: Point) -> list[Member]:
        return [control_of(Member(point, case.seed), seed, eps=eps) for seed in range(1, CONTROLS + 1)]

    first, *rest = _train(
        case,
        [
            Member(case.point, case.seed),
            *controls_of(case.point),
            *(Member(point, case.seed) for point in points),
        ],
    )
    judged = [
        Judged(case, *label, first, run, tuple(rest[:CONTROLS]))
        for label, run in zip(labels, rest[CONTROLS:], strict=True)
    ]
    # Own controls that end early make the envelope infinite from there on: who is outside before that is out.
    undecided = [n for n, each in enumerate(judged) if each.verdict().kind == "different"]
    for steps in (HEARING, STEPS):
        own = _train(case, [member for n in undecided for member in controls_of(points[n])], steps)
        for place, n in enumerate(undecided):
            judged[n] = replace(judged[n], run_controls=own[place * CONTROLS : (place + 1) * CONTROLS])
        undecided = [n for n in undecided if judged[n].verdict().kind != "different"]
    yield from judged


def _train(case: Case, members: list[Member], steps: int = STEPS) -> tuple[Trajectory, ...]:
    if not members:
        return ()
    return Pack(members, case.config, dtype=case.dtype, schedule=case.schedule).trajectories(0, steps)


def _twin(case: Case, draws: random.Random) -> Point:
    gauge = Gauge.of_alpha(2 ** draws.uniform(-4, 4))
    assert not gauge.exact_in_binary
    return regauge(case.point, gauge, LAWS[case.config.name])


def _off(point: Point, quantity: str | None, factor: float) -> Point:
    if quantity is None:
        return point
    if quantity in ("alpha", "init scale"):
        name = {"alpha": "scaling", "init scale": "init_scale"}[quantity]
        return replace(point, **{name: getattr(point, name) * factor})
    name = {"lr": "lr", "weight decay": "weight_decay"}[quantity]
    a, b = (replace(each, **{name: getattr(each, name) * factor}) for each in (point.a, point.b))
    return replace(point, a=a, b=b)
