"""What a sweep of 100,000 trials on 1,000 workers costs its driver, and where one driver is no longer enough.

    python benchmarks/scale_sim.py                                     # 1,000 to 10,000 trials, minutes
    python benchmarks/scale_sim.py --small                             # the same figures of a toy, seconds
    python benchmarks/scale_sim.py --trials 100000 --method random --mlflow none
    python benchmarks/scale_sim.py --ask gp tpe cmaes random           # seconds an ask, by trials known
    python benchmarks/scale_sim.py --lanes                             # what the reproducible order alone costs

The search, the ledger and the tracking are the real ones; the workers are simulated (`scale_cluster.py`) and the clock
is virtual: a job's duration is drawn, what the driver does is timed and charged. Without Ray, whose own time is not in
these figures. Each size runs in a process of its own, so that its peak memory is its own. By trial trained, means:

    sampling     ms of CPU in Optuna: asking, telling, pruning
    bookkeeping  ms of CPU around it: packs, orders and results as JSON
    ledger       ms of CPU in appending to it, to which each transaction adds `--sync-ms`, 1 ms unless told otherwise
    growth       ms of all that by trial ended, between 1,000, 3,000, 10,000 ... of them, and the memory by then
    in use       share of the workers' time in which they trained, the driver's time charged
    keeps busy   workers' time / driver's time: so many workers one driver has jobs for at this duration
    MLflow       requests and ms; the longest an event waited for its delivery; how long after the end all was there
    replay       s of CPU until a resumed driver has read the ledger and stands where it left off
    report       s of CPU for the report in all its formats, and its bytes

CPU is counted and waiting is not, so that the figures of a machine that others use are of some worth; what waiting for
a disk or a database adds to a transaction is an option. MLflow is delivered in turn with the simulation, and its time
(CPU of the writer, and of the server where it is one of the benchmark's own) goes to a writer of its own on the virtual
clock; the writer's CPU slows the driver down, for both are threads of one Python process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the driver's thread is what is counted
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scale_cluster import Cluster, Course, Workers, driver_clock, in_use_at_best
from sweeps import report
from sweeps.deliverables import write_exports
from sweeps.events import DriverStarted, Event, SweepCreated, SweepEnded, without_losses
from sweeps.ledger import Ledger
from sweeps.plan import make_plan, trial_space
from sweeps.records import read_sweep
from sweeps.reduction import Reduction
from sweeps.search import PackSearcher
from sweeps.spec import SpecDocument, parse_spec
from sweeps.study import Study
from sweeps.tracking import Outbox
from tests.support import free_port
from tests.sweeps.mlflow_support import server

TRIALS = (1_000, 3_000, 10_000)
KNOWN = {"gp": (100, 300, 1_000), "tpe": (100, 1_000, 10_000), "cmaes": (100, 1_000), "random": (100, 1_000, 10_000)}
ASKS = 3
MARKS = (1_000, 3_000, 10_000, 30_000)
PERIOD_S = 1.0
"""Between deliveries to MLflow, as in sweeps/tracking.py."""
SWEEP = "scale"

SPEC = """\
name: scale
task: {{type: digits}}
lora: {{target_modules: [fc1, fc2]}}
parameters:
  rank: {{values: [2, 4, 8, 16]}}
  lr: {{min: 1e-4, max: 1}}
  init_scale: {{min: 0.0625, max: 16}}
  alpha: {{values: [4, 8, 16, 32, 64]}}
train: {{optimizer: adamw, steps: 400}}
search:
  method: {method}
  order: {order}
  trials: {trials}
  pruner: {{type: {pruner}, rungs: [100, 200, 400]}}
certify: {{classes: 0}}
compute: {{pack: {pack}}}
"""


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        trials: how many are trained.
        workers: the cluster.
        pack: members to a pack, before memory runs out.
        ledger: URL of a PostgreSQL; empty for a SQLite file.
        mlflow: `none`, `server` for one of its own, `sqlite` for a file, or an address.
        sync_ms: what waiting for the disk or the database adds to each transaction.
        free_driver: the driver takes no time, so that what remains is the order's and the failures'.
    """

    trials: int
    workers: Workers
    method: str = "random"
    order: str = "reproducible"
    pruner: str = "successive_halving"
    pack: int = 8
    ledger: str = ""
    mlflow: str = "none"
    sync_ms: float = 1.0
    free_driver: bool = False

    @property
    def document(self) -> SpecDocument:
        """The sweep's spec."""
        fields = {name: getattr(self, name) for name in ("method", "order", "pruner", "trials", "pack")}
        return parse_spec(SPEC.format(**fields), "scale.yaml")


@dataclass(frozen=True)
class Mark:
    """How far a sweep had come.

    Attributes:
        trials: ended by then.
        driver_ms: by trial since the mark before.
        peak_bytes: of memory until then.
    """

    trials: int
    driver_ms: float
    peak_bytes: int


@dataclass(frozen=True)
class Figures:
    """What was measured; by trial trained, unless it is said."""

    trials: int
    method: str
    order: str
    workers: int
    jobs: int
    errors: dict[str, int]
    sampling_ms: float
    bookkeeping_ms: float
    ledger_ms: float
    growth: tuple[Mark, ...]
    in_use: float
    keeps_busy: float
    """Workers."""
    makespan_s: float
    """Virtual, of the whole sweep."""
    peak_bytes: int
    """Of the driver's memory while it searched, in all."""
    events: float
    transactions: float
    ledger_bytes: float
    replay_s: float
    report_s: float
    report_bytes: int
    peak_bytes_at_end: int
    """After replay and report, which a driver does too."""
    mlflow_requests: float | None = None
    mlflow_ms: float | None = None
    mlflow_lag_s: float | None = None
    """The longest, virtual."""
    mlflow_after_end_s: float | None = None


class Timed:
    """A study whose calls are timed."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._study, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            before_s = time.thread_time()
            try:
                return attribute(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - before_s

        return call


class Books:
    """The ledger as a driver appends to it, timed; and a charge for it: a driver waits until the disk has it."""

    def __init__(self, ledger: Ledger, setting: Setting) -> None:
        self._ledger, self._setting = ledger, setting
        self.seconds = 0.0
        self.events = self.transactions = self.told = 0
        self._shown_s = time.monotonic()

    def append(self, events: list[Event]) -> None:
        """Appends as `driver._append` does."""
        before_s = driver_clock()
        self._ledger.append(SWEEP, events)
        self.seconds += driver_clock() - before_s
        self.events += len(events)
        self.transactions += 1
        self.told += sum(event.kind == "trial_told" for event in events)
        if time.monotonic() > self._shown_s + 10:
            self._shown_s = time.monotonic()
            print(f"  {self.told:,} of {self._setting.trials:,} trials ended", file=sys.stderr)

    def charged(self) -> float:
        """The driver's time: its thread's CPU, and waiting for the ledger."""
        return driver_clock() + self.transactions * self._setting.sync_ms / 1e3


class Delivery:
    """The MLflow writer, on a clock of its own."""

    def __init__(self, ledger: Ledger, uri: str, theirs: Callable[[], float]) -> None:
        """Prepares it; `theirs` are the seconds that the server of the benchmark's own has used so far."""
        self._theirs = theirs
        self._outbox = Outbox(ledger, SWEEP, uri, SWEEP)
        self._free_s = 0.0
        self._pending_s: float | None = None
        self.seconds = self.lag_s = self.share = 0.0
        self.requests = 0

    def wake(self, now_s: float) -> None:
        """Says that something was appended."""
        if self._pending_s is None:
            self._pending_s = now_s

    def at(self, now_s: float) -> None:
        """Delivers what there is, if there is anything and the writer is free by now."""
        if self._pending_s is None or now_s < (begin_s := max(self._pending_s, self._free_s)):
            return
        theirs_s, cpu_s = self._theirs(), time.thread_time()
        self._outbox.deliver()
        mine_s = time.thread_time() - cpu_s
        taken_s = mine_s + self._theirs() - theirs_s
        self.share = min(0.5, mine_s / taken_s) if taken_s else 0.0
        self.seconds += taken_s
        self.lag_s = max(self.lag_s, begin_s + taken_s - self._pending_s)
        self._pending_s, self._free_s = None, begin_s + taken_s + PERIOD_S

    def finish(self, now_s: float) -> float:
        """Delivers the rest; how long after `now_s` all was there."""
        self.wake(now_s)
        self.at(max(now_s, self._free_s))
        return self._free_s - PERIOD_S - now_s


@contextlib.contextmanager
def counted_requests(delivery: Delivery | None) -> Iterator[None]:
    """Counts every HTTP request of this process."""
    import requests

    send = requests.Session.send

    def counting(session: Any, request: Any, **settings: Any) -> Any:
        if delivery is not None:
            delivery.requests += 1
        return send(session, request, **settings)

    requests.Session.send = counting  # type: ignore[method-assign]
    try:
        yield
    finally:
        requests.Session.send = send  # type: ignore[method-assign]


def measure(setting: Setting) -> Figures:
    """Runs a sweep to its end, resumes it, and writes its report."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scale-sim-")))
        ledger = stack.enter_context(Ledger(setting.ledger) if setting.ledger else Ledger.in_directory(directory))
        uri, theirs = setting.mlflow, lambda: 0.0
        if uri == "server":
            uri = stack.enter_context(server(directory / "mlflow.db", free_port()))
            theirs = children_clock
        elif uri == "sqlite":
            uri = f"sqlite:///{directory}/mlflow.db"
        before_bytes = ledger_bytes(ledger)
        create(ledger, setting, uri)
        delivery = None if uri == "none" else Delivery(ledger, uri, theirs)
        stack.enter_context(counted_requests(delivery))
        books = Books(ledger, setting)
        course, searcher, timed, growth = search(setting, books, delivery)
        ledger.append(SWEEP, [SweepEnded(state="finished")])
        peak_bytes = peak()
        after_s = None if delivery is None else delivery.finish(course.end_s)
        size = ledger_bytes(ledger) - before_bytes
        print("  replay and report", file=sys.stderr)
        replay_s = timed_call(lambda: replay(ledger, setting))
        report_s = timed_call(lambda: write_report(ledger, directory / "report"))
        trained = len(searcher._trials)
        mine_ms, synced_s = 1e3 / trained, books.transactions * setting.sync_ms / 1e3
        return Figures(
            trials=trained,
            method=setting.method,
            order=setting.order,
            workers=setting.workers.count,
            jobs=len(course.spans_s),
            errors=course.errors,
            sampling_ms=timed.seconds * mine_ms,
            bookkeeping_ms=(course.driver_s - timed.seconds - books.seconds - synced_s) * mine_ms,
            ledger_ms=books.seconds * mine_ms,
            growth=growth,
            in_use=course.utilisation(setting.workers.count),
            keeps_busy=course.busy_s / course.driver_s,
            makespan_s=course.end_s,
            peak_bytes=peak_bytes,
            events=books.events / trained,
            transactions=books.transactions / trained,
            ledger_bytes=size / trained,
            replay_s=replay_s,
            report_s=report_s,
            report_bytes=sum(path.stat().st_size for path in (directory / "report").rglob("*") if path.is_file()),
            peak_bytes_at_end=peak(),
            mlflow_requests=delivery.requests / trained if delivery and delivery.requests else None,
            mlflow_ms=delivery.seconds * mine_ms if delivery else None,
            mlflow_lag_s=delivery.lag_s if delivery else None,
            mlflow_after_end_s=after_s,
        )


def search(
    setting: Setting, books: Books, delivery: Delivery | None
) -> tuple[Course, PackSearcher, Timed, tuple[Mark, ...]]:
    """The search itself."""

    def append(events: list[Event]) -> None:
        books.append(events)
        if delivery is not None:
            delivery.wake(cluster.now_s)

    searcher = make_searcher(setting, append)
    timed = Timed(searcher._study)
    searcher._study = timed  # type: ignore[assignment]
    marks: list[Mark] = []
    before = [0, 0.0]

    def mark() -> None:
        told, driver_s = books.told, cluster.course.driver_s
        if told > before[0]:
            marks.append(Mark(told, 1e3 * (driver_s - before[1]) / (told - before[0]), peak()))
            before[:] = told, driver_s
            print(f"  {marks[-1]}", file=sys.stderr)

    def beside(now_s: float) -> None:
        if len(marks) < len(MARKS) and books.told >= MARKS[len(marks)]:
            mark()
        if delivery is not None:
            delivery.at(now_s)
            cluster.slowed = 1 / (1 - delivery.share)

    cluster = Cluster(setting.workers, charge=books.charged, beside=beside, free_driver=setting.free_driver)
    course = cluster.run(searcher)
    mark()
    return course, searcher, timed, tuple(marks)


def create(ledger: Ledger, setting: Setting, uri: str) -> None:
    """Enters the sweep, in place of one of an earlier run."""
    document = setting.document
    with ledger.database.writing() as connection:
        for table, column in (("events", "sweep"), ("sweeps", "id")):
            connection.execute(sa.text(f"DELETE FROM {table} WHERE {column} = :sweep"), {"sweep": SWEEP})
    plan = make_plan(
        document.spec, Reduction.of(document.spec), workers=setting.workers.count, most_members=setting.pack
    )
    created = SweepCreated(
        name=SWEEP,
        spec=document.spec.model_dump(mode="json"),
        spec_text=document.text,
        source="scale.yaml",
        plan=plan.model_dump(mode="json"),
        tracking_uri=uri,
        experiment=SWEEP,
        lanes=setting.workers.count + 1,
        pack=setting.pack,
    )
    ledger.create(SWEEP, created)
    ledger.append(SWEEP, [DriverStarted(resumed=False)])


def make_searcher(setting: Setting, append: Callable[[list[Event]], None]) -> PackSearcher:
    """A search as the driver makes it."""
    spec = setting.document.spec
    reduction = Reduction.of(spec)
    return PackSearcher(
        spec,
        reduction,
        trial_space(spec, reduction),
        trials=setting.trials,
        rungs=spec.search.rungs(spec.train.steps),
        pack=setting.pack,
        lanes=setting.workers.count + 1,
        cache=Path("cache"),
        checkpoints="checkpoints",
        append=append,
    )


def replay(ledger: Ledger, setting: Setting) -> None:
    """As a driver does that goes on."""
    past = [without_losses(record) for record in ledger.stream(SWEEP)]
    make_searcher(setting, lambda events: None).replay(past)


def write_report(ledger: Ledger, directory: Path) -> None:
    """The report and the exports, as `deliverables.write_report` does; no worker has left an adapter."""
    record = read_sweep(ledger, SWEEP)
    report.write(report.build(record), directory)
    if record.best is not None:
        write_exports(record, record.best, directory / "export")


def ledger_bytes(ledger: Ledger) -> int:
    """What the ledger takes on disk."""
    with ledger.database.reading() as connection:
        if connection.dialect.name == "postgresql":
            return int(connection.scalar(sa.text("SELECT pg_total_relation_size('events')")) or 0)
        connection.execute(sa.text("PRAGMA wal_checkpoint(TRUNCATE)"))
        return Path(str(connection.engine.url.database)).stat().st_size


def peak() -> int:
    """The most memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed_call(call: Callable[[], object]) -> float:
    """Its seconds of CPU."""
    began_s = driver_clock()
    call()
    return driver_clock() - began_s


def children_clock() -> float:
    """Seconds of CPU that the processes below this one have used."""
    used = [each.cpu_times() for each in psutil.Process().children(recursive=True)]
    return float(sum(times.user + times.system for times in used))


# -- asking ------------------------------------------------------------------------------------------------------------


def seconds_an_ask(method: str, known: int, asks: int) -> float:
    """CPU seconds that a method takes to propose a trial when so many are known; all threads."""
    setting = Setting(known, Workers(1), method=method, pruner="none")
    spec = setting.document.spec
    space = trial_space(spec, Reduction.of(spec))
    study = Study(space.dimensions, spec.search, goal="minimize", rungs=(400,), log_scale=True)
    draw = Workers(1).draw("known")
    for _ in range(known):
        # CMA-ES stands where its own trials have brought it; the others see values only, whoever proposed them.
        suggestion = study.ask(at_random=method != "cmaes")
        assert suggestion is not None
        study.tell(suggestion.number, "finished", 0.5 + abs(suggestion.values["lr"] - 0.1) + 0.1 * draw.random())
    began_s = time.process_time()
    for _ in range(asks):
        study.ask()
    return (time.process_time() - began_s) / asks


# -- what is printed ---------------------------------------------------------------------------------------------------


def show(figures: Figures) -> Iterator[str]:
    """A size's lines."""
    failed = ", ".join(f"{n:,} {kind}" for kind, n in sorted(figures.errors.items()))
    yield (
        f"{figures.trials:>7,} trials, {figures.method}, {figures.order}, {figures.workers:,} workers, "
        f"{figures.jobs:,} jobs ({failed or 'none failed'})"
    )
    yield (
        f"        sampling {figures.sampling_ms:.2f} ms, bookkeeping {figures.bookkeeping_ms:.2f} ms, "
        f"ledger {figures.ledger_ms:.2f} ms a trial"
    )
    yield (f"        growth {', '.join(f'{each.driver_ms:.2f} ms to {each.trials:,}' for each in figures.growth)}")
    yield (
        f"        workers in use {figures.in_use:.1%}; the driver keeps {figures.keeps_busy:,.0f} busy; "
        f"the sweep takes {figures.makespan_s / 3600:.2f} h"
    )
    yield (
        f"        {figures.events:.1f} events, {figures.transactions:.2f} transactions, "
        f"{figures.ledger_bytes / 1e3:.1f} kB of ledger a trial"
    )
    memory = f"{figures.peak_bytes / 1e6:,.0f} MB, with replay and report {figures.peak_bytes_at_end / 1e6:,.0f} MB"
    yield (
        f"        memory {memory}; replay {figures.replay_s:.1f} s, report {figures.report_s:.1f} s, "
        f"{figures.report_bytes / 1e6:.1f} MB"
    )
    if figures.mlflow_ms is not None:
        asked = "" if figures.mlflow_requests is None else f"{figures.mlflow_requests:.1f} requests, "
        yield (
            f"        MLflow: {asked}{figures.mlflow_ms:.0f} ms a trial, at most {figures.mlflow_lag_s:.0f} s behind, "
            f"all there {figures.mlflow_after_end_s:.0f} s after the end"
        )


def in_own_process(setting: Setting) -> Figures:
    """Measures in a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, setting).result()


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {field.name: field.default for field in dataclasses.fields(Workers)}
    parser.add_argument("--trials", type=int, nargs="+", default=TRIALS, help="sizes, one after the other")
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--method", choices=("gp", "tpe", "cmaes", "random"), default="random")
    parser.add_argument("--order", choices=("reproducible", "asynchronous"), default="reproducible")
    parser.add_argument("--pruner", choices=("successive_halving", "median", "none"), default="successive_halving")
    parser.add_argument("--pack", type=int, default=8, help="members to a pack")
    parser.add_argument("--sync-ms", type=float, default=1.0, help="waiting for the disk or database, a transaction")
    for name in ("job-s", "spread", "deaths", "diverging", "node-hours", "back-s"):
        parser.add_argument(f"--{name}", type=float, default=defaults[name.replace("-", "_")])
    for name in ("node", "losses", "seed"):
        parser.add_argument(f"--{name}", type=int, default=defaults[name])
    parser.add_argument("--fits", type=int, help="members that a worker's memory holds (default: a pack)")
    parser.add_argument("--ledger", default="", help="URL of a PostgreSQL (default: a SQLite file)")
    parser.add_argument("--mlflow", default="server", help="server, sqlite, none, or an address (default: server)")
    parser.add_argument("--mlflow-trials", type=int, default=1_000, help="larger sizes run without (default: 1,000)")
    parser.add_argument("--free-driver", action="store_true", help="the driver takes no time of the virtual clock")
    parser.add_argument("--ask", nargs="+", choices=tuple(KNOWN), help="instead: seconds an ask of these methods")
    parser.add_argument("--known", type=int, nargs="+", help="with --ask: trials that are known")
    parser.add_argument(
        "--lanes", action="store_true", help="instead: workers in use, by lanes and spread of job times"
    )
    parser.add_argument("--small", action="store_true", help="a toy of every kind, seconds")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> Iterator[Setting]:
    """What is run, in turn."""
    fits = options.fits or options.pack
    names = ("node", "job_s", "spread", "deaths", "diverging", "node_hours", "back_s", "losses", "seed")
    workers = Workers(options.workers, fits=fits, **{name: getattr(options, name) for name in names})
    same = {
        name: getattr(options, name)
        for name in ("method", "order", "pruner", "pack", "ledger", "sync_ms", "free_driver")
    }
    if options.small:
        few = dataclasses.replace(workers, count=8, node=4, losses=5, deaths=0.05, node_hours=0.5, fits=2)
        for order in ("reproducible", "asynchronous"):
            small = same | {"pack": 4, "order": order}
            yield Setting(40, few, mlflow="sqlite" if order == "reproducible" else "none", **small)
        return
    for trials in options.trials:
        yield Setting(trials, workers, mlflow=options.mlflow if trials <= options.mlflow_trials else "none", **same)


def main(arguments: list[str] | None = None) -> Mapping[str, Any]:
    """Measures, prints, and returns what `--json` prints."""
    options = parsed(arguments)
    cores = f"{os.cpu_count()} cores, Python {sys.version.split()[0]}"
    found: dict[str, Any] = {"machine": cores}
    if not options.json:
        print(cores)
    if options.lanes:
        found["in_use"] = []
        for workers, spread in itertools.product((10, 100, 1_000), (0.1, 0.3, 0.6)):
            lanes = (workers + 1, 2 * workers, 4 * workers)
            shares = {each: in_use_at_best(workers, each, spread, 20 * workers) for each in lanes}
            found["in_use"].append({"workers": workers, "spread": spread, "by_lanes": shares})
            if not options.json:
                shown = ", ".join(f"{share:.0%} with {each:,} lanes" for each, share in shares.items())
                print(f"{workers:>5,} workers, spread {spread:g}: in use {shown}")
    elif options.ask:
        found["ask_s"] = {}
        for method in options.ask:
            for known in options.known or KNOWN[method]:
                print(f"{method}, {known:,} known", file=sys.stderr)
                seconds = seconds_an_ask(method, known, ASKS)
                found["ask_s"].setdefault(method, {})[known] = seconds
                if not options.json:
                    print(f"{method:<8} {known:>8,} known: {seconds * 1e3:,.2f} ms an ask", flush=True)
    else:
        found["sizes"] = []
        for setting in settings_of(options):
            print(f"{setting.trials:,} trials", file=sys.stderr)
            figures = measure(setting) if options.small else in_own_process(setting)
            found["sizes"].append(dataclasses.asdict(figures))
            if not options.json:
                print(*show(figures), sep="\n", flush=True)
    if options.json:
        print(json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    main()
