"""Routes by hand: lists of sweeps, one sweep, and what may be done to it in each state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.store import OPEN
from sweeps.events import DriverStarted, QueueState, SweepExtended
from tests.services.api_support import Site, open_site, problem_of, trained
from tests.services.service_support import YAML

STATES: tuple[QueueState, ...] = (*OPEN, "paused", "finished", "failed", "cancelled")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with open_site(tmp_path) as one:
        yield one


def audited(site: Site) -> list[tuple[str, str, str]]:
    return [(one.user, one.action, one.sweep) for one in site.store.audit(limit=20) if one.action != "token create"]


# -- the list ----------------------------------------------------------------------------------------------------------


def listed(site: Site, token: str | None = "", **query: Any) -> list[str]:
    """All pages of a list, one after the other."""
    found: list[str] = []
    while True:
        answer = site.client(token).get("/v1/sweeps", params=query)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert len(page["sweeps"]) <= query.get("limit", 50)
        found += [one["sweep"] for one in page["sweeps"]]
        if page["next"] is None:
            return found
        query["after"] = page["next"]


@pytest.mark.parametrize("limit", [1, 3, 7, 8, 200])
def test_pages_have_every_sweep_once_latest_first(site: Site, limit: int):
    names = [site.enter(f"s{number}") for number in range(7)]
    # Two that came at the same moment are told apart by their ids.
    names += [site.enter(name, submitted_at_s=2e9) for name in ("twin-a", "twin-b")]
    assert listed(site, limit=limit) == names[::-1]


def test_a_sweep_that_comes_while_pages_are_turned_makes_no_gap_and_no_repeat(site: Site):
    names = [site.enter(f"s{number}") for number in range(4)]
    first = site.client().get("/v1/sweeps", params={"limit": 2}).json()
    site.enter("new")
    rest = listed(site, limit=2, after=first["next"])
    assert [one["sweep"] for one in first["sweeps"]] + rest == names[::-1]


def test_lists_are_filtered_by_state_owner_and_name(site: Site):
    for state in STATES:
        site.enter(f"in-{state}", state=state, owner="bob" if state in OPEN else "ann", name=f"n-{state}")
    assert listed(site, state=["queued", "paused"]) == ["in-paused", "in-queued"]
    assert listed(site, owner="ann", state="running") == []
    assert set(listed(site, owner="bob")) == {f"in-{state}" for state in OPEN}
    assert listed(site, name="n-failed", limit=1) == ["in-failed"]
    assert len(listed(site, site.token("bob"))) == len(OPEN)


@pytest.mark.parametrize(
    "query",
    [{"limit": 0}, {"limit": 201}, {"limit": "x"}, {"state": "odd"}, {"name": "a\0"}, {"owner": "../x"}]
    + [{"after": after} for after in ("", "x", "1", ":", "nan:a", "inf:a", "1:\0", "1:a/b", "-1:a", "1e999:a")],
)
def test_a_list_refuses_what_it_does_not_know(site: Site, query: dict[str, Any]):
    problem_of(site.client().get("/v1/sweeps", params=query), 422)


# -- one sweep ---------------------------------------------------------------------------------------------------------


def test_a_status_has_progress_and_the_best_so_far_while_it_runs(site: Site):
    site.enter("one", DriverStarted(resumed=False), *trained([0.5, 0.2, float("nan"), None]), state="running")
    body = site.client().get("/v1/sweeps/one").json()
    assert (body["state"], body["owner"], body["best"]) == ("running", "ann", 0.2)
    assert body["trials"]["waiting"] == 1
    assert body["progress"]["trials_ended"] == 3
    assert body["progress"]["trials_planned"] == 4
    assert (body["progress"]["jobs_ended"], body["progress"]["jobs_under_way"]) == (3, 1)
    assert (body["best_point"]["trial"], body["best_point"]["lr"]) == (1, 0.02)
    assert body["mlflow"]["url"] is None
    site.ledger.append("one", trained([None, None, None, 0.1])[-3:])
    assert site.client().get("/v1/sweeps/one").json()["best"] == 0.1


@pytest.mark.parametrize("reference", ["one", "tiny", "last"])
def test_a_sweep_goes_by_its_id_its_name_and_last(site: Site, reference: str):
    site.enter("one")
    assert site.client().get(f"/v1/sweeps/{reference}").json()["sweep"] == "one"


def test_a_queued_sweep_says_why_it_waits(site: Site):
    site.enter("busy", state="running", devices=2.0)
    site.enter("one")
    assert "free" in site.client().get("/v1/sweeps/one").json()["reason"]


@pytest.mark.parametrize("path", ["", "/events", "/logs", "/best", "/report", "/adapter", "/export?format=peft"])
def test_a_sweep_that_is_not_there_is_a_404_in_words(site: Site, path: str):
    detail = problem_of(site.client().get(f"/v1/sweeps/nobody{path}"), 404)["detail"]
    assert "must be named by its id, its name or `last`; found 'nobody'" in detail


def test_there_is_no_best_before_a_trial_has_finished(site: Site):
    site.enter("one", *trained([None]), state="running")
    detail = problem_of(site.client().get("/v1/sweeps/one/best"), 404)["detail"]
    assert detail == "a best point needs a finished trial; one is running and has none"


def test_the_best_point_is_the_status_own(site: Site):
    site.enter("one", *trained([0.5, 0.2]), state="finished")
    best = site.client().get("/v1/sweeps/one/best").json()
    assert best == site.client().get("/v1/sweeps/one").json()["best_point"]
    assert (best["value"], best["default_init"]["alpha"]) == (0.2, 4.0)


# -- changing ----------------------------------------------------------------------------------------------------------

# What becomes of a sweep in each state; None: it is refused, and nothing happens.
CHANGES: dict[str, dict[QueueState, QueueState | None]] = {
    "cancel": {
        "queued": "cancelled",
        "starting": "starting",
        "running": "running",
        "degraded": "degraded",
        "paused": "cancelled",
        "finished": "finished",
        "failed": "failed",
        "cancelled": "cancelled",
    },
    "resume": {
        "queued": None,
        "starting": None,
        "running": None,
        "degraded": None,
        "paused": "queued",
        "finished": None,
        "failed": "queued",
        "cancelled": "queued",
    },
    "extend": {
        "queued": "queued",
        "starting": None,
        "running": None,
        "degraded": None,
        "paused": "queued",
        "finished": "queued",
        "failed": "queued",
        "cancelled": "queued",
    },
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("action", list(CHANGES))
def test_what_may_be_done_to_a_sweep_in_each_state(site: Site, action: str, state: QueueState):
    site.enter("one", *trained([0.5]), state=state)
    before = site.snapshot()
    extension = {"json": {"trials": 8}} if action == "extend" else {}
    answer = site.client(site.token("ann")).post(f"/v1/sweeps/one/{action}", **extension)
    row, becomes = site.store.get("one"), CHANGES[action][state]
    if becomes is None:
        detail = problem_of(answer, 409)["detail"]
        assert f"one is {state}" in detail
    else:
        assert (answer.status_code, answer.json()["state"], row.state) == (202, becomes, becomes)
    at_rest = action == "cancel" and state in ("finished", "failed", "cancelled")
    if becomes is None or at_rest:
        assert {name: rows for name, rows in site.snapshot().items() if name != "tokens" and name != "audit"} == {
            name: rows for name, rows in before.items() if name != "tokens" and name != "audit"
        }
        assert audited(site) == [("ann", "submit", "one")]
        return
    assert audited(site)[0] == ("ann", action, "one")
    assert row.wanted == ("cancel" if action == "cancel" and state == becomes else "")
    assert row.trials == (8 if action == "extend" else 4)


def test_cancelling_again_is_no_new_wish(site: Site):
    site.enter("one", state="running")
    for _ in range(2):
        assert site.client().post("/v1/sweeps/one/cancel").status_code == 202
    assert [action for _, action, _ in audited(site)] == ["cancel", "submit"]


def test_who_did_what_is_in_the_sweeps_events_and_the_audit_log(site: Site):
    site.enter("one")
    site.client(site.token("ann")).post("/v1/sweeps/one/cancel")
    assert site.ledger.read("one")[-1].event.by == "ann"  # type: ignore[union-attr]
    entry = site.client().get("/v1/audit").json()["entries"][0]
    assert (entry["user"], entry["action"], entry["sweep"], entry["address"]) == ("ann", "cancel", "one", "testclient")
    assert len(entry["token"]) == 12


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"trials": 4}, "more than the 4"),
        ({"trials": -1}, "more than the 4"),
        ({"trials": 10**30}, "trials must be at most"),
        ({}, "body.trials"),
        ({"trials": "many"}, "body.trials"),
        ({"trials": 8, "more": 1}, "body.more"),
        ([], "body"),
    ],
)
def test_an_extension_must_be_a_larger_number(site: Site, body: Any, words: str):
    site.enter("one", *trained([0.5]), state="finished")
    assert words in problem_of(site.client().post("/v1/sweeps/one/extend", json=body), 422)["detail"]
    assert site.store.get("one").trials == 4


def test_what_is_no_json_is_refused_where_json_is_asked_for(site: Site):
    site.enter("one", *trained([0.5]), state="finished")
    for path in ("/v1/sweeps/one/extend", "/v1/translate"):
        media = {"Content-Type": "application/json"}
        assert "JSON" in problem_of(site.client().post(path, content="{", headers=media), 422)["detail"]
        assert "JSON" in problem_of(site.client().post(path, content=b"\xff", headers=media), 400)["detail"]
        problem_of(site.client().post(path, content="trials: 9", headers=YAML), 422)


def test_a_sweep_that_was_extended_before_is_extended_from_there(site: Site):
    site.enter("one", *trained([0.5]), SweepExtended(trials=8), state="finished", trials=8)
    assert (
        "more than the 8" in problem_of(site.client().post("/v1/sweeps/one/extend", json={"trials": 8}), 422)["detail"]
    )
    assert site.client().post("/v1/sweeps/one/extend", json={"trials": 9}).json()["progress"]["trials_planned"] == 9


def test_a_resumed_sweep_counts_among_its_owners_trials(tmp_path: Path):
    with open_site(tmp_path, user_trials=6) as site:
        site.enter("busy", owner="ann")
        site.enter("one", *trained([0.5]), state="failed")
        problem_of(site.client().post("/v1/sweeps/one/resume"), 429)
        problem_of(site.client().post("/v1/sweeps/one/extend", json={"trials": 6}), 429)
        assert site.store.get("one").state == "failed"
