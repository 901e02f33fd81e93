"""The service's tables, in SQLite and in PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.auth import make_token
from services.store import AuditEntry, KeyTakenError, Store, Submission
from sweeps.errors import SweepNotFoundError
from sweeps.events import QueueMoved, SweepCreated
from sweeps.ledger import Ledger
from tests.postgres_support import postgresql


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "sqlite":
        yield f"sqlite:///{directory / 'ledger.db'}"
    else:
        with postgresql(directory) as found:
            yield found


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    with Ledger(url) as one:
        yield one


@pytest.fixture
def store(ledger: Ledger) -> Store:
    return Store(ledger)


CREATED = SweepCreated(
    name="x", spec={}, spec_text="", source="x", plan={}, tracking_uri="", experiment="x", lanes=1, pack=1
)
NUMBERS = iter(range(1, 10_000))


def submitted(store: Store, **changes: object) -> Submission:
    number = next(NUMBERS)
    one = Submission(f"s-{number:05}", "ann", "s", False, 0, 1.0, 4, submitted_at_s=1e9 + number)
    one = replace(one, **changes)
    store.submit(one, CREATED, AuditEntry("ann", "submit", one.sweep))
    return store.get(one.sweep)


def test_what_was_submitted_is_queued_in_the_store_and_in_the_ledger(store: Store, ledger: Ledger):
    row = submitted(store)
    assert (row.state, row.owner) == ("queued", "ann")
    assert [record.event.kind for record in ledger.read(row.sweep)] == ["sweep_created", "queue_moved"]
    assert store.audit(limit=1)[0].sweep == row.sweep


def test_a_sweep_moves_only_from_where_its_mover_saw_it(store: Store, ledger: Ledger):
    row = submitted(store)
    assert store.move(row, "starting")
    assert not store.move(row, "cancelled")
    assert store.get(row.sweep).state == "starting"
    moves = [record.event for record in ledger.read(row.sweep) if isinstance(record.event, QueueMoved)]
    assert [move.state for move in moves] == ["queued", "starting"]


def test_of_many_movers_one_succeeds(store: Store):
    row = submitted(store)
    done: list[bool] = []
    threads = [threading.Thread(target=lambda: done.append(store.move(row, "starting"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [False] * 7 + [True]


def test_an_idempotency_key_is_taken_once_by_each_user(store: Store):
    first = submitted(store, key="k1")
    with pytest.raises(KeyTakenError, match="'k1' was used before"):
        submitted(store, key="k1")
    assert store.by_key("ann", "k1") == first
    assert submitted(store, key="k1", owner="bob").owner == "bob"
    assert submitted(store).key is None


def test_pages_follow_one_another_without_gap_or_overlap(store: Store):
    rows = [submitted(store, owner="pat") for _ in range(7)]
    seen, before = [], None
    while page := store.page(owner="pat", before=before, limit=3):
        seen += page
        before = (page[-1].submitted_at_s, page[-1].sweep)
    assert seen == rows[::-1]


def test_a_viewer_sees_their_own_and_what_is_shared(store: Store):
    own, shared = submitted(store, owner="eve"), submitted(store, owner="dan", shared=True)
    hidden = submitted(store, owner="dan")
    seen = {row.sweep for row in store.page(viewer="eve", limit=1000)}
    assert {own.sweep, shared.sweep} <= seen
    assert hidden.sweep not in seen


def test_device_time_is_summed_by_user(store: Store):
    for used in (10.0, 20.0):
        row = submitted(store, owner="sue")
        store.note(row, used_device_s=used, counted_s=5e8)
    assert store.used_since(4e8)["sue"] == 30.0
    assert "sue" not in store.used_since(6e8)


def test_a_revoked_or_expired_token_is_no_longer_valid(store: Store):
    made, audit = make_token(), AuditEntry("root", "token create")
    store.add_token(made, user="ann", scope="read", note="", expires_at_s=2e9, audit=audit)
    row = store.token(made.id)
    assert row is not None
    assert row.valid(1e9)
    assert not row.valid(2e9)
    assert store.revoke_token(made.id, audit)
    assert not store.revoke_token(made.id, audit)
    row = store.token(made.id)
    assert row is not None
    assert not row.valid(1e9)
    assert made.text not in repr(store.tokens())


def test_a_sweep_that_is_not_there_is_not_found(store: Store):
    with pytest.raises(SweepNotFoundError, match="found 'nope'"):
        store.get("nope")


def test_two_that_open_a_new_database_at_once_both_get_their_tables(tmp_path: Path):
    failures: list[BaseException] = []

    def open_it() -> None:
        try:
            with Ledger(f"sqlite:///{tmp_path / 'new.db'}") as ledger:
                Store(ledger).counts()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
