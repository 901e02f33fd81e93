"""PEFT itself as the reference for a member of a pack, and one way to train packs with torch.optim by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import peft
import torch
from torch import Tensor, nn

from lora_core.adapter import LoraBank, Member
from lora_core.dropout import PackDropout
from tests.lora_core.support import TARGETS, Mlp, losses_of

PEFT_NAMES = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
PEFT_NAMES["magnitude"] = "lora_magnitude_vector.default.weight"


def randomise(bank: LoraBank, factors: Sequence[str] = ("lora_B",), seed: int = 2) -> LoraBank:
    """B from a standard normal; magnitudes, if asked for, between half and one and a half of what they are."""
    draws = torch.Generator().manual_seed(seed)
    for k in range(len(bank.members)):
        tensors = bank.adapter(k)
        for name, value in tensors.items():
            if name.endswith("lora_B") and "lora_B" in factors:
                value.copy_(torch.randn(value.shape, generator=draws, dtype=torch.float64))
            if name.endswith("magnitude") and "magnitude" in factors:
                value.mul_(0.5 + torch.rand(value.shape, generator=draws, dtype=torch.float64))
        bank.load_adapter(k, tensors)
    return bank


class OurMask(nn.Module):
    """In PEFT's place for dropout: the mask that a pack of one would have."""

    def __init__(self, member: Member, layer: str) -> None:
        super().__init__()
        self.dropout, self.layer = PackDropout([member]), layer

    def forward(self, x: Tensor) -> Tensor:
        mask = self.dropout.mask(self.layer, x.detach().reshape(1, -1, x.shape[-1]))
        assert mask is not None
        return x * mask.keep_KMI.view_as(x) * mask.q_K11[0]


def peft_model_of(bank: LoraBank, k: int, *, batch: int | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A PEFT model that holds member k, training on a batch with our masks, or in evaluation."""
    point = bank.members[k].point
    config = peft.LoraConfig(
        r=point.rank,
        lora_alpha=point.scaling * point.rank,
        target_modules=list(TARGETS),
        use_dora=bank.dora,
        lora_dropout=point.dropout,
    )
    model = peft.get_peft_model(Mlp(dtype), config)
    for key, (parameter, name) in peft_parameters(model, bank.adapter(k)).items():
        value = bank.adapter(k)[key]
        parameter.data.copy_(value.mT if name == "lora_B" else value.view(parameter.shape))
    for layer in TARGETS:
        if point.dropout:
            ours = OurMask(bank.members[k], layer)
            ours.dropout.batch = batch
            model.base_model.model.get_submodule(layer).lora_dropout["default"] = ours
    return model.eval() if batch is None else model.train()


def peft_parameters(model: nn.Module, keys: Mapping[str, object]) -> dict[str, tuple[nn.Parameter, str]]:
    """PEFT's parameters under our keys, with the factor that each is."""
    return {
        key: (model.get_parameter(f"base_model.model.{layer}.{PEFT_NAMES[factor]}"), factor)
        for key, (layer, _, factor) in ((key, key.rpartition(".")) for key in keys)
    }


def adamw_over(bank: LoraBank) -> torch.optim.Optimizer:
    """torch's AdamW over every member's factors, each with its own constants."""
    groups = []
    for k, member in enumerate(bank.members):
        settings_of = {"lora_A": member.point.a, "lora_B": member.point.b, "magnitude": member.point.magnitude}
        for key, view in bank.member_tensors(k).items():
            settings = settings_of[key.rpartition(".")[2]]
            assert settings is not None
            group = {"params": [view], "lr": settings.lr, "eps": settings.eps, "weight_decay": settings.weight_decay}
            groups.append(group)
    return torch.optim.AdamW(groups)


def train_by_hand(model: Mlp, bank: LoraBank, steps: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """AdamW steps from step 0 on; yields the losses [K] of each."""
    optimizer, losses_K = adamw_over(bank), losses_of(model, len(bank.members), dtype)
    for step in range(steps):
        bank.zero_grad()
        bank.batch = step
        losses = losses_K(step)
        losses.sum().backward()
        bank.batch = None
        optimizer.step()
        yield losses.detach().clone()
