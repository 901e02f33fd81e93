"""Heavy work in processes of its own: what takes too long or too much dies there, and the service goes on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.planning import Planner, Room, clear_scratch
from services.policy import Places
from sweeps.errors import InputError, SpecError
from sweeps.home import Home
from tests.services.service_support import TINY_SPEC
from tests.support import environment

NOWHERE = Places(None, None, frozenset())
HOSTILE = TINY_SPEC.replace("[fc1, fc2]", f"'{'.*' * 400}X'")
"""Some 10**9 ways to match four letters before the X is missed."""


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planner]:
    one = Planner(Home(tmp_path_factory.mktemp("home")), processes=1, limit_s=60)
    yield one
    one.close()


def plan(planner: Planner, text: str, *, devices: int = 4, workers: int | None = None):
    return asyncio.run(planner.plan(text, "tiny.yaml", NOWHERE, Room(devices, workers)))


def test_workers_are_as_many_as_there_are_devices_unless_the_spec_or_the_service_says_fewer(planner: Planner):
    auto = TINY_SPEC.replace("workers: 1", "workers: auto").replace("trials: 4", "trials: 64")
    assert plan(planner, auto).plan["workers"] == 4
    assert plan(planner, auto).devices == 4
    assert plan(planner, auto, workers=2).plan["workers"] == 2
    assert plan(planner, TINY_SPEC).plan["workers"] == 1
    shared = auto.replace("workers: auto", "workers: auto, gpus_per_worker: 0.5")
    assert plan(planner, shared).plan["workers"] == 8
    assert plan(planner, shared).devices == 4


def test_what_can_never_run_is_refused_with_its_line(planner: Planner):
    with pytest.raises(SpecError, match=r"tiny.yaml:11: compute.workers: required at most 4, .*found 5; write fewer"):
        plan(planner, TINY_SPEC.replace("workers: 1", "workers: 5"))
    with pytest.raises(SpecError, match=r"compute.gpus_per_worker: required at most 0, as there are; found 1"):
        plan(planner, TINY_SPEC.replace("workers: 1", "gpus_per_worker: 1"), devices=0)


def test_every_fault_of_a_spec_comes_back(planner: Planner):
    with pytest.raises(SpecError) as refused:
        plan(planner, TINY_SPEC.replace("steps: 4", "steps: 0").replace("trials: 4", "trials: -1"))
    assert [(fault.path, fault.line) for fault in refused.value.faults] == [("train.steps", 8), ("search.trials", 9)]


def test_what_takes_too_long_is_killed_and_the_next_is_planned(tmp_path: Path):
    hasty = Planner(Home(tmp_path), processes=1, limit_s=12)
    try:
        with pytest.raises(InputError, match="a plan must be made within 12 s, and was not: write fewer values"):
            plan(hasty, HOSTILE)
        assert plan(hasty, TINY_SPEC).plan["trials"] == 4
    finally:
        hasty.close()


def test_a_process_that_dies_is_told_of_and_replaced(planner: Planner, monkeypatch: pytest.MonkeyPatch):
    import services.planning

    monkeypatch.setattr(services.planning, "_plan", _die)
    with pytest.raises(InputError, match=r"its process died \(exit code -9\)"):
        plan(planner, TINY_SPEC)
    monkeypatch.undo()
    assert plan(planner, TINY_SPEC).plan["trials"] == 4


def test_what_fails_is_named(planner: Planner, monkeypatch: pytest.MonkeyPatch):
    import services.planning

    for name in ("_report", "_adapter"):
        monkeypatch.setattr(services.planning, name, _die)
    with pytest.raises(InputError, match=r"a report must be rendered in the memory .* died \(exit code -9\)"):
        asyncio.run(planner.report("one", "md"))
    with pytest.raises(InputError, match=r"an adapter must be packed up in the memory .* died \(exit code -9\)"):
        asyncio.run(planner.adapter("one", None, Path("x")))


def test_secrets_of_a_text_are_masked_where_it_is_planned(planner: Planner):
    comment = "# postgresql://ann:canary@host/db\n"
    assert plan(planner, TINY_SPEC + comment).text == TINY_SPEC + comment.replace("canary", "***")


KILLED = """
import asyncio, multiprocessing, os, signal, sys
from pathlib import Path
from services.planning import Planner
from sweeps.home import Home

if __name__ == "__main__":
    planner = Planner(Home(Path(sys.argv[1])), processes=2, limit_s=60)
    asyncio.run(planner.devices())
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_no_process_outlives_a_service_that_is_killed(tmp_path: Path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    said = tmp_path / "said"  # and no pipe, which whoever lives on would keep open
    with said.open("w") as file:
        done = subprocess.run([sys.executable, script, tmp_path], env=environment(), stdout=file, timeout=60)
    assert done.returncode == -9
    children = [int(word) for word in said.read_text().split()]
    assert len(children) >= 2
    for _ in range(200):
        if not (left := [child for child in children if alive(child)]):
            return
        time.sleep(0.05)
    raise AssertionError(f"{left} live on")


def alive(process: int) -> bool:
    """Whether a process runs; one that is dead and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_scratch_is_emptied_and_nothing_else(tmp_path: Path):
    clear_scratch(Home(tmp_path))
    (tmp_path / "scratch" / "tmpx" / "adapter").mkdir(parents=True)
    (tmp_path / "scratch" / "tmpx" / "adapter" / "weights").write_bytes(b"x")
    (tmp_path / "scratch" / "a.zip").write_bytes(b"PK")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "one").write_bytes(b"x")
    (tmp_path / "scratch" / "link").symlink_to(tmp_path / "kept")
    clear_scratch(Home(tmp_path))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["kept", "kept/one", "scratch"]


def _die(*_arguments: object) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
