"""Why a twin is different: found by training it again with suspects removed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapter import Member
from lora_core.causes import Cause, find_cause, misplaced, suspected, without_law
from lora_core.gauge import Gauge, Point, regauge
from lora_core.laws import LAWS
from lora_core.optimizers import OptimizerConfig
from lora_core.train import batch_indices
from lora_core.trajectory import Trajectory, Verdict, compare, control_of
from tests.lora_core.support import BATCH, SAMPLES, TARGETS, Mlp, Pack, make_point, samples

STEPS, CONTROLS = 40, 4
GAUGE = Gauge.of_alpha(16)
POINT = make_point(lr=2e-2, eps=1e-3, weight_decay=0.5, clip_norm=0.16)
TWIN = regauge(POINT, GAUGE, LAWS["adamw"])


def factors(point: Point, **changes: object) -> Point:
    return replace(point, a=replace(point.a, **changes), b=replace(point.b, **changes))


EPS_LEFT = factors(TWIN, constants=POINT.a.constants)
DECAY_LEFT = factors(TWIN, weight_decay=POINT.a.weight_decay)
BOTH_LEFT = factors(EPS_LEFT, weight_decay=POINT.a.weight_decay)

# -- arithmetic --------------------------------------------------------------------------------------------------------


def said(twin: Point, point: Point = POINT, law: str = "adamw", gauge: Gauge = GAUGE) -> list[str]:
    return [str(each) for each in misplaced(point, twin, LAWS[law], gauge)]


def test_a_twin_has_nothing_misplaced():
    assert said(TWIN) == []
    for k in (2.0, 3.0, 0.7):
        gauge = Gauge.of_alpha(k)
        assert said(regauge(POINT, gauge, LAWS["adamw"]), gauge=gauge) == []


@pytest.mark.parametrize(
    ("twin", "expected"),
    [
        (EPS_LEFT, ["eps is not scaled: required 0.004, found 0.001"]),
        (DECAY_LEFT, ["weight decay is not scaled: required 2, found 0.5"]),
        (replace(TWIN, clip_norm=0.16), ["clip norm is not scaled: required 0.64, found 0.16"]),
        (replace(TWIN, clip_norm=None), ["clip norm is off: required 0.64, found none"]),
        (replace(TWIN, init_scale=1.0), ["init scale is not scaled: required 0.25, found 1"]),
        (factors(TWIN, lr=POINT.a.lr / 16), ["lr is off: required 0.005, found 0.00125"]),
        (replace(TWIN, b=replace(TWIN.b, lr=0.02)), ["lr of B is not scaled: required 0.005, found 0.02"]),
        (replace(TWIN, scaling=33.0), ["scaling is off: required 32, found 33"]),
        (replace(TWIN, rank=8), ["rank is off: required 4, found 8"]),
        (factors(TWIN, lr=TWIN.a.lr * (1 + 1e-8)), ["lr is off: required 0.005, found 0.005"]),
    ],
)
def test_what_is_misplaced_is_said_in_words(twin, expected):
    assert said(twin) == expected


def test_everything_misplaced_is_said_at_once_and_can_be_put_right():
    wrong = misplaced(POINT, replace(BOTH_LEFT, clip_norm=0.16), LAWS["adamw"], GAUGE)
    assert [each.name for each in wrong] == ["clip norm not scaled", "weight decay not scaled", "eps not scaled"]
    mended = replace(BOTH_LEFT, clip_norm=0.16)
    for each in wrong:
        mended = each.put_right(mended)
    assert mended == TWIN


def test_what_the_optimizer_does_not_read_is_passed_over():
    twin = regauge(POINT, GAUGE, LAWS["sgd"])
    assert said(factors(twin, constants={"eps": 7.0}), law="sgd") == []


def test_the_two_factors_are_told_apart_where_they_differ():
    point, gauge = replace(POINT, clip_norm=None), Gauge(4.0, 2.0)
    twin = factors(regauge(point, gauge, LAWS["adamw"]), lr=POINT.a.lr)
    assert said(twin, point, gauge=gauge) == [
        "lr of A is not scaled: required 0.005, found 0.02",
        "lr of B is not scaled: required 0.01, found 0.02",
    ]


def test_constants_that_are_pairs_are_compared_too():
    point = make_point(constants={"step_sizes": (1e-6, 50.0)})
    twin = factors(regauge(point, GAUGE, LAWS["rprop"]), constants=point.a.constants)
    assert said(twin, point, "rprop") == ["step sizes is not scaled: required (2.5e-07, 12.5), found (1e-06, 50)"]


# -- elimination over a pack -------------------------------------------------------------------------------------------


def train(point: Point) -> Trajectory:
    return train_member(Member(point, 7))


def train_member(member: Member) -> Trajectory:
    return Pack([member], OptimizerConfig("adamw")).trajectories(0, STEPS)[0]


def controls_of(point: Point) -> list[Trajectory]:
    return [train_member(control_of(Member(point, 7), seed)) for seed in range(CONTROLS)]


@pytest.fixture(scope="module")
def verdict_of():
    one, controls = train(POINT), controls_of(POINT)
    return lambda twin: compare(one, train(twin), controls)


def cause_of(verdict_of, twin: Point) -> Cause:
    assert verdict_of(twin).kind == "different"
    remedies = {each.name: each.put_right for each in misplaced(POINT, twin, LAWS["adamw"], GAUGE)}
    return find_cause(verdict_of, remedies, twin)


@pytest.mark.parametrize(
    ("twin", "name"), [(EPS_LEFT, "eps not scaled"), (DECAY_LEFT, "weight decay not scaled")], ids=["eps", "decay"]
)
def test_one_constant_left_behind_is_the_cause(verdict_of, twin, name):
    cause = cause_of(verdict_of, twin)
    assert cause == Cause("confirmed", (name,), reruns=1)
    assert cause.text == f"The cause is {name}: with that alone put right, the twin is no longer different."


def test_a_clip_norm_left_behind_is_the_cause(verdict_of):
    assert cause_of(verdict_of, replace(TWIN, clip_norm=0.16)).names == ("clip norm not scaled",)


def test_two_constants_left_behind_are_the_causes_together(verdict_of):
    cause = cause_of(verdict_of, BOTH_LEFT)
    assert cause == Cause("confirmed", ("weight decay not scaled", "eps not scaled"), reruns=3)
    assert cause.text == (
        "The causes are weight decay not scaled and eps not scaled: only with all of them put right, the twin is no "
        "longer different."
    )


def test_a_constant_that_is_off_but_does_not_matter_is_no_cause(verdict_of):
    """A clip norm ten times the largest gradient never clips, wherever it is."""
    twin = factors(replace(TWIN, clip_norm=None), weight_decay=POINT.a.weight_decay)
    loose = replace(POINT, clip_norm=1e3)
    one, controls = train(loose), controls_of(loose)
    twin = replace(twin, clip_norm=2e3)
    wrong = misplaced(loose, twin, LAWS["adamw"], GAUGE)
    assert [each.name for each in wrong] == ["clip norm off", "weight decay not scaled"]
    cause = find_cause(
        lambda each: compare(one, train(each), controls), {each.name: each.put_right for each in wrong}, twin
    )
    assert cause.names == ("weight decay not scaled",)


# -- elimination over a naive trainer ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Naive:
    """What people write: LoRA by hand, stock torch, a classifier head that is trained as well.

    Attributes:
        point: of the adapter.
        optimizer: a class of torch.optim.
        head_lr: of the classifier head: None leaves it frozen, "shared" gives it the adapter's.
        clip: over all there is to train, with whatever shares it (as stock trainers do), or over the adapter alone.
        neighbour: a second adapter, on another seed, that trains beside it at a point of its own.
        order: seed of the data order.
        perturbation: seed of the control's one-ulp perturbation.
    """

    point: Point
    optimizer: str = "AdamW"
    head_lr: float | str | None = None
    clip: str = "adapter"
    neighbour: Point | None = None
    order: int = 0
    perturbation: int | None = None


class NaiveAdapter:
    def __init__(self, model: Mlp, point: Point, seed: int, perturbation: int | None) -> None:
        self.model, self.point = model, point
        draws, self.a, self.b = torch.Generator().manual_seed(seed), {}, {}
        for name in TARGETS:
            base = getattr(model, name)
            a = torch.randn(point.rank, base.in_features, generator=draws) / point.rank * point.init_scale
            if perturbation is not None:
                coins = torch.randint(0, 2, a.shape, generator=torch.Generator().manual_seed(perturbation))
                a = torch.nextafter(a, torch.where(coins == 0, torch.inf, -torch.inf))
            self.a[name], self.b[name] = nn.Parameter(a), nn.Parameter(torch.zeros(base.out_features, point.rank))

    @property
    def groups(self) -> list[dict[str, object]]:
        eps = self.point.a.constants["eps"]
        return [
            {"params": [*each.values()], "lr": settings.lr, "eps": eps, "weight_decay": settings.weight_decay}
            for each, settings in ((self.a, self.point.a), (self.b, self.point.b))
        ]

    def parameters(self) -> list[nn.Parameter]:
        return [*self.a.values(), *self.b.values()]

    def __call__(self, x: Tensor) -> Tensor:
        for name in TARGETS:
            low = self.point.scaling * (x @ self.a[name].T) @ self.b[name].T
            x = torch.relu(getattr(self.model, name)(x) + low)
        return self.model.head(x)

    def norms(self) -> list[float]:
        with torch.no_grad():
            return [
                float((self.point.scaling * self.b[name].double() @ self.a[name].double()).norm()) for name in TARGETS
            ]


def train_naive(run: Naive) -> Trajectory:
    model, (x, y) = Mlp().requires_grad_(False), samples()
    adapter = NaiveAdapter(model, run.point, 3, run.perturbation)
    others, groups = [], adapter.groups
    if run.neighbour is not None:
        others.append(NaiveAdapter(model, run.neighbour, 4, None))
        groups += others[0].groups
    head = [*model.head.requires_grad_().parameters()] if run.head_lr is not None else []
    if head:
        lr = run.point.a.lr if run.head_lr == "shared" else run.head_lr
        groups.append({"params": head, "lr": lr, "weight_decay": 0.0})
    optimizer = getattr(torch.optim, run.optimizer)(groups)
    losses, norms = [], []
    for step in range(STEPS):
        rows = batch_indices(SAMPLES, BATCH, step, seed=run.order)
        optimizer.zero_grad()
        own = nn.functional.cross_entropy(adapter(x[rows]), y[rows])
        (own + sum(nn.functional.cross_entropy(each(x[rows]), y[rows]) for each in others)).backward()
        if run.clip == "everything":
            every = [*adapter.parameters(), *head, *(each for other in others for each in other.parameters())]
            nn.utils.clip_grad_norm_(every, run.point.clip_norm)
        else:
            norm = torch.stack([each.grad.square().sum() for each in adapter.parameters()]).sum().sqrt()
            for each in adapter.parameters():
                each.grad.mul_((run.point.clip_norm / norm).clamp(max=1.0))
        optimizer.step()
        losses.append(own.item())
        norms.append(adapter.norms())
    return Trajectory(torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64))


@dataclass(frozen=True)
class Pair:
    """A representative and its twin; what is changed in both for a remedy is changed together."""

    one: Naive
    twin: Naive

    def both(self, **changes: object) -> Pair:
        return Pair(replace(self.one, **changes), replace(self.twin, **changes))

    def verdict(self) -> Verdict:
        members = [control_of(Member(self.one.point, 0), seed) for seed in range(CONTROLS)]
        controls = [
            train_naive(replace(self.one, point=each.point, perturbation=each.perturbation_seed)) for each in members
        ]
        return compare(train_naive(self.one), train_naive(self.twin), controls)


NAIVE_POINT = make_point(lr=2e-2, eps=1e-6, weight_decay=0.03, clip_norm=0.16)
NAIVE = Pair(Naive(NAIVE_POINT), Naive(regauge(NAIVE_POINT, GAUGE, LAWS["adamw"])))
REMEDIES = {
    "clip shared": lambda pair: pair.both(clip="adapter"),
    "head shares the lr": lambda pair: pair.both(head_lr=None if pair.one.head_lr is None else 2e-2),
}


def test_the_naive_trainer_obeys_the_law():
    assert NAIVE.verdict().kind == "bit-identical"
    assert NAIVE.both(head_lr=2e-2).verdict().kind == "bit-identical"
    assert NAIVE.both(neighbour=NAIVE_POINT).verdict().kind == "bit-identical"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"clip": "everything", "head_lr": 2e-2}, ("clip shared",)),
        ({"clip": "everything", "neighbour": NAIVE_POINT}, ("clip shared",)),
        ({"head_lr": "shared"}, ("head shares the lr",)),
        ({"clip": "everything", "head_lr": "shared"}, ("clip shared", "head shares the lr")),
    ],
    ids=["clip with the head", "clip with a pack-mate", "lr with the head", "both with the head"],
)
def test_what_shares_with_the_adapter_is_the_cause(changes, names):
    pair = NAIVE.both(**changes)
    assert pair.verdict().kind == "different"
    assert find_cause(Pair.verdict, REMEDIES, pair) == Cause("confirmed", names, reruns=2 if len(names) == 1 else 3)


def test_an_optimizer_without_a_law_is_named():
    lawless = NAIVE.both(optimizer="RAdam")
    assert lawless.verdict().kind == "different"
    cause = without_law("radam")
    assert cause.standing == "no law"
    assert cause.text.startswith("The twin need not be the same: radam has no alpha equivalence: its warm-up phase")
    remedies = REMEDIES | {"optimizer without a law": lambda pair: pair.both(optimizer="AdamW")}
    assert find_cause(Pair.verdict, remedies, lawless).names == ("optimizer without a law",)
    assert without_law("adamw") is None


def test_what_no_suspect_explains_stays_unknown():
    pair = replace(NAIVE, twin=replace(NAIVE.twin, order=1)).both(clip="everything", head_lr="shared")
    cause = find_cause(Pair.verdict, REMEDIES, pair)
    assert cause == Cause("unknown", cleared=("clip shared", "head shares the lr"), reruns=3)
    assert cause.text == (
        "The cause is unknown: the twin stays different with clip shared and head shares the lr put right, alone and "
        "together."
    )
    assert "nothing else is suspected" in find_cause(Pair.verdict, {}, pair).text


# -- elimination itself ------------------------------------------------------------------------------------------------


def judge(cured_by: list[set[str]]):
    def verdict_of(mended: frozenset[str]) -> Verdict:
        cured = any(cure <= mended for cure in cured_by)
        return Verdict("identical up to rounding" if cured else "different", 1.0 if cured else 1e3)

    return verdict_of


def removing(*names: str):
    return {name: lambda mended, name=name: mended | {name} for name in names}


def test_two_suspects_that_each_help_alone_are_both_named():
    cause = find_cause(judge([{"eps"}, {"clip"}]), removing("lr", "eps", "clip"), frozenset())
    assert (cause.names, cause.alternatives, cause.reruns) == (("eps",), (("clip",),), 3)
    assert "or equally with clip put right" in cause.text


def test_the_smallest_set_that_helps_is_the_cause():
    cause = find_cause(judge([{"lr", "clip"}]), removing("lr", "eps", "clip"), frozenset())
    assert (cause.names, cause.alternatives) == (("lr", "clip"), ())


@pytest.mark.parametrize("needed", ["abcdefgh", "aceg", "h", "ab"])
def test_many_suspects_are_put_back_one_by_one(needed):
    cause = find_cause(judge([set(needed)]), removing(*"abcdefgh"), frozenset())
    assert (cause.standing, cause.names, cause.reruns) == ("confirmed", tuple(needed), 9 if len(needed) > 1 else 8)


def test_many_suspects_that_are_none_take_one_rerun():
    cause = find_cause(judge([]), removing(*"abcdefgh"), frozenset())
    assert (cause.standing, cause.reruns) == ("unknown", 1)
    assert cause.text.endswith("a, b, c, d, e, f, g and h put right, all together.")


def test_without_reruns_a_cause_is_only_suspected():
    assert suspected(["eps not scaled"]).text == (
        "The suspected cause is eps not scaled; nothing was trained again to confirm it."
    )
    assert suspected(["eps", "lr"]).text.startswith("The suspected causes are eps and lr;")
    assert suspected([]).standing == "unknown"
