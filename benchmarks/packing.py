"""Packing against solo runs, and against the bare frozen base: ratios from one run. Needs torch only; CUDA if any.

    python benchmarks/packing.py

For each width and pack size K: the time of K solo steps / the time of one packed step (never to fall below 1), and
F = the time of the frozen base's own step on the same rows / the time of the packed step. Medians over interleaved
rounds, one CPU thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lora_core.adapter import LoraBank, Member
from lora_core.gauge import FactorSettings, Point
from lora_core.optimizers import OptimizerConfig, PackOptimizer
from lora_core.train import Schedule, train_pack

ROUNDS, STEPS, RANK = 9, 8, 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network(width: int) -> nn.Sequential:
    """Four square layers with ReLU between."""
    torch.manual_seed(0)
    layers = [module for _ in range(4) for module in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).to(DEVICE)


def packed_step(width: int, rows: int, members: int) -> Callable[[], float]:
    """Returns a function that trains STEPS steps of a pack and gives the seconds a step."""
    model = network(width)
    settings = FactorSettings(lr=1e-4, constants={"eps": 1e-8})
    member = Member(Point(RANK, 2.0, 1.0, settings, settings, clip_norm=1.0), seed=0)
    bank = LoraBank.attach(model, ["0", "2", "4", "6"], [member] * members)
    optimizer = PackOptimizer(bank, OptimizerConfig("adamw"))
    x = torch.randn(members * rows, width, device=DEVICE)

    def losses_K(_step: int) -> torch.Tensor:
        return model(x).square().view(members, -1).mean(dim=1)

    def steps() -> None:
        for _ in train_pack(bank, optimizer, losses_K, start=0, stop=STEPS, schedule=Schedule("constant", STEPS)):
            pass

    return lambda: timed(steps)


def base_step(width: int, rows: int, members: int) -> Callable[[], float]:
    """The same for the frozen base alone: forward, and backward to the input of every layer but the first."""
    model = network(width).requires_grad_(False)
    x = torch.randn(members * rows, width, device=DEVICE)

    def steps() -> None:
        for _ in range(STEPS):
            hidden = model[0](x).requires_grad_()
            model[1:](hidden).square().mean().backward()

    return lambda: timed(steps)


def timed(work: Callable[[], object]) -> float:
    """Seconds a step."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began_s = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began_s) / STEPS


def main() -> None:
    torch.set_num_threads(1)
    print(f"{DEVICE}, rank {RANK}, AdamW with per-member clip; medians of {ROUNDS} interleaved rounds of {STEPS} steps")
    print(f"{'width':>6} {'rows':>5} {'K':>3} {'K solo / packed':>16} {'F':>6}")
    for width in (128, 768, 1536):
        for rows in (32, 128):
            for members in (4, 16):
                works = {
                    "packed": packed_step(width, rows, members),
                    "solo": packed_step(width, rows, 1),
                    "base": base_step(width, rows, members),
                }
                seconds: dict[str, list[float]] = {name: [] for name in works}
                for round_number in range(ROUNDS + 1):
                    for name, work in works.items():
                        taken = work()
                        if round_number:  # the first is warm-up
                            seconds[name].append(taken)
                packed, solo, base = (statistics.median(seconds[name]) for name in ("packed", "solo", "base"))
                print(f"{width:>6} {rows:>5} {members:>3} {members * solo / packed:>16.2f} {base / packed:>6.2f}")


if __name__ == "__main__":
    main()
