"""A ledger whose PostgreSQL goes away: who waits for it, for how long, and that nothing is lost or entered twice."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from sweeps.errors import LedgerAwayError, StateError
from sweeps.events import DriverStarted, Event, JobEnded, JobStarted, SweepEnded, TrialAsked, TrialTold
from sweeps.ledger import Ledger
from sweeps.patience import PatientLedger
from sweeps.records import SweepRecord, read_sweep
from tests.conftest import FinishedSweep
from tests.postgres_support import kill, postgresql, start
from tests.support import SMALL_SPEC, command, environment, record_of, trajectory_of
from tests.sweeps.support import make_created, make_spec

SWEEP = "test-1"
STARTED: list[Event] = [
    JobStarted(job=0, trials=(0,), start=0, stop=10),
    JobStarted(job=1, trials=(1,), start=0, stop=10),
]

_PATIENCE_S = 300.0
"""Of the tests, with a machine that has other things to do."""


class Server:
    """A PostgreSQL that can be taken away and brought back."""

    def __init__(self, directory: Path, url: str) -> None:
        self._directory, self.url = directory, url
        self.up = True

    def kill(self) -> None:
        kill(self._directory)
        self.up = False

    def start(self) -> None:
        start(self._directory)
        self.up = True


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("pg")
    with postgresql(directory) as url:
        yield Server(directory, url)


@pytest.fixture
def server(one_server: Server) -> Server:
    """It is up, and its database empty."""
    if not one_server.up:
        one_server.start()
    engine = sa.create_engine(one_server.url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    return one_server


@contextlib.contextmanager
def ledger_at(url: str) -> Iterator[Ledger]:
    """A ledger with one sweep."""
    with Ledger(url) as ledger:
        ledger.create(SWEEP, make_created(make_spec()))
        yield ledger


def patient(
    ledger: Ledger,
    *,
    say: Callable[[str], None] = lambda text: None,
    hurried: Callable[[], bool] = lambda: False,
    patience_s: float = _PATIENCE_S,
) -> PatientLedger:
    return PatientLedger(ledger, say=say, hurried=hurried, patience_s=patience_s)


def entered(ledger: Ledger) -> list[Event]:
    """All events but the sweep's first."""
    return [record.event for record in ledger.read(SWEEP)][1:]


# -- waiting -----------------------------------------------------------------------------------------------------------


def test_who_is_patient_waits_for_the_server_and_goes_on(server: Server):
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "is away" in text:
            server.start()

    with ledger_at(server.url) as ledger:
        driver = patient(ledger, say=say)
        driver.append(SWEEP, STARTED[:1])
        server.kill()
        driver.append(SWEEP, STARTED[1:])
        server.kill()
        assert [record.event for record in driver.read(SWEEP)][1:] == STARTED
    assert ["is away" in text for text in said] == [True, False, True, False]
    assert "refused" in said[0] or "closed" in said[0] or "terminat" in said[0]
    assert sa.make_url(server.url).password not in "".join(said)


def test_who_is_not_patient_is_told_at_once_and_sees_why(server: Server):
    with ledger_at(server.url) as ledger:
        server.kill()
        with pytest.raises(
            LedgerAwayError, match=r"the ledger must be writable; postgresql://.* is not: .*nothing was"
        ):
            ledger.append(SWEEP, STARTED)
        with pytest.raises(LedgerAwayError, match="the ledger must be readable"):
            ledger.read(SWEEP)


def test_patience_has_an_end_and_is_not_begun_anew_by_the_next_call(server: Server):
    said: list[str] = []
    with ledger_at(server.url) as ledger:
        driver = patient(ledger, say=said.append, patience_s=1.0)
        server.kill()
        with pytest.raises(LedgerAwayError, match="the ledger must be writable"):
            driver.append(SWEEP, STARTED)
        with pytest.raises(LedgerAwayError, match="the ledger must be readable"):
            driver.read(SWEEP)
        assert len(said) == 1
        server.start()
        assert [record.event for record in driver.read(SWEEP)][1:] == []
        assert "is back" in said[-1]


def test_who_wants_an_end_need_not_wait(server: Server):
    hurry = threading.Event()
    with ledger_at(server.url) as ledger:
        driver = patient(ledger, say=lambda text: hurry.set(), hurried=hurry.is_set, patience_s=float("inf"))
        server.kill()
        with pytest.raises(LedgerAwayError, match="the ledger must be writable"):
            driver.append(SWEEP, STARTED)
        with pytest.raises(LedgerAwayError, match="the ledger must be writable"):
            driver.append(SWEEP, [SweepEnded(state="interrupted")])


@pytest.mark.parametrize(
    ("fault", "mended"),
    [
        ("ALTER TABLE events RENAME TO lost", "ALTER TABLE lost RENAME TO events"),
        ("ALTER ROLE lora PASSWORD 'another'", "ALTER ROLE lora PASSWORD '{password}'"),
        ("ALTER TABLE events ADD CONSTRAINT full_disk CHECK (seq < 2)", "ALTER TABLE events DROP CONSTRAINT full_disk"),
    ],
)
def test_what_does_not_pass_by_itself_is_not_waited_for(server: Server, fault: str, mended: str):
    said: list[str] = []
    password = sa.make_url(server.url).password
    admin = sa.create_engine(server.url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with ledger_at(server.url) as ledger, admin.connect() as connection:
        connection.execute(sa.text(fault))
        ledger.close()  # its connections
        try:
            with pytest.raises((StateError, sa.exc.IntegrityError), match=r"must be writable|full_disk") as caught:
                patient(ledger, say=said.append).append(SWEEP, STARTED)
            assert not isinstance(caught.value, LedgerAwayError)
        finally:
            connection.execute(sa.text(mended.format(password=password)))
    admin.dispose()
    assert said == []


def test_a_file_is_never_waited_for(tmp_path: Path):
    said: list[str] = []
    with ledger_at(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger:
        ledger.close()
        (tmp_path / "ledger.db").unlink()
        (tmp_path / "ledger.db").mkdir()
        with pytest.raises(StateError, match="the ledger must be writable") as caught:
            patient(ledger, say=said.append).append(SWEEP, STARTED)
    assert not isinstance(caught.value, LedgerAwayError)
    assert said == []


# -- answers that are lost ---------------------------------------------------------------------------------------------


class Proxy:
    """Passes a client's bytes to a server and back, until it is told to break the connection at a commit.

    Attributes:
        breaking: `request`: the next commit does not reach the server; `answer`: it does, and its answer is lost.
        broken: how many connections were broken.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.breaking: str | None = None
        self.broken = 0
        self._forgetting = False
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._go(self._accept)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            self._end(one)
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()

    def forget(self) -> None:
        """Ends every connection towards the client, and keeps it open towards the server."""
        self.broken += 1
        self._forgetting = True
        for client in self._sockets[::2]:
            self._end(client)

    def _go(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server_port))
            self._sockets += [client, server]
            lost = threading.Event()
            self._go(self._requests, client, server, lost)
            self._go(self._answers, client, server, lost)

    def _requests(self, client: socket.socket, server: socket.socket, lost: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if self.breaking and b"COMMIT" in data:
                    before, self.breaking = self.breaking, None
                    self.broken += 1
                    if before == "request":
                        break
                    lost.set()
                server.sendall(data)
        if not self._forgetting:
            self._end(client, server)

    def _answers(self, client: socket.socket, server: socket.socket, lost: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if lost.is_set():
                    break
                client.sendall(data)
        self._end(client, server)

    @staticmethod
    def _end(*sockets: socket.socket) -> None:
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    port = sa.make_url(server.url).port
    assert port is not None
    between = Proxy(port)
    yield between
    between.close()


def through(server: Server, proxy: Proxy) -> str:
    return sa.make_url(server.url).set(port=proxy.port).render_as_string(hide_password=False)


def test_a_commit_whose_answer_was_lost_is_not_entered_twice(server: Server, proxy: Proxy):
    with ledger_at(through(server, proxy)) as ledger:
        driver = patient(ledger)
        for number, event in enumerate(STARTED):
            proxy.breaking = "answer"
            driver.append(SWEEP, [event, DriverStarted(resumed=True)])
            assert proxy.broken == number + 1
        assert entered(ledger) == [STARTED[0], DriverStarted(resumed=True), STARTED[1], DriverStarted(resumed=True)]

        # The proxy does lose answers to commits that are carried out, which the impatient see.
        proxy.breaking = "answer"
        with pytest.raises(LedgerAwayError, match="the ledger must be writable"):
            ledger.append(SWEEP, [SweepEnded(state="paused")])
        assert entered(ledger)[4:] == [SweepEnded(state="paused")]


def test_a_commit_that_never_arrived_is_made_again(server: Server, proxy: Proxy):
    with ledger_at(through(server, proxy)) as ledger:
        driver = patient(ledger)
        proxy.breaking = "request"
        driver.append(SWEEP, STARTED)
        assert proxy.broken == 1
        assert entered(ledger) == STARTED


def test_equal_events_of_two_appends_are_both_entered_whatever_was_lost(server: Server, proxy: Proxy):
    with ledger_at(through(server, proxy)) as ledger:
        driver = patient(ledger)
        driver.append(SWEEP, STARTED[:1])
        for breaking in ("request", "answer"):
            proxy.breaking = breaking
            driver.append(SWEEP, STARTED[:1])
        assert entered(ledger) == 3 * STARTED[:1]


# -- the only one ------------------------------------------------------------------------------------------------------


def test_who_was_the_only_one_is_so_again_after_a_restart(server: Server):
    with Ledger(server.url) as ledger, Ledger(server.url) as other, ledger.database.alone("service") as alone:
        assert alone()
        server.kill()
        assert alone()  # nobody else is there either
        server.start()
        assert alone()
        with pytest.raises(StateError, match="one service uses a ledger at a time"), other.database.alone("service"):
            pass
        with other.database.alone("something else"):
            pass


def test_who_comes_too_late_after_a_restart_learns_that_another_has_it(server: Server):
    with Ledger(server.url) as ledger, Ledger(server.url) as other, ledger.database.alone("service") as alone:
        server.kill()
        server.start()
        with other.database.alone("service") as others:
            assert not alone()
            assert others()
        assert alone()


def test_a_session_of_our_own_that_the_server_kept_does_not_stand_in_the_way(server: Server, proxy: Proxy):
    with Ledger(through(server, proxy)) as ledger, ledger.database.alone("service") as alone:
        proxy.forget()  # to the server it looks as if the client were there still
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            assert alone()
            with Ledger(server.url) as other:
                try:
                    with other.database.alone("service"):
                        pass
                except StateError:
                    break
            assert time.monotonic() < deadline_s
    assert proxy.broken == 1


# -- a sweep -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(cwd: Path, server: Server, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`lora-sweeps` with its ledger at the server, its words in a file; ended if it is there still."""
    (cwd / "database-url").write_text(server.url)
    with (cwd / "words").open("w") as words:
        process = subprocess.Popen(
            command(*arguments),
            cwd=cwd,
            env=environment(LORA_SWEEPS_DATABASE_FILE=str(cwd / "database-url"), OMP_NUM_THREADS="1"),
            stdout=words,
            stderr=words,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait()


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str], cwd: Path) -> None:
    while not holds():
        assert process.poll() is None, (cwd / "words").read_text()
        time.sleep(0.05)


def words(cwd: Path, what: str) -> int:
    return (cwd / "words").read_text().count(what)


def jobs_ended(server: Server) -> int:
    with Ledger(server.url) as ledger:
        sweeps = ledger.sweeps()
        return sum(isinstance(r.event, JobEnded) for r in ledger.read(sweeps[-1].id)) if sweeps else 0


def record_at(server: Server) -> SweepRecord:
    with Ledger(server.url) as ledger:
        return read_sweep(ledger, ledger.find("last").id)


def assert_everything_once(server: Server) -> None:
    with Ledger(server.url) as ledger:
        events = [record.event for record in ledger.read(ledger.find("last").id)]
    ended = [event.job for event in events if isinstance(event, JobEnded)]
    assert sorted(ended) == list(range(len(ended)))
    asked = [event.trial for event in events if isinstance(event, TrialAsked)]
    assert sorted(asked) == list(range(len(asked)))
    told = [event.trial for event in events if isinstance(event, TrialTold)]
    assert sorted(told) == sorted(asked)


def test_a_server_that_is_killed_again_and_again_costs_a_sweep_nothing_but_time(
    tmp_path: Path, server: Server, finished: FinishedSweep
):
    (tmp_path / "small.yaml").write_text(SMALL_SPEC)
    with running(tmp_path, server, "run", "small.yaml") as process:
        ended = 0
        for time_away, seconds in ((1, 0), (2, 0), (3, 3)):
            wait_until(lambda: jobs_ended(server) > ended, process, tmp_path)  # noqa: B023  # called at once
            ended = jobs_ended(server)
            server.kill()
            wait_until(lambda: words(tmp_path, "is away") == time_away, process, tmp_path)  # noqa: B023
            time.sleep(seconds)
            server.start()
            wait_until(lambda: words(tmp_path, "is back") == time_away, process, tmp_path)  # noqa: B023
        assert process.wait() == 0, (tmp_path / "words").read_text()
    record = record_at(server)
    assert record.state == "finished"
    assert record.delivered >= record.tellable_seq
    assert_everything_once(server)
    # What was searched is what it is with a file that is never away.
    assert trajectory_of(record) == trajectory_of(record_of(finished.cwd))
    assert record.best is not None
    assert record.best.value == finished.output["best"]["value"]


def test_who_interrupts_a_driver_that_waits_is_not_kept_and_resumes_later(tmp_path: Path, server: Server):
    (tmp_path / "small.yaml").write_text(SMALL_SPEC)
    with running(tmp_path, server, "run", "small.yaml") as process:
        wait_until(lambda: jobs_ended(server) > 0, process, tmp_path)
        server.kill()
        wait_until(lambda: words(tmp_path, "is away") == 1, process, tmp_path)
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=_PATIENCE_S)
    said = (tmp_path / "words").read_text()
    assert code == 2, said
    assert "nothing was lost: free the disk or the database, then `lora-sweeps run --resume`" in said
    assert "Traceback" not in said
    server.start()
    with running(tmp_path, server, "run", "--resume", "last") as process:
        assert process.wait() == 0, (tmp_path / "words").read_text()
    assert record_at(server).state == "finished"
    assert_everything_once(server)
