"""Routes by hand: the service itself, submissions, specs, the audit log, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ruamel.yaml
from prometheus_client.parser import text_string_to_metric_families

from services.edge import BrokenAnswerError
from services.planning import BusyError
from sweeps.errors import InputError, StateError
from sweeps.events import Delivered
from tests.services.api_support import Site, open_site, posted, problem_of, trained
from tests.services.service_support import TINY_SPEC, YAML
from tests.support import ROOT, run_json


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
    assert answer.json()["reason"] == "the ledger is away for now; try again in a while"


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
        {"optimizer": "rprop", "rank": 8, "alpha": 16, "lr": 1e-3, "constants": {"step_sizes": [1e-6, 50]}}
        | {"to_alpha": 64},
        "--optimizer rprop --rank 8 --alpha 16 --lr 1e-3 --constant step_sizes=1e-6,50 --to-alpha 64",
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
        (StateError("the ledger must be readable; postgresql://a:b@h/d is not"), 503, "the ledger is away for now"),
        (InputError("a plan must be made within 1 s"), 422, "a plan must be made within 1 s"),
    ],
)
def test_what_cannot_be_done_is_said_with_its_status(site: Site, fault: Exception, status: int, words: str):
    site.planner.fault = fault
    answer = posted(site.client())
    assert words in problem_of(answer, status)["detail"]
    assert ("retry-after" in answer.headers) == (status == 503)
    assert site.store.page(limit=1) == []


def test_where_the_ledger_is_only_the_log_says_and_once(site: Site, caplog: pytest.LogCaptureFixture):
    site.planner.fault = StateError("the ledger must be readable; postgresql://ann:canary@db.inside/sweeps is not")
    with caplog.at_level(logging.ERROR):
        answers = [posted(site.client()) for _ in range(3)]
    for answer in answers:
        assert problem_of(answer, 503)["detail"] == "the ledger is away for now; try again in a while"
    assert caplog.text.count("postgresql://ann:***@db.inside/sweeps") == 1
    assert "canary" not in caplog.text


def test_addresses_in_answers_have_no_secrets(tmp_path: Path):
    inside = {"ray_address": "https://ann:canary@ray.inside:8265", "mlflow_url": "https://ann:canary@mlflow.inside"}
    with open_site(tmp_path, **inside) as site:
        site.enter("one", Delivered(up_to=1, experiment_id="1", parent_run_id="2"), state="running")
        body = site.client().get("/v1/sweeps/one").json()
        assert body["ray_url"].endswith("***@ray.inside:8265")
        assert "canary" not in str(body)


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


def asked_by(site: Site, messages: list[dict[str, Any]], **scope: Any) -> list[Any]:
    """What the application says to a request whose body comes in these messages."""
    said: list[Any] = []
    token = ("authorization", f"Bearer {site.admin}")
    headers = [(name.encode(), value.encode()) for name, value in (("host", "localhost"), token)]
    whole = {"type": "http", "method": "GET", "query_string": b"", "headers": headers} | scope

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()  # its client stays, and says nothing more
        return messages.pop(0)

    async def send(message: Any) -> None:
        said.append(message)

    asyncio.run(site.app(whole, receive, send))
    return said


def test_who_breaks_off_an_upload_is_no_fault_of_ours(site: Site, caplog: pytest.LogCaptureFixture):
    begun = [{"type": "http.request", "body": b"name: t", "more_body": True}, {"type": "http.disconnect"}]
    said = asked_by(site, begun, method="POST", path="/v1/sweeps")
    assert [message for message in said if message["type"] == "http.response.start"] == []
    assert caplog.text == ""
    assert site.store.page(limit=1) == []


def test_an_answer_that_breaks_in_the_middle_is_cut_off(site: Site, caplog: pytest.LogCaptureFixture):
    site.enter("one", state="finished")

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a canary")

    site.ledger.read_raw = broken  # type: ignore[method-assign]
    waiting = [{"type": "http.request", "body": b""}]
    with pytest.raises(BrokenAnswerError):
        asked_by(site, waiting, path="/v1/sweeps/one/events")
    assert "fault" in caplog.text
