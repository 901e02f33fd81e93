"""Every route by hand: what it answers, what it refuses, and in which words."""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ruamel.yaml
from prometheus_client.parser import text_string_to_metric_families

from services.planning import BusyError
from services.store import OPEN
from sweeps.errors import InputError, StateError
from sweeps.events import DriverStarted, QueueState, SweepExtended
from tests.services.api_support import Site, open_site, posted, problem_of, trained
from tests.services.service_support import TINY_SPEC, YAML
from tests.support import ROOT, run_json

STATES: tuple[QueueState, ...] = (*OPEN, "paused", "finished", "failed", "cancelled")


def loaded(text: Any) -> Any:
    """A YAML text or file as plain objects."""
    return ruamel.yaml.YAML(typ="safe").load(text)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with open_site(tmp_path) as one:
        yield one


def audited(site: Site) -> list[tuple[str, str, str]]:
    return [(one.user, one.action, one.sweep) for one in site.store.audit(limit=20) if one.action != "token create"]


# -- the service itself ------------------------------------------------------------------------------------------------


def test_healthz_says_ok_to_everybody(site: Site):
    answer = site.client(None).get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "reason": ""})


def test_readyz_says_whether_the_queue_is_looked_after(site: Site):
    assert site.client().get("/readyz").json() == {"status": "ok", "reason": ""}
    site.service.looked_at_s = float("-inf")
    answer = site.client().get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["status"] == "not ready"
    assert "nobody has looked after the queue" in answer.json()["reason"]


def test_readyz_says_that_the_database_is_away(site: Site, monkeypatch: pytest.MonkeyPatch):
    def away() -> dict[str, int]:
        raise StateError("the ledger must be readable; postgresql://ann:hunter2@host/db is not")

    monkeypatch.setattr(site.store, "counts", away)
    answer = site.client().get("/readyz")
    assert answer.status_code == 503
    assert "must be readable" in answer.json()["reason"]
    assert "hunter2" not in answer.text


def test_metrics_are_prometheus_and_count_by_route(site: Site):
    site.enter("one", state="running")
    site.enter("two")
    for sweep in ("one", "two", "none"):
        site.client().get(f"/v1/sweeps/{sweep}")
    for method in ("FOO", "BAR"):
        site.client(None).request(method, "/nowhere")
    answer = site.client().get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {family.name: family for family in text_string_to_metric_families(answer.text)}
    states = {sample.labels["state"]: sample.value for sample in found["lora_sweeps_sweeps"].samples}
    assert states == {"running": 1, "queued": 1}
    requests = {
        tuple(sample.labels[name] for name in ("method", "route", "status")): sample.value
        for sample in found["lora_sweeps_http_requests"].samples
        if sample.name.endswith("_total")
    }
    assert requests["GET", "/v1/sweeps/{sweep}", "200"] == 2
    assert requests["GET", "/v1/sweeps/{sweep}", "404"] == 1
    assert requests["other", "none", "404"] == 2
    assert {"lora_sweeps_event_streams", "lora_sweeps_supervisor_trouble"} <= set(found)


def test_the_openapi_document_is_served(site: Site):
    assert site.client().get("/openapi.json").json() == site.app.openapi()


# -- submitting --------------------------------------------------------------------------------------------------------


def test_a_spec_is_planned_and_queued(site: Site):
    answer = posted(site.client(site.token("ann")), source="tiny.yaml")
    assert answer.status_code == 201
    body = answer.json()
    assert answer.headers["location"] == f"/v1/sweeps/{body['sweep']}"
    assert (body["state"], body["plan"]["trials"]) == ("queued", 4)
    row = site.store.get(body["sweep"])
    assert (row.owner, row.name, row.shared, row.priority) == ("ann", "tiny", False, 0)
    created = site.ledger.read(row.sweep)[0].event
    assert (created.spec_text, created.source) == (TINY_SPEC, "tiny.yaml")  # type: ignore[union-attr]
    assert audited(site) == [("ann", "submit", row.sweep)]


def test_a_spec_may_be_json(site: Site):
    spec = json.dumps(loaded(TINY_SPEC))
    answer = site.client().post("/v1/sweeps", content=spec, headers={"Content-Type": "application/json"})
    assert answer.status_code == 201, answer.text
    yaml = posted(site.client()).json()["plan"]
    assert answer.json()["plan"] == yaml


def test_name_priority_and_sharing_are_taken_from_the_query(site: Site):
    body = posted(site.client(), name="other.name", priority=7, shared=True).json()
    row = site.store.get(body["sweep"])
    assert row.sweep.startswith("other.name-")
    assert (row.name, row.priority, row.shared) == ("other.name", 7, True)


def test_the_same_idempotency_key_is_the_same_sweep(site: Site):
    ann, bob = site.client(site.token("ann")), site.client(site.token("bob"))
    key = {"Idempotency-Key": "monday/1"}
    first, again = posted(ann, headers=key), posted(ann, headers=key)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert site.planner.planned == 1
    detail = problem_of(posted(ann, TINY_SPEC + "\n", headers=key), 422)["detail"]
    assert first.json()["sweep"] in detail
    problem_of(posted(ann, headers=key, name="renamed"), 422)
    assert posted(bob, headers=key).json()["sweep"] != first.json()["sweep"]
    assert len(site.store.page(limit=10)) == 2


def test_a_refused_spec_does_not_use_its_idempotency_key_up(site: Site):
    key = {"Idempotency-Key": "k"}
    problem_of(posted(site.client(), "name: x\n", headers=key), 422)
    assert posted(site.client(), headers=key).status_code == 201


@pytest.mark.parametrize("path", ["/v1/sweeps", "/v1/plan"])
def test_every_fault_of_a_spec_is_told_with_its_path_and_line(site: Site, path: str):
    spec = TINY_SPEC.replace("adamw", "adamv").replace("trials: 4", "trials: -4")
    body = problem_of(site.client().post(path, content=spec, params={"source": "my.yaml"}, headers=YAML), 422)
    lines = {name: number for number, name in enumerate(TINY_SPEC.splitlines(), start=1)}
    line = {key: next(n for text, n in lines.items() if text.startswith(key)) for key in ("train", "search")}
    faults = {fault["path"]: fault for fault in body["faults"]}
    assert {name: fault["line"] for name, fault in faults.items()} == {
        "train.optimizer": line["train"],
        "search.trials": line["search"],
    }
    assert faults["train.optimizer"]["found"] == "'adamv'"
    assert faults["train.optimizer"]["hint"] == "did you mean 'adam'?"
    assert f"my.yaml:{line['train']}: train.optimizer: required" in body["detail"]
    assert site.store.page(limit=1) == []


@pytest.mark.parametrize("media", ["application/xml", "multipart/form-data; boundary=x", "application/octet-stream"])
def test_what_is_neither_yaml_nor_json_is_refused(site: Site, media: str):
    answer = site.client().post("/v1/sweeps", content=TINY_SPEC, headers={"Content-Type": media})
    assert problem_of(answer, 415)["detail"].startswith("a spec must be sent as application/yaml or application/json")


HOSTILE = {
    "nothing": b"",
    "no UTF-8": b"\xff\xfe",
    "cut off": b"{",
    "a list": b"[]",
    "NUL": b"name: \x00",
    "no anchor": b"a: *b",
    "a Python object": b"!!python/object/apply:os.system [ls]",
    "deep YAML": b"- " * 5000,
    "deep JSON": b"[" * 20_000,
    "a circle": b"a: &a [*a, *a]",
    "half a character": b'{"name": "x", "tracking": {"experiment": "\\ud800"}}',
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_no_body_brings_the_service_down(site: Site, body: bytes):
    for path in ("/v1/sweeps", "/v1/plan"):
        problem_of(site.client().post(path, content=body, headers=YAML), 422)
    assert site.store.page(limit=1) == []


def test_text_that_is_no_unicode_is_refused_wherever_it_stands(site: Site):
    spec = loaded(TINY_SPEC) | {"tracking": {"experiment": "a\ud800"}}
    answer = site.client().post("/v1/sweeps", content=json.dumps(spec), headers=YAML)
    problem_of(answer, 422)


@pytest.mark.parametrize(
    ("limit", "words", "status"),
    [(3, "could never run here", 422), (6, "wait for one, or cancel one", 429)],
)
def test_a_users_trials_are_limited(tmp_path: Path, limit: int, words: str, status: int):
    with open_site(tmp_path, user_trials=limit) as site:
        first = posted(site.client())
        answer = first if limit < 4 else posted(site.client())
        assert words in problem_of(answer, status)["detail"]
        assert len(site.store.page(limit=9)) == (limit >= 4)


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


# -- logs --------------------------------------------------------------------------------------------------------------


def write_log(site: Site, sweep: str, content: bytes) -> None:
    path = site.service.home.logs(sweep)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def test_a_log_that_is_not_there_yet_is_empty(site: Site):
    site.enter("one")
    assert site.client().get("/v1/sweeps/one/logs").json() == {"text": "", "offset": 0, "next": 0}


def followed(site: Site, sweep: str) -> bytes:
    """The log from its beginning, part by part."""
    found, offset = b"", 0
    while True:
        part = site.client().get(f"/v1/sweeps/{sweep}/logs", params={"offset": offset}).json()
        assert part["offset"] == offset
        if part["next"] == offset:
            return found
        found, offset = found + part["text"].encode(), part["next"]


def test_a_followed_log_is_the_file(site: Site):
    site.enter("one")
    content = "".join(f"line {number} äöü\n" for number in range(40_000)).encode()
    write_log(site, "one", content + b"not ended")
    assert followed(site, "one") == content
    write_log(site, "one", content + b"not ended, but now\n")
    assert followed(site, "one") == content + b"not ended, but now\n"


def test_without_an_offset_a_log_ends_with_its_last_line_and_begins_with_a_whole_one(site: Site):
    site.enter("one")
    content = "".join(f"line {number}\n" for number in range(60_000)).encode()
    write_log(site, "one", content)
    part = site.client().get("/v1/sweeps/one/logs").json()
    assert part["next"] == len(content)
    assert content[part["offset"] :] == part["text"].encode()
    assert content[part["offset"] - 1 : part["offset"]] == b"\n"
    assert len(part["text"]) <= 256 * 1024


def test_a_log_has_no_secret_wherever_one_begins_to_read(site: Site):
    site.enter("one")
    line = b"delivering to postgresql://ann:canary-7311@host/db?password=canary-7311\n"
    content = b"before\n" + line + b"after\n"
    write_log(site, "one", content)
    for offset in range(len(content)):
        part = site.client().get("/v1/sweeps/one/logs", params={"offset": offset})
        assert not any(piece in part.text for piece in ("canary", "anary-", "-7311", "7311", "311"))
        assert part.json()["next"] == len(content)


def test_a_line_beyond_all_bounds_is_got_over(site: Site):
    site.enter("one")
    content = b"a" * 700_000 + b"\nend\n"
    write_log(site, "one", content)
    offset, texts = 0, []
    while (part := site.client().get("/v1/sweeps/one/logs", params={"offset": offset}).json())["next"] > offset:
        offset, texts = part["next"], [*texts, part["text"]]
    assert offset == len(content)
    assert texts[0] == "a" * 256 * 1024
    assert texts[-1] == "end\n"


def test_an_offset_beyond_the_end_is_the_end(site: Site):
    site.enter("one")
    write_log(site, "one", b"a\n")
    assert site.client().get("/v1/sweeps/one/logs?offset=99").json() == {"text": "", "offset": 2, "next": 2}
    problem_of(site.client().get("/v1/sweeps/one/logs?offset=-1"), 422)


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


# -- results -----------------------------------------------------------------------------------------------------------


def test_a_report_comes_as_json_markdown_and_html(site: Site):
    site.enter("one", *trained([0.5, 0.2]), state="finished")
    answers = {
        form: site.client().get("/v1/sweeps/one/report", params={"format": form}) for form in ("json", "md", "html")
    }
    media = {form: answer.headers["content-type"] for form, answer in answers.items()}
    assert media == {
        "json": "application/json",
        "md": "text/markdown; charset=utf-8",
        "html": "text/html; charset=utf-8",
    }
    assert answers["json"].json()["sweep"] == "one"
    assert answers["md"].text.startswith("# Collapse report: one")
    assert answers["html"].text.startswith("<!doctype html>")
    assert site.client().get("/v1/sweeps/one/report").json() == answers["json"].json()
    problem_of(site.client().get("/v1/sweeps/one/report?format=pdf"), 422)


def test_a_report_in_html_can_run_nothing(site: Site):
    site.enter("one", *trained([0.5]), state="finished")
    policy = site.client().get("/v1/sweeps/one/report?format=html").headers["content-security-policy"]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    assert rules["default-src"] == ["'none'"]
    assert set(rules["sandbox"]) <= {"allow-popups"}
    assert "script-src" not in rules


FORMS = ("peft", "trl", "axolotl", "llamafactory", "unsloth", "hf_trainer", "loralib")


@pytest.mark.parametrize("form", FORMS)
def test_the_best_point_is_exported_for_every_trainer(site: Site, form: str):
    from sweeps.export import FORMATS

    assert set(FORMS) == set(FORMATS)
    site.enter("one", *trained([0.5, 0.2]), state="finished")
    body = site.client().get("/v1/sweeps/one/export", params={"format": form}).json()
    assert (body["sweep"], body["trial"], body["format"], body["alpha"]) == ("one", 1, form, 4.0)
    assert body["files"]
    assert str(site.home) not in json.dumps(body)
    zipped = site.client().get("/v1/sweeps/one/export", params={"format": form}, headers={"Accept": "application/zip"})
    assert zipped.headers["content-type"] == "application/zip"
    assert zipped.headers["content-disposition"] == f'attachment; filename="one-{form}.zip"'
    with zipfile.ZipFile(io.BytesIO(zipped.content)) as archive:
        assert {name: archive.read(name).decode() for name in archive.namelist()} == body["files"]


def test_an_export_may_have_another_alpha_and_another_trial(site: Site):
    site.enter("one", *trained([0.5, 0.2]), state="finished")
    get = site.client().get
    assert get("/v1/sweeps/one/export", params={"format": "peft", "trial": 0}).json()["trial"] == 0
    for alpha, number in (("16", 16.0), ("8*rank", 16.0)):
        body = get("/v1/sweeps/one/export", params={"format": "peft", "alpha": alpha}).json()
        assert (body["alpha"], body["init_scale"]) == (number, 0.5)
        assert json.loads(body["files"]["adapter_config.json"])["lora_alpha"] == number
        assert any(each["name"] == "init_scale" for each in body["leftovers"])


@pytest.mark.parametrize(
    "query",
    [{}, {"format": "pef"}, {"format": "peft", "trial": 99}, {"format": "peft", "trial": -1}]
    + [
        {"format": "peft", "alpha": alpha}
        for alpha in ("", "0", "-1", "nan", "inf", "1e999", "rank*rank", "__import__('os')", "9" * 65, "2*\0", "√rank")
    ],
)
def test_an_export_refuses_what_it_cannot_say(site: Site, query: dict[str, Any]):
    site.enter("one", *trained([0.5, 0.2]), state="finished")
    problem_of(site.client().get("/v1/sweeps/one/export", params=query), 422)


def test_there_is_no_export_before_a_trial_has_finished(site: Site):
    site.enter("one", *trained([None]), state="running")
    answer = site.client().get("/v1/sweeps/one/export?format=peft")
    assert "an export needs a finished trial" in problem_of(answer, 422)["detail"]


def test_an_adapter_leaves_nothing_behind(site: Site, monkeypatch: pytest.MonkeyPatch):
    site.enter("one", *trained([0.5]), state="finished")
    answer = site.client().get("/v1/sweeps/one/adapter")
    assert (answer.status_code, answer.content) == (200, b"PK")
    assert answer.headers["content-disposition"] == 'attachment; filename="one-adapter.zip"'

    async def broken(sweep: str, trial: int | None, archive: Path) -> None:
        archive.write_bytes(b"half")
        raise InputError("no adapter is kept of this trial")

    monkeypatch.setattr(site.planner, "adapter", broken)
    assert "no adapter is kept" in problem_of(site.client().get("/v1/sweeps/one/adapter"), 422)["detail"]
    assert list((site.home / "scratch").iterdir()) == []


# -- specs -------------------------------------------------------------------------------------------------------------


def test_a_plan_submits_nothing(site: Site):
    before = site.snapshot()
    body = site.client().post("/v1/plan", content=TINY_SPEC, headers=YAML).json()
    assert (body["trials"], body["seconds"]) == (4, None)
    spec = json.dumps(loaded(TINY_SPEC))
    media = {"Content-Type": "application/json"}
    assert site.client().post("/v1/plan", content=spec, headers=media).json() == body
    timed = site.client().post("/v1/plan?timed=true", content=TINY_SPEC, headers=YAML).json()
    assert timed["seconds"] == pytest.approx(0.001 * timed["member_steps"] / timed["workers"])
    assert site.snapshot() == before


TRANSLATIONS: list[tuple[dict[str, Any], str]] = [
    ({"rank": 8, "alpha": 16, "lr": 2e-4, "to_alpha": 32}, "--rank 8 --alpha 16 --lr 2e-4 --to-alpha 32"),
    (
        {"optimizer": "sgd", "rank": 8, "alpha": "2*rank", "lr": 0.1, "lr_ratio": 4, "to_init_scale": 1},
        "--optimizer sgd --rank 8 --alpha 2*rank --lr 0.1 --lr-ratio 4 --to-init-scale 1",
    ),
    (
        {"rank": 8, "alpha": 16, "lr": 2e-4, "weight_decay": 0.01, "clip_norm": 1, "constants": {"eps": 1e-8}}
        | {"rslora": True, "to_rslora": False},
        "--rank 8 --alpha 16 --lr 2e-4 --weight-decay 0.01 --clip-norm 1 --eps 1e-8 --rslora --to-lora",
    ),
]


@pytest.mark.parametrize(("asked", "options"), TRANSLATIONS)
def test_translate_says_what_the_command_says(site: Site, tmp_path: Path, asked: dict[str, Any], options: str):
    answer = site.client().post("/v1/translate", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json() == run_json("translate", *options.split(), "--json", cwd=tmp_path)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"rank": 8, "alpha": 16, "lr": 1e-3},
        {"rank": 8, "alpha": 16, "lr": 1e-3, "to_rank": 4},
        {"rank": 0, "alpha": 16, "lr": 1e-3, "to_alpha": 4},
        {"rank": 8, "alpha": "os.system('ls')", "lr": 1e-3, "to_alpha": 4},
        {"rank": 8, "alpha": 16, "lr": 1e-3, "to_alpha": "nan"},
        {"rank": 8, "alpha": 16, "lr": 1e-3, "optimizer": "adamv", "to_alpha": 4},
        {"preset": "../x", "to_alpha": 4},
        {"rank": 10**400, "alpha": 16, "lr": 1e-3, "to_alpha": 4},
        {"rank": 8, "alpha": 1e-300, "lr": 1e300, "to_alpha": 1e300},
        {"rank": 8, "alpha": 16, "lr": 1e-3, "constants": {"nothing": 1}, "to_alpha": 4},
    ],
)
def test_translate_refuses_in_words(site: Site, asked: dict[str, Any]):
    problem_of(site.client().post("/v1/translate", json=asked), 422)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", ["lr", "to_alpha", "to_lr", "init_scale", "weight_decay", "clip_norm", "lr_ratio"])
def test_translate_takes_no_number_that_is_none(site: Site, key: str, number: str):
    body = '{"rank": 8, "alpha": 16, "lr": 1e-3, "to_alpha": 4, ' + f'"{key}": {number}' + "}"
    answer = site.client().post("/v1/translate", content=body, headers={"Content-Type": "application/json"})
    problem_of(answer, 422)


def test_the_schema_is_one_and_the_examples_fit_it(site: Site):
    schema = site.client().get("/v1/schema").json()
    jsonschema.validators.validator_for(schema).check_schema(schema)
    examples = [ROOT / "examples" / "digits.yaml"]
    for path in examples:
        jsonschema.validate(loaded(path), schema)
    wrong = loaded(TINY_SPEC) | {"trian": {}}
    with pytest.raises(jsonschema.ValidationError, match="trian"):
        jsonschema.validate(wrong, schema)


# -- the audit log -----------------------------------------------------------------------------------------------------


def test_pages_of_the_audit_log_have_every_entry_once(site: Site):
    for number in range(7):
        site.enter(f"s{number}")
    found: list[str] = []
    query: dict[str, Any] = {"limit": 3}
    while True:
        page = site.client().get("/v1/audit", params=query).json()
        found += [one["sweep"] for one in page["entries"]]
        if page["next"] is None:
            break
        query["before"] = page["next"]
    assert found == [f"s{number}" for number in range(6, -1, -1)] + [""]
    for wrong in ({"limit": 0}, {"limit": 1001}, {"before": 0}, {"before": 2**63}):
        problem_of(site.client().get("/v1/audit", params=wrong), 422)


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/nowhere", "/v1", "/v1/", "/v1/sweeps/", "/v1/sweeps/one/", "/v1/sweeps/one/nothing"]
)
def test_an_unknown_route_is_a_404_in_words(site: Site, path: str):
    assert "/openapi.json" in problem_of(site.client().get(path), 404)["detail"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/v1/sweeps/one"),
        ("PUT", "/v1/sweeps"),
        ("POST", "/v1/schema"),
        ("GET", "/v1/plan"),
        ("X", "/healthz"),
    ],
)
def test_a_method_that_a_route_has_not_is_a_405_in_words(site: Site, method: str, path: str):
    answer = site.client().request(method, path)
    assert f"has no {method}" in problem_of(answer, 405)["detail"]
    assert answer.headers["allow"]


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        (BusyError("64 plans are waiting; try again in a while"), 503, "64 plans are waiting"),
        (StateError("the ledger must be readable; postgresql://a:canary@h/d is not"), 503, "postgresql://a:***@h/d"),
        (InputError("planning must be done within 1 s"), 422, "planning must be done within 1 s"),
    ],
)
def test_what_cannot_be_done_is_said_with_its_status(site: Site, fault: Exception, status: int, words: str):
    site.planner.fault = fault
    answer = posted(site.client())
    assert words in problem_of(answer, status)["detail"]
    assert ("retry-after" in answer.headers) == (status == 503)
    assert site.store.page(limit=1) == []


def test_a_fault_of_ours_has_a_number_and_its_trace_only_in_the_log(site: Site, caplog: pytest.LogCaptureFixture):
    site.planner.fault = RuntimeError("a canary that nobody foresaw")
    with caplog.at_level(logging.ERROR):
        answer = posted(site.client())
    detail = problem_of(answer, 500)["detail"]
    number = detail.rsplit(" ", 1)[-1]
    assert "canary" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert f"fault {number}: POST /v1/sweeps" in caplog.text
    assert "a canary that nobody foresaw" in caplog.text
    assert len([record for record in caplog.records if record.exc_info]) == 1
    assert site.client().get("/v1/sweeps").status_code == 200
    assert 'route="/v1/sweeps",status="500"' in site.client().get("/metrics").text


def test_every_route_puts_a_fault_of_ours_into_words(site: Site, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a canary")

    site.enter("one", *trained([0.5]), state="finished")
    monkeypatch.setattr(site.store, "page", broken)
    monkeypatch.setattr(site.store, "get", broken)
    for path in ("/v1/sweeps", "/v1/sweeps/one", "/v1/sweeps/one/events", "/v1/sweeps/one/logs"):
        assert "canary" not in problem_of(site.client().get(path), 500)["detail"]
