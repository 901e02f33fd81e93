"""Ray clusters of several nodes on this machine, each node a set of processes of its own that can lose its power.

node      a raylet, what it starts, and on the head what Ray keeps of the cluster
mark      a variable in the environment of all processes of a node, by which they are found
inside    words before a node's command line: how it comes to be in a namespace of its own
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import environment, free_ports, pids_with

_ATTEMPTS = 4

_PATIENCE_S = 180
"""For whatever takes seconds on a machine with nothing else to do."""


def until(condition: Callable[[], Any], *, patience_s: float = _PATIENCE_S) -> Any:
    """Waits until something holds, and returns it."""
    deadline_s = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.1)
    return found


def kill_all_with(setting: str) -> None:
    """Kills the processes that have this in their environment, and what they start meanwhile."""
    while pids := {pid for pid in pids_with(setting) - {os.getpid()} if not _is_dead(pid)}:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _is_dead(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


@dataclass
class RayNode:
    """One node.

    Attributes:
        address: its IP address.
        process: `ray start --block`.
        mark: see the top of the file.
        log: what it said.
        inside: see the top of the file.
    """

    address: str
    process: subprocess.Popen[bytes]
    mark: str
    log: Path
    inside: Sequence[str]

    @property
    def pids(self) -> set[int]:
        """Its processes, `ray start` and the workers among them."""
        return pids_with(self.mark)

    @property
    def node_id(self) -> str:
        """Ray's name for it."""
        for pid in self.pids:
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                if found := re.search(r"raylet/raylet .*--node_id=([0-9a-f]+)", command):
                    return found[1]
        raise AssertionError(f"{self.address} has no raylet")

    def has_started(self) -> bool:
        """Waits until the cluster has it, or it has given up; what it left is gone then."""
        until(lambda: self.process.poll() is not None or "Ray runtime started" in self.log.read_text())
        if self.process.poll() is None:
            return True
        self.kill()
        return False

    def kill(self) -> None:
        """Ends all its processes at once, as when a machine loses its power."""
        kill_all_with(self.mark)
        self.process.wait()

    def stop(self) -> None:
        """Ends it in order, as `ray stop` does."""
        self.process.terminate()
        try:
            self.process.wait(_PATIENCE_S)
        finally:
            self.kill()


@dataclass
class RayCluster:
    """A head, behind a token, and the nodes that have joined it.

    Attributes:
        address: HOST:PORT of the head.
        dashboard: URL of its dashboard; empty without one.
        access: what a driver's environment needs.
    """

    address: str
    dashboard: str
    access: dict[str, str]
    head: RayNode = field(init=False)
    scratch: Path
    settings: dict[str, str]
    nodes: list[RayNode] = field(default_factory=list)

    def join(self, *addresses: str, inside: Mapping[str, Sequence[str]] | None = None) -> list[RayNode]:
        """Starts nodes that take one job each, all at once."""
        words = ["--address", self.address, "--num-cpus", "1"]
        nodes = [self._begin(address, words, (inside or {}).get(address, ())) for address in addresses]
        return [node if node.has_started() else self.start(node.address, words, node.inside) for node in nodes]

    def start(self, address: str, words: Sequence[str], inside: Sequence[str] = ()) -> RayNode:
        """Starts a node with `ray start`'s own options, again where it gives up, as it does after 30 s."""
        for _ in range(_ATTEMPTS):
            node = self._begin(address, words, inside)
            if node.has_started():
                return node
        raise AssertionError(node.log.read_text())

    def _begin(self, address: str, words: Sequence[str], inside: Sequence[str]) -> RayNode:
        mark = f"TESTS_RAY_NODE={secrets.token_hex(8)}"
        name, _, value = mark.partition("=")
        log = self.scratch / f"{value}.log"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        ray += ["--object-store-memory", str(2**27), "--min-worker-port", "0", "--max-worker-port", "0"]
        ray += ["--node-ip-address", address, *words]
        # Whoever kills the tests kills the nodes.
        bound = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with log.open("wb") as said:
            process = subprocess.Popen(
                [*bound, *inside, *ray],
                env=environment(**self.settings, **{name: value}),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        node = RayNode(address, process, mark, log, inside)
        self.nodes.append(node)
        return node


@contextlib.contextmanager
def ray_cluster(
    address: str, *, cpus: int = 0, dashboard: bool = False, inside: Sequence[str] = (), port: int = 0, **settings: str
) -> Iterator[RayCluster]:
    """A cluster of a head alone; with the context ends everything that belongs to the cluster.

    Args:
        address: the head's IP address. Every process on this machine has 127.0.0.0/8 to itself.
        cpus: that the head gives to jobs.
        dashboard: whether it has one, on the same address, and with it Ray's jobs.
        inside: see the top of the file.
        port: for drivers and nodes; 0 for one that is free here.
        settings: more of Ray's settings, for all nodes.
    """
    free, dashboard_port, client, agent, agent_grpc = free_ports(5)
    port = port or free
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    words = ["--head", "--port", str(port), "--num-cpus", str(cpus)]
    words += ["--include-dashboard", str(dashboard).lower(), "--ray-client-server-port", str(client)]
    if dashboard:
        words += ["--dashboard-host", address, "--dashboard-port", str(dashboard_port)]
        words += ["--dashboard-agent-listen-port", str(agent), "--dashboard-agent-grpc-port", str(agent_grpc)]
    # Ray puts sockets below its directory, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        everywhere = (
            access
            | settings
            | {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "RAY_TMPDIR": scratch,
                "RAY_USAGE_STATS_ENABLED": "0",
            }
        )
        url = f"http://{address}:{dashboard_port}" if dashboard else ""
        cluster = RayCluster(f"{address}:{port}", url, access, Path(scratch), everywhere)
        try:
            cluster.head = cluster.start(address, words, inside)
            yield cluster
        finally:
            for node in reversed(cluster.nodes):
                node.kill()
            kill_all_with(f"RAY_AUTH_TOKEN={access['RAY_AUTH_TOKEN']}")  # drivers, of Ray's jobs too
