"""A member of a bank is what PEFT 0.21 trains, on small models of the kinds that people fine-tune.

Held to over 50 steps of AdamW from the same A, with the same data: losses within 1e-6 in float32 and 1e-12 in float64,
relative. The two do the same products in another order (x A^T B^T before or after the base product is added, one fused
optimizer step or many), so they part by rounding, which training amplifies. Measured: at most 6.7e-7 in float32
(DeBERTa-v2), 1.3e-15 in float64, and nothing at all in float64 for Llama and Qwen2, whose norms compute in float32 and
round the difference away. With LoRA dropout PEFT is given our masks in place of its own, which it draws from torch's
global generator.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

from lora_core.adapter import LoraBank, Member
from lora_core.checkpoint import export_peft_adapter, import_peft_adapter
from lora_core.gauge import Gauge, regauge
from lora_core.laws import LAWS
from tests.lora_core.peft_reference import OurMask
from tests.lora_core.real_models import (
    SHAPES,
    VOCABULARY,
    losses_of,
    make_model,
    make_point,
    pack,
    peft_model,
    put_into_peft,
    train,
    train_peft,
)

pytestmark = [
    # PEFT 0.21 asks transformers 5.23 by the older name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

RANK, ALPHA = 4, 8
EVERY = tuple(SHAPES)
VARIANTS = [
    *[(name, "plain") for name in EVERY],
    *[(name, "rslora") for name in ("gpt2", "roberta", "t5-encoder")],
    *[(name, "dora") for name in ("gpt2", "llama", "deberta-v2")],
    *[(name, "dropout") for name in ("gpt2", "llama", "roberta")],
]
DTYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"])


def member(variant: str = "plain", seed: int = 3, rank: int = RANK) -> Member:
    scaling = ALPHA / (math.sqrt(rank) if variant == "rslora" else rank)
    point = make_point(rank, scaling, dora=variant == "dora")
    return Member(replace(point, dropout=0.3 if variant == "dropout" else 0.0), seed)


def settings_of(name: str, variant: str, targets: list[str] | None = None) -> dict[str, object]:
    return {
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": targets or list(SHAPES[name].targets),
        "use_rslora": variant == "rslora",
        "use_dora": variant == "dora",
        "fan_in_fan_out": SHAPES[name].fan_in_fan_out,
    }


def with_our_masks(theirs: torch.nn.Module, subject: Member, names: Iterable[str]) -> list[OurMask]:
    """Puts our masks in the place of PEFT's dropout, and returns them."""
    masks = []
    for layer in names:
        module = theirs.base_model.model.get_submodule(layer)
        masks.append(OurMask(subject, layer))
        module.lora_dropout["default"] = masks[-1]
    return masks


def distance(name: str, variant: str, dtype: torch.dtype, targets: list[str] | None = None, steps: int = 50) -> float:
    """The largest relative distance of our losses from PEFT's."""
    subject, causal = member(variant), SHAPES[name].causal
    with pack(name, [subject], dtype, targets=targets) as (bank, optimizer, losses_K):
        start = bank.adapter(0)
        ours = train(bank, optimizer, losses_K, steps)[:, 0]
    theirs = peft_model(make_model(name, dtype), **settings_of(name, variant, targets))
    parameters = put_into_peft(theirs, start)
    layers = dict.fromkeys(key.rpartition(".")[0] for key in start)
    masks = with_our_masks(theirs, subject, layers) if subject.point.dropout else []
    undropped = losses_of(theirs, 1, causal=causal)

    def losses(step: int) -> torch.Tensor:
        for mask in masks:
            mask.dropout.batch = step
        return undropped(step)

    expected = train_peft(theirs, parameters, subject, losses, steps)
    assert float(expected[-5:].mean()) < 0.97 * float(expected[:5].mean()), "it must have learnt something"
    return float(((ours - expected) / expected).abs().max())


@DTYPES
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_member_has_pefts_losses(name, variant, dtype, rtol):
    assert distance(name, variant, dtype) <= rtol


def test_the_masks_matter():
    with pack("gpt2", [member("dropout"), member("plain")], torch.float64) as (bank, optimizer, losses_K):
        dropped, plain = train(bank, optimizer, losses_K, 10).T
    assert dropped[0] == plain[0], "B starts at 0"
    assert float(((dropped - plain) / plain).abs().max()) > 1e-4


# -- adapter folders ---------------------------------------------------------------------------------------------------

FOLDERS = [*[(name, "rslora") for name in EVERY], ("gpt2", "dora"), ("roberta", "dora")]


def logits_of(name: str, model: torch.nn.Module) -> torch.Tensor:
    """Of a whole batch, by the losses' own way of calling a model: each row's loss."""
    with torch.no_grad():
        return torch.stack([losses_of(model, 1, causal=SHAPES[name].causal)(step)[0] for step in range(4)])


def random_adapter(bank: LoraBank, seed: int = 5) -> dict[str, torch.Tensor]:
    """Weights of a size that matters, as after long training."""
    draws = torch.Generator().manual_seed(seed)
    moved = {}
    for key, value in bank.adapter(0).items():
        noise = torch.randn(value.shape, generator=draws, dtype=torch.float64).to(value.dtype)
        moved[key] = value * (1 + 0.2 * noise) if key.endswith("magnitude") else 0.1 * noise
    return moved


@pytest.mark.parametrize(("name", "variant"), FOLDERS)
def test_an_exported_adapter_gives_the_same_in_peft_merged_and_unmerged(tmp_path, name, variant):
    model, shape = make_model(name, torch.float64), SHAPES[name]
    before = logits_of(name, model)
    with LoraBank.attach(model, shape.targets, [member(variant)]) as bank:
        bank.load_adapter(0, random_adapter(bank))
        ours = logits_of(name, model)
        export(tmp_path, bank, list(shape.targets), rslora=variant == "rslora")
        merged = bank.merge(0)
    theirs = peft.PeftModel.from_pretrained(make_model(name, torch.float64), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(logits_of(name, theirs.eval()), ours, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits_of(name, theirs.merge_and_unload()), ours, rtol=1e-12, atol=0)
    for layer, weight in merged.items():
        model.get_submodule(layer).weight.data.copy_(weight)
    torch.testing.assert_close(logits_of(name, model), ours, rtol=1e-12, atol=0)
    assert float((ours - before).abs().max()) > 0.01, "the adapter must matter"


def export(directory: Path, bank: LoraBank, targets: list[str] | str, *, rslora: bool = False) -> None:
    export_peft_adapter(
        directory,
        bank.adapter(0),
        rank=RANK,
        alpha=ALPHA,
        target_modules=targets,
        use_rslora=rslora,
        fan_in_fan_out=bank.fan_in_fan_out,
    )


@pytest.mark.parametrize(("name", "variant"), FOLDERS)
def test_an_adapter_that_peft_wrote_gives_the_same_here_merged_and_unmerged(tmp_path, name, variant):
    theirs = peft_model(make_model(name, torch.float64), **settings_of(name, variant), init_lora_weights=False)
    theirs.save_pretrained(tmp_path)
    expected, adapter = logits_of(name, theirs), import_peft_adapter(tmp_path)
    assert adapter.use_rslora == (variant == "rslora")
    assert adapter.use_dora == (variant == "dora")
    model = make_model(name, torch.float64)
    with LoraBank.attach(model, adapter.target_modules, [member(variant)]) as bank:
        bank.load_adapter(0, adapter.tensors)
        torch.testing.assert_close(logits_of(name, model), expected, rtol=1e-12, atol=0)
        merged = bank.merge(0)
    for layer, weight in merged.items():
        model.get_submodule(layer).weight.data.copy_(weight)
    torch.testing.assert_close(logits_of(name, model), expected, rtol=1e-12, atol=0)


# -- packs and twins ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["f32", "f64"])
@pytest.mark.parametrize("name", EVERY)
def test_a_packed_member_is_its_solo_run(name, dtype, rtol):
    members = [replace(member(seed=seed, rank=rank)) for seed, rank in enumerate((2, 8, 4))]
    targets = SHAPES[name].pack_targets
    with pack(name, members, dtype, targets=targets) as (bank, optimizer, losses_K):
        packed = train(bank, optimizer, losses_K, 12)
    assert len({float(loss) for loss in packed[-1]}) == 3, "the members must be three runs"
    for k, each in enumerate(members):
        with pack(name, [each], dtype, targets=targets) as (bank, optimizer, losses_K):
            solo = train(bank, optimizer, losses_K, 12)
        assert float(((packed[:, k] - solo[:, 0]) / solo[:, 0]).abs().max()) <= rtol


def is_bit_identical(name: str, subject: Member, k: float = 4.0, **more: object) -> bool:
    runs = []
    for point in (subject.point, regauge(subject.point, Gauge.of_alpha(k), LAWS["adamw"])):
        with pack(name, [replace(subject, point=point)], **more) as (bank, optimizer, losses_K):
            runs.append((train(bank, optimizer, losses_K, 12), bank.update_norms_KL()))
    assert bool((runs[0][1] > 0).all()), "every layer must have moved"
    return all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("name", "variant"), [*[(name, "plain") for name in EVERY], ("gpt2", "dora"), ("roberta", "dora")]
)
def test_twins_of_power_four_are_bit_identical(name, variant):
    assert is_bit_identical(name, member(variant))


# -- embeddings --------------------------------------------------------------------------------------------------------

EMBEDDINGS = [("llama", ["embed_tokens", "q_proj"]), ("roberta", ["word_embeddings", "query"])]


@DTYPES
@pytest.mark.parametrize(("name", "targets"), EMBEDDINGS)
def test_an_adapted_embedding_has_pefts_losses(name, targets, dtype, rtol):
    assert distance(name, "plain", dtype, targets) <= rtol


@pytest.mark.parametrize(("name", "targets"), EMBEDDINGS)
def test_an_adapted_embedding_is_packed_and_has_twins(name, targets):
    assert is_bit_identical(name, member(), targets=targets)
    members = [member(seed=seed, rank=rank) for seed, rank in enumerate((2, 8, 4))]
    with pack(name, members, torch.float64, targets=targets) as (bank, optimizer, losses_K):
        packed = train(bank, optimizer, losses_K, 12)
    with pack(name, members[2:], torch.float64, targets=targets) as (bank, optimizer, losses_K):
        torch.testing.assert_close(packed[:, 2:], train(bank, optimizer, losses_K, 12), rtol=1e-12, atol=0)


def test_an_embedding_starts_as_pefts_does_with_the_init_scale_in_b():
    targets = ["embed_tokens"]
    theirs = peft_model(make_model("llama"), r=16, target_modules=targets, init_lora_weights="gaussian")
    module = theirs.base_model.model.get_submodule("model.embed_tokens")
    assert not module.lora_embedding_A["default"].any()
    assert float(module.lora_embedding_B["default"].detach().std()) == pytest.approx(1, rel=0.15)
    subject = Member(replace(make_point(16), init_scale=2.0), seed=0)
    with LoraBank.attach(make_model("llama"), targets, [subject], init="gaussian") as bank:
        adapter = bank.adapter(0)
    assert adapter["model.embed_tokens.lora_embedding_A"].shape == (16, VOCABULARY)
    assert not adapter["model.embed_tokens.lora_embedding_A"].any()
    assert float(adapter["model.embed_tokens.lora_embedding_B"].std()) == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize(("name", "targets"), EMBEDDINGS)
def test_an_adapted_embedding_goes_to_peft_and_comes_back(tmp_path, name, targets):
    model = make_model(name, torch.float64)
    with LoraBank.attach(model, targets, [member()]) as bank:
        bank.load_adapter(0, random_adapter(bank))
        ours = logits_of(name, model)
        export(tmp_path / "ours", bank, targets)
        merged = bank.merge(0)
    for layer, weight in merged.items():
        model.get_submodule(layer).weight.data.copy_(weight)
    torch.testing.assert_close(logits_of(name, model), ours, rtol=1e-12, atol=0)
    theirs = peft.PeftModel.from_pretrained(
        make_model(name, torch.float64), tmp_path / "ours", autocast_adapter_dtype=False
    )
    torch.testing.assert_close(logits_of(name, theirs.eval()), ours, rtol=1e-12, atol=0)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    back = import_peft_adapter(tmp_path / "theirs")
    assert all(
        torch.equal(value, import_peft_adapter(tmp_path / "ours").tensors[k]) for k, value in back.tensors.items()
    )
    torch.testing.assert_close(logits_of(name, theirs.merge_and_unload()), ours, rtol=1e-12, atol=0)


# -- half precision and checkpointing ----------------------------------------------------------------------------------


def gradients(*, dtype: torch.dtype = torch.float32, autocast: bool = False, checkpointing: bool = False, **more):
    model = make_model("llama", dtype)
    if checkpointing:  # in training mode only; the config has no dropout
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    targets = ["q_proj", "down_proj", "embed_tokens"] if more.get("embedding") else None
    members = [replace(member(seed=seed), point=replace(member().point, dropout=0.2)) for seed in range(2)]
    with pack("llama", members, targets=targets, model=model) as (bank, _, losses_K):
        bank.load_adapter(0, random_adapter(bank))
        bank.load_adapter(1, random_adapter(bank, seed=6))
        bank.batch = 3
        calls: list[None] = []
        bank.layers["model.layers.0.self_attn.q_proj"].register_forward_hook(lambda *_: calls.append(None))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses = losses_K(0)
        losses.float().sum().backward()
        assert len(calls) == (2 if checkpointing else 1)
        return losses.detach(), bank.grads_KP.clone()


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_changes_nothing(autocast, embedding):
    plain, again = (
        gradients(autocast=autocast, checkpointing=checkpointing, embedding=embedding)
        for checkpointing in (False, True)
    )
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))
    assert plain[1].any()


@pytest.mark.parametrize("half", [{"autocast": True}, {"dtype": torch.bfloat16}], ids=["autocast", "bfloat16"])
def test_half_precision_gives_the_same_gradients_to_its_own_precision(half):
    (losses, grads_KP), (expected, wanted_KP) = gradients(**half, embedding=True), gradients(embedding=True)
    assert grads_KP.dtype == torch.float32
    torch.testing.assert_close(losses.float(), expected, rtol=0.02, atol=0)
    for found, wanted in zip(grads_KP, wanted_KP, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 0.1
