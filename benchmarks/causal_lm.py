"""Tokens a second of a pack of language-model adapters, beside PEFT training the same members one at a time.

    python benchmarks/causal_lm.py
    python benchmarks/causal_lm.py --shape qwen2-0.5b --device cuda --members 8 --batch 4 --width 512

Both sides train the same K members on the same batches, padded to the same widths, in the same dtype, from the same
weights of the same transformers model, with the same clip and AdamW:

    packed   our task and bank, K members in one pass
    PEFT     peft.get_peft_model, unmodified, and torch.optim.AdamW; a member at a time, so its time is K solo runs

For each setting: tokens trained a second on both sides, padding not counted, and their ratio, above 1 where the pack is
faster. Medians over interleaved rounds; in each the solo side is another member. Losses of both sides are compared step
by step, or it would not be the same work. Needs torch, transformers and peft; neither Ray nor MLflow.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import peft
import torch
import transformers
from torch import Tensor, nn

from lora_core.adapter import LoraBank, Member
from lora_core.allocator import keep_freed_memory
from lora_core.gauge import FactorSettings, Point
from lora_core.optimizers import OptimizerConfig, PackOptimizer
from lora_core.train import Schedule, batch_indices, train_pack
from sweeps.tasks.causal_lm import CausalLmTask
from sweeps.tasks.pretrained import vocabulary
from sweeps.tasks.tokens import Rows, Tokens

ALPHA, EPS, CLIP_NORM, SAMPLES = 16.0, 1e-8, 1.0, 256
LRS = (1e-4, 3e-4, 1e-3, 3e-3)

Clock = Literal["wall", "process"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}
"""process: seconds that the process had a CPU, for one thread on a machine that others share."""

AGREE = {"float32": 1e-4, "float64": 1e-6, "bfloat16": 2e-2}
"""How far apart, relative, a member's losses may be on the two sides: they add up in another order, transformers
takes the loss in float32 whatever the model is in, and PEFT computes adapters of a bfloat16 model in float32."""


@dataclass(frozen=True)
class Shape:
    """A model's config and the layers that are adapted; its weights are random, which no time depends on."""

    kind: type[transformers.PreTrainedConfig]
    settings: dict[str, Any]
    targets: list[str]


def _gpt2(**settings: Any) -> Shape:
    # Without its dropout, which PEFT's side would draw and a pack never does.
    without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return Shape(transformers.GPT2Config, {**settings, **without}, ["c_attn", "c_proj", "c_fc"])


def _qwen2(width: int, hidden: int, layers: int, heads: int) -> Shape:
    settings = {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    }
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return Shape(transformers.Qwen2Config, settings, targets)


SHAPES = {
    # GPT-2's own layers, but four of them and a small vocabulary: seconds on a CPU.
    "gpt2-4": _gpt2(n_layer=4, vocab_size=8192, bos_token_id=0, eos_token_id=0),
    "gpt2": _gpt2(),
    "tiny": _gpt2(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0),
    "qwen2-0.5b": _qwen2(896, 4864, 24, 14),
    "qwen2-1.5b": _qwen2(1536, 8960, 28, 12),
}


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        members: K.
        batch: samples of a step.
        width: tokens of the longest sample; the shortest has half of them.
        steps: of a round.
        clock: which seconds are counted.
    """

    members: int
    batch: int
    width: int
    steps: int
    clock: Clock = "wall"


def make_model(shape: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen model of random weights, the same ones each time."""
    shaped = SHAPES[shape]
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(shaped.kind(**shaped.settings), dtype=dtype)
    return model.to(device).requires_grad_(False).eval()


def make_rows(width: int, known: int) -> Rows:
    """Samples of random tokens, between half a width and a width long."""
    draws = torch.Generator().manual_seed(0)
    lengths = torch.randint(width // 2, width + 1, (SAMPLES,), generator=draws).tolist()
    ids = [torch.randint(known, (length,), generator=draws).tolist() for length in lengths]
    return Rows.padded(Tokens.of([(each, [True] * len(each)) for each in ids]))


class Packed:
    """All members in one pass."""

    def __init__(self, model: nn.Module, targets: list[str], setting: Setting, rank: int) -> None:
        self.rows = make_rows(setting.width, vocabulary(model))
        self.task = CausalLmTask(model, self.rows, self.rows)
        members = [Member(_point(rank, LRS[k % len(LRS)]), seed=k) for k in range(setting.members)]
        self.bank = LoraBank.attach(model, targets, members)
        self.initial = [self.bank.adapter(k) for k in range(setting.members)]
        self._setting = setting

    def round(self) -> tuple[float, Tensor]:
        """Trains from the beginning; the seconds that it took, and the losses [steps, K]."""
        setting = self._setting
        for k, adapter in enumerate(self.initial):
            self.bank.load_adapter(k, adapter)
        optimizer = PackOptimizer(self.bank, OptimizerConfig("adamw"))

        def losses_K(step: int) -> Tensor:
            return self.task.losses_K(_indices(setting, step), setting.members)

        schedule = Schedule("constant", setting.steps)
        train = train_pack(self.bank, optimizer, losses_K, start=0, stop=setting.steps, schedule=schedule)
        seconds, records = _timed(lambda: list(train), setting.clock, self.bank.params_KP.device)
        return seconds, torch.tensor([record.losses for record in records], dtype=torch.float64)


class Solo:
    """One member at a time, as PEFT's users train it."""

    def __init__(self, model: nn.Module, targets: list[str], packed: Packed, setting: Setting, rank: int) -> None:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=ALPHA,
            target_modules=targets,
            fan_in_fan_out=packed.bank.fan_in_fan_out,
            task_type="CAUSAL_LM",
        )
        self._model = peft.get_peft_model(model, config).train()
        self._trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._packed, self._setting = packed, setting

    def round(self, k: int) -> tuple[float, Tensor]:
        """Trains member k from the beginning; the seconds that it took, and its losses [steps]."""
        for key, value in self._packed.initial[k].items():
            layer, _, factor = key.rpartition(".")
            parameter = self._model.get_parameter(f"base_model.model.{layer}.{factor}.default.weight")
            parameter.data.copy_(value.mT if factor == "lora_B" else value)
        lr = self._packed.bank.members[k].point.a.lr
        optimizer = torch.optim.AdamW(self._trained, lr=lr, eps=EPS, weight_decay=0.0, fused=True)
        device = self._trained[0].device

        def step(number: int) -> Tensor:
            batch = self._packed.rows.batch(_indices(self._setting, number).tolist(), multiple=8)
            ids = batch.ids.to(device)
            # transformers shifts them itself; the first of a sample is never asked for.
            labels = torch.full_like(batch.targets, -100)
            labels[:, 1:] = batch.targets[:, :-1]
            loss = self._model(input_ids=ids, labels=labels.to(device), use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._trained, CLIP_NORM)
            optimizer.step()
            return loss.detach().double()

        def work() -> Tensor:
            return torch.stack([step(i) for i in range(self._setting.steps)])

        seconds, losses = _timed(work, self._setting.clock, device)
        return seconds, losses.cpu()


@dataclass(frozen=True)
class Measured:
    """What a setting gave.

    Attributes:
        packed, solo: tokens trained a second on both sides, padding not counted.
        apart: how far a member's losses were from each other, relative.
    """

    packed: float
    solo: float
    apart: float

    @property
    def ratio(self) -> float:
        """How much faster the pack is."""
        return self.packed / self.solo


def measure(
    shape: str, setting: Setting, *, rank: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> Measured:
    """Measures a setting; the first round is warm-up."""
    targets, (ours, theirs) = SHAPES[shape].targets, (make_model(shape, device, dtype) for _ in range(2))
    packed = Packed(ours, targets, setting, rank)
    solo = Solo(theirs, targets, packed, setting, rank)
    packed_s, solo_s, apart = [], [], 0.0
    for number in range(rounds + 1):
        k = number % setting.members
        seconds, losses = packed.round()
        solo_seconds, solo_losses = solo.round(k)
        apart = max(apart, float(((losses[:, k] - solo_losses) / solo_losses).abs().max()))
        if number:
            packed_s.append(seconds)
            solo_s.append(solo_seconds)
    tokens = sum(int(packed.task.lengths_S[_indices(setting, step)].sum()) for step in range(setting.steps))
    return Measured(setting.members * tokens / statistics.median(packed_s), tokens / statistics.median(solo_s), apart)


def _point(rank: int, lr: float) -> Point:
    settings = FactorSettings(lr, constants={"eps": EPS})
    return Point(rank, ALPHA / rank, 1.0, settings, settings, clip_norm=CLIP_NORM)


def _indices(setting: Setting, step: int) -> Tensor:
    return batch_indices(SAMPLES, setting.batch, step, seed=0)


def _timed(work: Callable[[], Any], clock: Clock, device: torch.device) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began_s = CLOCKS[clock]()
    made = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return CLOCKS[clock]() - began_s, made


def main(arguments: list[str] | None = None) -> list[Measured]:
    """Measures every combination of members, batch and width, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-4", help="of the model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=AGREE, help="default: float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--members", type=int, nargs="+", default=[4, 16], help="K")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="samples a step")
    parser.add_argument("--width", type=int, nargs="+", default=[32, 64], help="tokens of the longest sample")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--rounds", type=int, default=5, help="that are counted, after one of warm-up")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="process: CPU time, for a machine that is shared"
    )
    given = parser.parse_args(arguments)
    if given.clock == "process" and (given.threads > 1 or given.device == "cuda"):
        parser.error("--clock process counts one CPU thread; found more, or a GPU")
    dtype = given.dtype or ("float32" if given.device == "cpu" else "bfloat16")
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # as workers do; the solo side gains a little too
    print(
        f"{given.shape}, {given.device}, {dtype}, {given.threads} CPU threads, rank {given.rank}, AdamW, clipped; "
        f"medians of {given.rounds} interleaved rounds of {given.steps} steps, {given.clock} time; tokens/s "
        "without padding"
    )
    print(f"{'K':>3} {'batch':>5} {'width':>5} {'packed tokens/s':>16} {'PEFT tokens/s':>14} {'ratio':>6} {'apart':>8}")
    all_measured = []
    for width, batch, members in itertools.product(given.width, given.batch, given.members):
        setting = Setting(members, batch, width, given.steps, given.clock)
        device = torch.device(given.device)
        found = measure(
            given.shape, setting, rank=given.rank, rounds=given.rounds, device=device, dtype=getattr(torch, dtype)
        )
        speeds = f"{found.packed:>16,.0f} {found.solo:>14,.0f} {found.ratio:>6.2f}"
        print(f"{members:>3} {batch:>5} {width:>5} {speeds} {found.apart:>8.1g}", flush=True)
        if found.apart > AGREE[dtype]:
            raise SystemExit(
                f"losses must agree to {AGREE[dtype]:g}, or it is not the same work; found {found.apart:g}"
            )
        all_measured.append(found)
    return all_measured


if __name__ == "__main__":
    main()
