"""Twins really trained, and the verdict on them."""

import math
from dataclasses import replace

import pytest
import torch

from lora_core.adapter import Member
from lora_core.gauge import Gauge, Point, regauge
from lora_core.laws import LAWS, law_of
from lora_core.optimizers import OptimizerConfig
from lora_core.trajectory import Trajectory, align, compare, control_of
from tests.lora_core.support import TARGETS, Pack, make_point

STEPS = 40
CONFIGS = [
    OptimizerConfig("sgd"),
    OptimizerConfig("sgd", {"momentum": 0.9}),
    OptimizerConfig("adam"),
    OptimizerConfig("adamw"),
]
REPRESENTATIVE = make_point(rank=4, scaling=2.0, init_scale=1.5, lr=2e-2, eps=1e-6, weight_decay=0.03, clip_norm=0.16)
by_optimizer = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join([config.name, *config.options]))
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def run(point: Point, config: OptimizerConfig, *, dtype=torch.float32, perturbation_seed=None) -> Trajectory:
    return train(point, config, dtype=dtype, perturbation_seed=perturbation_seed)[0]


def train(point: Point, config: OptimizerConfig, *, dtype=torch.float32, perturbation_seed=None):
    pack = Pack([Member(point, 7, perturbation_seed)], config, dtype=dtype)
    return pack.trajectories(0, STEPS)[0], pack


def controls(point: Point, config: OptimizerConfig, *, dtype=torch.float32) -> list[Trajectory]:
    members = [control_of(Member(point, 7), seed, eps=torch.finfo(dtype).eps) for seed in range(4)]
    return [run(member.point, config, dtype=dtype, perturbation_seed=member.perturbation_seed) for member in members]


# -- the law, trained --------------------------------------------------------------------------------------------------


def representative(config: OptimizerConfig) -> Point:
    lr = 0.3 if config.name == "sgd" else REPRESENTATIVE.a.lr
    return replace(REPRESENTATIVE, a=replace(REPRESENTATIVE.a, lr=lr), b=replace(REPRESENTATIVE.b, lr=lr))


@by_dtype
@by_optimizer
@pytest.mark.parametrize("k", [1 / 16, 1 / 4, 4, 16])
def test_twins_of_power_four_are_bit_identical(config, dtype, k):
    point = representative(config)
    twin = regauge(point, Gauge.of_alpha(k), LAWS[config.name])
    assert twin.scaling == 2.0 * k
    (one, one_pack), (other, other_pack) = (train(each, config, dtype=dtype) for each in (point, twin))
    assert torch.equal(one.losses, other.losses)
    assert torch.equal(one.update_norms, other.update_norms)
    for name in TARGETS:
        update_OI, twin_update_OI = (updates(pack)[name] for pack in (one_pack, other_pack))
        assert update_OI.any()
        assert torch.equal(update_OI, twin_update_OI)
    assert compare(one, other, []).kind == "bit-identical"


def updates(pack: Pack) -> dict[str, torch.Tensor]:
    """s B A of member 0, layer by layer."""
    tensors, s = pack.bank.adapter(0), pack.bank.members[0].point.scaling
    return {name: s * (tensors[f"{name}.lora_B"].mT @ tensors[f"{name}.lora_A"]) for name in TARGETS}


@by_dtype
@by_optimizer
@pytest.mark.parametrize("factors", [(2.0, 1.0), (1.0, 2.0), (4.0, 0.5)])
def test_two_parameter_twins_of_powers_of_two_are_bit_identical(config, dtype, factors):
    point = representative(config)
    point = replace(point, clip_norm=None, b=replace(point.b, lr=2 * point.b.lr))
    twin = regauge(point, Gauge(*factors), LAWS[config.name])
    assert twin.a.lr != point.a.lr or twin.b.lr != point.b.lr
    one, other = run(point, config, dtype=dtype), run(twin, config, dtype=dtype)
    assert compare(one, other, []).kind == "bit-identical"


@by_optimizer
def test_twins_over_a_bfloat16_model_are_bit_identical(config):
    point = representative(config)
    twin = regauge(point, Gauge.of_alpha(4), LAWS[config.name])
    one, other = (run(each, config, dtype=torch.bfloat16) for each in (point, twin))
    assert compare(one, other, []).kind == "bit-identical"


@by_optimizer
def test_the_clip_of_these_runs_does_clip(config):
    point = representative(config)
    assert not torch.equal(run(point, config).losses, run(replace(point, clip_norm=None), config).losses)


@pytest.mark.parametrize("constant", ["eps", "weight_decay"])
def test_a_constant_left_behind_makes_a_difference(constant):
    config = OptimizerConfig("adamw")
    point = make_point(scaling=2.0, init_scale=1.5, lr=2e-2, eps=1e-3, weight_decay=0.03)
    twin = regauge(point, Gauge.of_alpha(16), LAWS["adamw"])
    left = {"eps": {"constants": point.a.constants}, "weight_decay": {"weight_decay": point.a.weight_decay}}[constant]
    wrong = replace(twin, a=replace(twin.a, **left), b=replace(twin.b, **left))
    one = run(point, config)
    assert compare(one, run(twin, config), []).kind == "bit-identical"
    assert compare(one, run(wrong, config), controls(point, config)).kind == "different"


@by_optimizer
def test_a_twin_that_doubles_alpha_is_identical_up_to_rounding(config):
    point = representative(config)
    twin = regauge(point, Gauge.of_alpha(2), LAWS[config.name])
    one = run(point, config)
    verdict = compare(one, run(twin, config), controls(point, config))
    assert verdict.kind == "identical up to rounding"
    assert 0 < verdict.max_ratio < 10
    assert verdict.first_step is None


@by_optimizer
def test_a_learning_rate_off_by_one_percent_is_different(config):
    point = representative(config)
    twin = regauge(point, Gauge.of_alpha(4), LAWS[config.name])
    off = replace(twin, a=replace(twin.a, lr=twin.a.lr * 1.01), b=replace(twin.b, lr=twin.b.lr * 1.01))
    one = run(point, config)
    verdict = compare(one, run(off, config), controls(point, config))
    assert verdict.kind == "different"
    assert verdict.max_ratio > 100
    assert verdict.first_step == 2, "the warm-up's first step has lr 0, its second is the first that moves"


def test_the_published_rule_for_sgd_is_different_under_adamw():
    one, config = run(REPRESENTATIVE, OptimizerConfig("adamw")), OptimizerConfig("adamw")
    published = regauge(REPRESENTATIVE, Gauge.of_alpha(4), LAWS["sgd"])
    assert published.a.lr == REPRESENTATIVE.a.lr / 4
    verdict = compare(one, run(published, config), controls(REPRESENTATIVE, config))
    assert verdict.kind == "different"
    assert verdict.first_step == 2
    law = regauge(REPRESENTATIVE, Gauge.of_alpha(4), law_of("adamw"))
    assert compare(one, run(law, config), []).kind == "bit-identical"


def test_controls_packed_together_give_the_verdicts_of_controls_run_alone():
    config = OptimizerConfig("adamw")
    pack = Pack([Member(REPRESENTATIVE, 7, seed) for seed in range(4)], config)
    packed = pack.trajectories(0, STEPS)
    one = run(REPRESENTATIVE, config)
    twin = run(regauge(REPRESENTATIVE, Gauge.of_alpha(2), LAWS["adamw"]), config)
    assert compare(one, twin, packed).kind == "identical up to rounding"


def test_a_control_run_moves_every_constant_by_one_unit_in_the_last_place():
    point = replace(REPRESENTATIVE, b=replace(REPRESENTATIVE.b, lr=0.08))
    found = [control_of(Member(point, 7), seed) for seed in range(8)]
    assert {member.perturbation_seed for member in found} == set(range(8))
    assert {member.seed for member in found} == {7}
    for name in ("scaling", "init_scale", "clip_norm"):
        factors = {getattr(member.point, name) / getattr(point, name) for member in found}
        assert sorted(factors) == pytest.approx([1 - 2**-23, 1 + 2**-23], rel=1e-12)
    for name in ("lr", "weight_decay", "eps"):
        factors = {getattr(member.point.a, name) / getattr(point.a, name) for member in found}
        assert sorted(factors) == pytest.approx([1 - 2**-23, 1 + 2**-23], rel=1e-12)
    assert all(member.point.a.weight_decay == member.point.b.weight_decay for member in found), "equal stays equal"
    double = control_of(Member(point, 7), 0, eps=2**-52).point.scaling / point.scaling
    assert abs(double - 1) == pytest.approx(2**-52, rel=0.6)
    assert control_of(Member(replace(point, clip_norm=None), 7), 0).point.clip_norm is None
    assert control_of(Member(point, 7), 3) == control_of(Member(point, 7), 3)


# -- the verdict's own arithmetic --------------------------------------------------------------------------------------


def trajectory(*losses: float, norms: tuple[float, ...] | None = None) -> Trajectory:
    columns = norms if norms is not None else (1.0,) * len(losses)
    return Trajectory(torch.tensor(losses, dtype=torch.float64), torch.tensor(columns, dtype=torch.float64)[:, None])


def test_the_envelope_is_the_running_maximum_of_the_controls_over_a_floor():
    base, control = trajectory(2.0, 2.0, 2.0), trajectory(2.0, 2.02, 2.0)
    verdict = compare(base, trajectory(2.0, 2.0, 2.04), [control], eps=0.0)
    assert verdict.kind == "identical up to rounding"
    assert verdict.max_ratio == pytest.approx(0.02 / 0.01)
    assert compare(base, trajectory(2.02, 2.0, 2.0), [control], eps=1e-3).max_ratio == pytest.approx(0.01 / 1e-3)
    late = compare(base, trajectory(2.0, 2.0, 2.04), [control, trajectory(2.0, 2.04, 2.0)], eps=0.0)
    assert late.max_ratio == pytest.approx(1.0)


def test_a_verdict_names_the_first_step_outside_the_envelope():
    base, control = trajectory(1.0, 1.0, 1.0, 1.0), trajectory(1.0, 1.01, 1.01, 1.01)
    verdict = compare(base, trajectory(1.0, 1.05, 1.2, 1.5), [control], eps=0.0)
    assert (verdict.kind, verdict.first_step) == ("different", 3)
    assert verdict.max_ratio == pytest.approx(50)
    assert compare(base, trajectory(1.0, 1.05, 1.2, 1.5), [control], eps=0.0, threshold=60).first_step is None


def test_each_quantity_has_its_own_envelope():
    base = trajectory(1.0, 1.0, norms=(1.0, 1.0))
    control = trajectory(1.0, 1.5, norms=(1.0, 1.0))
    verdict = compare(base, trajectory(1.0, 1.0, norms=(1.0, 1.01)), [control])
    assert (verdict.kind, verdict.first_step) == ("different", 2)


def test_an_update_norm_of_zero_has_a_sensible_deviation():
    base = trajectory(1.0, 1.0, norms=(0.0, 1.0))
    near = trajectory(1.0, 1.0, norms=(0.0, 1.0 + 1e-8))
    assert compare(base, near, [base]).kind == "identical up to rounding"
    verdict = compare(base, trajectory(1.0, 1.0, norms=(1e-30, 1.0)), [near])
    assert (verdict.kind, verdict.first_step) == ("different", 1)
    assert math.isfinite(verdict.max_ratio)


def test_equal_patterns_of_non_finite_values_count_as_equal():
    base = trajectory(1.0, math.inf, math.nan)
    assert compare(base, trajectory(1.0, math.inf, math.nan), []).kind == "bit-identical"
    near = trajectory(1.0 + 1e-8, math.inf, math.nan)
    assert compare(base, near, [base]).kind == "identical up to rounding"


@pytest.mark.parametrize("last", [(1.0, math.nan), (1.0, 1.0), (-1e9, math.nan)])
def test_a_run_that_blows_up_is_different_from_one_that_does_not(last):
    base = trajectory(1.0, math.inf, math.nan)
    for one, other in ((base, trajectory(1.0, *last)), (trajectory(1.0, *last), base)):
        verdict = compare(one, other, [one])
        assert (verdict.kind, verdict.max_ratio) == ("different", math.inf)


@pytest.mark.parametrize("last", [(math.inf, math.nan), (1e300, 5.0), (math.nan, math.nan), (-1e15, 1.0)])
def test_nothing_is_compared_once_both_losses_are_beyond_all_bounds(last):
    # Overflow comes a step sooner in one gauge than in another, and freezes a run before it can be seen in its loss.
    base = trajectory(1.0, 1e13, math.nan, norms=(1.0, 2.0, 2.0))
    twin = trajectory(1.0, *last, norms=(1.0, 3.0, 4.0))
    assert compare(base, twin, []).kind == "bit-identical"
    assert compare(base, twin, []).compared_steps == 1
    verdict = compare(base, trajectory(1.01, *last), [base])
    assert (verdict.kind, verdict.first_step) == ("different", 1)


def test_losses_that_are_large_from_the_start_are_compared():
    base = trajectory(3e12, 2.5e12, 2e12, norms=(0.0, 1.0, 2.0))
    verdict = compare(base, trajectory(3e12, 2.9e12, 1.2e12, norms=(0.0, 0.5, 5.0)), [base])
    assert (verdict.kind, verdict.first_step, verdict.compared_steps) == ("different", 2, 3)


def test_a_run_that_ended_early_is_different_from_one_that_went_on():
    base = trajectory(1.0, 1.0, 1.0)
    verdict = compare(base, trajectory(1.0, 1.0), [base])
    assert (verdict.kind, verdict.first_step, verdict.max_ratio) == ("different", 3, math.inf)


def test_where_a_control_diverges_rounding_may_do_so_too():
    base, twin = trajectory(1.0, 1.0, 1.0), trajectory(1.0, 1.0, math.inf)
    assert compare(base, twin, [base]).kind == "different"
    for control in (trajectory(1.0, 1.0, math.nan), trajectory(1.0, 1.0)):
        verdict = compare(base, twin, [base, control])
        assert (verdict.kind, verdict.max_ratio) == ("identical up to rounding", 1.0)
        assert compare(base, trajectory(1.0, 1.01, math.inf), [base, control]).first_step == 2


def test_a_verdict_says_where_the_runs_part_and_how_far():
    base, control = trajectory(2.0, 2.0, 2.0, 2.0), trajectory(2.0, 2.0, 2.02, 2.0)
    verdict = compare(base, trajectory(2.0, 2.002, 2.0, 3.0), [control], eps=1e-3)
    assert (verdict.kind, verdict.first_difference, verdict.first_step) == ("different", 2, 4)
    assert verdict.max_deviation == pytest.approx(0.5)
    assert verdict.envelope == pytest.approx(1e-3 + 0.01)
    assert verdict.max_ratio == pytest.approx(0.5 / 0.011)


def test_a_bit_identical_twin_has_no_first_difference_and_no_deviation():
    base = trajectory(2.0, 2.0)
    verdict = compare(base, base, [], eps=2**-52)
    assert (verdict.first_difference, verdict.max_deviation, verdict.envelope) == (None, 0.0, 2**-52)
    assert compare(base, base, [trajectory(2.0, 2.2)], eps=0.0).envelope == pytest.approx(0.1)


def test_one_bit_in_one_quantity_is_the_first_difference():
    base, last_bit = trajectory(1.0, 1.0), trajectory(1.0, 1.0, norms=(1.0, 1.0 + 2**-52))
    verdict = compare(base, last_bit, [base])
    assert (verdict.kind, verdict.first_difference) == ("identical up to rounding", 2)
    assert verdict.max_deviation == 2**-52


def test_an_alignment_shows_each_step_of_the_quantity_that_is_farthest_out():
    base = trajectory(1.0, 1.0, norms=(1.0, 1.0))
    twin, control = trajectory(1.3, 1.0, norms=(1.2, 1.2)), trajectory(1.1, 1.0, norms=(1.02, 1.02))
    found = align(base, twin, [control], eps=0.0)
    assert found.deviation_T.tolist() == pytest.approx([0.2, 0.2])
    assert found.envelope_T.tolist() == pytest.approx([0.02, 0.02])
    assert found.ratio_T.tolist() == pytest.approx([10.0, 10.0])
    assert found.deviation_TQ[0, 0] == pytest.approx(0.3)
    assert found.verdict() == compare(base, twin, [control], eps=0.0)


def test_an_alignment_without_controls_has_the_floor_for_an_envelope():
    found = align(trajectory(1.0, 1.0), trajectory(1.0, 1.5), [], eps=1e-3)
    assert found.envelope_T.tolist() == [1e-3, 1e-3]
    assert found.deviation_T.tolist() == [0.0, 0.5]


def test_a_twin_that_rounding_sent_the_other_way_is_heard_with_its_own_controls():
    base, other_way = trajectory(1.0, 1.0, 1.0), trajectory(1.0, 1.5, 1.5)
    controls = [trajectory(1.0, 1.0, 1.0 + 1e-7)] * 4
    assert compare(base, other_way, controls).kind == "different"
    back = trajectory(1.0, 1.0, 1.0)
    heard = compare(base, other_way, controls, twin_controls=[other_way, back])
    assert (heard.kind, heard.first_step) == ("identical up to rounding", None)
    assert heard.envelope == pytest.approx(0.5 / 1.5)
    own = [trajectory(1.0, 1.5 + 1e-7, 1.5)] * 4
    assert compare(base, other_way, controls, twin_controls=own).first_step == 2, "its own controls are off with it"


def test_own_controls_that_end_early_decide_only_what_they_saw():
    base, controls = trajectory(1.0, 1.0, 1.0), [trajectory(1.0, 1.0, 1.0)]
    early, late = trajectory(1.0, 1.5, 1.5), trajectory(1.0, 1.0, 1.5)
    assert compare(base, early, controls, twin_controls=[trajectory(1.0, 1.5)]).first_step == 2
    assert compare(base, late, controls, twin_controls=[trajectory(1.0, 1.0)]).kind == "identical up to rounding"


def test_a_verdict_about_rounding_needs_controls():
    with pytest.raises(ValueError, match="judged by control runs; found none"):
        compare(trajectory(1.0), trajectory(1.1), [])


def test_runs_of_other_layers_cannot_be_compared():
    other = Trajectory(torch.ones(1, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="must follow the same layers"):
        compare(trajectory(1.0), other, [])


def test_a_trajectory_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"losses \[T\] and update norms \[T, L\]; found \(2,\) and \(3, 1\)"):
        Trajectory(torch.zeros(2), torch.zeros(3, 1))


def test_recording_needs_steps():
    with pytest.raises(ValueError, match="at least one step; found none"):
        Pack([Member(REPRESENTATIVE, 7)], OptimizerConfig("sgd")).trajectories(4, 4)
