"""Examines this machine, or a cluster, before money is spent: finds the facts that `checkup.py` judges.

    this machine    everything but what takes several nodes
    a cluster       the same of every node, asked at once, and of the driver, which alone writes ledger and MLflow

Every question is bounded in time. One that cannot be asked, or breaks, is a failed check and no exception.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import statistics
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from sweeps import checkup, engine, node_facts, nodes, source_facts, storage, tracking, tracking_address
from sweeps.checkup import Check, Needs
from sweeps.errors import InputError
from sweeps.home import Home, database_url
from sweeps.node_facts import NodeFacts
from sweeps.secrecy import hide_passwords
from sweeps.source_facts import Source, SourceFacts
from sweeps.spec import SpecDocument, SweepSpec
from sweeps.spec_tasks import CausalLmTask, ModelTask, PythonTask

_PATIENCE_S = 120
"""For one question, which may have to load torch on a busy machine."""

_CLOCK_ROUNDS = 3
"""Of these the one with the shortest round trip counts."""

_T = TypeVar("_T")

Say = Callable[[str], None]


def examine(document: SpecDocument | None, home: Home, address: str | None, say: Say) -> list[Check]:
    """Examines a machine or a cluster.

    Args:
        document: the spec that is to run there; None for any.
        home: the state directory, which is there.
        address: of a running Ray cluster; None for this machine alone.
        say: is told what is being looked at.
    """
    say("looking at this machine")
    label = "this machine" if address is None else "driver"
    checks, needs, seen = list[Check](), Needs(), None
    if document is not None:
        say("looking at the spec's model")
        needs = _needs(document)
        sized, problem = _bounded("model's config", lambda: _sized(document, needs), label)
        needs, checks = sized or needs, checks + problem
    sources = _sources(document) if document is not None else ()
    directories = {checkup.STATE: str(home.path), "cache": str(home.cache)}
    facts, problem = _bounded("machine", lambda: node_facts.gather(directories), label)
    checks += problem
    if facts is not None:
        checks += _machine(facts, label, needs, clustered=address is not None)
    if sources:
        seen, problem = _bounded("sources", lambda: source_facts.look(sources), label)
        checks += problem + _judged(sources, label, seen)
    checks += _state(home, facts, cluster=address is not None) + _checkpoints(home)
    say("looking at the ledger")
    checks += _ledger(home)
    say("looking at MLflow")
    checks += _mlflow(document)
    if address is not None:
        checks += _Cluster(home, address, document, needs, facts, seen).checks(say)
    else:
        checks += checkup.devices({label: facts}, needs) if facts is not None else []
        checks += _own_token(home)
    return checks


def _bounded(name: str, ask: Callable[[], _T], node: str = checkup.EVERYWHERE) -> tuple[_T | None, list[Check]]:
    """Asks for something in a thread, and gives up on it in time; what went wrong is a failed check."""
    answer: list[_T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            answer.append(ask())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name=f"doctor-{name}", daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    if answer:
        return answer[0], []
    if errors:
        return None, [checkup.refused(name, errors[0], node)]
    way_out = "see whether what it needs answers at all: the network, the disk, the server"
    return None, [Check(name, "failed", f"no answer within {_PATIENCE_S} s", way_out, node)]


# -- a machine ---------------------------------------------------------------------------------------------------------


def _machine(
    facts: NodeFacts,
    node: str,
    needs: Needs,
    *,
    clustered: bool,
    driver: NodeFacts | None = None,
    in_ray: float | None = None,
) -> list[Check]:
    """What is said of one machine, whichever it is."""
    checks = [checkup.versions(facts, node, needs, driver)]
    trains = in_ray is not None or not clustered  # a driver beside a cluster trains nothing itself
    if trains:
        checks.append(checkup.gpus(facts, node, in_ray))
    checks.append(checkup.memory(facts, node, needs if trains else Needs()))
    checks += checkup.disks(facts, node, checkpoint_bytes=(needs.checkpoint_bytes or 0) if driver is None else 0)
    return [*checks, checkup.shared_memory(facts, node), checkup.open_files(facts, node)]


def _judged(
    sources: tuple[Source, ...],
    node: str,
    found: tuple[SourceFacts, ...] | None,
    driver: tuple[SourceFacts, ...] | None = None,
) -> list[Check]:
    if found is None:
        return []
    others: tuple[SourceFacts | None, ...] = driver or (None,) * len(sources)
    return [checkup.source(*three) for three in zip(sources, (node,) * len(sources), found, others, strict=True)]


def _own_token(home: Home) -> list[Check]:
    """The token of clusters that lora-sweeps starts itself; made at the first run."""
    if not home.ray_token.exists():
        return []
    return [checkup.token_file(str(home.ray_token), home.ray_token.stat().st_mode)]


# -- the spec ----------------------------------------------------------------------------------------------------------


def _sources(document: SpecDocument) -> tuple[Source, ...]:
    """What every worker reads of a spec."""
    task = document.spec.task
    if isinstance(task, PythonTask):
        return () if task.path is None else (Source("task.path", task.path, "code"),)
    if not isinstance(task, ModelTask):
        return ()
    found = [
        Source("task.model", task.model, "model", task.revision),
        Source("task.data.train", task.data.train, "dataset"),
    ]
    if isinstance(task.data.eval, str):
        found.append(Source("task.data.eval", task.data.eval, "dataset"))
    return tuple(found)


def _needs(document: SpecDocument) -> Needs:
    """What a spec asks for by itself."""
    spec = document.spec
    if not isinstance(spec.task, ModelTask):
        return Needs(spec.compute.gpus_per_worker)
    places = [place for place in (spec.task.data.train, spec.task.data.eval) if isinstance(place, str)]
    packages = ("transformers", *(() if all(Path(place).is_file() for place in places) else ("datasets",)))
    return Needs(spec.compute.gpus_per_worker, packages)


def _sized(document: SpecDocument, needs: Needs) -> Needs:
    """What it asks for beyond that, as its model's config tells."""
    if not isinstance(document.spec.task, ModelTask):
        return needs
    from sweeps.dtypes import with_dtype
    from sweeps.tasks import base_bytes  # loads torch

    spec = with_dtype(document).spec
    checkpoints = None if storage.configured_place() else _checkpoint_bytes(spec)
    return replace(needs, base_bytes=base_bytes(spec), checkpoint_bytes=checkpoints)


def _checkpoint_bytes(spec: SweepSpec) -> int:
    """What all members' states take if no trial is pruned: adapters, and what the optimizer keeps of them."""
    from lora_core.targets import NoTargetError, find_targets
    from sweeps.plan import make_plan
    from sweeps.reduction import Reduction
    from sweeps.tasks import pretrained

    assert isinstance(spec.task, ModelTask)
    kind = pretrained.CAUSAL_LM if isinstance(spec.task, CausalLmTask) else pretrained.CLASSIFIER
    outline = pretrained.without_weights(pretrained.load_config(spec.task, kind), kind)
    reduction = Reduction.of(spec)
    try:
        layers = find_targets(outline, spec.lora.target_modules).values()
    except NoTargetError as error:
        required = "lora.target_modules must name layers of the model"
        raise InputError(f"{required}; {error}; correct it, and see `lora-sweeps plan`") from None
    weights = sum(max(reduction.space.ranks) * (layer.in_features + layer.out_features) for layer in layers)
    plan = make_plan(spec, reduction, workers=1, most_members=None)
    states = 1 + spec.train.law.states_with(spec.train.settings)
    return 4 * weights * states * plan.trials * len(plan.rungs)


# -- ledger and MLflow -------------------------------------------------------------------------------------------------


def _state(home: Home, facts: NodeFacts | None, *, cluster: bool) -> list[Check]:
    if facts is None:
        return []
    kind = next(disk.kind for disk in facts.disks if disk.use == checkup.STATE)
    url = _quietly(database_url)
    return [checkup.state_file_system(str(home.path), kind, sqlite=not url, cluster=cluster)]


def _checkpoints(home: Home) -> list[Check]:
    """Whether the place for checkpoints can be used from here."""

    def ask() -> Check:
        place = _place(home)
        storage.probe(place)
        return Check("checkpoints", "ok", f"{place}: written, read back and removed")

    check, problem = _bounded("checkpoints", ask)
    return problem if check is None else [check]


def _place(home: Home) -> str:
    """The place for checkpoints, or where it will be made."""
    return storage.configured_place() or str(home.path)


def _quietly(ask: Callable[[], _T]) -> _T | None:
    try:
        return ask()
    except InputError:
        return None  # the check that is about it says so


class _RollBackError(Exception):
    """Ends the transaction of a probe."""


def _ledger(home: Home) -> list[Check]:
    def ask() -> Check:
        with home.ledger() as ledger:
            with ledger.database.reading() as connection:
                kind = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}[connection.dialect.name]
                version = "sqlite_version()" if kind == "SQLite" else "current_setting('server_version')"
                number = connection.exec_driver_sql(f"SELECT {version}").scalar()
                took_s = [_seconds(lambda: connection.exec_driver_sql("SELECT 1").scalar()) for _ in range(5)]
            sweep = f"doctor-{secrets.token_hex(4)}"
            with contextlib.suppress(_RollBackError), ledger.database.writing() as connection:
                connection.exec_driver_sql(f"INSERT INTO sweeps VALUES ('{sweep}', 'doctor', 0)")
                raise _RollBackError
            shown = ledger.database.shown
        latency_ms = 1e3 * statistics.median(took_s)
        return Check(
            "ledger", "ok", f"{kind} {number} at {shown}, written and rolled back, {latency_ms:.2g} ms a query"
        )

    check, problem = _bounded("ledger", ask)
    return problem if check is None else [check]


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _mlflow(document: SpecDocument | None) -> list[Check]:
    """Whether the driver, which writes to it, reaches MLflow and its artifacts."""
    own = None if document is None else document.spec.tracking
    uri = (own and own.uri) or os.environ.get("MLFLOW_TRACKING_URI") or tracking.default_uri(Path.cwd())
    named = None if document is None or own is None else own.experiment or document.spec.name
    shown = tracking_address.shown_address(uri) if _is_server(uri) else hide_passwords(tracking.absolute_uri(uri))

    def ask() -> Check:
        tracking.check_tracking(uri, named)  # the first of several: it may have to look up a name
        latency_ms = 1e3 * _seconds(lambda: tracking.check_tracking(uri, named))
        return Check("MLflow", "ok", f"{_server_version(uri)}{shown} answers in {latency_ms:.2g} ms")

    check, problem = _bounded("MLflow", ask)
    if check is None:
        return [*problem, Check("artifacts", "skipped", "MLflow does not answer")]
    artifacts, problem = _bounded("artifacts", lambda: _artifacts(uri, named or "Default"))
    return [check, *problem, *(artifacts or [])]


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _server_version(uri: str) -> str:
    if not _is_server(uri):
        return ""
    address = f"{tracking_address.shown_address(uri)}/version"
    try:
        with urllib.request.urlopen(address, timeout=10) as response:
            return f"version {response.read(100).decode('utf-8', 'replace').strip()} at "
    except (OSError, ValueError):
        return "a version that it does not tell, at "


def _artifacts(uri: str, experiment: str) -> list[Check]:
    """Writes a small artifact, as the end of a sweep does, and removes it."""
    name = "artifacts"
    local = tracking_address.artifact_location(uri, experiment)
    if local is not None:
        path = urllib.request.url2pathname(local.removeprefix("file://"))
        return [replace(checkup.disk(node_facts.gather_disk(name, path), checkup.EVERYWHERE), name=name)]
    if not _is_server(uri):
        return [Check(name, "skipped", "without a server their place is only known once an experiment was made")]
    store = tracking.artifact_store(uri, experiment)
    if store is None:
        return [Check(name, "skipped", "no experiment that is there tells where they go")]
    place, folder = hide_passwords(str(store.artifact_uri)), f"lora-sweeps-doctor-{secrets.token_hex(4)}"
    with _probe_file() as file:
        began_s = time.perf_counter()
        try:
            store.log_artifact(str(file), folder)
        except Exception as error:  # every store has its own
            way_out = "give whoever runs lora-sweeps, or the server, the right to write there"
            return [Check(name, "failed", f"{place} refuses: {_words(error)}", way_out)]
        took_ms = 1e3 * (time.perf_counter() - began_s)
    try:
        store.delete_artifacts(folder)
    except Exception as error:
        found = f"{place} is written, in {took_ms:.0f} ms; {folder} stays there: {_words(error)}"
        return [Check(name, "warning", found, "remove it by hand; a sweep removes nothing")]
    return [Check(name, "ok", f"{place} is written in {took_ms:.0f} ms")]


@contextlib.contextmanager
def _probe_file() -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="lora-sweeps-") as directory:
        file = Path(directory, "probe.txt")
        file.write_text("written by lora-sweeps doctor, which removes it\n", encoding="utf-8")
        yield file


def _words(error: Exception) -> str:
    return hide_passwords((str(error).strip() or type(error).__name__).splitlines()[0])


# -- a cluster ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cluster:
    """A cluster to be examined.

    Attributes:
        home: the state directory.
        address: of the cluster's head.
        document: the spec that is to run there; None for any.
        needs: of the spec.
        driver: facts of this machine; None where there are none.
        seen: the spec's sources, as this machine sees them; None where it could not look.
    """

    home: Home
    address: str
    document: SpecDocument | None
    needs: Needs
    driver: NodeFacts | None
    seen: tuple[SourceFacts, ...] | None

    def checks(self, say: Say) -> list[Check]:
        """Connects, asks, and lets go."""
        say(f"connecting to Ray at {self.address}")
        with contextlib.ExitStack() as connected:
            made = engine.cluster(self.address, workers=1, token_file=self.home.ray_token)
            _, problem = _bounded("Ray", lambda: connected.enter_context(made))
            if problem:
                return problem
            return self._connected(say)

    def _connected(self, say: Say) -> list[Check]:
        say("asking its nodes what they have")
        shares_cache = _quietly(storage.configured_place) is None
        cache = str(self.home.cache) if shares_cache else None
        answers, problem = _bounded(
            "nodes", lambda: nodes.ask(node_facts.gather, {"cache": cache}, timeout_s=_PATIENCE_S)
        )
        if answers is None:
            return problem
        names = _names([answer.node for answer in answers])
        checks = [_there([answer.node for answer in answers], self.address)]
        resources, problem = _bounded("workers", self._room)
        checks += problem if resources is None else [resources[1]]
        takes_jobs = {answer.node.id: resources is None or answer.node.room(resources[0]) > 0 for answer in answers}
        found: dict[str, NodeFacts] = {}
        for answer in answers:
            name = names[answer.node.id]
            if answer.error:
                checks.append(checkup.silent(name, answer.error))
                continue
            found[name] = answer.value
            needs = self.needs if takes_jobs[answer.node.id] else Needs()
            checks += _machine(answer.value, name, needs, clustered=True, driver=self.driver, in_ray=answer.node.gpus)
        checks += checkup.devices(found, self.needs) + self._token(found.values())
        say("asking them for the time")
        checks += self._in_time("clock", names, self._clocks)
        say("having them read and write checkpoints")
        checks += self._in_time("checkpoints", names, self._exchange)
        if self.document is not None and (sources := _sources(self.document)):
            say("asking them for the model and the data")
            wanted = {node: name for node, name in names.items() if takes_jobs[node]}
            checks += self._in_time("sources", wanted, lambda which: self._look(sources, which))
        return checks

    def _in_time(self, what: str, names: dict[str, str], ask: Callable[[dict[str, str]], list[Check]]) -> list[Check]:
        checks, problem = _bounded(what, lambda: ask(names))
        return problem if checks is None else checks

    def _room(self) -> tuple[nodes.Resources, Check]:
        """What a worker takes, and whether it fits anywhere."""
        compute = None if self.document is None else self.document.spec.compute
        resources = nodes.resources("auto" if compute is None else compute.gpus_per_worker)
        takes = f"{resources.cpus:g} CPU and {resources.gpus:g} GPUs"
        try:
            nodes.check_fits(resources)
        except InputError as error:
            return resources, checkup.refused("workers", error)
        room = nodes.cluster_workers(resources)
        if compute is not None and compute.workers != "auto" and compute.workers > room:
            found = f"room for {room} that take {takes} each; the spec wants {compute.workers}"
            return resources, Check("workers", "warning", found, "add nodes, or write workers: auto")
        return resources, Check("workers", "ok", f"room for {room} that take {takes} each")

    def _token(self, found: Iterable[NodeFacts]) -> list[Check]:
        modes = {facts.auth_mode.lower() for facts in found}
        if not modes:
            return [Check("Ray's token", "skipped", "no node has said whether one is asked for")]
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        mode = path.stat().st_mode if path.exists() else None
        inline = bool(os.environ.get("RAY_AUTH_TOKEN"))
        return [checkup.token("token" if modes == {"token"} else "", str(path), mode, in_environment=inline)]

    def _clocks(self, names: dict[str, str]) -> list[Check]:
        best: dict[str, tuple[float, float]] = {}
        errors: dict[str, str] = {}
        for _ in range(_CLOCK_ROUNDS):
            sent_s = time.time()
            answers = nodes.ask(node_facts.now, timeout_s=_PATIENCE_S / (_CLOCK_ROUNDS + 1))
            half_s = (time.time() - sent_s) / 2
            for answer in answers:
                if answer.error:
                    errors[answer.node.id] = answer.error
                elif answer.node.id not in best or half_s < best[answer.node.id][1]:
                    best[answer.node.id] = (answer.value - (sent_s + half_s), half_s)
        return [
            checkup.clock(name, *best[node])
            if node in best
            else Check("clock", "skipped", errors.get(node, "the node has left"), node=name)
            for node, name in names.items()
        ]

    def _exchange(self, names: dict[str, str]) -> list[Check]:
        place = _place(self.home)
        storage.leave_mark(place, mark := f"probe-{secrets.token_hex(8)}")
        left = [mark]
        try:
            answers = nodes.ask(node_facts.exchange, place, mark)
            left += [answer.value for answer in answers if not answer.error]
            errors = {answer.node.id: answer.error or _unseen(place, answer.value) for answer in answers}
        finally:
            for name in left:
                storage.remove_mark(place, name)
        return [
            checkup.exchanged(name, place, errors[node])
            if node in errors
            else Check("checkpoints", "skipped", "the node has left", node=name)
            for node, name in names.items()
        ]

    def _look(self, sources: tuple[Source, ...], names: dict[str, str]) -> list[Check]:
        checks = list[Check]()
        for answer in nodes.ask(source_facts.look, sources):
            if answer.node.id not in names:
                continue
            name = names[answer.node.id]
            if answer.error:
                checks += [Check(one.use, "skipped", answer.error, node=name) for one in sources]
            else:
                checks += _judged(sources, name, answer.value, self.seen)
        return checks


def _names(found: list[nodes.Node]) -> dict[str, str]:
    """What nodes are called, by their ids: their addresses, where those differ."""
    counts = Counter(node.address for node in found)
    return {node.id: node.address if counts[node.address] == 1 else f"{node.address} ({node.id[:6]})" for node in found}


def _there(found: list[nodes.Node], address: str) -> Check:
    cpus, gpus = sum(node.cpus for node in found), sum(node.gpus for node in found)
    some = f"{len(found)} node{'' if len(found) == 1 else 's'}"
    return Check("Ray", "ok", f"{some} at {address}, with {cpus:g} CPUs and {gpus:g} GPUs")


def _unseen(place: str, mark: str) -> str:
    """Why the driver cannot read what a node has left; empty where it can."""
    try:
        storage.check_mark(place, mark)
    except InputError as error:
        return str(error)
    return ""
