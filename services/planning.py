"""Heavy work for the service in processes of its own: planning a sweep, rendering a report, packing up an adapter.

They load torch, which the service does not, so that it stays small, answers meanwhile, and outlives a model that does
not fit. Every piece of work has a time limit, after which its process is killed.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

from services.policy import Places, parse_submitted
from sweeps.errors import InputError
from sweeps.home import Home
from sweeps.secrecy import hide_passwords

_TASKS_A_PROCESS = 100
"""After so many a process is replaced by a fresh one: libraries keep memory that they were done with."""

_MOST_WAITING = 64

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h

_T = TypeVar("_T")


class BusyError(InputError):
    """Too much is waiting to be planned; it may be asked for again in a while."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of work, in words for whoever waits for it in vain.

    Attributes:
        done: what must be done.
        slow: the way out where it takes too long.
        large: the way out where its process dies.
    """

    done: str
    slow: str
    large: str


_AGAIN = "try again once the service has less to do"

_PLAN = _Kind("a plan must be made", "write fewer values, or less data", "write a smaller search space, or model")
_REPORT = _Kind("a report must be rendered", _AGAIN, "have it rendered where there is more: `lora-sweeps report`")
_ADAPTER = _Kind("an adapter must be packed up", _AGAIN, "have it written where there is more: `lora-sweeps export`")
_DEVICES = _Kind("the devices must be counted", _AGAIN, _AGAIN)


@dataclass(frozen=True, slots=True)
class Room:
    """What one sweep may take.

    Attributes:
        devices: GPUs or cores.
        workers: at most so many; None: as many as there are devices for.
    """

    devices: int
    workers: int | None


@dataclass(frozen=True, slots=True)
class Planned:
    """A spec that was found fit, and what it would run.

    Attributes:
        spec: resolved, every default filled in.
        plan: as `sweeps.plan.Plan` writes itself.
        devices: that it takes while it runs.
        text: as it came, but for its secrets.
    """

    spec: dict[str, Any]
    plan: dict[str, Any]
    devices: float
    text: str


class Planner:
    """A few processes, and what waits for them."""

    def __init__(self, home: Home, *, processes: int, limit_s: float) -> None:
        """Starts nothing yet: the first piece of work does.

        Args:
            home: the state directory.
            processes: how many.
            limit_s: seconds that one piece of work may take.
        """
        self._home, self._limit_s, self._waiting = home, limit_s, 0
        # Spawned: a fork of a process with threads and open connections is asking for trouble.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(
            max_workers=processes, max_tasks=_TASKS_A_PROCESS, initializer=_prepare, context=context
        )

    async def devices(self) -> int:
        """GPUs of this machine, or cores where there are none."""
        return await self._do(_DEVICES, _devices)

    async def plan(self, text: str, source: str, places: Places, room: Room, *, timed: bool = False) -> Planned:
        """Reads a submitted spec, and plans it.

        Raises:
            SpecError: every fault of it.
            InputError: it takes too long, or too much memory.
        """
        return await self._do(_PLAN, _plan, text, source, places, room, timed, self._home)

    async def report(self, sweep: str, form: str) -> str:
        """Renders the report of a sweep as `md`, `json` or `html`."""
        return await self._do(_REPORT, _report, sweep, form, self._home)

    async def adapter(self, sweep: str, trial: int | None, archive: Path) -> None:
        """Packs a trial's adapter, or the best one's, into a ZIP archive."""
        await self._do(_ADAPTER, _adapter, sweep, trial, archive, self._home)

    def close(self) -> None:
        """Ends the processes, at once."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    async def _do(self, kind: _Kind, work: Callable[..., _T], *arguments: Any) -> _T:
        if self._waiting >= _MOST_WAITING:
            raise BusyError(f"{self._waiting} plans and reports are waiting, which is the most; try again in a while")
        self._waiting += 1
        future: Future[_T] = self._pool.schedule(work, args=arguments, timeout=self._limit_s)
        try:
            return await asyncio.wrap_future(future)
        except TimeoutError:
            raise InputError(f"{kind.done} within {self._limit_s:g} s, and was not: {kind.slow}") from None
        except ProcessExpired as error:
            raise InputError(
                f"{kind.done} in the memory that the service has; its process died (exit code {error.exitcode}): "
                f"{kind.large}"
            ) from None
        finally:
            self._waiting -= 1


def clear_scratch(home: Home) -> None:
    """Deletes what a service that was killed had packed up and not sent: once at a start, before anything is sent."""
    scratch = home.path / "scratch"
    for path in scratch.iterdir() if scratch.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _prepare() -> None:
    _die_with_parent()
    os.nice(5)  # whoever only asks how a sweep is getting on goes first
    os.environ["OMP_NUM_THREADS"] = "1"


def _die_with_parent() -> None:
    """Has Linux end this process when the one that started it is killed, and can end nobody itself."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # it was gone before
        os._exit(1)


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def _plan(text: str, source: str, places: Places, room: Room, timed: bool, home: Home) -> Planned:
    from sweeps.dtypes import with_dtype
    from sweeps.planning import plan_sweep

    document = parse_submitted(text, source, places)
    compute = document.spec.compute
    share = compute.gpus_per_worker if isinstance(compute.gpus_per_worker, float) else 1.0
    share = share or 1.0
    most = max(0, int(room.devices / share))
    if most < 1:
        hint = "write auto, or a share of one"
        raise document.error("compute.gpus_per_worker", f"at most {room.devices}, as there are", f"{share:g}", hint)
    if room.workers is not None:
        most = min(most, room.workers)
    if compute.workers != "auto" and compute.workers > most:
        required = f"at most {most}, which is what the service has for one sweep"
        raise document.error("compute.workers", required, str(compute.workers), "write fewer, or auto")
    workers = most if compute.workers == "auto" else compute.workers
    document = with_dtype(document)
    plan = plan_sweep(document, home, workers=workers, timed=timed)
    # A large text takes seconds to be masked, in which the service itself would answer nobody.
    masked = hide_passwords(text)
    return Planned(document.spec.model_dump(mode="json"), plan.model_dump(mode="json"), workers * share, masked)


def _report(sweep: str, form: str, home: Home) -> str:
    from sweeps.records import read_sweep
    from sweeps.report import build, render

    with home.ledger() as ledger:
        return render(build(read_sweep(ledger, sweep)), form)  # type: ignore[arg-type]  # checked where it was asked


def _adapter(sweep: str, trial: int | None, archive: Path, home: Home) -> None:
    import tempfile

    from services.exports import trial_of
    from sweeps.deliverables import write_adapter
    from sweeps.records import read_sweep

    with home.ledger() as ledger, tempfile.TemporaryDirectory(dir=archive.parent) as directory:
        record = read_sweep(ledger, sweep)
        files = write_adapter(record, trial_of(record, trial), home, Path(directory) / "adapter")
        with zipfile.ZipFile(archive, "w") as packed:  # stored: safetensors do not get smaller
            for path in files:
                packed.write(path, f"adapter/{path.name}")
