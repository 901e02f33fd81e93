"""The report's plots, as SVG: the search, twins over their representatives, lr over rank. Alone imports matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from sweeps.collapse import Certificate, TwinVerdict
from sweeps.rank_scaling import ConventionSlope, RankScaling
from sweeps.space import Configuration

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "lora-sweeps",  # the same plot is the same text
    "legend.frameon": False,
}
_MARKERS = {"finished": "o", "pruned": "v"}
TWIN_COLOURS = ("#d1495b", "#edae49", "#00798c", "#7768ae", "#30638e", "#8d6a9f", "#4f772d", "#bc4749")
_MOST_TICKS = 12

_MOST_MARKS = 2000
"""Marks of a kind in a panel that stay shapes; more become a picture, or a page of 100,000 would not open."""

Point = tuple[Configuration, str, float | None]


def search(points: Sequence[Point], *, metric: str, goal: str) -> str:
    """Learning rate against init scale, coloured by the objective, a panel a rank.

    Args:
        points: canonical point, state and value of each trial; one without a value is a cross.
        metric: what the colour is, with its unit.
        goal: `minimize` or `maximize`: which end is marked as the best.

    Returns:
        An SVG element.
    """
    ranks = sorted({configuration.rank for configuration, _, _ in points})
    values = [value for _, _, value in points if value is not None]
    if not values:
        return ""
    norm = LogNorm(min(values), max(values)) if min(values) > 0 else Normalize(min(values), max(values))
    choose = min if goal == "minimize" else max
    finished = [point for point in points if point[1] == "finished" and point[2] is not None]
    best = choose(finished, key=lambda point: point[2] or 0.0, default=None)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(ranks) + 1.4, 3.2))
        # By hand: a layout engine draws everything several times over, which takes longer than all the rest.
        figure.subplots_adjust(left=0.8 / figure.get_figwidth(), right=0.99, bottom=0.16, top=0.9, wspace=0.08)
        axes = figure.subplots(1, len(ranks), sharex=True, sharey=True, squeeze=False)[0]
        shown: Any = None
        for axis, rank in zip(axes, ranks, strict=True):
            here = [point for point in points if point[0].rank == rank]
            shown = _scatter(axis, here, norm, goal) or shown
            if best is not None and best[0].rank == rank:
                axis.scatter(
                    best[0].lr, best[0].init_scale, marker="o", s=160, facecolors="none", edgecolors="#d1495b", lw=1.6
                )
            axis.set(xscale="log", yscale="log", title=f"rank {rank}", xlabel="learning rate")
            axis.minorticks_off()
        axes[0].set_ylabel("init scale (factor on the default)")
        figure.colorbar(shown, ax=list(axes), label=metric, pad=0.02)
        return svg(figure, "Learning rate against init scale, coloured by the objective, one panel a rank")


def twins(certificates: Sequence[Certificate]) -> str:
    """Loss of every twin over its representative's, and below how far they are apart, a column a certificate.

    Returns:
        An SVG element; empty where there are no certificates.
    """
    if not certificates:
        return ""
    with mpl.rc_context(STYLE):
        size = (3.1 * len(certificates) + 0.8, 4.4)
        figure = Figure(figsize=size)
        figure.subplots_adjust(left=0.8 / size[0], right=0.99, bottom=0.12, top=0.93, wspace=0.25, hspace=0.08)
        rows = figure.subplots(2, len(certificates), squeeze=False, sharex="col", height_ratios=(2, 1))
        for column, certificate in enumerate(certificates):
            _twin_losses(rows[0][column], certificate)
            _twin_distances(rows[1][column], certificate)
        rows[0][0].set_ylabel("training loss (nats)")
        rows[1][0].set_ylabel("relative distance")
        return svg(figure, "Training loss of twins over their representatives, and the distance between them")


def rank_scaling(scaling: RankScaling) -> str:
    """The best learning rate over rank, a line a convention for alpha; dotted, where it would not move.

    Returns:
        An SVG element; empty where no rank has a trial that could be compared.
    """
    ranks = [rank.rank for rank in scaling.ranks if rank.best_trial is not None]
    if not ranks:
        return ""
    errors = {rank.rank: rank.error or 0.0 for rank in scaling.ranks}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.6))
        figure.subplots_adjust(left=0.11, right=0.58, bottom=0.14, top=0.96)
        axis = figure.subplots()
        # Side by side, so that error bars of conventions that meet at a rank can be told apart.
        for place, (convention, colour) in enumerate(zip(scaling.conventions, TWIN_COLOURS, strict=False)):
            nudge = 1.03 ** (place - (len(scaling.conventions) - 1) / 2)
            _best_over_rank(axis, convention, errors, colour, nudge)
        axis.plot([], [], color="#888888", lw=0.9, ls=":", label="slope 0: lr the same at every rank")
        axis.plot([], [], color="#888888", ls="", marker="x", ms=5, label="best single trial, nothing fitted")
        axis.set(xscale="log", yscale="log", xlabel="rank", ylabel="best learning rate")
        ticks = ranks[:: math.ceil(len(ranks) / _MOST_TICKS)]
        axis.set_xticks(ticks, [str(rank) for rank in ticks])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        for each in (axis.xaxis, axis.yaxis):
            each.set_minor_locator(NullLocator())
        axis.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.02, 0.5))
        return svg(figure, "The best learning rate over rank, a line for each convention for alpha")


def _best_over_rank(
    axis: Any, convention: ConventionSlope, errors: dict[int, float], colour: str, nudge: float
) -> None:
    """Points with bars of one standard error, the fitted line, the level line through its middle, the best trials."""
    seen = [(best.rank * nudge, best.observed_lr) for best in convention.best if best.observed_lr is not None]
    axis.plot(*zip(*seen, strict=True), color=colour, ls="", marker="x", ms=5, alpha=0.6)
    fitted = [(best.rank, best.lr) for best in convention.best if best.lr is not None]
    label = convention.name
    if fitted:
        bars = [(lr - lr * math.exp(-errors[rank]), lr * math.exp(errors[rank]) - lr) for rank, lr in fitted]
        xs, ys = [rank * nudge for rank, _ in fitted], [lr for _, lr in fitted]
        axis.errorbar(xs, ys, yerr=list(zip(*bars, strict=True)), color=colour, fmt="o", ms=4, lw=1.1, capsize=2)
    if convention.slope is not None and convention.middle_lr is not None and convention.middle_rank is not None:
        label += f"\nlr ~ rank^{convention.slope:z.2f} ({convention.low:z.2f} to {convention.high:z.2f})"
        ends = [min(errors), max(errors)]
        line = [convention.middle_lr * (rank / convention.middle_rank) ** convention.slope for rank in ends]
        axis.plot([rank * nudge for rank in ends], line, color=colour, lw=1.4, label=label)
        axis.plot(ends, [convention.middle_lr] * 2, color=colour, lw=0.9, ls=":")
    else:
        axis.plot([], [], color=colour, ls="", marker="x", label=f"{label}\nno slope located")


def _scatter(axis: Any, points: Sequence[Point], norm: Any, goal: str) -> Any:
    shown = None
    for state, marker in _MARKERS.items():
        measured = [(c.lr, c.init_scale, value) for c, s, value in points if s == state and value is not None]
        if measured:
            lrs, init_scales, values = zip(*measured, strict=True)
            cmap = "viridis_r" if goal == "maximize" else "viridis"
            size = 42 if state == "finished" else 18
            many = len(lrs) > _MOST_MARKS
            shown = axis.scatter(
                lrs, init_scales, c=values, norm=norm, cmap=cmap, marker=marker, s=size, rasterized=many
            )
    lost = [(c.lr, c.init_scale) for c, s, _ in points if s in ("diverged", "failed")]
    if lost:
        many = len(lost) > _MOST_MARKS
        axis.scatter(*zip(*lost, strict=True), marker="x", color="#888888", s=24, rasterized=many)
    return shown


def _twin_losses(axis: Any, certificate: Certificate) -> None:
    steps = range(1, len(certificate.losses) + 1)
    representative = certificate.representative
    axis.plot(steps, certificate.losses, color="#cccccc", lw=6, label=f"alpha {representative.alpha:g} (trained)")
    for twin, colour in zip(certificate.twins, TWIN_COLOURS, strict=False):
        label = f"alpha {twin.configuration.alpha:g}"
        axis.plot(range(1, len(twin.losses) + 1), twin.losses, color=colour, lw=1.1, ls=(0, (4, 3)), label=label)
    axis.set(title=representative.label())
    axis.legend(fontsize=7)


def _twin_distances(axis: Any, certificate: Certificate) -> None:
    exact = []
    for twin, colour in zip(certificate.twins, TWIN_COLOURS, strict=False):
        if twin.verdict == "bit-identical":
            exact.append(f"{twin.configuration.alpha:g}")
            continue
        axis.plot(*zip(*_distances(certificate, twin), strict=True), color=colour, lw=1.1)
    axis.set(yscale="log", xlabel="step")
    axis.minorticks_off()
    if len(exact) == len(certificate.twins):
        axis.set(ylim=(1e-9, 1e-3), yticks=[])
    if exact:
        text = f"alpha {', '.join(exact)}: exactly 0"
        axis.text(0.02, 0.95, text, transform=axis.transAxes, va="top", fontsize=7)


def _distances(certificate: Certificate, twin: TwinVerdict) -> list[tuple[int, float]]:
    """(step, relative distance of the losses); where they are equal it is floored, for the log axis."""
    pairs = zip(certificate.losses, twin.losses, strict=False)
    return [(step, max(abs(a - b) / (abs(a) or 1.0), 1e-9)) for step, (a, b) in enumerate(pairs, start=1)]


def svg(figure: Figure, description: str) -> str:
    """A figure as an SVG element, the same text for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": description})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
