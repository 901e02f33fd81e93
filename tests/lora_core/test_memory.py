"""Bytes that live at once, held to what PyTorch's own profiler sees of the allocator, and to numbers by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_core.adapter import LoraBank, Member
from lora_core.laws import LAWS
from lora_core.memory import MemberBytes, base_bytes, measure_member, pack_limit, peak_bytes
from lora_core.optimizers import OptimizerConfig
from tests.lora_core.support import Pack, make_point, profiled_peak


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_lives_at_once_is_counted_views_and_writes_in_place_once(device):
    x = torch.ones(1000, device=device)

    def work() -> None:
        first = x * 2  # 4000
        first.view(10, 100).add_(1)
        second = first + x  # 8000 now
        del first
        third = second.double()  # 4000 + 8000
        x.add_(third[0])

    assert peak_bytes(work) == 12_000


def test_a_backward_pass_is_counted_as_the_profiler_does():
    x = torch.ones(64, 32)
    model = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 1000)).requires_grad_(False)
    with LoraBank.attach(model, ["0", "2"], [Member(make_point(), 0)]):

        def work() -> None:
            nn.functional.cross_entropy(model(x), torch.zeros(64, dtype=torch.int64)).backward()

        seen, counted = profiled_peak(work), peak_bytes(work)
    assert seen > 64 * 1000 * 4 * 2
    assert counted == pytest.approx(seen, rel=0.02)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
def test_attention_keeps_no_scores_on_the_meta_device_either(masked, heads):
    def attended(device: str) -> int:
        query = torch.ones(2, 4, 128, 8, device=device, requires_grad=True)
        key = torch.ones(2, heads, 128, 8, device=device)
        mask = torch.ones(2, 1, 128, 128, dtype=torch.bool, device=device) if masked else None

        def work() -> None:
            attend = nn.functional.scaled_dot_product_attention
            attend(query, key, key, attn_mask=mask, enable_gqa=heads == 2).sum().backward()

        return peak_bytes(work)

    scores = 2 * 4 * 128 * 128 * 4
    assert attended("meta") < scores
    assert attended("meta") == pytest.approx(attended("cpu"), rel=0.3)


def test_a_model_that_reads_values_to_decide_can_be_counted_on_the_meta_device():
    x = torch.ones(1000, device="meta")

    def work() -> None:
        if (x == 0).all():
            return
        assert (float(x[0]), int(x[0]), x[0].item()) == (0, 0, 0)
        x.double()

    assert peak_bytes(work) == 8000


def measured(device: str, *, rows: int = 8, most_rows: int = 1, widest: bool = True) -> MemberBytes:
    model = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 1000)).to(device)
    x = torch.ones(rows, 32, device=device)
    with LoraBank.attach(model, ["0", "2"], [Member(make_point(rank=4), 0)]) as bank:
        return measure_member(
            bank,
            lambda: model(x).logsumexp(dim=1).sum()[None],
            optimizer_states=2,
            most_rows=most_rows,
            widest=widest,
        )


def test_a_member_is_its_adapter_its_optimizer_and_the_more_of_training_and_evaluation():
    found = measured("cpu")
    weights = 4 * 4 * (32 + 128 + 128 + 1000)
    assert (found.fixed, found.optimizer) == (2 * weights, 2 * weights)
    assert found.training > found.evaluation > found.fixed + 8 * 1000 * 4
    assert found.total == found.training + found.optimizer
    assert measured("meta") == found


def test_more_rows_than_were_counted_are_scaled_up():
    base, eight = measured("cpu"), 8 * 1000 * 4
    wide = measured("cpu", most_rows=64)
    assert wide.training == base.training
    assert wide.evaluation - wide.fixed == 8 * (base.evaluation - base.fixed) > 8 * eight
    unsure = measured("cpu", most_rows=64, widest=False)
    assert unsure.training - unsure.fixed == 8 * (base.training - base.fixed)
    assert unsure.training == pytest.approx(measured("cpu", rows=64).training, rel=0.02)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("everything", [False, True])
def test_an_optimizers_states_are_those_that_a_member_holds(law, everything):
    keeping = {name: {"momentum": 0.9}.get(name, True) for name, option in law.options.items() if option.states}
    config = OptimizerConfig(law.name, keeping if everything else {})
    pack = Pack([Member(make_point(rank=8, constants=law.constants()), 0)], config)
    pack.train(0, 1)
    weights = sum(value.nbytes for value in pack.bank.adapter(0).values())
    held = sum(value.nbytes for value in pack.optimizer.state(0).values() if value.dim())
    assert held == law.states_with(law.settings(config.options)) * weights


# -- packs -------------------------------------------------------------------------------------------------------------


MEMBER = MemberBytes(fixed=100, optimizer=200, training=1000, evaluation=1100)


def test_the_pack_limit_is_the_largest_pack_that_fits():
    memory = 10_000 + 5 * 1300
    assert pack_limit(memory, base_bytes=10_000, member=MEMBER, reserve=0.0) == 5
    assert pack_limit(memory - 1, base_bytes=10_000, member=MEMBER, reserve=0.0) == 4
    assert pack_limit(20_000, base_bytes=10_000, member=MEMBER, reserve=0.25) == 3
    assert pack_limit(9_000, base_bytes=10_000, member=MEMBER) == 0


@pytest.mark.parametrize("reserve", [-0.1, 1.0])
def test_a_reserve_that_is_no_share_is_refused(reserve):
    with pytest.raises(ValueError, match="reserve must be a share of the memory"):
        pack_limit(1000, base_bytes=0, member=MEMBER, reserve=reserve)


def test_a_base_models_bytes_are_its_weights_and_buffers():
    assert base_bytes(nn.BatchNorm1d(10)) == 4 * (10 + 10 + 10 + 10) + 8
