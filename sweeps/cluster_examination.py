"""Examines a cluster: every node at once, and what only several nodes can get wrong; see `examination.py`."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sweeps import checkup, engine, node_facts, nodes, source_facts, storage
from sweeps.checkup import Check, Needs
from sweeps.errors import InputError
from sweeps.home import Home
from sweeps.machine_examination import PATIENCE_S, bounded, judged, machine, place_for_checkpoints, quietly, sources_of
from sweeps.node_facts import NodeFacts
from sweeps.source_facts import Source, SourceFacts
from sweeps.spec import SpecDocument

_CLOCK_ROUNDS = 3
"""Of these the one with the shortest round trip counts."""

_LOOK_S = 0.9 * PATIENCE_S
"""For the spec's sources: datasets, and with it torch, may have to be loaded to see what is in its cache."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cluster:
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
            _, problem = bounded("Ray", lambda: connected.enter_context(made))
            if problem:
                return problem
            return self._connected(say)

    def _connected(self, say: Say) -> list[Check]:
        say("asking its nodes what they have")
        shares_cache = quietly(storage.configured_place) is None
        cache = str(self.home.cache) if shares_cache else None
        answers, problem = bounded(
            "nodes", lambda: nodes.ask(node_facts.gather, {"cache": cache}, timeout_s=PATIENCE_S)
        )
        if answers is None:
            return problem
        names = _names([answer.node for answer in answers])
        checks = [_there([answer.node for answer in answers], self.address)]
        resources, problem = bounded("workers", self._room)
        checks += problem if resources is None else [resources[1]]
        room = {answer.node.id: 1 if resources is None else answer.node.room(resources[0]) for answer in answers}
        found: dict[str, NodeFacts] = {}
        for answer in answers:
            name = names[answer.node.id]
            if answer.error:
                checks.append(checkup.silent(name, answer.error))
                continue
            found[name] = answer.value
            needs = self.needs if room[answer.node.id] else Needs()
            in_ray, fits = answer.node.gpus, room[answer.node.id]
            checks += machine(answer.value, name, needs, clustered=True, driver=self.driver, in_ray=in_ray, room=fits)
        checks += checkup.devices(found, self.needs) + self._token(found.values())
        say("asking them for the time")
        checks += self._in_time("clock", names, self._clocks)
        say("having them read and write checkpoints")
        checks += self._in_time("checkpoints", names, self._exchange)
        if self.document is not None and (sources := sources_of(self.document)):
            say("asking them for the model and the data")
            wanted = {node: name for node, name in names.items() if room[node]}
            checks += self._in_time("sources", wanted, lambda which: self._look(sources, which))
        return checks

    def _in_time(self, what: str, names: dict[str, str], ask: Callable[[dict[str, str]], list[Check]]) -> list[Check]:
        checks, problem = bounded(what, lambda: ask(names))
        return problem if checks is None else checks

    def _room(self) -> tuple[nodes.Resources, Check]:
        """What a worker takes, and whether it fits anywhere."""
        compute = None if self.document is None else self.document.spec.compute
        cluster = nodes.look()
        resources = cluster.resources("auto" if compute is None else compute.gpus_per_worker)
        takes = f"{resources.cpus:g} CPU and {resources.gpus:g} GPUs"
        try:
            cluster.check_fits(resources)
        except InputError as error:
            return resources, checkup.refused("workers", error)
        room = cluster.workers(resources)
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
            answers = nodes.ask(node_facts.now, timeout_s=PATIENCE_S / (_CLOCK_ROUNDS + 1))
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
        place = place_for_checkpoints(self.home)
        errors = {answer.node.id: answer.error for answer in nodes.exchange(place)}
        return [
            checkup.exchanged(name, place, errors[node])
            if node in errors
            else Check("checkpoints", "skipped", "the node has left", node=name)
            for node, name in names.items()
        ]

    def _look(self, sources: tuple[Source, ...], names: dict[str, str]) -> list[Check]:
        checks = list[Check]()
        for answer in nodes.ask(source_facts.look, sources, timeout_s=_LOOK_S):
            if answer.node.id not in names:
                continue
            name = names[answer.node.id]
            if answer.error:
                checks += [Check(one.use, "skipped", answer.error, node=name) for one in sources]
            else:
                checks += judged(sources, name, answer.value, self.seen)
        return checks


def _names(found: list[nodes.Node]) -> dict[str, str]:
    """What nodes are called, by their ids: their addresses, where those differ."""
    counts = Counter(node.address for node in found)
    return {node.id: node.address if counts[node.address] == 1 else f"{node.address} ({node.id[:6]})" for node in found}


def _there(found: list[nodes.Node], address: str) -> Check:
    cpus, gpus = sum(node.cpus for node in found), sum(node.gpus for node in found)
    some = f"{len(found)} node{'' if len(found) == 1 else 's'}"
    return Check("Ray", "ok", f"{some} at {address}, with {cpus:g} CPUs and {gpus:g} GPUs")
