"""Small transformers models made from their configs, their data, and one way to train packs on them and PEFT beside."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import peft
import torch
import transformers
from torch import Tensor, nn

from lora_core.adapter import LoraBank, Member
from lora_core.gauge import FactorSettings, Point
from lora_core.optimizers import OptimizerConfig, PackOptimizer
from lora_core.train import Schedule, batch_indices, train_pack

VOCABULARY, TOKENS, SAMPLES, BATCH, CLASSES = 96, 8, 24, 4, 3
CONSTANT = Schedule("constant", steps=1000)


def _encoder(**more: object) -> dict[str, object]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "num_labels": CLASSES,
        "pad_token_id": 1,
        **more,
    }


def _decoder(**more: object) -> dict[str, object]:
    return _encoder(num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=None, **more)


class Pooled(nn.Module):
    """An encoder without a head of its own: the mean of its tokens, by a frozen matrix, to the classes."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.out = nn.Linear(32, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.out((hidden * mask).sum(dim=1) / mask.sum(dim=1))


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def _deberta() -> nn.Module:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    buckets = {"position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0}
    config = transformers.DebertaV2Config(**_encoder(pooler_hidden_size=32), **relative, **buckets)
    return transformers.DebertaV2ForSequenceClassification(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, pad_token_id=1
    )
    return Pooled(transformers.T5EncoderModel(config))


@dataclass(frozen=True)
class Shape:
    """A kind of model.

    Attributes:
        make: makes it, with whatever weights.
        targets: of its adapters.
        packed: those of a pack of several members, where they are others.
        causal: whether it is trained to say the next token; else it tells classes.
        spread: standard deviation of its weights: larger than its config's, so that the adapters have work to do.
    """

    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    packed: tuple[str, ...] | None = None
    causal: bool = False
    spread: float = 0.25

    @property
    def fan_in_fan_out(self) -> bool:
        return "c_attn" in self.targets

    @property
    def pack_targets(self) -> tuple[str, ...]:
        return self.packed or self.targets


SHAPES = {
    "gpt2": Shape(_gpt2, ("c_attn", "c_proj", "c_fc"), causal=True),
    "llama": Shape(
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_decoder())),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        causal=True,
    ),
    "qwen2": Shape(
        lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_decoder())),
        ("q_proj", "v_proj", "down_proj"),
        causal=True,
    ),
    "roberta": Shape(
        lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**_encoder(type_vocab_size=1))
        ),
        ("query", "value", "output.dense"),
    ),
    "deberta-v2": Shape(_deberta, ("query_proj", "key_proj", "value_proj"), packed=("value_proj", "output.dense")),
    "t5-encoder": Shape(_t5, ("q", "k", "v", "o", "wi", "wo"), spread=0.1),  # its attention has no 1 / sqrt(d)
}


@functools.cache
def _weights(name: str) -> dict[str, Tensor]:
    """Drawn in float64, a generator a weight."""
    drawn = {}
    for seed, (key, value) in enumerate(SHAPES[name].make().state_dict().items()):
        if not value.is_floating_point() or "norm" in key.lower() or "ln_" in key:
            continue
        draws = torch.Generator().manual_seed(seed)
        drawn[key] = SHAPES[name].spread * torch.randn(value.shape, generator=draws, dtype=torch.float64)
    return drawn


def make_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model every time, in evaluation mode: its own dropout is off."""
    model = SHAPES[name].make()
    model.load_state_dict(_weights(name), strict=False)
    return model.to(dtype).eval()


@functools.cache
def _data() -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(7)
    ids = torch.randint(2, VOCABULARY, (SAMPLES, TOKENS), generator=draws)
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (SAMPLES,), generator=draws)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    return ids * mask + (1 - mask), mask, torch.randint(0, CLASSES, (SAMPLES,), generator=draws)


def losses_of(model: nn.Module, members: int, *, causal: bool) -> Callable[[int], Tensor]:
    """The batch is repeated, member-major, attention mask and all; each loss is the mean over a member's own tokens."""

    def losses_K(step: int) -> Tensor:
        rows = batch_indices(SAMPLES, BATCH, step, seed=0)
        ids, mask, classes = (each[rows].repeat(members, *[1] * (each.dim() - 1)) for each in _data())
        out = model(input_ids=ids, attention_mask=mask)
        logits = out if isinstance(out, Tensor) else out.logits
        if causal:
            labels = ids.masked_fill(mask == 0, -100)[:, 1:].contiguous()
            nats = nn.functional.cross_entropy(logits[:, :-1].mT, labels, reduction="none").view(members, -1)
            return nats.sum(dim=1) / (labels.view(members, -1) != -100).sum(dim=1)
        return nn.functional.cross_entropy(logits, classes, reduction="none").view(members, BATCH).mean(dim=1)

    return losses_K


def make_point(rank: int = 4, scaling: float = 2.0, lr: float = 1e-3, *, dora: bool = False) -> Point:
    settings = FactorSettings(lr, 0.01, {"eps": 1e-8})
    return Point(rank, scaling, 1.0, settings, settings, magnitude=replace(settings, lr=lr / 2) if dora else None)


@contextlib.contextmanager
def pack(
    name: str,
    members: Sequence[Member],
    dtype: torch.dtype = torch.float32,
    *,
    targets: Sequence[str] | str | None = None,
    model: nn.Module | None = None,
) -> Iterator[tuple[LoraBank, PackOptimizer, Callable[[int], Tensor]]]:
    """Members over a fresh model, an optimizer, and the losses."""
    model = make_model(name, dtype) if model is None else model
    shape = SHAPES[name]
    with LoraBank.attach(model, targets or shape.targets, members) as bank:
        yield bank, PackOptimizer(bank, OptimizerConfig("adamw")), losses_of(model, len(members), causal=shape.causal)


def train(bank: LoraBank, optimizer: PackOptimizer, losses_K: Callable[[int], Tensor], steps: int) -> Tensor:
    """The losses [T, K], in float64."""
    records = train_pack(bank, optimizer, losses_K, start=0, stop=steps, schedule=CONSTANT)
    return torch.tensor([record.losses for record in records], dtype=torch.float64)


def peft_model(model: nn.Module, **settings: object) -> nn.Module:
    """PEFT's model over ours."""
    config = peft.LoraConfig(**settings)  # type: ignore[arg-type]
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()  # type: ignore[arg-type]


def put_into_peft(theirs: nn.Module, adapter: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Sets PEFT's parameters from our adapter and returns them under our keys."""
    found = {}
    for key, value in adapter.items():
        layer, _, factor = key.rpartition(".")
        module = theirs.base_model.model.get_submodule(layer)
        if factor == "magnitude":
            parameter = module.lora_magnitude_vector["default"].weight
        elif factor.startswith("lora_embedding"):
            parameter = getattr(module, factor)["default"]
        else:
            parameter = getattr(module, factor)["default"].weight
        parameter.data.copy_(value.mT if factor.endswith("_B") else value.view(parameter.shape))
        found[key] = parameter
    return found


def train_peft(
    theirs: nn.Module, parameters: dict[str, nn.Parameter], member: Member, losses: Callable[[int], Tensor], steps: int
) -> Tensor:
    """The losses [T] under torch's AdamW, in float64."""
    trained = {id(p) for p in theirs.parameters() if p.requires_grad}
    assert trained == {id(p) for p in parameters.values()}, "PEFT must train what we do"
    point, groups = member.point, []
    for key, parameter in parameters.items():
        settings = point.magnitude if key.endswith("magnitude") else point.a
        groups.append({"params": [parameter], "lr": settings.lr, "weight_decay": settings.weight_decay})
    optimizer = torch.optim.AdamW(groups, eps=1e-8)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = losses(step)[0]
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    return torch.tensor(seen, dtype=torch.float64)
