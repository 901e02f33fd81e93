"""A service that is killed while sweeps run: their drivers go on, and the next service finds them as they are."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from pathlib import Path

from sweeps.events import DriverStarted, JobEnded, JobStarted, QueueMoved, TrialTold
from sweeps.home import Home
from sweeps.ledger import Ledger, Record
from tests.services import service_support
from tests.services.service_support import LONG_SPEC, Served, kill_drivers, start, stop

_KILLS = 20
_TRUE_WITHIN_S = 2.0


def events_of(home: Path, sweep: str) -> list[Record]:
    with Ledger.in_directory(home) as ledger:
        return ledger.read(sweep)


def killed_and_started(served: Served) -> Served:
    os.killpg(served.process.pid, signal.SIGKILL)
    served.process.communicate()
    return start(served.home, "--devices", "4")


def wait_for_jobs(home: Path, sweep: str, count: int, *, timeout_s: float = 240) -> None:
    deadline_s = time.monotonic() + timeout_s
    while sum(isinstance(record.event, JobEnded) for record in events_of(home, sweep)) < count:
        assert time.monotonic() < deadline_s, Home(home).logs(sweep).read_text()
        time.sleep(0.2)


def true_within(served: Served, sweep: str, *states: str) -> str:
    """The state that a service gives, once it is one of these; it has two seconds."""
    deadline_s = time.monotonic() + _TRUE_WITHIN_S
    while (found := served.status(sweep))["state"] not in states and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return f"{found['state']} {found['reason']}".strip()


def holders_of(path: Path) -> set[int]:
    """Processes that have a file open."""
    wanted, found = os.stat(path), set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone by now, or another user's
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.stat(descriptor), wanted):
                        found.add(int(process.name))
    return found


def test_a_service_killed_twenty_times_loses_nothing_and_starts_nothing_twice(tmp_path: Path):
    served = start(tmp_path / "home", "--devices", "4")
    home = Home(served.home)
    try:
        sweeps = [served.submit(LONG_SPEC) for _ in range(3)]
        for sweep in sweeps:
            wait_for_jobs(home.path, sweep, 1)
        pids = {sweep: home.driver_pid(sweep) for sweep in sweeps}
        assert None not in pids.values()
        for _ in range(_KILLS):
            served = killed_and_started(served)
            assert [true_within(served, sweep, "running") for sweep in sweeps] == ["running"] * 3
            assert {sweep: home.driver_pid(sweep) for sweep in sweeps} == pids
        for sweep in sweeps:
            events = [record.event for record in events_of(home.path, sweep)]
            assert [event.state for event in events if isinstance(event, QueueMoved)] == [
                "queued",
                "starting",
                "running",
            ]
            assert sum(isinstance(event, DriverStarted) for event in events) == 1
            for kind in (JobStarted, JobEnded, TrialTold):
                seen = Counter(getattr(e, "job", getattr(e, "trial", None)) for e in events if isinstance(e, kind))
                assert seen
                assert set(seen.values()) == {1}

        # What happens while nobody looks is found out by the next one: a driver dies, another is told to end.
        killed, cancelled, going = sweeps
        os.killpg(served.process.pid, signal.SIGKILL)
        served.process.communicate()
        dying = pids[killed]
        assert dying is not None
        os.killpg(dying, signal.SIGKILL)
        served = start(served.home, "--devices", "4")
        assert true_within(served, killed, "queued").startswith("queued its driver died")
        with served.client() as client:
            assert client.post(f"/v1/sweeps/{cancelled}/cancel").status_code == 202
        served = killed_and_started(served)
        assert served.wait_for(cancelled, "cancelled")["reason"] == ""
        assert served.wait_for(killed, "running")["progress"]["jobs_ended"] >= 1
        assert home.driver_pid(killed) not in (None, dying)
        assert home.driver_pid(going) == pids[going]

        # Stopped in order, it says what goes on without it; nothing it had started has ended with it.
        said = stop(served)
        assert f"{killed}, {going} go on without the service" in said
        assert home.driver_pid(going) == pids[going]
    finally:
        if served.process.poll() is None:
            served.process.kill()
            served.process.communicate()
        kill_drivers(home.path)


def test_a_driver_started_by_a_service_gives_its_lock_to_nobody(tmp_path: Path):
    """Ray's processes outlive a killed driver for a moment: they must not seem to drive the sweep."""
    with service_support.serving(tmp_path / "home", "--devices", "4") as served:
        home, sweep = Home(served.home), served.submit(LONG_SPEC)
        wait_for_jobs(home.path, sweep, 1)
        pid = home.driver_pid(sweep)
        assert pid is not None
        assert holders_of(home.path / "locks" / sweep) == {pid}
