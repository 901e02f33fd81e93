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
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from sweeps import checkup, node_facts, source_facts, storage, tracking, tracking_address
from sweeps.checkup import Check, Needs
from sweeps.cluster_examination import Cluster, Say
from sweeps.errors import InputError
from sweeps.home import Home, database_url
from sweeps.machine_examination import bounded, judged, machine, place_for_checkpoints, quietly, sources_of
from sweeps.node_facts import NodeFacts
from sweeps.secrecy import hide_passwords
from sweeps.source_facts import Source, SourceFacts
from sweeps.spec import SpecDocument, SweepSpec
from sweeps.spec_tasks import CausalLmTask, ModelTask


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
    checks, needs, seen, sized = list[Check](), Needs(), None, None
    if document is not None:
        say("looking at the spec's model")
        needs = needs_of(document)
        sized, problem = bounded("model's config", lambda: _sized(document, needs, alone=address is None), label)
        needs, checks = sized or needs, checks + problem
    sources = sources_of(document) if document is not None else ()
    directories = {checkup.STATE: str(home.path), "cache": str(home.cache)}
    facts, problem = bounded("machine", lambda: node_facts.gather(directories), label)
    checks += problem
    if facts is not None:
        checks += machine(facts, label, needs, clustered=address is not None, room=needs.workers or 1)
    if sources:
        seen, problem = bounded("sources", lambda: source_facts.look(sources), label)
        checks += problem + judged(sources, label, seen)
        if document is not None and sized is not None and _is_whole_model(sources[0], seen):
            _, problem = bounded("model's tokenizer", lambda: _load_tokenizer(document), label)
            checks += problem
    checks += _state(home, facts, cluster=address is not None) + _checkpoints(home)
    say("looking at the ledger")
    checks += _ledger(home)
    say("looking at MLflow")
    checks += _mlflow(document)
    if address is not None:
        checks += Cluster(home, address, document, needs, facts, seen).checks(say)
    else:
        checks += checkup.devices({label: facts}, needs) if facts is not None else []
        checks += _own_token(home)
    return checks


def _own_token(home: Home) -> list[Check]:
    """The token of clusters that lora-sweeps starts itself; made at the first run."""
    if not home.ray_token.exists():
        return []
    return [checkup.token_file(str(home.ray_token), home.ray_token.stat().st_mode)]


# -- the spec ----------------------------------------------------------------------------------------------------------


def needs_of(document: SpecDocument) -> Needs:
    """What a spec asks for by itself."""
    spec = document.spec
    workers = None if spec.compute.workers == "auto" else spec.compute.workers
    if not isinstance(spec.task, ModelTask):
        return Needs(spec.compute.gpus_per_worker, workers=workers)
    places = [place for place in (spec.task.data.train, spec.task.data.eval) if isinstance(place, str)]
    gpus = spec.compute.gpus_per_worker
    packages = ["transformers"]
    packages += [] if all(Path(place).is_file() for place in places) else ["datasets"]
    packages += [] if gpus == "auto" or gpus <= 1 else ["accelerate"]  # lays a model out over several GPUs
    return Needs(gpus, tuple(packages), workers=workers)


def _sized(document: SpecDocument, needs: Needs, *, alone: bool) -> Needs:
    """What it asks for beyond that, as its model's config tells, and where this machine is alone its GPUs and cores."""
    if not isinstance(document.spec.task, ModelTask):
        return needs
    from sweeps.dtypes import with_dtype
    from sweeps.preflight import local_workers  # loads torch
    from sweeps.tasks import base_bytes

    spec = with_dtype(document).spec
    checkpoints = None if storage.configured_place() else _checkpoint_bytes(spec)
    workers = local_workers(spec) if alone else needs.workers
    return replace(needs, base_bytes=base_bytes(spec), checkpoint_bytes=checkpoints, workers=workers)


def _is_whole_model(first: Source, seen: tuple[SourceFacts, ...] | None) -> bool:
    return first.kind == "model" and seen is not None and seen[0].there and not seen[0].lacking


def _load_tokenizer(document: SpecDocument) -> None:
    """Loads it as a sweep would: only that tells whether its files are more than names."""
    from sweeps.tasks import pretrained

    assert isinstance(document.spec.task, ModelTask)
    pretrained.load_tokenizer(document.spec.task.model, document.spec.task.revision)


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
    url = quietly(database_url)
    return [checkup.state_file_system(str(home.path), kind, sqlite=not url, cluster=cluster)]


def _checkpoints(home: Home) -> list[Check]:
    """Whether the place for checkpoints can be used from here."""

    def ask() -> Check:
        place = place_for_checkpoints(home)
        storage.probe(place)
        return Check("checkpoints", "ok", f"{place}: written, read back and removed")

    check, problem = bounded("checkpoints", ask)
    return problem if check is None else [check]


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

    check, problem = bounded("ledger", ask)
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

    def ask() -> Check:
        tracking.check_tracking(uri, named)  # the first of several: it may have to look up a name
        latency_ms = 1e3 * _seconds(lambda: tracking.check_tracking(uri, named))
        shown = tracking_address.shown_address(uri) if _is_server(uri) else hide_passwords(tracking.absolute_uri(uri))
        return Check("MLflow", "ok", f"{_server_version(uri)}{shown} answers in {latency_ms:.2g} ms")

    check, problem = bounded("MLflow", ask)
    if check is None:
        return [*problem, Check("artifacts", "skipped", "MLflow does not answer")]
    artifacts, problem = bounded("artifacts", lambda: _artifacts(uri, named or "Default"))
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
