"""Runs jobs on Ray: a local cluster of its own, or one that is there.

One Ray Tune trial is one job. Tune places jobs on workers and keeps the workers alive between them; it decides
nothing and remembers nothing. What happened is in the ledger, so Tune's own experiment state goes to a temporary
directory. Beside this file only `nodes.py`, `autoscaling.py` and `worker.py` know of Ray.

As many jobs are with Tune at once as the plan has workers, whether there is room for them yet or not: where nodes can
be added, it is the workers that wait which make Ray's autoscaler add them, and a worker without a job is let go, so
that its node can go too. Nothing is asked for in the cluster's own name (`ray.autoscaler.sdk.request_resources`): that
is one value for all who use the cluster, and outlives a driver that is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from sweeps.errors import ClusterError
from sweeps.jobs import JobErrorKind, JobOrder, JobResult
from sweeps.nodes import Resources, WorkerWatch, answers
from sweeps.secrecy import hide_passwords

_CONNECT_TIMEOUT_S = 10
_OBJECT_STORE_BYTES = 100 * 2**20

_NODE_DIED = "node has died"
"""What Ray's error of a lost actor says where it is the node that died (`gcs_actor_manager.cc`)."""

_CUT_OFF = "keepalive watchdog timeout"
"""What it says where the network to the worker has gone, whatever has become of the two ends."""

_OUT_OF_MEMORY = ("running low on memory", "NODE_OUT_OF_MEMORY")
"""What it says where its memory monitor has ended a worker."""

_SETTINGS = {
    # Read by Ray when it is first imported, and inherited by the processes it starts.
    "RAY_grpc_client_keepalive_time_ms": "20000",  # else an answer that the network has lost is waited for 5 minutes
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: Tune's handler waits for running jobs
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class Jobs(Protocol):
    """Where jobs come from and results go to: `sweeps.search.PackSearcher`."""

    @property
    def finished(self) -> bool:
        """Whether there will be no more jobs."""

    def suggest(self) -> JobOrder | None:
        """The next job, or None for now."""

    def complete(self, result: JobResult, *, wall_s: float = 0.0) -> None:
        """Takes a job's result."""


@contextlib.contextmanager
def cluster(address: str | None, *, workers: int, token_file: Path) -> Iterator[None]:
    """Connects to a Ray cluster for as long as the context lasts.

    Args:
        address: `auto` or `HOST:PORT` of a running cluster; None starts one on this machine, on loopback only and
            behind a token of its own.
        workers: CPUs of a local cluster.
        token_file: where a local cluster's token is kept.

    Raises:
        ClusterError: the cluster cannot be started or reached.
    """
    os.environ.update({name: value for name, value in _SETTINGS.items() if name not in os.environ})
    if address is not None and address.startswith("ray://"):
        raise ClusterError(
            f"--address must be `auto` or HOST:PORT of the cluster's head; found {address}: Ray Client connections "
            "cannot carry a search; run on the head node with --address auto"
        )
    if address is not None:
        _check_reachable(address)
    with _guarded(token_file) if address is None else contextlib.nullcontext():
        _connect(address, workers)
        import ray

        try:
            yield
        finally:
            ray.shutdown()


def _connect(address: str | None, workers: int) -> None:
    import ray

    local = {"num_cpus": workers, "object_store_memory": _OBJECT_STORE_BYTES} if address is None else {}
    try:
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **local,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
        raise ClusterError(
            f"{where} must be there to run on; it cannot be used: {str(error).splitlines()[0]}"
        ) from error


def run_jobs(
    jobs: Jobs,
    *,
    resources: Resources,
    workers: int,
    poll: Callable[[], None],
    tell: Callable[[str], None],
) -> None:
    """Runs jobs on the connected cluster until there are no more.

    Args:
        jobs: where jobs come from and results go to.
        resources: what each takes.
        workers: jobs at once, those that wait for a node among them.
        poll: called several times a second, between whatever else happens; what it raises ends the run.
        tell: is told, in words, that jobs wait because no node has room for a worker.

    Raises:
        BaseException: whatever `jobs` itself raised, KeyboardInterrupt included.
    """
    from ray import tune

    from sweeps.worker import PackTrainable

    adapter = _adapter(jobs, resources)
    with tempfile.TemporaryDirectory(prefix="lora-sweeps-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(PackTrainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=adapter,
                num_samples=-1,
                # Also the number of workers that Tune waits for at once, which would be one.
                max_concurrent_trials=workers,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                name="jobs",
                verbose=0,
                callbacks=[_polling(poll, adapter, WorkerWatch(resources, tell))],
                log_to_file=False,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        tuner.fit()
    if adapter.error is not None:
        raise adapter.error


def _polling(poll: Callable[[], None], adapter: Any, watch: WorkerWatch) -> Any:
    from ray.tune import Callback

    class Polling(Callback):  # type: ignore[misc]
        """Calls `poll` at every turn of Tune's loop, has the next job composed, and sees whether there are workers."""

        def __init__(self) -> None:
            self._with_worker: set[str] = set()

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            poll()
            if adapter.error is not None and not self._with_worker:
                raise adapter.error  # else Tune would wait for workers of jobs whose results nobody can take
            watch.look(len(self._with_worker))
            adapter.trials = trials
            adapter.look_ahead()

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._with_worker.add(trial.trial_id)
            adapter.begin(trial.trial_id)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._with_worker.discard(trial.trial_id)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._with_worker.discard(trial.trial_id)

        def __reduce__(self) -> Any:
            return (Callback, ())

    return Polling()


def _adapter(jobs: Jobs, resources: Resources) -> Any:
    from ray.tune.search import Searcher

    class JobSearcher(Searcher):  # type: ignore[misc]
        """Tune's view of where jobs come from."""

        def __init__(self) -> None:
            super().__init__()
            self.error: BaseException | None = None
            self.trials: list[Any] = []
            self._next: JobOrder | None = None
            self._started: dict[str, tuple[int, float]] = {}

        def look_ahead(self) -> None:
            """Composes the next job, which can take a sampler seconds, so that it is there when a worker is free."""
            try:
                if self._next is None and self._started and self.error is None:
                    self._next = jobs.suggest()
            except Exception as error:
                # Tune would wrap it in an error of its own; it is raised as it is when Tune is done.
                self.error = error

        def suggest(self, trial_id: str) -> Any:
            try:
                order = self._next or jobs.suggest() if self.error is None else None
            except Exception as error:
                self.error, order = error, None
            self._next = None
            if order is None:
                return Searcher.FINISHED if jobs.finished or self.error else None
            self._started[trial_id] = (order.job, time.perf_counter())
            return {"order": order.model_dump_json(), "gpus": resources.gpus}

        def begin(self, trial_id: str) -> None:
            """A job has its worker: what it waited for one is none of its time."""
            self._started[trial_id] = (self._started[trial_id][0], time.perf_counter())

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            job, started_s = self._started.pop(trial_id)
            if error or result is None or "result" not in result:
                kind, detail = _why_lost(next((trial for trial in self.trials if trial.trial_id == trial_id), None))
                outcome = JobResult(job=job, error=kind, detail=detail)
            else:
                outcome = JobResult.model_validate_json(result["result"])
            try:
                jobs.complete(outcome, wall_s=time.perf_counter() - started_s)
            except Exception as failure:
                self.error = failure

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the ledger is the one truth."""

        def __reduce__(self) -> Any:
            # Tune pickles its configuration into its experiment state, which nobody reads.
            return (Searcher, ())

    return JobSearcher()


def _why_lost(trial: Any) -> tuple[JobErrorKind, str]:
    """Why a job has no result, as Ray tells it: its worker died, or the node did, which is not the job's fault.

    Args:
        trial: Tune's, in error; None where it is not known.
    """
    import ray

    died = "the worker's process ended before its job did"
    error, said = (None, "") if trial is None else (_error_of(trial), _words_of(trial))
    if any(sign in said for sign in _OUT_OF_MEMORY):
        return "oom", "Ray ended the worker because its node ran low on memory"
    if isinstance(error, ray.exceptions.RayTaskError):  # it lives, and what it raised is none of a job's errors
        return "error", said
    if not isinstance(error, ray.exceptions.RayActorError):
        return "worker_died", f"{died}: {_last_line(said)}" if said else died
    if _CUT_OFF in said:
        return "node_lost", "the network to the node of the worker was lost before the job was done"
    node = _actor(error).get("Address", {}).get("NodeID", "")
    if error.preempted or _NODE_DIED in str(error) or (node and not answers(node)):
        taken = "was taken away (preempted)" if error.preempted else "vanished"
        return "node_lost", f"the node of the worker {taken} before the job was done"
    return "worker_died", f"{died}: {_last_line(said)}"


def _actor(error: Any) -> dict[str, Any]:
    """What the cluster knows of the actor that an error is about."""
    import ray

    return dict(ray._private.state.actors(error.actor_id)) if error.actor_id else {}


def _error_of(trial: Any) -> BaseException | None:
    """Reads the error that Tune, in this process, has just kept of a trial; its own way finds it only later."""
    import ray

    try:
        with open(trial.pickled_error_file, "rb") as file:
            error = ray.cloudpickle.load(file)
    except (OSError, TypeError):  # none was kept, and so has no name
        return None
    return error if isinstance(error, BaseException) else None


def _words_of(trial: Any) -> str:
    """What Tune has written down of a trial's error, whatever its kind; passwords hidden."""
    try:
        with open(trial.error_file, encoding="utf-8", errors="replace") as file:
            return hide_passwords(file.read())
    except (OSError, TypeError):
        return ""


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason is known")


@contextlib.contextmanager
def _guarded(token_file: Path) -> Iterator[None]:
    """Keeps a cluster of our own on loopback, behind a token of its own, whoever shares the machine.

    A user's own `RAY_AUTH_MODE` is left alone.
    """
    ours = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # every listener on 127.0.0.1
    if "RAY_AUTH_MODE" not in os.environ:
        _make_token(token_file)
        ours |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        # Ray reads the mode once, when it is imported; who has imported it before must make it read again.
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

        AuthenticationTokenLoader.instance().reset_cache()
        Config.initialize("")
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _make_token(path: Path) -> None:
    """Makes a token file unless there is one; of two processes that do so at once, both end up with the same one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
    os.chmod(path, 0o600)


def _check_reachable(address: str) -> None:
    """Tries the head's port first: Ray itself takes minutes to give up."""
    import socket

    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"--address must be `auto` or HOST:PORT of a running Ray cluster; {address} does not answer: {error}"
        ) from error
