"""The service under load: 1,000 stored sweeps, 50 clients, 200 event streams, on this machine.

    python benchmarks/service_load.py [--seconds 600]

A real service in a process of its own, and this process as everybody who asks it. Each client asks for the status of a
sweep at random, and half a second after the answer for another. A writer appends an event a second to each of 20
running sweeps, as a driver does, with the time in it; each of them has 10 listeners. Printed:

    status     time to the whole answer of GET /v1/sweeps/{id}
    events     from before the event is appended to its arrival at a listener; the service looks every 0.25 s
    memory     resident, of the service's process, a minute's mean at the beginning and at the end

Clients, writer and service share the machine's cores, so the figures are upper bounds for the service's part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import httpx2 as httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from services.store import AuditEntry, Store, Submission
from sweeps.events import (
    Event,
    JobEnded,
    JobStarted,
    QueueMoved,
    RungReported,
    SweepCreated,
    SweepEnded,
    TrialAsked,
    TrialTold,
)
from sweeps.ledger import Ledger
from sweeps.plan import make_plan
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import load_spec
from tests.services.service_support import Served, serving

SWEEPS, RUNNING, CLIENTS, LISTENERS = 1000, 20, 50, 200
PAUSE_S, EVENT_EVERY_S = 0.5, 1.0
WARM_UP_S = 15.0

DIGITS = load_spec(Path(__file__).parent.parent / "examples" / "digits.yaml")


def main() -> None:
    """Fills a ledger, serves it, and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure (default: 60)")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(prefix="service-load-") as directory:
        home = Path(directory) / "home"
        home.mkdir(mode=0o700)
        print(f"writing {SWEEPS:,} sweeps", file=sys.stderr)
        sweeps = fill(home)
        with serving(home, "--devices", "1") as served:
            asyncio.run(measure(served, sweeps, seconds))


def fill(home: Path) -> list[str]:
    """Enters sweeps of 64 trials, all finished but the first ones, whose drivers the benchmark plays."""
    plan = make_plan(DIGITS.spec, Reduction.of(DIGITS.spec), workers=2, most_members=None)
    created = SweepCreated(
        name="digits",
        spec=DIGITS.spec.model_dump(mode="json"),
        spec_text=DIGITS.text,
        source="digits.yaml",
        plan=plan.model_dump(mode="json"),
        tracking_uri="sqlite:///mlflow.db",
        experiment="digits",
        lanes=3,
        pack=plan.pack,
    )
    trials = trials_of_a_sweep()
    with Ledger.in_directory(home) as ledger:
        store = Store(ledger)
        for number in range(SWEEPS):
            sweep, owner = f"digits-{number:06x}", f"user{number % 20}"
            # Queued behind a device that nobody has, so that the service leaves the running ones to the benchmark.
            row = Submission(sweep, owner, "digits", False, 0, 99.0, 64, submitted_at_s=1e9 + number)
            store.submit(row, created, AuditEntry(owner, "submit", sweep))
            ledger.append(sweep, trials)
            if number >= RUNNING:
                ledger.append(sweep, [SweepEnded(state="finished")])
                store.move(store.get(sweep), "finished")
    return [f"digits-{number:06x}" for number in range(SWEEPS)]


def trials_of_a_sweep() -> list[Event]:
    """The events of 64 trials, drawn at random."""
    draw, reduction = random.Random(0), Reduction.of(DIGITS.spec)
    events: list[Event] = []
    for trial in range(64):
        values = {"rank": 1.0, "lr": draw.uniform(1e-4, 1), "init_scale": draw.uniform(0.1, 10)}
        configuration = Configuration(4, 16.0, lr=values["lr"], init_scale=values["init_scale"])
        events.append(
            TrialAsked(
                trial=trial, values=values, configuration=configuration, class_id=reduction.class_id(configuration)
            )
        )
    for job in range(8):
        members = tuple(range(8 * job, 8 * job + 8))
        events.append(JobStarted(job=job, trials=members, start=0, stop=200))
        for trial in members:
            loss = draw.uniform(0.1, 3)
            curve = tuple((step, loss + 1 / (step + 1)) for step in range(0, 200, 5))
            metrics = {"eval/loss": loss, "eval/accuracy": draw.random()}
            events.append(RungReported(trial=trial, job=job, step=200, metrics=metrics, train_losses=curve))
        events.append(JobEnded(job=job, train_s=1.0, wall_s=1.0))
        events += [TrialTold(trial=trial, state="finished", value=draw.uniform(0.1, 3)) for trial in members]
    return events


async def measure(served: Served, sweeps: list[str], seconds: float) -> None:
    """Runs everybody at once, and prints what they saw."""
    process = psutil.Process(served.process.pid)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Authorization": f"Bearer {served.token}"}
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=60, limits=limits) as client:
        statuses: list[tuple[float, float]] = []
        events: list[tuple[float, float]] = []
        memory: list[tuple[float, float]] = []
        began_s = time.monotonic()
        end_s = began_s + WARM_UP_S + seconds
        tasks = [asyncio.create_task(ask(client, sweeps, statuses, end_s, seed)) for seed in range(CLIENTS)]
        tasks += [asyncio.create_task(listen(client, sweeps[n % RUNNING], events, end_s)) for n in range(LISTENERS)]
        tasks.append(asyncio.create_task(write(served.home, sweeps[:RUNNING], end_s)))
        tasks.append(asyncio.create_task(weigh(process, memory, end_s)))
        await asyncio.gather(*tasks)
        cpu = process.cpu_times()
    measured = began_s + WARM_UP_S
    show("status", [value for at_s, value in statuses if at_s >= measured], seconds)
    show("events", [value for at_s, value in events if at_s >= measured], seconds)
    share = min(60.0, seconds / 4)
    first = mean([value for at_s, value in memory if measured <= at_s < measured + share])
    last = mean([value for at_s, value in memory if at_s >= end_s - share])
    print(f"memory   {first:.0f} MB in the first {share:.0f} s, {last:.0f} MB in the last, {last / first:.3f} of it")
    print(f"CPU      {(cpu.user + cpu.system) / (time.monotonic() - began_s):.2f} cores, the service's part")


async def ask(
    client: httpx.AsyncClient, sweeps: list[str], seen: list[tuple[float, float]], end_s: float, seed: int
) -> None:
    """A client."""
    draw = random.Random(seed)
    await asyncio.sleep(draw.random() * PAUSE_S)
    while (now_s := time.monotonic()) < end_s:
        answer = await client.get(f"/v1/sweeps/{draw.choice(sweeps)}")
        seen.append((now_s, time.monotonic() - now_s))
        assert answer.status_code == 200, answer.text
        await asyncio.sleep(PAUSE_S)


async def listen(client: httpx.AsyncClient, sweep: str, seen: list[tuple[float, float]], end_s: float) -> None:
    """A listener; what was there before it came is not counted."""
    async with client.stream("GET", f"/v1/sweeps/{sweep}/events") as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data:") and '"queue_moved"' in line:
                reason = json.loads(line[5:])["event"]["reason"]
                if reason.startswith("sent "):
                    seen.append((time.monotonic(), time.time() - float(reason.removeprefix("sent "))))
            if time.monotonic() > end_s:
                return


async def write(home: Path, sweeps: list[str], end_s: float) -> None:
    """The drivers, and some seconds more so that every listener wakes up once again."""
    with Ledger.in_directory(home) as ledger:
        while time.monotonic() < end_s + 3:
            for sweep in sweeps:
                event = QueueMoved(state="queued", reason=f"sent {time.time()}")
                await asyncio.to_thread(ledger.append, sweep, [event])
                await asyncio.sleep(EVENT_EVERY_S / len(sweeps))


async def weigh(process: psutil.Process, seen: list[tuple[float, float]], end_s: float) -> None:
    """The service's memory."""
    while (now_s := time.monotonic()) < end_s:
        seen.append((now_s, process.memory_info().rss / 1e6))
        await asyncio.sleep(1)


def show(name: str, values: list[float], seconds: float) -> None:
    """A line of the result."""
    ranked = sorted(values)
    at = {share: ranked[min(len(ranked) - 1, int(share * len(ranked)))] * 1e3 for share in (0.5, 0.99)}
    print(
        f"{name:<8} median {at[0.5]:.0f} ms, p99 {at[0.99]:.0f} ms, longest {ranked[-1] * 1e3:.0f} ms "
        f"({len(ranked):,}, {len(ranked) / seconds:.0f} a second)"
    )


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    print(f"{os.cpu_count()} cores; {SWEEPS:,} sweeps, {CLIENTS} clients, {LISTENERS} streams of {RUNNING} sweeps")
    main()
