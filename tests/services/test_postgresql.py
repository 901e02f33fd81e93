"""A service whose ledger is a PostgreSQL, as several machines share it."""

from __future__ import annotations

import time
from pathlib import Path

import sqlalchemy as sa

from services.store import Store
from sweeps.events import JobEnded
from sweeps.ledger import Ledger
from tests.postgres_support import postgresql, restart
from tests.services.service_support import LONG_SPEC, serving
from tests.support import free_port, run_cli


def test_a_sweep_runs_with_its_ledger_in_postgresql_and_the_password_stays_where_it_was(tmp_path: Path):
    with postgresql(tmp_path / "pg") as url:
        password = sa.make_url(url).password
        assert password is not None
        file = tmp_path / "database-url"
        file.write_text(url + "\n")
        file.chmod(0o600)
        home = tmp_path / "home"
        with serving(home, "--devices", "1", LORA_SWEEPS_DATABASE_FILE=str(file)) as served:
            sweep = served.submit()
            status = served.wait_for(sweep, "finished", "failed", "paused")
            assert (status["state"], status["reason"]) == ("finished", "")
            assert status["trials"]["finished"] == 4
        assert not (home / "ledger.db").exists()
        with Ledger(url) as ledger:
            assert Store(ledger).get(sweep).state == "finished"
            assert all(password not in record.event.model_dump_json() for record in ledger.read(sweep))
        written = [path for path in home.rglob("*") if path.is_file()]
        assert len(written) > 5
        assert not [path for path in written if password.encode() in path.read_bytes()]


def test_a_service_without_its_database_says_so(tmp_path: Path):
    url = f"postgresql://lora:canary-password@127.0.0.1:{free_port()}/postgres"
    done = run_cli("serve", "--port", "0", cwd=tmp_path, LORA_SWEEPS_DATABASE=url)
    assert done.returncode == 2
    assert "the ledger must be a database that can be written" in done.stderr
    assert "canary-password" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_database_that_is_restarted_under_a_running_sweep_costs_it_nothing_but_time(tmp_path: Path):
    with postgresql(tmp_path / "pg") as url:
        settings = {"LORA_SWEEPS_DATABASE": url}
        with serving(tmp_path / "home", "--devices", "1", **settings) as served:
            # Another service on the same database, with a state directory of its own, would start its drivers too.
            other = {"LORA_SWEEPS_HOME": str(tmp_path / "other"), **settings}
            done = run_cli("serve", "--port", "0", cwd=tmp_path, timeout_s=60, **other)
            assert done.returncode == 2
            assert "one service uses a ledger at a time" in done.stderr

            sweep = served.submit(LONG_SPEC)
            served.wait_for(sweep, "running")
            jobs = ended_jobs(url, sweep, more_than=0)
            restart(tmp_path / "pg")
            assert ended_jobs(url, sweep, more_than=jobs) > jobs
            state = served.wait_for(sweep, "running", "failed", "paused")
            assert (state["state"], state["reason"]) == ("running", "")
        with Ledger(url) as ledger:
            started = [r.event.job for r in ledger.read(sweep) if isinstance(r.event, JobEnded)]
        assert len(started) == len(set(started))


def ended_jobs(url: str, sweep: str, *, more_than: int) -> int:
    """How many jobs have ended, once they are more than so many."""
    deadline_s = time.monotonic() + 180
    while time.monotonic() < deadline_s:
        with Ledger(url) as ledger:
            count = sum(isinstance(record.event, JobEnded) for record in ledger.read(sweep))
        if count > more_than:
            return count
        time.sleep(0.5)
    raise AssertionError(f"{more_than} jobs have ended, and no more")
