"""What an examination asks of one machine, whichever it is; see `examination.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from sweeps import checkup, storage
from sweeps.checkup import Check, Needs
from sweeps.errors import InputError
from sweeps.home import Home
from sweeps.node_facts import NodeFacts
from sweeps.source_facts import Source, SourceFacts
from sweeps.spec import SpecDocument
from sweeps.spec_tasks import ModelTask, PythonTask

PATIENCE_S = 120
"""For one question, which may have to load torch on a busy machine."""

T = TypeVar("T")


def bounded(name: str, ask: Callable[[], T], node: str = checkup.EVERYWHERE) -> tuple[T | None, list[Check]]:
    """Asks for something in a thread, and gives up on it in time; what went wrong is a failed check."""
    answer: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            answer.append(ask())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name=f"doctor-{name}", daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    if answer:
        return answer[0], []
    if errors:
        return None, [checkup.refused(name, errors[0], node)]
    way_out = "see whether what it needs answers at all: the network, the disk, the server"
    return None, [Check(name, "failed", f"no answer within {PATIENCE_S} s", way_out, node)]


def machine(
    facts: NodeFacts,
    node: str,
    needs: Needs,
    *,
    clustered: bool,
    driver: NodeFacts | None = None,
    in_ray: float | None = None,
    room: int = 1,
) -> list[Check]:
    """What is said of one machine, whichever it is.

    Args:
        facts: of the machine.
        node: what it is called.
        needs: of the spec.
        clustered: whether it is part of a cluster, or drives one.
        driver: facts of the driver, which it is held to.
        in_ray: the GPUs that Ray has of it; None for a machine that is no node.
        room: how many workers it has room for; 1 where that is not known.
    """
    checks = [checkup.versions(facts, node, needs, driver)]
    trains = in_ray is not None or not clustered  # a driver beside a cluster trains nothing itself
    if trains:
        checks.append(checkup.gpus(facts, node, in_ray))
    checks.append(checkup.memory(facts, node, needs if trains else Needs(), room))
    checks += checkup.disks(facts, node, checkpoint_bytes=(needs.checkpoint_bytes or 0) if driver is None else 0)
    return [*checks, checkup.shared_memory(facts, node), checkup.open_files(facts, node)]


def judged(
    sources: tuple[Source, ...],
    node: str,
    found: tuple[SourceFacts, ...] | None,
    driver: tuple[SourceFacts, ...] | None = None,
) -> list[Check]:
    """What is said of a spec's sources as one machine sees them, held to what the driver sees."""
    if found is None:
        return []
    others: tuple[SourceFacts | None, ...] = driver or (None,) * len(sources)
    return [checkup.source(*three) for three in zip(sources, (node,) * len(sources), found, others, strict=True)]


def sources_of(document: SpecDocument) -> tuple[Source, ...]:
    """What every worker reads of a spec."""
    task = document.spec.task
    if isinstance(task, PythonTask):
        return () if task.path is None else (Source("task.path", task.path, "code"),)
    if not isinstance(task, ModelTask):
        return ()
    found = [
        Source("task.model", task.model, "model", task.revision),
        Source("task.data.train", task.data.train, "dataset", config=task.data.config),
    ]
    if isinstance(task.data.eval, str):
        found.append(Source("task.data.eval", task.data.eval, "dataset", config=task.data.config))
    return tuple(found)


def place_for_checkpoints(home: Home) -> str:
    """The place for checkpoints, or where it will be made."""
    return storage.configured_place() or str(home.path)


def quietly(ask: Callable[[], T]) -> T | None:
    """What is asked for; None where it is refused."""
    try:
        return ask()
    except InputError:
        return None  # the check that is about it says so
