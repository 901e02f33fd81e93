"""What the connected Ray cluster has: its nodes, the workers that fit on them, and what the nodes themselves say."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sweeps.errors import ClusterError

_ANSWER_S = 60
"""How long a node has to answer: it may have to start a process, and load torch in it."""

_IDLE_S = 5
"""For so long no worker must be there before somebody is told: between two jobs there may be none for a moment."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker takes."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Node:
    """A living node of the cluster.

    Attributes:
        id: Ray's.
        address: its IP address.
        cpus: that Ray may give away; 0 for a head that takes no jobs.
        gpus: likewise.
    """

    id: str
    address: str
    cpus: float
    gpus: float

    def room(self, resources: Resources) -> int:
        """How many workers it has room for: a worker lies on one node, with all its GPUs."""
        by_cpu = self.cpus / resources.cpus
        return int(min(by_cpu, self.gpus / resources.gpus) if resources.gpus else by_cpu)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node said.

    Attributes:
        node: the node.
        value: what the function returned there.
        error: why it returned nothing; empty where it did.
    """

    node: Node
    value: Any
    error: str = ""


def living_nodes() -> list[Node]:
    """The nodes of the connected cluster that are alive, the head among them."""
    import ray

    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def ask(function: Callable[..., Any], *arguments: Any, timeout_s: float = _ANSWER_S) -> list[Answer]:
    """Calls a function on every living node at once, beside what runs there, and returns what each said.

    Args:
        function: a Python function that the nodes can import; it takes no CPU and no GPU of Ray's.
        arguments: its arguments, the same everywhere.
        timeout_s: for all of them together.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    nodes = living_nodes()
    asked = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(*arguments)
        for node in nodes
    ]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
    answers = []
    for node, reference in zip(nodes, asked, strict=True):
        if reference not in answered:
            ray.cancel(reference, force=True)
            answers.append(Answer(node, None, f"no answer within {timeout_s:g} s"))
            continue
        try:
            answers.append(Answer(node, ray.get(reference)))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            answers.append(Answer(node, None, f"{type(cause).__name__}: {str(cause).strip().splitlines()[-1]}"))
    return answers


def cluster_workers(resources: Resources) -> int:
    """How many workers the connected cluster has room for, at least one."""
    return max(1, sum(node.room(resources) for node in living_nodes()))


class WorkerWatch:
    """Notices that jobs wait because all nodes on which workers were are gone, and says so once."""

    def __init__(self, resources: Resources, tell: Callable[[str], None]) -> None:
        """Takes what a worker takes, and who is told."""
        self._resources, self._tell = resources, tell
        self._idle_since_s: float | None = None  # None before there was a first worker
        self._told = False

    def look(self, at_work: int) -> None:
        """Looks at how many workers are at work, while there are jobs to be done."""
        now_s = time.monotonic()
        if at_work:
            self._idle_since_s, self._told = now_s, False
        elif self._idle_since_s is not None and now_s - self._idle_since_s > _IDLE_S and not self._told:
            self._idle_since_s = now_s  # the cluster is not asked at every turn
            if not any(node.room(self._resources) for node in living_nodes()):
                self._told = True
                self._tell("waiting for a worker: no node of the cluster has room for one; goes on when one joins")


def check_fits(resources: Resources) -> None:
    """Makes sure that some node of the connected cluster has room for a worker; Ray would wait for ever.

    Raises:
        ClusterError: none has.
    """
    nodes = living_nodes()
    if any(node.room(resources) for node in nodes):
        return
    found = "; ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes)
    raise ClusterError(
        f"a worker takes {resources.cpus:g} CPU and {resources.gpus:g} GPUs of one node; the nodes have {found}; "
        "lower compute.gpus_per_worker or use another cluster"
    )


def check_shared(directory: Path) -> None:
    """Makes sure that every node of the connected cluster sees a directory of this machine, as checkpoints need.

    Raises:
        ClusterError: a node does not.
    """
    if len(living_nodes()) == 1:
        return
    probe = directory / f"probe-{secrets.token_hex(8)}"
    probe.touch()
    try:
        answers = ask(os.path.exists, str(probe))
    finally:
        probe.unlink()
    blind = [answer.node.address for answer in answers if not answer.value]
    if blind:
        raise ClusterError(
            f"the state directory must be seen from every node, because checkpoints lie in it; {directory} is not seen "
            f"from {', '.join(blind)}: set LORA_SWEEPS_HOME to a directory that all nodes share"
        )


def resources(gpus_per_worker: float | Literal["auto"]) -> Resources:
    """What a worker takes of the connected cluster: one CPU, and one GPU where there are any, unless the spec says."""
    if gpus_per_worker == "auto":
        return Resources(1.0, 1.0 if any(node.gpus >= 1 for node in living_nodes()) else 0.0)
    return Resources(1.0, gpus_per_worker)
