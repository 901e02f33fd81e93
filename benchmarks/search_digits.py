"""How well a search method does on the digits landscape, without Ray: steps trained, and the best loss found.

    python benchmarks/search_digits.py --methods gp tpe random --seeds 8

Runs examples/digits.yaml's search as a sweep would (the same packs, rungs and order), one worker in this process.
Prints a line a seed and the geometric means.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path

import torch

from sweeps.events import Event, TrialTold
from sweeps.plan import Plan, make_plan, trial_space
from sweeps.reduction import Reduction
from sweeps.search import PackSearcher
from sweeps.spec import SweepSpec, load_spec
from sweeps.training import JobRunner

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits.yaml"


def run(spec: SweepSpec, plan: Plan, runner: JobRunner, folder: Path) -> tuple[float, int, float]:
    """Runs one search; returns the best loss in nats, the member-steps trained, and the sampler's seconds."""
    values: list[float] = []

    def take(events: list[Event]) -> None:
        values.extend(
            e.value for e in events if isinstance(e, TrialTold) and e.state == "finished" and e.value is not None
        )

    reduction = Reduction.of(spec)
    searcher = PackSearcher(
        spec,
        reduction,
        trial_space(spec, reduction),
        trials=plan.trials,
        rungs=plan.rungs,
        pack=plan.pack,
        lanes=plan.workers + 1,
        cache=folder / "cache",
        checkpoints=folder / "checkpoints",
        append=take,
    )
    under_way: deque = deque()
    steps, sampling_s = 0, 0.0
    while not searcher.finished:
        began_s = time.perf_counter()
        order = searcher.suggest() if len(under_way) <= plan.workers else None
        sampling_s += time.perf_counter() - began_s
        if order is not None:
            under_way.append(order)
        elif under_way:
            order = under_way.popleft()
            steps += len(order.members) * (order.stop - order.start)
            searcher.complete(runner.run(order))
    return min(values), steps, sampling_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["gp", "tpe", "random"])
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    example = load_spec(EXAMPLE).spec
    runner = JobRunner()
    found: dict[str, list[tuple[float, int, float]]] = {method: [] for method in arguments.methods}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(arguments.seeds):
            for method in arguments.methods:  # interleaved, so that whatever else the machine does hits all alike
                search = example.search.model_copy(update={"method": method, "seed": seed})
                certify = example.certify.model_copy(update={"classes": 0})
                spec = example.model_copy(update={"search": search, "certify": certify})
                plan = make_plan(spec, Reduction.of(spec), workers=2, most_members=64)
                result = run(spec, plan, runner, Path(temporary) / method / str(seed))
                found[method].append(result)
                best, steps, sampling_s = result
                print(f"seed {seed} {method:7} best {best:.4f} nats  {steps} member-steps  sampler {sampling_s:.1f} s")
    for method, results in found.items():
        best = math.exp(statistics.fmean(math.log(best) for best, _, _ in results))
        steps = statistics.fmean(steps for _, steps, _ in results)
        print(f"{method:7} geometric mean of the best {best:.4f} nats, mean {steps:.0f} member-steps")


if __name__ == "__main__":
    main()
