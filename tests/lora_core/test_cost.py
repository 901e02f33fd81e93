"""Held to numbers worked out by hand for 4 -> 6 (adapted) -> 3 (adapted) -> 2."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from lora_core.adapter import Member
from lora_core.cost import LayerShape, layer_shapes, member_bytes, pack_bytes, pack_limit, step_flops
from lora_core.laws import LAWS
from lora_core.optimizers import OptimizerConfig
from tests.lora_core.support import BATCH, TARGETS, Pack, make_point

WIDTHS = {"fc1": (4, 6), "fc2": (6, 3), "head": (3, 2)}
LAYERS = layer_shapes(WIDTHS, {"fc1", "fc2"})


def widths_of(pack: Pack) -> dict[str, tuple[int, int]]:
    linear = {name: layer.base for name, layer in pack.bank.layers.items()} | {"head": pack.model.head}
    return {name: (layer.in_features, layer.out_features) for name, layer in linear.items()}


def test_the_backward_pass_reaches_inputs_behind_the_first_adapter_only():
    assert [layer.input_trained for layer in LAYERS] == [False, True, True]
    assert [layer.input_trained for layer in layer_shapes(WIDTHS, {"fc2"})] == [False, False, True]
    assert LAYERS[0] == LayerShape(4, 6, adapted=True, input_trained=False)


def test_a_target_that_is_no_layer_is_refused():
    with pytest.raises(ValueError, match="among the layers fc1, fc2, head; found fc3"):
        layer_shapes(WIDTHS, {"fc1", "fc3"})


def test_flops_are_those_worked_out_by_hand():
    flops = step_flops(LAYERS, members=5, rank=2, rows=7)
    # 70 = 2 K M. Base: 24 forward; 18 and 6 forward and backward.
    assert flops.base == 70 * (24 + 2 * 18 + 2 * 6)
    # Adapters, times R = 2: fc1 forward 10, to A and B 10, to h 6; fc2 forward 9, to A and B 9, to h 3, to its input 6.
    assert flops.adapters == 70 * 2 * (26 + 27)
    assert flops.total == 70 * 178
    assert flops.base_fraction == pytest.approx(72 / 178)


def test_flops_are_those_that_pytorch_counts():
    pack = Pack([Member(make_point(rank=4), seed) for seed in range(3)], OptimizerConfig("adamw"))
    with FlopCounterMode(display=False) as counter:
        pack.train(0, 1)
    expected = step_flops(layer_shapes(widths_of(pack), TARGETS), members=3, rank=4, rows=BATCH)
    # Its counter does not know baddbmm_: h B^T of both layers and u A of the second.
    unseen = 2 * 3 * BATCH * 4 * (24 + 24 + 24)
    assert counter.get_total_flops() == expected.total - unseen


@pytest.mark.parametrize("states", [0, 1, 2])
def test_bytes_of_a_member_are_those_worked_out_by_hand(states):
    member = member_bytes(LAYERS, rank=2, rows=7, optimizer_states=states, activation_itemsize=2)
    assert member.weights == member.gradients == 4 * 2 * (10 + 9)
    assert member.optimizer == states * member.weights
    # Kept a row: inputs 4 + 6 and h 2 + 2 beside the adapters, outputs 6 + 3 + 2 of the base model.
    assert member.activations == 7 * (4 * 14 + 2 * 11)
    assert member.transient == 2 * 7 * 6 * 2
    assert member.total == (2 + states) * 152 + 546 + 168


def test_dora_and_dropout_take_what_they_keep():
    plain, both = (
        member_bytes(LAYERS, rank=2, rows=7, optimizer_states=2, dora=on, dropout=on) for on in (False, True)
    )
    outputs, inputs = 6 + 3, 4 + 6  # of the two adapted layers
    assert both.weights - plain.weights == 4 * outputs
    assert both.optimizer - plain.optimizer == 2 * 4 * outputs
    assert both.activations - plain.activations == 7 * (4 * outputs + inputs)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("everything", [False, True])
def test_bytes_of_weights_and_optimizer_are_those_that_a_bank_holds(law, everything):
    keeping = {name: {"momentum": 0.9}.get(name, True) for name, option in law.options.items() if option.states}
    config = OptimizerConfig(law.name, keeping if everything else {})
    pack = Pack([Member(make_point(rank=8, constants=law.constants()), 0)], config)
    pack.train(0, 1)
    states = law.states_with(law.settings(config.options))
    member = member_bytes(layer_shapes(widths_of(pack), TARGETS), rank=8, rows=1, optimizer_states=states)
    state = pack.optimizer.state(0)
    assert member.weights == sum(value.nbytes for value in pack.bank.adapter(0).values())
    assert member.optimizer == sum(value.nbytes for value in state.values() if value.dim())


def test_the_pack_limit_is_the_largest_pack_that_fits():
    member = member_bytes(LAYERS, rank=2, rows=7, optimizer_states=2, activation_itemsize=2)
    assert member.total == 1322
    memory = 10_000 + 5 * 1322
    assert pack_bytes(10_000, member, 5) == memory
    assert pack_limit(memory, base_bytes=10_000, member=member, reserve=0.0) == 5
    assert pack_limit(memory - 1, base_bytes=10_000, member=member, reserve=0.0) == 4
    assert pack_limit(20_000, base_bytes=10_000, member=member, reserve=0.25) == 3
    assert pack_limit(9_000, base_bytes=10_000, member=member) == 0


@pytest.mark.parametrize("reserve", [-0.1, 1.0])
def test_a_reserve_that_is_no_share_is_refused(reserve):
    member = member_bytes(LAYERS, rank=2, rows=7, optimizer_states=0)
    with pytest.raises(ValueError, match="reserve must be a share of the memory"):
        pack_limit(1000, base_bytes=0, member=member, reserve=reserve)
