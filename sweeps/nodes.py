"""What the connected Ray cluster has: its nodes, the workers that fit on them, and what the nodes themselves say.

room        workers that a node has room for
worker      lies on one node, with all its GPUs
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from sweeps import storage
from sweeps.autoscaling import Growth, NodeType, configuration_here, of_configuration, published
from sweeps.errors import ClusterError, StorageError
from sweeps.node_memory import Memory, memory_here

_ANSWER_S = 60
"""How long a node has to answer: it may have to start a process, and load torch in it."""

_IDLE_S = 5
"""For so long no worker must be there before somebody is told: between two jobs there may be none for a moment."""


_DYING_S = 1
"""A node that goes takes its workers along, which may be noticed first."""

_REACH_S = 5


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
        is_head: whether it is the cluster's head.
    """

    id: str
    address: str
    cpus: float
    gpus: float
    is_head: bool = False

    def room(self, resources: Resources) -> int:
        """How many workers it has room for."""
        return room(self, resources)


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


def room(node: Node | NodeType, resources: Resources) -> int:
    """How many workers a node has room for: a worker lies on one node, with all its GPUs."""
    by_cpu = node.cpus / resources.cpus
    if not resources.gpus:
        return int(by_cpu)
    # Ray gives away whole GPUs, or shares of one: what is left over on each of several is not put together.
    by_gpu = node.gpus / resources.gpus if resources.gpus >= 1 else int(node.gpus) * int(1 / resources.gpus + 1e-9)
    return int(min(by_cpu, by_gpu))


def living_nodes() -> list[Node]:
    """The nodes of the connected cluster that are alive, the head among them."""
    import ray

    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            "node:__internal_head__" in node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def answers(node: str) -> bool:
    """Whether the node of this id is there. Ray itself notices only after a while that one is not."""
    import ray

    time.sleep(_DYING_S)
    for known in ray.nodes():
        if known["NodeID"] == node and known["Alive"]:
            try:
                address = known["NodeManagerAddress"], known["NodeManagerPort"]
                socket.create_connection(address, timeout=_REACH_S).close()
            except OSError:
                return False
            return True
    return False


def ask(
    function: Callable[..., Any], *arguments: Any, nodes: list[Node] | None = None, timeout_s: float = _ANSWER_S
) -> list[Answer]:
    """Calls a function on every living node at once, beside what runs there, and returns what each said.

    Args:
        function: a Python function that the nodes can import, and that may be called twice; it takes no CPU and no
            GPU of Ray's.
        arguments: its arguments, the same everywhere.
        nodes: which are asked; None for all that live.
        timeout_s: for all of them together.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Once more where the process ends that Ray has picked for it: of an earlier question that was given up, say.
    remote = ray.remote(num_cpus=0, max_retries=1)(function)
    nodes = living_nodes() if nodes is None else nodes
    asked = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(*arguments)
        for node in nodes
    ]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
    if late := [reference for reference in asked if reference not in answered]:
        for reference in late:
            ray.cancel(reference, force=True)
        ray.wait(late, num_returns=len(late), timeout=_REACH_S)  # what is to end now does nothing afterwards
    answers = []
    for node, reference in zip(nodes, asked, strict=True):
        if reference not in answered:
            answers.append(Answer(node, None, f"no answer within {timeout_s:g} s"))
            continue
        try:
            answers.append(Answer(node, ray.get(reference)))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            answers.append(
                Answer(node, None, f"{type(cause).__name__}: {(str(cause).strip() or 'no words').splitlines()[-1]}")
            )
    return answers


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes of a cluster, and those that it can have.

    Attributes:
        nodes: that live now.
        growth: what its autoscaler may add; None where it has none that is known of.
    """

    nodes: tuple[Node, ...]
    growth: Growth | None

    def resources(self, gpus_per_worker: float | Literal["auto"]) -> Resources:
        """What a worker takes: one CPU, and one GPU where there are or can be any, unless the spec says."""
        if gpus_per_worker == "auto":
            gpus = [node.gpus for node in self.nodes] + [kind.gpus for kind in self._types]
            return Resources(1.0, 1.0 if max(gpus, default=0.0) >= 1 else 0.0)
        return Resources(1.0, gpus_per_worker)

    def check_fits(self, resources: Resources) -> None:
        """Makes sure that some node has room for a worker, or one that can be added; Ray would wait for ever.

        Raises:
            ClusterError: none has.
        """
        if sum(room(node, resources) for node in self.nodes) + sum(room(kind, resources) for kind in self._types):
            return
        found = "; ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in self.nodes)
        added = "; ".join(f"{kind.cpus:g} CPUs and {kind.gpus:g} GPUs ({kind.name})" for kind in self._types)
        raise ClusterError(
            f"a worker takes {resources.cpus:g} CPU and {resources.gpus:g} GPUs of one node; the nodes have {found}"
            f"{f'; those that can be added have {added}' if added else ''}; "
            "lower compute.gpus_per_worker or use another cluster"
        )

    def workers(self, resources: Resources, wanted: int | Literal["auto"] = "auto") -> int:
        """How many workers there are to be, at least one.

        Args:
            resources: what each takes.
            wanted: as the spec says. Where nodes can be added, `auto` is as many as there can ever be; where none can,
                no more are waited for than there is room for now.
        """
        now = self.room_now(resources)
        if self.growth is not None:
            return max(1, now, self._at_most(resources)) if wanted == "auto" else wanted
        return max(1, now if wanted == "auto" else min(wanted, now))

    def room_now(self, resources: Resources) -> int:
        """How many workers its living nodes have room for."""
        return sum(room(node, resources) for node in self.nodes)

    def unused(self, resources: Resources) -> str:
        """What of the cluster its workers leave alone because it has no GPUs; empty where there is nothing."""
        idle = [node for node in self.nodes if not node.is_head and not node.gpus and node.cpus >= 1]
        if not resources.gpus or not idle:
            return ""
        nodes = "a node without any is" if len(idle) == 1 else f"{len(idle)} nodes without any are"
        cpus = sum(node.cpus for node in idle)
        return (
            f"workers train on GPUs, and {nodes} not used, {cpus:g} CPUs in all; compute.gpus_per_worker: 0 would "
            "train on CPUs only"
        )

    @property
    def _types(self) -> tuple[NodeType, ...]:
        return () if self.growth is None else self.growth.types

    def _at_most(self, resources: Resources) -> int:
        """Workers on the cluster at its largest: its head, and of the other nodes first those with most room."""
        total = sum(room(node, resources) for node in self.nodes if node.is_head)
        left = 0 if self.growth is None else self.growth.most
        for kind in sorted(self._types, key=lambda kind: room(kind, resources), reverse=True):
            total += min(kind.most, left) * room(kind, resources)
            left -= min(kind.most, left)
        return total


def look() -> Cluster:
    """The connected cluster as it is now."""
    nodes = tuple(living_nodes())
    return Cluster(nodes, _growth([node for node in nodes if node.is_head]))


def _growth(heads: list[Node]) -> Growth | None:
    """What the autoscaler may add, as it says itself or as its configuration does, which the head has."""
    import ray

    growth = published()
    if growth is not None or not heads:
        return growth
    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    (answer,) = ask(configuration_here, port, nodes=heads)
    return None if answer.value is None else of_configuration(answer.value)


def worker_bytes(cluster: Cluster, resources: Resources, workers: int) -> int | None:
    """What memory any worker has at least, as the nodes with room for one say; None where none says.

    Args:
        cluster: the connected one.
        resources: what a worker takes.
        workers: how many there are to be.
    """
    with_room = [node for node in cluster.nodes if room(node, resources)]
    if not with_room:
        return None
    said = ask(memory_here, bool(resources.gpus), nodes=with_room)
    shares = [
        share(answer.value, min(workers, room(answer.node, resources)), resources) for answer in said if answer.value
    ]
    return min((found for found in shares if found is not None), default=None)


def share(memory: Memory, workers: int, resources: Resources) -> int | None:
    """What memory a worker of a node has; None where its GPUs are not to be seen.

    Args:
        memory: the node's.
        workers: that may lie on it.
        resources: what each takes.
    """
    if not resources.gpus:
        return memory.free_bytes // (workers + 1)  # one share is for whatever else the node does
    return int(min(memory.gpu_bytes) * resources.gpus) if memory.gpu_bytes else None


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


def check_storage(place: str) -> None:
    """Makes sure that what one node of the connected cluster writes to the place for checkpoints, all can read.

    Raises:
        StorageError: it cannot be written here.
        ClusterError: a node sees another directory there, or none, or cannot use it.
    """
    if len(living_nodes()) == 1:
        storage.probe(place)
        return
    answers = exchange(place)
    # A node that went meanwhile, or is about to, will see nothing of the sweep either.
    living = {node.id for node in living_nodes()}
    if failed := [answer for answer in answers if answer.error and answer.node.id in living]:
        raise ClusterError(
            f"checkpoints must lie where every node reads and writes; {place} is no such place: "
            + "; ".join(f"{answer.node.address}: {answer.error}" for answer in failed)
            + "; set LORA_SWEEPS_HOME to a directory that all nodes share, or LORA_SWEEPS_CHECKPOINTS to a URL such as "
            "s3://bucket/path that all of them reach"
        )


def exchange(place: str, timeout_s: float = _ANSWER_S) -> list[Answer]:
    """Has every living node read what is written here, and write what is then read here; leaves nothing behind.

    Args:
        place: for checkpoints.
        timeout_s: for all nodes together.

    Returns:
        What each node said; an error where one of the two cannot be done.

    Raises:
        StorageError: it cannot be written here, or nothing be removed.
    """
    asked, mark = living_nodes(), f"probe-{secrets.token_hex(8)}"
    storage.leave_mark(place, mark)
    try:
        said = ask(_read_and_write, place, mark, nodes=asked, timeout_s=timeout_s)
        return [answer if answer.error else replace(answer, error=_unseen(place, str(answer.value))) for answer in said]
    finally:
        # Those too that a node may have written without having said so.
        _remove_marks(place, [mark, *(_own_mark(mark, node.id) for node in asked)])


def _read_and_write(place: str, mark: str) -> str:
    """On a node: reads what the driver has written, and returns the name of what it has written itself."""
    import ray

    storage.check_mark(place, mark)  # first: a directory that is not the driver's is not written to
    storage.leave_mark(place, own := _own_mark(mark, ray.get_runtime_context().get_node_id()))
    return own


def _own_mark(mark: str, node: str) -> str:
    """The name of what the node of this id writes: the driver, which removes it, must know it without an answer."""
    return f"{mark}-{node}"


def _remove_marks(place: str, names: list[str]) -> None:
    """Removes all that can be removed, and only then tells of the first that cannot."""
    refused = []
    for name in names:
        try:
            storage.remove_mark(place, name)
        except StorageError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def _unseen(place: str, mark: str) -> str:
    """Why what a node has left cannot be read here; empty where it can."""
    try:
        storage.check_mark(place, mark)
    except StorageError as error:
        return str(error)
    return ""
