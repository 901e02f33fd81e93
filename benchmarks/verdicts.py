"""Error rates of the verdict on twins: how often a twin is called different, and a near-twin not. Needs torch only.

    python benchmarks/verdicts.py
    python benchmarks/verdicts.py --cases 300 --first-seed 1000 --weak 40

Trains the population of tests/lora_core/verdict_experiment.py, which says what is in it, on one CPU thread, and prints
Markdown. By default it is the very population of tests/lora_core/test_verdict_errors.py. The envelopes that a near-twin
reaches are those of its first verdict; misses are counted in the last. Bounds are one-sided, 95%: the rule of three
where nothing was counted, else Wilson's upper limit. They are of cases, a case counting once: its runs share their
representative and its controls, so they are not independent. `--weak` is how many cases are added for each range of
weight decay too weak for that population.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs where nothing is installed but torch

from lora_core.trajectory import THRESHOLD
from tests.lora_core.verdict_experiment import QUANTITIES, SIZES, STEPS, Judged, draw_case, run_case, weak_decay

CASES, TWINS = 67, 3
SHARES = ((0.3, 1.0), (0.1, 0.3), (0.03, 0.1), (0.01, 0.03))
"""Ranges of lr x wd x steps below the one that the population draws from."""


def upper_bound(events: int, runs: int) -> float:
    """Returns a bound that a rate lies below with 95% confidence: the rule of three, or Wilson's."""
    if not events:
        return min(1.0, 3 / runs)
    z, rate = 1.645, events / runs
    middle = rate + z * z / (2 * runs)
    return (middle + z * math.sqrt(rate * (1 - rate) / runs + z * z / (4 * runs * runs))) / (1 + z * z / runs)


def experiment(cases: int = CASES, twins: int = TWINS, first_seed: int = 0) -> list[Judged]:
    """The whole population, trained and judged."""
    seeds = range(first_seed, first_seed + cases)
    return [judged for seed in seeds for judged in run_case(draw_case(seed), twins=twins)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=CASES, help="representatives")
    parser.add_argument("--first-seed", type=int, default=0, help="another population")
    parser.add_argument("--weak", type=int, default=12, help="cases a range of weak decay")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began_s = time.perf_counter()
    population = experiment(arguments.cases, TWINS, arguments.first_seed)
    taken_s = time.perf_counter() - began_s
    print(f"{arguments.cases} representatives, {STEPS} steps, {taken_s:.0f} s, torch {torch.__version__}\n")
    print(*_twins([judged for judged in population if judged.quantity is None]), sep="\n", end="\n\n")
    print(*_near_twins(population), sep="\n")
    if arguments.weak:
        print("\nWeight decay off by 0.01% where there is little of it:\n")
        print(*_weak(arguments.weak), sep="\n")


def _twins(twins: Sequence[Judged]) -> Iterable[str]:
    yield "| twins | worst, in envelopes | false alarms | cases, 95% below |"
    yield "|---|---|---|---|"
    for heard, name in ((False, "first verdict"), (True, "heard again with controls of their own")):
        verdicts = [judged.verdict(heard=heard) for judged in twins]
        alarms = sum(verdict.kind == "different" for verdict in verdicts)
        worst = max(verdict.max_ratio for verdict in verdicts)
        bound = _bound_by_case(twins, [verdict.kind == "different" for verdict in verdicts])
        yield f"| {len(twins)}, {name} | {worst:.1f} | {alarms} | {bound:.1%} |"
    heard_again = sum(bool(judged.run_controls) for judged in twins)
    diverged = len({judged.case.seed for judged in twins if not _finite(judged)})
    yield f"\nHeard again: {heard_again} twins. Diverged: {diverged} representatives."


def _near_twins(population: Sequence[Judged]) -> Iterable[str]:
    mildest = f"mildest, in envelopes (threshold {THRESHOLD:g})"
    yield f"| off by | quantity | near-twins | {mildest} | misses | cases, 95% below |"
    yield "|---|---|---|---|---|---|"
    for size in SIZES:
        for quantity in (*QUANTITIES, "all"):
            group = [each for each in population if each.size == size and quantity in (each.quantity, "all")]
            yield _misses(f"{size:.2%} | {quantity}", group)


def _weak(cases: int) -> Iterable[str]:
    yield "| precision | lr x wd x steps | near-twins | mildest, in envelopes | misses | cases, 95% below |"
    yield "|---|---|---|---|---|---|"
    for dtype in (torch.float32, torch.float64):
        for share in SHARES:
            population = [weak_decay(number, share, dtype) for number in range(cases)]
            kinds = [("weight decay", SIZES[-1])]
            group = [each for case in population for each in run_case(case, twins=0, kinds=kinds)]
            yield _misses(f"{str(dtype).removeprefix('torch.')} | {share[0]:g} to {share[1]:g}", group)


def _misses(name: str, group: Sequence[Judged]) -> str:
    verdicts = [judged.verdict() for judged in group]
    missed = [verdict.kind != "different" for verdict in verdicts]
    mildest = min(judged.verdict(heard=False).max_ratio for judged in group)
    return f"| {name} | {len(group)} | {mildest:,.3g} | {sum(missed)} | {_bound_by_case(group, missed):.1%} |"


def _bound_by_case(group: Sequence[Judged], wrong: Sequence[bool]) -> float:
    """The bound on the share of cases in which anything is wrong."""
    bad = {judged.case.seed for judged, is_wrong in zip(group, wrong, strict=True) if is_wrong}
    return upper_bound(len(bad), len({judged.case.seed for judged in group}))


def _finite(judged: Judged) -> bool:
    return bool(judged.representative.losses.isfinite().all())


if __name__ == "__main__":
    main()
