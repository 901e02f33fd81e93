"""What becomes of jobs that do not come back: told apart on a real Ray, each by what really happens to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sweeps import engine
from sweeps.errors import StateError
from sweeps.jobs import JobErrorKind, JobOrder, JobResult, MemberOrder
from sweeps.nodes import Resources
from sweeps.space import Configuration
from sweeps.spec import parse_spec
from sweeps.worker import keep_to_share
from tests.support import SMALL_SPEC

KILLS_ITSELF = """\
import os, signal

def make_task(**_):
    os.kill(os.getpid(), signal.SIGKILL)
"""


TELLS_WHAT_IT_SEES = """\
import os

def make_task(**_):
    raise ValueError(f"it sees {os.environ.get('CUDA_VISIBLE_DEVICES')!r}")
"""


class Unreadable:
    """An order in the words of another version."""

    job = 0

    def model_dump_json(self) -> str:
        return '{"job": 0, "canary": 1}'


class Given:
    """Hands out what it was given, and keeps what comes back; `breaking` is raised instead of taking a result."""

    def __init__(self, *orders: Any, breaking: Exception | None = None) -> None:
        self.orders, self.breaking = list(orders), breaking
        self.results: list[JobResult] = []

    @property
    def finished(self) -> bool:
        return not self.orders

    def suggest(self) -> Any:
        return self.orders.pop(0) if self.orders else None

    def complete(self, result: JobResult, *, wall_s: float = 0.0) -> None:
        self.results.append(result)
        if self.breaking is not None:
            raise self.breaking


def order_of(spec: str, folder: Path, job: int = 0, *, stop: int = 10) -> JobOrder:
    point = Configuration(rank=2, alpha=16.0, lr=0.01, init_scale=1.0)
    return JobOrder(
        job=job,
        work="train",
        spec=parse_spec(spec, "test.yaml").spec.model_dump(mode="json"),
        cache=str(folder / "cache"),
        checkpoints=str(folder / "checkpoints"),
        members=(MemberOrder(trial=job, configuration=point, class_id=""),),
        start=0,
        stop=stop,
    )


def run(jobs: Given, *, gpus: float = 0.0, workers: int = 1) -> None:
    resources = Resources(1.0, gpus)
    engine.run_jobs(jobs, resources=resources, workers=workers, poll=lambda: None, tell=lambda _text: None)


@contextlib.contextmanager
def a_ray(folder: Path, **settings: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        for name, value in settings.items():
            patch.setenv(name, value)
        with engine.cluster(None, workers=1, token_file=folder / "token"):
            yield


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with a_ray(tmp_path_factory.mktemp("ray")):
        yield


def outcome(order: Any) -> tuple[JobErrorKind | None, str]:
    jobs = Given(order)
    run(jobs)
    (result,) = jobs.results
    return result.error, result.detail


def test_a_worker_that_ray_ends_for_its_memory_has_run_out_of_it(tmp_path: Path):
    with a_ray(tmp_path, RAY_memory_usage_threshold="0.01", RAY_memory_monitor_refresh_ms="100"):
        spec = SMALL_SPEC.replace("steps: 40", "steps: 4000000").replace("20, 40]", "20, 4000000]")
        kind, detail = outcome(order_of(spec, tmp_path, stop=4_000_000))
    assert kind == "oom"
    assert "ran low on memory" in detail


@pytest.mark.usefixtures("ray_here")
def test_a_job_that_is_done_says_where(tmp_path: Path):
    jobs = Given(order_of(SMALL_SPEC, tmp_path, 0), order_of(SMALL_SPEC, tmp_path, 1))
    run(jobs)
    assert [result.job for result in jobs.results] == [0, 1]
    assert all(result.error is None and result.node for result in jobs.results)


@pytest.mark.usefixtures("ray_here")
def test_a_worker_whose_process_ends_died_and_its_node_did_not(tmp_path: Path):
    (tmp_path / "kills_itself.py").write_text(KILLS_ITSELF)
    task = f"{{type: python, path: {tmp_path}, entrypoint: kills_itself:make_task}}"
    kind, detail = outcome(order_of(SMALL_SPEC.replace("{type: digits}", task), tmp_path))
    assert kind == "worker_died"
    assert detail.startswith("the worker's process ended before its job did: ")


@pytest.mark.usefixtures("ray_here")
def test_a_worker_that_asks_for_no_gpu_sees_none(tmp_path: Path):
    (tmp_path / "tells.py").write_text(TELLS_WHAT_IT_SEES)
    task = f"{{type: python, path: {tmp_path}, entrypoint: tells:make_task}}"
    kind, detail = outcome(order_of(SMALL_SPEC.replace("{type: digits}", task), tmp_path))
    assert kind == "error"
    assert detail.rstrip().endswith("ValueError: it sees ''")


@pytest.mark.parametrize(("gpus", "fractions"), [(0.5, [0.5]), (1.0, []), (2.0, [])])
def test_a_worker_keeps_to_its_share_of_a_gpu(gpus: float, fractions: list[float], monkeypatch: pytest.MonkeyPatch):
    kept: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", kept.append)
    keep_to_share(gpus)
    assert kept == fractions


@pytest.mark.usefixtures("ray_here")
def test_what_a_worker_raises_outside_of_its_job_is_told_in_its_words():
    kind, detail = outcome(Unreadable())
    assert kind == "error"
    assert "ValidationError" in detail
    assert "canary" in detail


@pytest.mark.usefixtures("ray_here")
def test_a_result_that_cannot_be_taken_ends_the_run_though_jobs_wait_for_workers(tmp_path: Path):
    jobs = Given(*(order_of(SMALL_SPEC, tmp_path, job) for job in range(4)), breaking=StateError("the ledger is away"))
    with pytest.raises(StateError, match="the ledger is away"):
        run(jobs, workers=3)
    assert [result.job for result in jobs.results] == [0]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("RpcError: RPC error: keepalive watchdog timeout rpc_code: 14.", "node_lost"),
        ("1 worker(s) were killed due to the node running low on memory", "oom"),
        ("nothing that is known", "worker_died"),
    ],
)
def test_an_error_that_ray_keeps_as_words_only_is_told_by_them(said: str, kind: JobErrorKind, tmp_path: Path):
    import ray

    (tmp_path / "error.txt").write_text(f"Traceback\n{said}\n")
    (tmp_path / "error.pkl").write_bytes(ray.cloudpickle.dumps(ray.exceptions.RayActorError()))
    trial = SimpleNamespace(error_file=str(tmp_path / "error.txt"), pickled_error_file=str(tmp_path / "error.pkl"))
    assert engine._why_lost(trial)[0] == kind
