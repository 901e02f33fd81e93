"""Held to numbers worked out by hand for 4 -> 6 (adapted) -> 3 (adapted) -> 2."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from lora_core.adapter import Member
from lora_core.cost import LayerShape, layer_shapes, step_flops
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
