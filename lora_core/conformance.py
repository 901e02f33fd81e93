"""Does the law hold to the last bit, for every row of the table? `python -m lora_core.conformance [--device cuda]`

    symbol  meaning
    (a, b)  a gauge of powers of two
    k       a b, the factor on alpha

A representative and its twin in another gauge are trained on a small network, and every loss and every norm of s B A
must be the same number. The runs have all that a user's have: warm-up and a falling learning rate, weight decay, a clip
that bites, accumulated gradients, and absolute constants large enough to matter (`Absolute.telling`). A twin with one
quantity left where it was must come out different: else the suite could not tell a wrong power from a right one.

Nothing here is written for an optimizer: a new row in `laws.py` is all that is needed.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapter import LoraBank, Member
from lora_core.gauge import FactorSettings, Gauge, Point, regauge
from lora_core.laws import LAWS, Kernel, OptimizerLaw
from lora_core.optimizers import OptimizerConfig, PackOptimizer
from lora_core.seeds import generator
from lora_core.train import Schedule, ScheduleKind, batch_indices, train_pack
from lora_core.trajectory import Trajectory, record_trajectories

SHARED = tuple(Gauge.of_alpha(k) for k in (1 / 16, 1 / 4, 4.0, 16.0, 256.0))
"""Gauges with one learning rate for A and B."""
TWO_PARAMETER = (Gauge(2.0, 1.0), Gauge(1.0, 2.0), Gauge(4.0, 1 / 2), Gauge(8.0, 1 / 16))
"""Gauges that change the ratio of their learning rates."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
STEPS = 16

_SAMPLES, _BATCH, _WIDTHS, _CLASSES = 64, 16, (12, 24, 24), 5


@dataclass(frozen=True, slots=True)
class Regimen:
    """How a run is trained, but for the optimizer."""

    schedule: ScheduleKind
    clip_norm: float | None = None
    accumulation: int = 1
    dropout: float = 0.0
    dora: bool = False

    def __str__(self) -> str:
        said = {
            f"clip {self.clip_norm}": self.clip_norm is not None,
            f"{self.accumulation} batches a step": self.accumulation > 1,
            f"dropout {self.dropout}": self.dropout > 0,
            "DoRA": self.dora,
        }
        return ", ".join([self.schedule, *(text for text, true in said.items() if true)])


CLIPPED = Regimen("cosine", clip_norm=0.05)
ACCUMULATED = Regimen("linear", accumulation=2, dropout=0.1)
DORA = Regimen("cosine", dora=True, dropout=0.1)


@dataclass(frozen=True, eq=False)
class Case:
    """One representative: what is trained, and how. Its twins are in the gauges asked for.

    Attributes:
        law: row of the table.
        options: settings of the optimizer that are not its defaults.
        dtype: of the model and the adapters.
        regimen: the rest.
        kernel: how torch runs through the parameters.
    """

    law: OptimizerLaw
    options: Mapping[str, Any]
    dtype: torch.dtype
    regimen: Regimen
    kernel: Kernel | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __str__(self) -> str:
        return (
            f"{variant_name(self.law, self.options)}, {dtype_name(self.dtype)}, {self.regimen}, {self.kernel or 'auto'}"
        )

    @property
    def gauges(self) -> tuple[Gauge, ...]:
        """Those that the law has for it: a clip ties A and B together."""
        return SHARED if self.regimen.clip_norm else SHARED + TWO_PARAMETER

    @cached_property
    def point(self) -> Point:
        """The representative."""
        constants = {name: constant.telling for name, constant in self.law.absolute.items()}
        # Steps of a like size for all: a gradient here is about 0.1, and where its size does not count, 1.
        lr = 0.1 if self.law.degree == 1 else 0.01
        settings = FactorSettings(lr, 0.0 if self.law.decay is None else 0.3, constants)
        magnitude = FactorSettings(lr, 0.0, constants) if self.regimen.dora else None
        return Point(4, 2.0, 1.0, settings, settings, self.regimen.clip_norm, magnitude, self.regimen.dropout)

    @cached_property
    def trajectory(self) -> Trajectory:
        """The representative's run."""
        return self.run(self.point)

    def run(self, point: Point) -> Trajectory:
        """Trains a point."""
        model = _Network(self.dtype).to(self.device)
        x, y = (tensor.to(self.device) for tensor in _samples(self.dtype))

        def losses_K(batch: int) -> Tensor:
            rows = batch_indices(_SAMPLES, _BATCH, batch, seed=0).to(self.device)
            return nn.functional.cross_entropy(model(x[rows]), y[rows])[None]

        with LoraBank.attach(model, ("fc1", "fc2"), [Member(point, seed=0)], dtype=self.dtype) as bank:
            optimizer = PackOptimizer(bank, OptimizerConfig(self.law.name, self.options, self.kernel))
            schedule = Schedule(self.regimen.schedule, STEPS, warmup_steps=3 if self.law.scheduled else 0)
            records = train_pack(
                bank,
                optimizer,
                losses_K,
                start=0,
                stop=STEPS,
                schedule=schedule,
                accumulation=self.regimen.accumulation,
            )
            return record_trajectories(bank, records)[0]

    def holds(self, gauge: Gauge) -> bool:
        """Whether the twin in a gauge is the same run, bit for bit, and a run at all: finite, every layer moving."""
        quantities_TQ = self.trajectory.quantities_TQ
        alive = bool(quantities_TQ.isfinite().all()) and bool((quantities_TQ[-1] > 0).all())
        return alive and same_bits(self.trajectory, self.run(regauge(self.point, gauge, self.law)))

    def near_twins(self, gauge: Gauge) -> dict[str, Point]:
        """Twins in a gauge, each with one quantity left where the representative has it, by the quantity's name."""
        twin, own = regauge(self.point, gauge, self.law), self.point
        factors: dict[str, dict[str, Any]] = {"lr": {"lr": own.a.lr}}
        if self.law.decay is not None:
            factors["weight_decay"] = {"weight_decay": own.a.weight_decay}
        for name in self.law.absolute:
            factors[name] = {"constants": {**twin.a.constants, name: own.a.constants[name]}}
        near = {name: replace(twin, a=replace(twin.a, **c), b=replace(twin.b, **c)) for name, c in factors.items()}
        near["init_scale"] = replace(twin, init_scale=own.init_scale)
        near["scaling"] = replace(twin, scaling=own.scaling)
        if own.clip_norm is not None:
            near["clip_norm"] = replace(twin, clip_norm=own.clip_norm)
        return near


def cases(law: OptimizerLaw, *, device: torch.device | None = None) -> Iterator[Case]:
    """Every case of a row: its variants in all number formats, clipped and not, with DoRA; and its kernels."""
    where = device or torch.device("cpu")
    variants: Sequence[Mapping[str, Any]] = ({}, *law.variants)
    for options, dtype, regimen in itertools.product(variants, DTYPES, (CLIPPED, ACCUMULATED, DORA)):
        if regimen.dora and (law.matrices or options):
            continue  # magnitudes are vectors, and once is enough
        if dtype.itemsize < 4 and law.wrong_in_half and law.wrong_in_half.items() <= options.items():
            continue  # refused
        yield Case(law, options, dtype, regimen, device=where)
    for kernel in law.kernels:
        yield Case(law, {}, torch.float32, CLIPPED, kernel, where)


def same_bits(one: Trajectory, other: Trajectory) -> bool:
    """Whether all losses and update norms of two runs are the same numbers."""
    return torch.equal(one.quantities_TQ, other.quantities_TQ)


# -- the small network -------------------------------------------------------------------------------------------------


class _Network(nn.Module):
    """Two adapted layers and a head."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = nn.Linear(_WIDTHS[0], _WIDTHS[1])
        self.fc2 = nn.Linear(_WIDTHS[1], _WIDTHS[2])
        self.head = nn.Linear(_WIDTHS[2], _CLASSES)
        draws = generator("conformance weights")
        with torch.no_grad():
            for parameter in self.parameters():
                bound = 1 / math.sqrt(parameter.shape[-1])
                parameter.uniform_(-bound, bound, generator=draws)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))
        return logits


def _samples(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draws = generator("conformance samples")
    x = torch.randn(_SAMPLES, _WIDTHS[0], generator=draws).to(dtype)
    return x, torch.randint(0, _CLASSES, (_SAMPLES,), generator=draws)


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """What was found for one optimizer with one set of options."""

    name: str
    twins: Mapping[str, tuple[int, int]]
    """By number format: twins that are bit-identical, and all."""


def variant_name(law: OptimizerLaw, options: Mapping[str, Any]) -> str:
    """`sgd`, `sgd (momentum=0.9, nesterov)`."""
    said = ", ".join(name if value is True else f"{name}={value}" for name, value in options.items())
    return f"{law.name} ({said})" if said else law.name


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`."""
    return str(dtype).removeprefix("torch.")


def rows(found: Mapping[Case, Mapping[Gauge, bool]]) -> list[Row]:
    """Sums up, a row a variant, in the order of the table."""
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for case, held in found.items():
        of_variant = counts.setdefault(variant_name(case.law, case.options), {})
        same, tried = of_variant.get(dtype_name(case.dtype), (0, 0))
        of_variant[dtype_name(case.dtype)] = same + sum(held.values()), tried + len(held)
    return [Row(name, twins) for name, twins in counts.items()]


def table(found: Mapping[Case, Mapping[Gauge, bool]]) -> str:
    """What was found, as Markdown: bit-identical twins of all that were trained."""
    formats = [dtype_name(dtype) for dtype in DTYPES]
    lines = [f"| optimizer | {' | '.join(formats)} |", f"|---|{'---|' * len(formats)}"]
    for row in rows(found):
        cells = ["{} of {}".format(*row.twins[name]) if name in row.twins else "refused" for name in formats]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs all of it and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--optimizer", choices=LAWS, nargs="*", default=list(LAWS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    chosen = [case for name in arguments.optimizer for case in cases(LAWS[name], device=arguments.device)]
    print(table({case: {gauge: case.holds(gauge) for gauge in case.gauges} for case in chosen}))


if __name__ == "__main__":
    main()
