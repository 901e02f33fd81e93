import math
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from sweeps import ledger as ledger_module
from sweeps.errors import StateError, SweepNotFoundError
from sweeps.events import Certified, DriverStarted, JobStarted, MemberDiverged, RungReported, TrialTold
from sweeps.ledger import Ledger
from tests.sweeps.support import make_created, make_spec

ROOT = Path(__file__).parents[2]
CREATED = make_created(make_spec())


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger.in_directory(tmp_path)
    ledger.create("s", CREATED)
    yield ledger
    ledger.close()


def job(number: int, *trials: int) -> JobStarted:
    return JobStarted(job=number, trials=trials, start=0, stop=1)


def in_process(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Runs code in another Python, where `ledger` is this directory's and `job` makes an event."""
    opening = (
        "import sys, time; from pathlib import Path\n"
        "from sweeps.ledger import Ledger; from sweeps.events import JobStarted\n"
        "ledger = Ledger.in_directory(Path(sys.argv[1]))\n"
        "def job(number, *trials): return JobStarted(job=number, trials=trials, start=0, stop=1)\n"
    )
    command = [sys.executable, "-c", opening + code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# -- what goes in comes out --------------------------------------------------------------------------------------------


def test_events_come_back_in_order_and_from_where_one_asks(ledger):
    ledger.append("s", [job(0), job(1)])
    ledger.append("s", [job(2)])
    records = ledger.read("s")
    assert [record.event for record in records] == [CREATED, job(0), job(1), job(2)]
    assert [record.seq for record in records] == sorted({record.seq for record in records})
    assert ledger.read("s", after=records[1].seq) == records[2:]
    assert ledger.read("s", after=records[-1].seq) == []


def test_a_stream_is_all_that_is_there_page_by_page(ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "_PAGE", 3)
    for number in range(8):  # pages of 3, 3, 3 and none
        ledger.append("s", [job(number)])
    assert list(ledger.stream("s")) == ledger.read("s")
    assert list(ledger.stream("s", after=ledger.read("s")[3].seq)) == ledger.read("s")[4:]
    assert ledger.read("s", limit=2) == ledger.read("s")[:2]
    stream = ledger.stream("s")
    first = next(stream)
    ledger.append("s", [job(8)])  # what comes while it is read is read too
    assert [first, *stream] == ledger.read("s")


def test_sweeps_do_not_see_each_other(ledger):
    ledger.create("t", CREATED)
    ledger.append("s", [job(0)])
    ledger.append("t", [job(1)])
    assert [record.event for record in ledger.read("s")] == [CREATED, job(0)]
    assert [record.event for record in ledger.read("t")] == [CREATED, job(1)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-320, 0.1 + 0.2])
def test_every_float_survives(ledger, value):
    ledger.append(
        "s",
        [
            RungReported(trial=0, job=0, step=1, metrics={"eval/loss": value}, train_losses=((1, value),)),
            MemberDiverged(trial=0, job=0, step=1, train_losses=((1, value),)),
            TrialTold(trial=0, state="finished", value=value),
            Certified(certificate={"losses": [value, 1.0], "max_ratio": value}),
        ],
    )
    _, rung, diverged, told, certified = (record.event for record in ledger.read("s"))
    found = [
        rung.metrics["eval/loss"],
        rung.train_losses[0][1],
        diverged.train_losses[0][1],
        told.value,
        certified.certificate["losses"][0],
        certified.certificate["max_ratio"],
    ]
    assert all(x == value or (math.isnan(x) and math.isnan(value)) for x in found)


def test_an_event_that_cannot_be_appended_takes_the_others_with_it(ledger):
    with pytest.raises(sa.exc.IntegrityError, match="FOREIGN KEY"):
        ledger.append("no such sweep", [job(0), job(1)])

    def broken():
        yield job(0)
        raise RuntimeError("no more events")

    with pytest.raises(RuntimeError, match="no more events"):
        ledger.append("s", broken())
    assert [record.event for record in ledger.read("s")] == [CREATED]


def test_a_sweep_that_exists_is_not_created_again(ledger):
    with pytest.raises(sa.exc.IntegrityError, match="UNIQUE"):
        ledger.create("s", CREATED)
    assert len(ledger.read("s")) == 1


# -- finding -----------------------------------------------------------------------------------------------------------


def test_a_sweep_is_found_by_id_then_by_name_then_as_the_last(tmp_path):
    ledger = Ledger.in_directory(tmp_path)
    for sweep, name in (("digits-1", "digits"), ("digits-2", "digits"), ("other-1", "other"), ("x", "digits-1")):
        ledger.create(sweep, CREATED.model_copy(update={"name": name}))
    assert ledger.find("digits-1").id == "digits-1"
    assert ledger.find("digits").id == "digits-2"
    assert ledger.find("other").id == "other-1"
    assert ledger.find("last").id == "x"
    assert [sweep.id for sweep in ledger.sweeps()] == ["digits-1", "digits-2", "other-1", "x"]
    with pytest.raises(SweepNotFoundError, match=r"found 'digit'; the latest are x, other-1, digits-2, digits-1"):
        ledger.find("digit")
    ledger.close()


def test_an_empty_ledger_says_how_to_begin(tmp_path):
    ledger = Ledger.in_directory(tmp_path)
    with pytest.raises(SweepNotFoundError, match="there are none yet: start one with `lora-sweeps run SPEC`"):
        ledger.find("last")
    ledger.close()


# -- several at once ---------------------------------------------------------------------------------------------------


def test_threads_lose_nothing_and_keep_their_transactions_whole(ledger):
    def write(writer: int) -> None:
        for n in range(20):
            ledger.append("s", [job(writer, n, 0), job(writer, n, 1), job(writer, n, 2)])

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = [record.event for record in ledger.read("s")][1:]
    assert len(events) == 4 * 20 * 3
    for i in range(0, len(events), 3):
        assert [event.trials[1] for event in events[i : i + 3]] == [0, 1, 2]
        assert len({(event.job, event.trials[0]) for event in events[i : i + 3]}) == 1
    for writer in range(4):
        assert [event.trials[0] for event in events if event.job == writer][::3] == list(range(20))


def test_processes_that_open_a_new_ledger_at_once_lose_nothing(tmp_path):
    code = (
        "from tests.sweeps.support import make_created, make_spec\n"
        "ledger.create(f's{sys.argv[2]}', make_created(make_spec()))\n"
        "for n in range(15): ledger.append(f's{sys.argv[2]}', [job(n, 0), job(n, 1)])"
    )
    processes = [in_process(code, tmp_path, writer) for writer in range(4)]
    for process in processes:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    ledger = Ledger.in_directory(tmp_path)
    for writer in range(4):
        events = [record.event for record in ledger.read(f"s{writer}")][1:]
        assert [(event.job, *event.trials) for event in events] == [(n, k) for n in range(15) for k in range(2)]
    ledger.close()


def test_new_ledgers_can_be_opened_by_many_threads_at_once(tmp_path):
    for attempt in range(10):
        home, faults, barrier = tmp_path / str(attempt), [], threading.Barrier(6)
        home.mkdir()

        def open_ledger(home: Path = home, faults: list[Exception] = faults, barrier=barrier) -> None:
            barrier.wait()
            try:
                Ledger.in_directory(home).close()
            except StateError as error:
                faults.append(error)

        threads = [threading.Thread(target=open_ledger) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []


def test_a_writer_that_is_killed_leaves_whole_transactions(ledger, tmp_path):
    code = (
        "print('ready', flush=True)\nn = 0\nwhile True:\n    ledger.append('s', [job(n, k) for k in range(20)]); n += 1"
    )
    for _ in range(3):
        before = len(ledger.read("s"))
        process = in_process(code, tmp_path)
        assert process.stdout is not None
        process.stdout.readline()
        while len(ledger.read("s")) < before + 60:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        events = [record.event for record in ledger.read("s")][before:]
        assert len(events) % 20 == 0
        assert [(event.job, *event.trials) for event in events] == [
            (n, k) for n in range(len(events) // 20) for k in range(20)
        ]
    ledger.append("s", [DriverStarted(resumed=True)])
    assert ledger.read("s")[-1].event == DriverStarted(resumed=True)


# -- a state that cannot be used ---------------------------------------------------------------------------------------


def test_the_files_are_readable_by_their_owner_only(tmp_path):
    before = os.umask(0o022)
    try:
        ledger = Ledger.in_directory(tmp_path)
        ledger.create("s", CREATED)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert set(modes) >= {"ledger.db", "ledger.db-wal"}
    assert set(modes.values()) == {0o600}
    ledger.close()


def test_what_was_appended_is_on_disk_before_append_returns(ledger):
    with ledger.database.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


@pytest.mark.parametrize("obstacle", ["a missing directory", "a directory in its place", "another file in its place"])
def test_a_file_that_is_no_ledger_is_refused_by_name(tmp_path, obstacle):
    home = tmp_path
    match obstacle:
        case "a missing directory":
            home = tmp_path / "missing"
        case "a directory in its place":
            (home / "ledger.db").mkdir()
        case _:
            (home / "ledger.db").write_bytes(b"this is no database, but it is long enough to be read as one" * 20)
    with pytest.raises(StateError, match=r"the ledger must be a .*ledger\.db cannot: ") as caught:
        Ledger.in_directory(home)
    assert "\n" not in str(caught.value)


def test_a_damaged_ledger_is_told_when_it_is_read_or_written(tmp_path):
    ledger = Ledger.in_directory(tmp_path)
    ledger.create("s", CREATED)
    for n in range(50):
        ledger.append("s", [job(n, *range(100))])
    ledger.close()
    path = tmp_path / "ledger.db"
    content = bytearray(path.read_bytes())
    content[8192:] = b"\xff" * (len(content) - 8192)
    path.write_bytes(content)
    ledger = Ledger.in_directory(tmp_path)
    with pytest.raises(StateError, match=r"the ledger must be readable; .* is not: database disk image is malformed"):
        ledger.read("s")
    with pytest.raises(StateError, match=r"the ledger must be (read|writ)able; .* is not: "):
        ledger.append("s", [job(0)])
    ledger.close()


def test_an_event_of_another_version_is_told(ledger, tmp_path):
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute(
            "INSERT INTO events (sweep, kind, at_s, payload) VALUES ('s', 'sang', 0, ?)", ['{"kind": "sang"}']
        )
    connection.close()
    with pytest.raises(StateError, match=r"events that this version knows; event 2 of .* is none"):
        ledger.read("s")


def test_a_full_disk_is_told_and_loses_nothing(ledger):
    with ledger.database.reading() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StateError, match=r"is not: database or disk is full; nothing was lost: free the disk"):
        ledger.append("s", [job(n, *range(1000)) for n in range(100)])
    assert [record.event for record in ledger.read("s")] == [CREATED]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+nothing://user:hunter2@localhost/sweeps",
        "nothing://user:hunter2@localhost/sweeps",
        "postgresql+nothing://localhost/sweeps?user=me&password=hunter2",
        "user:hunter2@localhost",
    ],
)
def test_no_message_has_a_password(url):
    with pytest.raises(StateError, match="the ledger must be a database that can be written") as caught:
        Ledger(url)
    assert "hunter2" not in str(caught.value)
