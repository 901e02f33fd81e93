"""Optimizers that are in the table, that are not, and that are made up, each found or refused without knowing it."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from lora_core.adapter import LoraBank, Member
from lora_core.conformance import same_bits
from lora_core.discovery import CONFIRMED_AT, Exponents, find_law
from lora_core.foreign import ForeignOptimizer
from lora_core.gauge import FactorSettings, Gauge, Point, regauge
from lora_core.laws import LAWS
from lora_core.optimizers import OptimizerConfig, PackOptimizer
from lora_core.seeds import generator
from lora_core.train import Schedule, batch_indices, train_pack
from lora_core.trajectory import record_trajectories
from tests.lora_core.support import TARGETS, Mlp

STEPS = 12
SAMPLES, BATCH = 64, 16


def runner(kind, *, warmup_steps=0):
    """Trains a point on a small network with that optimizer."""
    model = Mlp(torch.float32)
    x = torch.randn(SAMPLES, model.fc1.in_features, generator=generator("discovery samples"))
    labels = torch.randint(0, 5, (SAMPLES,), generator=generator("discovery labels"))

    def run(point, steps):
        def losses_K(batch):
            rows = batch_indices(SAMPLES, BATCH, batch, seed=0)
            return nn.functional.cross_entropy(model(x[rows]), labels[rows])[None]

        with LoraBank.attach(model, TARGETS, [Member(point, seed=0)]) as bank:
            schedule = Schedule("cosine", STEPS, warmup_steps)
            records = train_pack(bank, PackOptimizer(bank, kind), losses_K, start=0, stop=steps, schedule=schedule)
            return record_trajectories(bank, records)[0]

    return run


def make_point(lr, **changes):
    settings = FactorSettings(lr)
    return replace(Point(rank=4, scaling=2.0, init_scale=1.0, a=settings, b=settings), **changes)


def search(make, lr=0.01, *, point=None, warmup_steps=0, **arguments):
    kind = ForeignOptimizer(make)
    run = runner(kind, warmup_steps=warmup_steps)
    return find_law(run, point or make_point(lr), kind, steps=STEPS, **arguments)


# -- made up -----------------------------------------------------------------------------------------------------------


class Simple(torch.optim.Optimizer):
    """p -= lr x update(g), with the constants of a subclass."""

    def __init__(self, params, lr, **constants):
        super().__init__(params, {"lr": lr, **constants})

    def update(self, group, p):
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group.get("weight_decay", 0))
                    p.add_(self.update(group, p), alpha=-group["lr"])


class SignSgd(Simple):
    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, lr, weight_decay=weight_decay)

    def update(self, group, p):
        return p.grad.sign()


class Clipped(Simple):
    """Update clipped element by element, at a constant that can be set."""

    def __init__(self, params, lr=1e-3, limit=0.1):
        super().__init__(params, lr, limit=limit)

    def update(self, group, p):
        return p.grad.clamp(-group["limit"], group["limit"])


class ClippedForGood(Simple):
    """The same, at a constant that cannot."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr)

    def update(self, group, p):
        return p.grad.clamp(-1e-3, 1e-3)


class TwoConstants(Simple):
    """Gradients over their size plus eps, and steps no larger than `most`."""

    def __init__(self, params, lr=1e-3, eps=1e-3, most=1e-3):
        super().__init__(params, lr, eps=eps, most=most)

    def update(self, group, p):
        direction, most = p.grad / (p.grad.abs() + group["eps"]), group["most"] / max(group["lr"], 1e-9)
        return direction.clamp(-most, most)


class Redundant(Simple):
    """Only the product of its constants counts."""

    def __init__(self, params, lr=1e-3, one=0.1, other=0.1):
        super().__init__(params, lr, one=one, other=other)

    def update(self, group, p):
        return p.grad / (p.grad.abs() + group["one"] * group["other"])


class WithoutLr(Simple):
    def __init__(self, params, lr=1.0, stride=1e-2):
        super().__init__(params, lr, stride=stride)

    def update(self, group, p):
        return p.grad.sign() * (group["stride"] / group["lr"] if group["lr"] else 0.0)


class StrangeDecay(SignSgd):
    """Decay at a constant rate above a size of the weights, so it has a law without decay only."""

    def update(self, group, p):
        return p.grad.sign() + group["weight_decay"] * (p.abs() > 0.1)


class Noisy(SignSgd):
    def update(self, group, p):
        return p.grad + torch.randn(p.shape)


class Viewing(SignSgd):
    """Takes weights for contiguous, as those of a stock trainer are."""

    def update(self, group, p):
        return p.grad.view(-1).sign().view(p.shape)


class Closing(SignSgd):
    def step(self, closure):
        raise NotImplementedError


class Demanding(SignSgd):
    def __init__(self, params, lr, total_steps, closure_of, *, warmup=3):
        super().__init__(params, lr)


# -- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_row_of_every_optimizer_of_the_table_is_found(law):
    make = partial(getattr(torch.optim, law.kind), **law.fixed)
    found = search(make, 0.1 if law.degree == 1 else 0.01)
    expected = {name: power for name, power in law.powers.items() if name != "initial_accumulator_value"}  # 0
    assert found.powers == Exponents(law.lr_power, law.decay_power if law.decay else 0, expected), found.text
    assert (found.confirmed, found.alternatives, found.obstacle, found.nearest) == (CONFIRMED_AT, (), None, None)
    assert (found.weight_decay is not None) == (law.decay is not None)


def test_the_finding_is_said_in_the_words_of_the_law():
    found = search(torch.optim.Adam, point=make_point(0.01, clip_norm=0.05), warmup_steps=2)
    assert found.text == (
        "at alpha x k the same run has lr / sqrt(k), init_scale / sqrt(k), eps x sqrt(k), weight_decay x k, "
        "clip_norm x sqrt(k): bit-identical over 12 steps at k = 1/16, 1/4, 4, 16, 256"
    )
    assert found.telling == ("eps",)
    assert found.set_aside == {"betas": "refused when doubled, so a pure number"}
    said = json.loads(json.dumps(found.as_dict()))
    assert said["powers"] == {"lr_power": -1, "decay_power": 2, "powers": {"eps": 1}}
    assert (said["text"], said["runs"]) == (found.text, found.runs)


def test_a_floor_is_raised_until_it_makes_a_difference():
    found = search(torch.optim.Rprop)
    low, high = found.shifted["step_sizes"]
    assert low > 1e-6
    assert high / low == pytest.approx(5e7)


def test_radam_has_none_because_its_warm_up_is_of_another_degree():
    found = search(torch.optim.RAdam)
    assert found.powers is None
    assert found.text == "it has no law with half-integer exponents: the nearest, lr / k, parts at step 6"


def test_adafactors_hidden_floor_is_found_to_spoil_it():
    # Its first eps is None, so torch takes the precision of the weights: nothing that a gauge could move.
    found = search(torch.optim.Adafactor)
    assert found.powers is None
    assert found.nearest == Exponents(0, 0, {"eps": -1})


def test_sign_sgd_is_found():
    assert search(SignSgd).powers == Exponents(-1, 1)


def test_a_clipped_update_needs_the_power_of_a_gradient_for_its_limit():
    found = search(Clipped, 0.1)
    assert found.powers == Exponents(-2, 0, {"limit": 1})
    assert found.shifted == {"limit": 0.01}  # no gradient here reaches 0.1: a ceiling tells once it is low enough


def test_an_absolute_constant_that_cannot_be_set_leaves_none():
    found = search(ClippedForGood, 0.1)
    assert found.powers is None
    assert found.text.startswith("it has no law with half-integer exponents: the nearest, lr")


def test_two_constants_that_must_move_are_found_together():
    assert search(TwoConstants).powers == Exponents(-1, 0, {"eps": 1, "most": -1})


def test_exponents_that_do_as_well_are_all_named():
    found = search(Redundant)
    assert {tuple(each.powers.items()) for each in (found.powers, *found.alternatives)} == {
        (("one", 1),),
        (("other", 1),),
    }
    assert found.text.endswith(
        "So is each of these, and it is not known which one is meant: "
        "lr / sqrt(k), init_scale / sqrt(k), other x sqrt(k)"
    )


def test_a_learning_rate_that_makes_no_difference_is_left_alone():
    found = search(WithoutLr, 1.0)
    assert found.powers == Exponents(0, 0, {"stride": -1})
    assert found.set_aside == {"lr": "makes no difference here"}


def test_a_law_that_holds_only_without_weight_decay_is_no_law():
    found = search(StrangeDecay)
    assert (found.powers, found.without_decay, found.confirmed) == (None, Exponents(-1), ())
    assert "weight_decay" in found.text.partition("Without weight decay")[0]
    assert found.text.endswith("Without weight decay at alpha x k the same run has lr / sqrt(k), init_scale / sqrt(k)")


# -- what cannot be looked for -----------------------------------------------------------------------------------------


def test_training_that_is_not_deterministic_is_refused():
    found = search(Noisy)
    assert (found.powers, found.runs) == (None, 2)
    assert found.text == (
        "nothing can be found: training is not deterministic here: two runs of the same point part at step 1"
    )


def test_a_representative_that_diverges_proves_nothing():
    assert "choose another learning rate" in search(torch.optim.SGD, 1e30).text
    assert "choose another learning rate" in search(torch.optim.SGD, 0.0).text


def test_the_search_ends_after_the_runs_that_it_may_make():
    seen = []
    found = search(torch.optim.AdamW, most_runs=30, progress=lambda done, text: seen.append((done, text)))
    assert found.text == "nothing can be found: given up after 30 runs, as many as were allowed"
    assert [done for done, _ in seen] == list(range(30))
    assert seen[-1][1].startswith("k = 4: lr")


def test_runs_out_in_weight_decay_leave_what_holds_without_it():
    whole = search(SignSgd)
    found = search(SignSgd, most_runs=whole.runs - 1)
    assert (found.powers, found.without_decay) == (None, Exponents(-1))
    assert found.text.startswith("nothing can be found: given up")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Demanding, "Demanding must be makeable from parameters and lr alone; found that it needs total_steps, clos"),
        (torch.nn.Linear, "must be a subclass of torch.optim.Optimizer.*; found Linear"),
        ("adam", "must be a subclass of torch.optim.Optimizer.*; found adam"),
        (lambda params, rate=0.1: None, "must take a learning rate as lr; found the arguments rate"),
    ],
)
def test_what_is_no_optimizer_for_this_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        ForeignOptimizer(make)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(torch.optim.Adam, betas=(2.0, 2.0)), r"Adam refuses .*betas.*ValueError: Invalid beta"),
        (Closing, "Closing must step without arguments; found that it needs closure"),
        (lambda params, lr: [lr], "must return an optimizer with 4 groups; found a list"),
    ],
)
def test_a_constructor_that_refuses_the_representative_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        search(make)


def test_a_weight_decay_for_one_that_has_none_is_an_error():
    settings = FactorSettings(0.01, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"Rprop has no weight decay; found weight_decay=0\.1"):
        ForeignOptimizer(torch.optim.Rprop).group(settings)


# -- the optimizer -----------------------------------------------------------------------------------------------------


def test_constants_are_the_positive_floats_and_tuples_of_the_signature():
    assert ForeignOptimizer(torch.optim.SGD).constants == {}
    assert ForeignOptimizer(torch.optim.Rprop).constants == {"etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)}
    assert ForeignOptimizer(torch.optim.Adafactor).constants == {"eps": (1e-3,), "d": 1.0}
    group = ForeignOptimizer(torch.optim.Adafactor).group(FactorSettings(0.1, constants={"eps": (0.5,)}))
    assert group == {"lr": 0.1, "eps": (None, 0.5), "d": 1.0, "weight_decay": 0.0}


@pytest.mark.parametrize("gauge", [Gauge(1.0, 1.0), Gauge(2.0, 1.0)], ids=str)
def test_it_trains_as_the_optimizer_of_the_table_does(gauge):
    settings = FactorSettings(0.01, 0.1, {"eps": 1e-2})
    point = regauge(make_point(0.01, a=settings, b=settings), gauge, LAWS["adamw"])
    known, foreign = OptimizerConfig("adamw", kernel="foreach"), ForeignOptimizer(torch.optim.AdamW)
    one, other = (runner(kind)(point, STEPS) for kind in (known, foreign))
    assert same_bits(one, other)
    assert math.isfinite(float(one.losses[-1]))


def test_its_matrices_are_contiguous_as_in_a_stock_trainer():
    point = make_point(0.01)
    assert same_bits(*(runner(ForeignOptimizer(make))(point, STEPS) for make in (Viewing, SignSgd)))


class Assigning(torch.optim.Optimizer):
    """Follows signs of tall matrices and clamps wide ones, so it has no law; and sets `.data` where others write."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad.sign() if p.shape[0] > p.shape[1] else p.grad.clamp(-1e-3, 1e-3)
                p.data = p.data - group["lr"] * step


def test_an_optimizer_that_sets_data_trains_all_the_same():
    assert search(Assigning).powers is None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.optim.SparseAdam, "SparseAdam fails in its step: RuntimeError: SparseAdam does not support dense"),
        (
            type(
                "Bare", (torch.optim.Optimizer,), {"__init__": lambda self, params, lr: None, "step": lambda self: None}
            ),
            "Bare ",
        ),
    ],
)
def test_an_optimizer_that_cannot_step_is_refused_by_name(kind, message):
    with pytest.raises(ValueError, match=message):
        search(kind)
