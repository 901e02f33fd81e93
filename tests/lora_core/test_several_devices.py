"""Packs over a model that lies on several devices, as accelerate lays it out.

Without several GPUs devices are checked with torch's fake tensors, which have a device and no values, and raise where
an operation mixes two. `meta:0` and `meta:1` stand for two GPUs: without CUDA autograd knows no `cuda:1`.
Numbers are checked on the CPU: under accelerate's hooks, and with a bank that is cut in two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lora_core import adapter as adapters
from lora_core.adapter import LoraBank, Member
from lora_core.checkpoint import load_member, save_member
from lora_core.gauge import FactorSettings, Point
from lora_core.laws import LAWS
from lora_core.optimizers import OptimizerConfig, PackOptimizer, norms_of_rows
from lora_core.storage import Storage, make_storages
from lora_core.train import losses_and_norms, train_pack
from tests.lora_core.real_models import CONSTANT, SHAPES, VOCABULARY, losses_of, make_model
from tests.lora_core.support import Mlp, Pack, make_point

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # accelerate looks whether weights that it has laid out are tied.
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning"),
]

PLACES = {
    "gpt2": ({"transformer.wte": 0, "transformer.wpe": 0, "transformer.h.0": 0, "lm_head": 0},
             {"transformer.h.1": 1, "transformer.ln_f": 1}),
    "llama": ({"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0},
              {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}),
    "roberta": ({"roberta.embeddings": 0, "roberta.encoder.layer.0": 0},
                {"roberta.encoder.layer.1": 1, "classifier": 1}),
}  # fmt: skip
"""What of a model is on the first device, and what on the second."""

VARIANTS = {
    "plain": {"clip_norm": 1.0},
    "dora": {"clip_norm": 1.0, "magnitude": True},
    "dropout": {"dropout": 0.5},
    "dora and dropout": {"dropout": 0.5, "magnitude": True},
}


def places_of(name: str, kind: str) -> dict[str, str]:
    return {part: f"{kind}:{index}" for half in PLACES[name] for part, index in half.items()}


def member(rank: int = 4, seed: int = 0, *, magnitude: bool = False, head: bool = False, **more: object) -> Member:
    settings = FactorSettings(1e-2, 0.01, {"eps": 1e-8})
    apart = {"magnitude": settings if magnitude else None, "head": settings if head else None}
    return Member(Point(rank, 2.0, 1.0, settings, settings, **apart, **more), seed)  # type: ignore[arg-type]


def lie(model: nn.Module, places: Mapping[str, str]) -> nn.Module:
    """A model of the meta device with fake weights on the devices of its parts, under accelerate's hooks."""
    made: dict[Tensor, Tensor] = {}
    for name, module in model.named_modules():
        part = max((each for each in places if f"{name}.".startswith(f"{each}.")), key=len, default=None)
        for table in (module._parameters, module._buffers):
            for key, value in table.items():
                if value is None:
                    continue
                assert part is not None, f"{name} is on no device"
                fake = torch.empty(value.shape, dtype=value.dtype, device=places[part])
                whole = nn.Parameter(fake) if isinstance(value, nn.Parameter) else fake
                table[key] = made.setdefault(value, whole)  # tied weights stay tied
    return dispatch_model(model.eval(), dict(places), main_device=next(iter(places.values())))


def fake_model(name: str) -> nn.Module:
    with torch.device("meta"):
        model = SHAPES[name].make()
    return lie(model, places_of(name, "meta"))


def fake_losses(model: nn.Module, members: int, device: str, *, causal: bool) -> Tensor:
    """The losses [K] of a batch of two rows, given where the model ends."""
    ids = torch.zeros(2 * members, 8, dtype=torch.int64, device=device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert str(logits.device) == device
    labels = ids if causal else ids[:, 0]
    return (
        nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(members, -1).mean(1)
    )


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def check_places(bank: LoraBank, optimizer: PackOptimizer) -> None:
    """Every tensor of a pack lies beside its layer."""
    expected = {name: layer.weight.device for name, layer in bank.layers.items()}
    expected |= {name: next(head.base.parameters()).device for name, head in bank.heads.items()}
    assert len(set(expected.values())) == 2
    for module in (*bank.layers.values(), *bank.heads.values()):
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        assert all(tensor.device == module.stored_K.device for tensor in own)
    for k in range(len(bank.members)):
        for key, weight in bank.member_tensors(k).items():
            layer = max((name for name in expected if key.startswith(f"{name}.")), key=len)
            assert weight.device == weight.grad.device == expected[layer]
        for key, value in optimizer.state(k).items():
            layer = max((name for name in expected if key.startswith(f"{name}.")), key=len)
            # torch keeps the step count of what is not fused on the host.
            assert value.device == expected[layer] or (value.dim() == 0 and value.device.type == "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.usefixtures("fake")
def test_a_step_mixes_no_devices(name: str, variant: str):
    model, causal = fake_model(name), SHAPES[name].causal
    end = "meta:0" if name == "gpt2" else "meta:1"  # GPT-2's output is tied to its embedding
    heads = None if causal else ["classifier"]
    members = [member(rank, seed, head=not causal, **VARIANTS[variant]) for seed, rank in enumerate((4, 2))]
    with LoraBank.attach(model, SHAPES[name].pack_targets, members, heads=heads) as bank:
        assert [str(storage.device) for storage in bank.storages] == ["meta:0", "meta:1"]
        optimizer = PackOptimizer(bank, OptimizerConfig("adamw", kernel="foreach"))
        for batch in range(2):
            bank.zero_grad()
            bank.batch = batch
            losses = fake_losses(model, 2, end, causal=causal)
            losses.sum().backward()
            bank.batch = None
            assert losses_and_norms(optimizer, losses.detach().double()).shape == (2, 2)
            optimizer.step(1.0)
        assert str(bank.update_norms_KL().device) == "meta:0"
        check_places(bank, optimizer)


@pytest.mark.parametrize("name", [name for name, law in LAWS.items() if law.absolute.keys() <= {"eps"}])
@pytest.mark.usefixtures("fake")
def test_an_optimizer_keeps_its_state_beside_the_weights(name: str):
    with torch.device("meta"):
        bare = Mlp()
    model = lie(bare, {"fc1": "meta:0", "fc2": "meta:1", "head": "meta:1"})
    settings = FactorSettings(1e-2, 0.0, {"eps": 1e-8} if LAWS[name].absolute else {})
    point = Point(4, 2.0, 1.0, settings, settings, clip_norm=1.0)
    with LoraBank.attach(model, ["fc1", "fc2"], [Member(point, 0)] * 2) as bank:
        kernels = LAWS[name].kernels  # a fused one wants a device that computes
        optimizer = PackOptimizer(bank, OptimizerConfig(name, kernel="foreach" if "foreach" in kernels else None))
        model(torch.empty(4, 12, device="meta:1")).sum().backward()
        optimizer.clip()
        optimizer.step(1.0)
        check_places(bank, optimizer)
        # What was saved is on the CPU, and goes where it belongs.
        saved = {key: torch.empty(value.shape, dtype=value.dtype) for key, value in optimizer.state(0).items()}
        optimizer.load_state(1, saved)
        bank.load_adapter(1, {key: torch.empty(value.shape) for key, value in bank.adapter(0).items()})
        check_places(bank, optimizer)


@pytest.mark.usefixtures("fake")
def test_a_layer_brings_its_input_to_its_own_device():
    with torch.device("meta"):
        model = Mlp()
    lie(model, {"fc1": "meta:0", "fc2": "meta:1", "head": "meta:1"})
    x = torch.empty(4, 24, device="meta:0")
    with pytest.raises(Exception, match=r"meta:0 and meta:1|meta:1 and meta:0"):
        nn.functional.linear(x, model.fc2.weight)  # what the test rests on: mixing is found
    with LoraBank.attach(model, ["fc2"], [member()]):
        assert str(model.fc2(x).device) == "meta:1"


@pytest.mark.usefixtures("fake")
def test_a_head_on_two_devices_is_refused():
    with torch.device("meta"):
        model = SHAPES["roberta"].make()
    places = {"roberta": "meta:0", "classifier.dense": "meta:0", "classifier.out_proj": "meta:1"}
    with pytest.raises(ValueError, match="a head must be on one device; found 'classifier' on meta:0, meta:1"):
        LoraBank.attach(lie(model, places), ["query"], [member(head=True)], heads=["classifier"])


# -- numbers -----------------------------------------------------------------------------------------------------------


def cut_in_two(bases, heads, **how) -> tuple[Storage, ...]:
    """Two storages, as if every second layer were on another device."""
    names = [*bases, *heads]
    made = []
    for here in (set(names[::2]), set(names[1::2])):
        parts = ({name: each for name, each in table.items() if name in here} for table in (bases, heads))
        made += make_storages(*parts, **how)
    return tuple(made)


def trained(members: Sequence[Member], config: OptimizerConfig, *, steps: int = 6) -> Pack:
    """A pack after some steps in float64."""
    heads = ["head"] if members[0].point.head is not None else []
    pack = Pack(members, config, dtype=torch.float64, heads=heads)
    pack.records = pack.train(0, steps)
    return pack


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "muon"])
@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_a_pack_in_two_storages_learns_the_same(name: str, clip_norm: float | None, monkeypatch: pytest.MonkeyPatch):
    law = LAWS[name]
    point = make_point(clip_norm=clip_norm, scaling=1.0)
    settings = replace(point.a, constants=dict.fromkeys(law.absolute, 1e-08))
    members = [Member(replace(point, a=settings, b=settings, rank=rank), rank) for rank in (4, 2)]
    whole = trained(members, OptimizerConfig(name))
    monkeypatch.setattr(adapters, "make_storages", cut_in_two)
    parts = trained(members, OptimizerConfig(name))
    assert (len(whole.bank.storages), len(parts.bank.storages)) == (1, 2)
    for k in range(2):
        expected, found = whole.bank.adapter(k), parts.bank.adapter(k)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            if clip_norm is None:  # nothing but a norm looks at both
                assert torch.equal(found[key], value)
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


def test_magnitudes_heads_and_two_learning_rates_go_through_two_storages(monkeypatch: pytest.MonkeyPatch):
    base = member(magnitude=True, head=True, dropout=0.25)
    members = [Member(replace(base.point, b=replace(base.point.b, lr=3e-2), rank=rank), rank) for rank in (4, 3)]
    whole = trained(members, OptimizerConfig("adamw"))
    monkeypatch.setattr(adapters, "make_storages", cut_in_two)
    parts = trained(members, OptimizerConfig("adamw"))
    assert parts.records == whole.records
    for k in range(2):
        assert all(torch.equal(parts.bank.adapter(k)[key], value) for key, value in whole.bank.adapter(k).items())
        for key, value in whole.bank.merged_weights(k).items():
            assert torch.equal(parts.bank.merged_weights(k)[key], value)
    torch.testing.assert_close(parts.bank.update_norms_KL().sort().values, whole.bank.update_norms_KL().sort().values)
    with pytest.raises(ValueError, match="only a bank on one device has one storage; found cpu, cpu"):
        _ = parts.bank.params_KP


def test_a_checkpoint_goes_from_one_storage_to_two_and_back(tmp_path, monkeypatch: pytest.MonkeyPatch):
    members, config = [member(magnitude=True, clip_norm=1e9)], OptimizerConfig("adamw")
    first = trained(members, config, steps=3)
    for n, cut in enumerate((True, False)):
        with monkeypatch.context() as patch:
            if cut:
                patch.setattr(adapters, "make_storages", cut_in_two)
            second = Pack(members, config, dtype=torch.float64)
        assert len(second.bank.storages) == (2 if cut else 1)
        where = tmp_path / str(n)
        save_member(where, adapter=first.bank.adapter(0), optimizer=first.optimizer.state(0), step=3, extra={})
        state = load_member(where)
        second.bank.load_adapter(0, state.adapter)
        second.optimizer.load_state(0, state.optimizer)
        first = second
        first.train(3 + n, 4 + n)
    uncut = trained(members, config, steps=5)
    for key, value in uncut.bank.adapter(0).items():
        assert torch.equal(first.bank.adapter(0)[key], value)


def test_a_member_that_diverges_on_one_device_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapters, "make_storages", cut_in_two)
    pack = Pack([member(), member(seed=1)], OptimizerConfig("adamw"))
    losses = pack.losses_K(0)
    losses.sum().backward()
    pack.bank.storages[1].grads_KP[1, 0] = torch.inf
    _, norms = losses_and_norms(pack.optimizer, losses.detach().double()).tolist()
    assert norms[0] < float("inf") == norms[1]


def test_a_norm_over_parts_is_the_norm_and_moves_with_a_gauge():
    draws = torch.Generator().manual_seed(0)
    whole_KP = torch.randn(3, 50, generator=draws, dtype=torch.float64)
    parts = [whole_KP[:, :20], whole_KP[:, 20:49], whole_KP[:, 49:49], whole_KP[:, 49:]]
    torch.testing.assert_close(norms_of_rows(parts), torch.linalg.vector_norm(whole_KP, dim=1), rtol=1e-15, atol=0)
    assert torch.equal(
        norms_of_rows([part.float() * 4 for part in parts]), 4 * norms_of_rows([p.float() for p in parts])
    )


def checkpointed(model: nn.Module) -> nn.Module:
    """A model that keeps nothing of its layers for the backward pass."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2].isdigit():
            forward = module.forward
            module.forward = lambda *args, forward=forward, **more: checkpoint(  # type: ignore[assignment]
                forward, *args, use_reentrant=False, preserve_rng_state=False, **more
            )
    return model


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", PLACES)
def test_hooks_that_move_activations_change_no_bit(name: str, again: bool):
    def losses(*, hooked: bool) -> list[tuple[float, ...]]:
        model, causal = make_model(name), SHAPES[name].causal
        model.config.use_cache = False  # a layer that is computed twice would find its own keys there
        if hooked:
            places = dict.fromkeys(places_of(name, "cpu"), "cpu")
            dispatch_model(model, places, main_device="cpu", force_hooks=True)
            assert all(hasattr(model.get_submodule(part), "_hf_hook") for part in places)
        if again:
            checkpointed(model)
        members = [
            member(rank, rank, magnitude=True, head=not causal, dropout=0.3, clip_norm=1.0) for rank in (4, 2, 3)
        ]
        with LoraBank.attach(
            model, SHAPES[name].pack_targets, members, heads=None if causal else ["classifier"]
        ) as bank:
            optimizer = PackOptimizer(bank, OptimizerConfig("adamw"))
            step = losses_of(model, 3, causal=causal)
            records = list(train_pack(bank, optimizer, step, start=0, stop=3, schedule=CONSTANT))
        return [record.losses for record in records]

    assert losses(hooked=True) == losses(hooked=False)


# -- GPUs --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, on which a model is really spread")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PLACES)
def test_a_model_on_two_gpus_trains_as_on_one(name: str, variant: str):
    def losses(places: Mapping[str, str]) -> Tensor:
        model, causal = make_model(name, torch.float64), SHAPES[name].causal
        end = places.get("lm_head") or places["classifier"]
        dispatch_model(model, dict(places), force_hooks=True)
        members = [member(rank, rank, head=not causal, **VARIANTS[variant]) for rank in (4, 2)]
        with LoraBank.attach(
            model, SHAPES[name].pack_targets, members, heads=None if causal else ["classifier"]
        ) as bank:
            optimizer = PackOptimizer(bank, OptimizerConfig("adamw"))
            found = []
            for batch in range(5):
                draws = torch.Generator().manual_seed(batch)
                ids = torch.randint(2, VOCABULARY, (4, 8), generator=draws).to(end).repeat(2, 1)
                bank.zero_grad()
                bank.batch = batch
                logits = model(input_ids=ids).logits
                labels = ids if causal else ids[:, 0] % 3
                nats = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
                each = nats.view(2, -1).mean(1)
                each.sum().backward()
                bank.batch = None
                found.append(losses_and_norms(optimizer, each.detach()).cpu())
                optimizer.step(1.0)
            return torch.stack(found)

    spread = places_of(name, "cuda")
    torch.testing.assert_close(losses(spread), losses(dict.fromkeys(spread, "cuda:0")), rtol=1e-9, atol=1e-12)
