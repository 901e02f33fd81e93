"""A service whose ledger is a PostgreSQL, as several machines share it."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from services.store import Store
from sweeps.ledger import Ledger
from tests.postgres_support import free_port, postgresql
from tests.services.service_support import serving
from tests.support import run_cli


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
