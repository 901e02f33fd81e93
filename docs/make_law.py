"""Makes what is measured in docs/law.md, and its plot: `make docs`. Tests hold the page to it.

The page is written by hand but for the parts between `<!-- made by docs/make_law.py: NAME -->` and `<!-- end -->`:

    law         the table of optimizers, from lora_core/laws.py
    verified    what the conformance suite finds (lora_core/conformance.py); it takes a minute
    where       with which torch and on what processor
    refused     optimizers without a law
    dispute     alpha x 4 beside lr x 4, alone and with the init moved too, on the digits; drawn in law-dispute.svg
"""

from __future__ import annotations

import platform
import re
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from pages import with_parts
from torch import Tensor

from lora_core.adapter import LoraBank, Member
from lora_core.conformance import DTYPES, SHARED, STEPS, TWO_PARAMETER, Case, cases, dtype_name, same_bits, table
from lora_core.gauge import FactorSettings, Gauge, Point, regauge
from lora_core.laws import LAWS, WITHOUT_LAW, OptimizerLaw
from lora_core.optimizers import OptimizerConfig, PackOptimizer
from lora_core.train import Schedule, batch_indices, train_pack
from lora_core.trajectory import Trajectory, record_trajectories
from sweeps.plots import STYLE, TWIN_COLOURS, svg
from sweeps.tasks.digits import DigitsTask

PATH = Path(__file__).parent / "law.md"
PLOT = Path(__file__).parent / "law-dispute.svg"

_WIDTH = 125

Found = Mapping[Case, Mapping[Gauge, bool]]


def document(text: str, parts: Mapping[str, str]) -> str:
    """The page with some of its parts made anew; see `with_parts`."""
    return with_parts(text, parts, script="make_law.py", page="law.md")


def parts_of(found: Found) -> dict[str, str]:
    """The parts that are the same on every machine."""
    return {"law": law_table(), "verified": verified(found), "refused": refused()}


# -- from the table of optimizers --------------------------------------------------------------------------------------


def law_table() -> str:
    """What keeps the run as it was when alpha x k, with one learning rate for A and B: a row an optimizer."""
    lines = [
        "| optimizer | `p` | lr | init scale | weight decay | clip norm | its own absolute constants |",
        "|---|---|---|---|---|---|---|",
    ]
    for law in LAWS.values():
        kind = {"l2": "L2", "decoupled": "decoupled", None: ""}[law.decay]
        decay = f"{kind}: {in_powers_of_k(law.decay_power)}" if law.decay else "has none"
        own = ", ".join(f"`{name}` {in_powers_of_k(power)}" for name, power in law.powers.items()) or "has none"
        cells = [law.name, str(law.degree), in_powers_of_k(law.lr_power), in_powers_of_k(-1), decay]
        lines.append(f"| {' | '.join([*cells, in_powers_of_k(1), own])} |")
    return "\n".join(lines)


def in_powers_of_k(power: int) -> str:
    """What a constant that moves like f**power is multiplied by, where f = sqrt(k): `/ sqrt(k)`, `x k`."""
    root = {1: "sqrt(k)", 2: "k"}[abs(power)]
    return f"`{'x' if power > 0 else '/'} {root}`"


def refused() -> str:
    """The optimizers without a law, and why."""
    items = (f"- `{name}`: {reason}." for name, reason in WITHOUT_LAW.items())
    return "\n".join(textwrap.fill(item, _WIDTH, subsequent_indent="  ") for item in items)


# -- from the conformance suite ----------------------------------------------------------------------------------------


def verified(found: Found) -> str:
    """How many twins were trained, in which gauges and how, and the suite's table."""
    twins = [same for held in found.values() for same in held.values()]
    alphas = ", ".join(str(Fraction(gauge.k)) for gauge in SHARED)
    pairs = ", ".join(f"({Fraction(gauge.a)},{Fraction(gauge.b)})" for gauge in TWO_PARAMETER)
    regimens = "; ".join(dict.fromkeys(str(case.regimen) for case in found))
    kernels = ", ".join(sorted({case.kernel for case in found if case.kernel}))
    decay = max(case.point.a.weight_decay for case in found)
    items = [
        f"- gauges with one learning rate: alpha x {alphas}; gauges that change the ratio of A's and B's, `(a,b)`: "
        f"{pairs}, where nothing is clipped",
        f"- number formats: {', '.join(map(dtype_name, DTYPES))}; torch's ways through the parameters: {kernels}",
        f"- {STEPS} steps each, under one of: {regimens}",
        f"- in all of them warm-up where the optimizer reads lr at every step, weight decay {decay:g} where it has "
        "one, and its absolute constants at values large enough to matter",
    ]
    return "\n".join(
        [
            f"{sum(twins):,} of {len(twins):,} twins are bit-identical to their {len(found)} representatives:",
            "",
            *(textwrap.fill(item, _WIDTH, subsequent_indent="  ") for item in items),
            "",
            table(found),
        ]
    )


def where() -> str:
    """What it was made with."""
    processor = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return f"Made with torch {torch.__version__} on one thread of a CPU, {processor}."


# -- the dispute -------------------------------------------------------------------------------------------------------

_RANK, _ALPHA, _K = 8, 16.0, 4.0
_LR = {"sgd": 3e-3, "adamw": 1e-3}
_BATCH, _STEPS, _LAST = 64, 200, 20


@dataclass(frozen=True, slots=True)
class Run:
    """One line of the plot.

    Attributes:
        label: what is moved, and by how much.
        losses: training loss before each step, in nats.
        bit_identical: whether all its losses and update norms are those of alpha x 4 alone.
    """

    label: str
    losses: tuple[float, ...]
    bit_identical: bool


def dispute(cache: Path, *, steps: int = _STEPS) -> dict[str, list[Run]]:
    """Trains the digits' adapters, by optimizer; the second run of each is alpha x 4 alone.

    Args:
        cache: where the base network is kept.
        steps: of each run.
    """
    task = DigitsTask.load(0, cache=cache, device=torch.device("cpu"), dtype=torch.float32)
    found = {}
    for name in _LR:
        runs = {label: _train(task, point, name, steps) for label, point in _points(LAWS[name]).items()}
        of_alpha = runs[f"alpha x {_K:g}"]
        found[name] = [Run(each, tuple(run.losses.tolist()), same_bits(run, of_alpha)) for each, run in runs.items()]
    return found


def _points(law: OptimizerLaw) -> dict[str, Point]:
    """What is trained, by what is moved."""
    settings = FactorSettings(_LR[law.name], 0.0, law.constants())
    base = Point(_RANK, _ALPHA / _RANK, 1.0, settings, settings)
    other_alpha = replace(base, scaling=base.scaling * _K)
    other_lr = replace(settings, lr=settings.lr * _K)
    points = [base, other_alpha, replace(base, a=other_lr, b=other_lr)]
    for rule in _LR:
        twin = regauge(other_alpha, Gauge.of_alpha(1 / _K), LAWS[rule])
        forgotten = replace(twin.a, constants=settings.constants)  # eps, where there is one
        points += [twin, replace(twin, a=forgotten, b=forgotten)]
    return {_moved(base, point): point for point in points}


def _moved(base: Point, point: Point) -> str:
    ratios = {
        "alpha": point.scaling / base.scaling,
        "lr": point.a.lr / base.a.lr,
        "init": point.init_scale / base.init_scale,
        "eps": (point.a.eps or 1.0) / (base.a.eps or 1.0),
    }
    said = [f"{name} {'x' if by > 1 else '/'} {max(by, 1 / by):g}" for name, by in ratios.items() if by != 1]
    return ", ".join(said) or "base"


def _train(task: DigitsTask, point: Point, optimizer: str, steps: int) -> Trajectory:
    def losses_K(batch: int) -> Tensor:
        return task.losses_K(batch_indices(task.n_samples, _BATCH, batch, seed=0), 1)

    with LoraBank.attach(task.model, ("fc1", "fc2"), [Member(point, seed=0)]) as bank:
        stepper = PackOptimizer(bank, OptimizerConfig(optimizer))
        schedule = Schedule("constant", steps)
        return record_trajectories(bank, train_pack(bank, stepper, losses_K, start=0, stop=steps, schedule=schedule))[0]


def distances(run: Run, other: Run) -> list[float]:
    """How far the losses of two runs are apart at each step, relative to the second's."""
    return [abs(one - two) / abs(two) for one, two in zip(run.losses, other.losses, strict=True)]


def dispute_table(found: Mapping[str, Sequence[Run]]) -> str:
    """The runs in numbers."""
    rates = " and ".join(f"{LAWS[name].kind} at lr {lr:g}" for name, lr in _LR.items())
    setting = (
        f"Rank {_RANK}, alpha {_ALPHA:g}, {rates}, no decay, {len(found['sgd'][0].losses)} steps of {_BATCH} digits, "
        f"float32. Loss: mean over the last {_LAST} steps, in nats. Distance: of the losses, relative to those of "
        f"alpha x {_K:g}, the largest over all steps."
    )
    lines = [
        *textwrap.wrap(setting, _WIDTH),
        "",
        f"| optimizer | moved | loss | distance from alpha x {_K:g} |",
        "|---|---|---|---|",
    ]
    for name, runs in found.items():
        for run in runs:
            last = run.losses[-_LAST:]
            apart = "none: bit-identical" if run.bit_identical else f"{max(distances(run, runs[1])):.2g}"
            apart = "–" if run is runs[1] else apart
            lines.append(f"| {name} | {run.label} | {sum(last) / len(last):.3f} | {apart} |")
    return "\n".join(lines)


def dispute_plot(found: Mapping[str, Sequence[Run]]) -> str:
    """Losses, and below them how far they are from those of alpha x 4, a column an optimizer.

    Returns:
        An SVG element.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 5.4))
        figure.subplots_adjust(left=0.08, right=0.99, bottom=0.09, top=0.94, wspace=0.18, hspace=0.1)
        rows = figure.subplots(2, len(found), sharex="col", height_ratios=(3, 2), squeeze=False)
        # A colour a label, the same in both columns.
        labels = dict.fromkeys(run.label for runs in found.values() for run in runs[2:])
        colours = dict(zip(labels, TWIN_COLOURS, strict=False))
        for column, (name, runs) in enumerate(found.items()):
            _losses(rows[0][column], runs, colours)
            _distances(rows[1][column], runs, colours)
            rows[0][column].set_title(LAWS[name].kind)
        rows[0][0].set_ylabel("training loss (nats)")
        rows[1][0].set_ylabel(f"relative distance\nfrom alpha x {_K:g}")
        # matplotlib ends some lines of a path with a space.
        return re.sub(r" +$", "", svg(figure, "alpha x 4 beside lr x 4, alone and with init moved too"), flags=re.M)


def _losses(axis: Any, runs: Sequence[Run], colours: Mapping[str, str]) -> None:
    base, of_alpha, *others = runs
    steps = range(1, len(base.losses) + 1)
    axis.plot(steps, base.losses, color="#888888", lw=0.9, ls=":", label=base.label)
    axis.plot(steps, of_alpha.losses, color="#cccccc", lw=6, label=of_alpha.label)
    for run in others:
        how = {"ls": (0, (4, 3)), "zorder": 3} if run.bit_identical else {"ls": "-"}
        axis.plot(steps, run.losses, color=colours[run.label], lw=1.1, label=run.label, **how)
    axis.set(yscale="log")
    axis.legend(fontsize=7)


def _distances(axis: Any, runs: Sequence[Run], colours: Mapping[str, str]) -> None:
    base, of_alpha, *others = runs
    exact = [run.label for run in others if run.bit_identical]
    for run in (base, *others):
        if not run.bit_identical:
            # Before the first step all losses are equal: B is 0.
            apart = [(step, far) for step, far in enumerate(distances(run, of_alpha), start=1) if far > 0]
            style = {"color": "#888888", "ls": ":"} if run is base else {"color": colours[run.label]}
            axis.plot(*zip(*apart, strict=True), lw=1.1, **style)
    axis.set(yscale="log", xlabel="step", ylim=(1e-9, 30))
    axis.minorticks_off()
    for place, label in enumerate(exact):
        text = f"{label}: exactly 0 at every step"
        axis.text(0.02, 0.04 + 0.08 * place, text, transform=axis.transAxes, fontsize=7)


def main() -> None:
    """Runs all of it and writes the page and the plot."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    every = [case for law in LAWS.values() for case in cases(law)]
    parts = parts_of({case: {gauge: case.holds(gauge) for gauge in case.gauges} for case in every})
    with tempfile.TemporaryDirectory() as cache:
        runs = dispute(Path(cache))
    parts |= {"where": where(), "dispute": dispute_table(runs)}
    PATH.write_text(document(PATH.read_text(encoding="utf-8"), parts), encoding="utf-8")
    PLOT.write_text(dispute_plot(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
