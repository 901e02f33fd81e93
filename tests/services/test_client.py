"""The client class against a real service: typed answers, errors, and what it does when the network fails it."""

from __future__ import annotations

import io
import json
import math
import socket
import stat
import subprocess
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services import client as client_module
from services import connection, credentials
from services.client import Client, PlainHttpWarning
from services.schemas import ENDED
from services.store import OPEN
from services.streaming import on_the_wire
from services.unpacking import unpack
from sweeps.collapse import Certificate
from sweeps.errors import InputError, SpecError, StateError, SweepNotFoundError
from sweeps.events import EVENT, Certified, Event, MemberDiverged, RungReported
from sweeps.ledger import Ledger
from sweeps.records import fold, read_sweep
from sweeps.spec import json_schema
from tests.services.client_support import Answer, Asked, finished_sweep, passed_on, stub
from tests.services.service_support import TINY_SPEC, Served, serving, start, stop


@pytest.fixture
def client(served: Served) -> Any:
    with Client(served.url, served.token) as one:
        yield one


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited between attempts, which it does not here."""
    waited: list[float] = []
    monkeypatch.setattr(connection, "time", SimpleNamespace(sleep=waited.append, monotonic=time.monotonic))
    return waited


# -- what it answers ---------------------------------------------------------------------------------------------------


def test_events_of_a_service_fold_into_what_its_ledger_says(served: Served, client: Client):
    sweep = finished_sweep(served)
    records = list(client.events(sweep))
    with Ledger.in_directory(served.home) as ledger:
        kept = ledger.read(sweep)
        told = read_sweep(ledger, sweep)
    assert [(one.seq, one.event) for one in records] == [(one.seq, one.event) for one in kept]
    assert all(abs(one.at_s - other.at_s) <= 1 for one, other in zip(records, kept, strict=True))
    assert fold(sweep, records).best is not None
    assert fold(sweep, records).counts() == told.counts()
    half = records[len(records) // 2].seq
    assert [one.seq for one in client.events(sweep, after=half)] == [one.seq for one in kept if one.seq > half]


def test_status_best_report_and_export_are_of_one_sweep(served: Served, client: Client):
    sweep = finished_sweep(served)
    status = client.status(sweep)
    assert (status.sweep, status.state, status.owner) == (sweep, "finished", client.status("tiny").owner)
    best = client.best(sweep)
    assert best == status.best_point
    assert client.report(sweep).startswith(f"# Collapse report: {sweep}")
    assert json.loads(client.report(sweep, "json"))["sweep"] == sweep
    export = client.export(sweep, "peft", alpha=16)
    assert (export.trial, export.alpha) == (best.trial, 16.0)
    assert set(export.files) == {"adapter_config.json", "training.json"}


def test_every_page_of_a_list_is_read(served: Served, client: Client, monkeypatch: pytest.MonkeyPatch):
    finished_sweep(served)
    other = client.submit(TINY_SPEC, name="paged")
    client.cancel(other.sweep)
    at_once = [one.sweep for one in client.list()]
    assert len(at_once) >= 2
    monkeypatch.setattr(client_module, "_PAGE", 1)
    assert [one.sweep for one in client.list()] == at_once
    assert [one.sweep for one in client.list(name="paged")] == [other.sweep]
    assert list(client.list(owner="nobody")) == []


def test_an_adapter_arrives_as_the_service_has_it(served: Served, client: Client, tmp_path: Path):
    sweep = finished_sweep(served)
    files = client.adapter(sweep, tmp_path / "adapter")
    there = served.home / "reports" / sweep / "adapter"
    assert [file.name for file in files] == ["adapter_config.json", "adapter_model.safetensors"]
    for file in files:
        assert file.read_bytes() == (there / file.name).read_bytes()
    assert sorted(tmp_path.rglob("*")) == sorted([tmp_path / "adapter", *files])


def test_logs_are_read_to_their_end(served: Served, client: Client):
    sweep = finished_sweep(served)
    whole = "".join(part.text for part in client.follow_logs(sweep, 0))
    assert whole == served.log(sweep)
    assert client.logs(sweep, 5).text == whole[whole.index("\n") + 1 :]


def test_plan_translate_and_schema(client: Client):
    assert client.plan(TINY_SPEC).trials == 4
    moved = client.translate(optimizer="adamw", rank=8, alpha=16, lr=1e-4, to_alpha=64)
    assert moved["lr"] == 5e-5
    assert client.schema() == json_schema()
    assert client.ready().status == "ok"


def test_states_that_have_ended_are_those_that_a_service_is_done_with():
    assert {*ENDED, *OPEN} == {"queued", "starting", "running", "degraded", *ENDED}
    assert not ENDED & set(OPEN)


# -- numbers that are none ---------------------------------------------------------------------------------------------


def _same(one: Any, other: Any) -> bool:
    """Whether two dumps are equal, all numbers that are none being equal to one another."""
    match one, other:
        case float(), float() if not math.isfinite(one):
            return not math.isfinite(other)
        case dict(), dict():
            return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
        case ((list() | tuple()), (list() | tuple())):
            return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


@pytest.mark.parametrize(
    "event",
    [
        RungReported(trial=1, job=2, step=3, metrics={"a": math.nan, "b": 1.0}, train_losses=((1, math.inf), (2, 1.0))),
        MemberDiverged(trial=1, job=2, step=3, train_losses=((1, 2.0), (2, math.nan))),
    ],
    ids=lambda event: event.kind,
)
def test_a_diverged_loss_arrives_as_a_number_that_is_none(event: Event):
    line = next(
        line for line in on_the_wire(7, 1.5, event.model_dump_json()).data.splitlines() if line.startswith(b"data:")
    )
    assert b"NaN" not in line
    assert b"Infinity" not in line
    record = client_module._record_of(line.removeprefix(b"data: ").decode())
    assert record.seq == 7
    assert type(record.event) is type(event)
    assert _same(record.event.model_dump(), event.model_dump())


def test_a_certificate_of_diverged_twins_arrives_whole(served: Served):
    with Ledger.in_directory(served.home) as ledger:
        records = ledger.read(finished_sweep(served))
    certified = next(record.event for record in records if isinstance(record.event, Certified))
    certificate = json.loads(json.dumps(certified.certificate))
    certificate["twins"][0]["max_deviation"] = math.inf
    certificate["twins"][0]["losses"][0] = math.nan
    event = Certified(certificate=certificate)
    data = next(
        one for one in on_the_wire(7, 1.5, event.model_dump_json()).data.decode().splitlines() if "data:" in one
    )
    arrived = client_module._record_of(data.removeprefix("data: ")).event
    assert isinstance(arrived, Certified)
    found = Certificate.model_validate(arrived.certificate)
    assert _same(found.model_dump(), Certificate.model_validate(certificate).model_dump())


@pytest.mark.parametrize("data", ["", "[]", '{"seq": 1, "at": "2026-01-01T00:00:00+00:00", "event": {"kind": "new"}}'])
def test_an_event_of_another_version_is_named(data: str):
    with pytest.raises(StateError, match="another version"):
        client_module._record_of(data)


def test_what_a_newer_event_says_beside_what_is_known_is_left_out():
    event = json.loads(MemberDiverged(trial=1, job=2, step=3).model_dump_json()) | {"news": 1}
    data = json.dumps({"seq": 1, "at": "2026-01-01T00:00:00+00:00", "event": event})
    assert client_module._record_of(data).event == EVENT.validate_python(event | {}, extra="ignore")


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_wrong_spec_comes_back_with_every_fault(client: Client, tmp_path: Path):
    spec = tmp_path / "bad.yaml"
    spec.write_text(TINY_SPEC.replace("steps: 4", "steps: many").replace("name: tiny", "name: a b"))
    with pytest.raises(SpecError, match=r"bad\.yaml:1: name: required") as raised:
        client.submit(spec)
    assert [fault.path for fault in raised.value.faults] == ["name", "train.steps"]
    assert raised.value.source == str(spec)


def test_each_refusal_says_what_to_do(served: Served, client: Client):
    with pytest.raises(SweepNotFoundError, match="found 'nosuch'"):
        client.status("nosuch")
    for name in ("..", "a/b", "%2e%2e", "", "a?b", "a b"):
        with pytest.raises(SweepNotFoundError, match="by its id, its name or `last`"):
            client.status(name)
    with pytest.raises(InputError, match="what is resumed must be paused"):
        client.resume(finished_sweep(served))
    with (
        Client(served.url, "lsw_000000000000_" + "x" * 43) as stranger,
        pytest.raises(InputError, match=r"found one that it does not know.*lora-sweeps login"),
    ):
        stranger.status("last")
    with (
        Client(served.url, served.add_token("reader", "read")) as reader,
        pytest.raises(InputError, match=r"scope submit is required.*tokens that may do more"),
    ):
        reader.submit(TINY_SPEC)


def test_without_a_token_it_says_how_to_get_one(served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("LORA_SWEEPS_TOKEN", "LORA_SWEEPS_TOKEN_FILE", "LORA_SWEEPS_HOME"):
        monkeypatch.delenv(name, raising=False)
    with Client(served.url) as nobody, pytest.raises(InputError, match="found none: `lora-sweeps login"):
        nobody.status("last")


def test_a_server_that_does_not_answer_is_named(waits: list[float]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with Client(url, "lsw_x") as client, pytest.raises(InputError, match=rf"{url} must answer; it does not"):
        client.status("last")
    assert waits == list(connection._WAITS_S)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, b"hello"),
        Answer(200, b"{}", {"Content-Type": "application/json"}),
        Answer(404, b"no such page"),
        Answer(500, b"broken"),
        Answer(401, b"<html>"),
    ],
)
def test_a_server_that_is_no_service_is_named(answer: Answer):
    with (
        stub(lambda _asked, _number: answer) as other,
        Client(other.url, "lsw_x") as client,
        pytest.raises(InputError, match=rf"{other.url} must be a service of lora-sweeps"),
    ):
        client.status("last")


def test_a_service_that_says_more_than_is_known_is_understood(served: Served):
    sweep = finished_sweep(served)

    def with_news(asked: Asked, _number: int) -> Answer:
        answer = passed_on(asked, served)
        return replace(answer, body=json.dumps(json.loads(answer.body) | {"news": [1]}).encode())

    with stub(with_news) as newer, Client(newer.url, served.token) as client:
        assert client.status(sweep).sweep == sweep


def test_a_service_may_lie_below_a_path(served: Served):
    def below(asked: Asked, _number: int) -> Answer:
        return passed_on(replace(asked, path=asked.path.removeprefix("/lora")), served)

    with stub(below) as proxy, Client(f"{proxy.url}/lora/", served.token) as client:
        assert client.ready().status == "ok"
        assert proxy.asked[0].path == "/lora/readyz"


# -- tokens go to their server only ------------------------------------------------------------------------------------


def test_a_token_of_a_file_is_sent_to_its_server_only(served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path = tmp_path / "tokens"
    credentials.save(path, served.url, served.token)
    monkeypatch.setenv("LORA_SWEEPS_TOKEN_FILE", str(path))
    monkeypatch.delenv("LORA_SWEEPS_TOKEN", raising=False)
    with Client(served.url) as client:
        assert client.ready().status == "ok"
    with stub(lambda asked, _number: passed_on(asked, served)) as other, Client(other.url) as client:
        with pytest.raises(InputError, match="found none"):
            client.ready()
        assert [(asked.path, "authorization" in asked.headers) for asked in other.asked] == [("/readyz", False)]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(served: Served, status: int):
    with (
        stub(lambda asked, _number: passed_on(asked, served)) as other,
        stub(lambda asked, _number: Answer(status, b"", {"Location": other.url + asked.path})) as first,
        Client(first.url, served.token) as client,
    ):
        with pytest.raises(InputError, match=r"points to 'http://127.*no token is sent unasked"):
            client.status("last")
        with pytest.raises(InputError, match="points to"):
            client.submit(TINY_SPEC)
        assert len(first.asked) == 2
        assert other.asked == []


def test_a_token_in_clear_is_warned_of_beyond_this_machine():
    with pytest.warns(PlainHttpWarning, match=r"http://sweeps\.example is not encrypted"):
        Client("http://sweeps.example", "lsw_x").close()
    for server in ("https://sweeps.example", "http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"):
        Client(server, "lsw_x").close()  # a warning would be an error here


def test_a_certificate_that_nobody_vouches_for_is_refused(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *subject]
    subprocess.run(made, check=True, capture_output=True)
    with stub(lambda asked, _number: passed_on(asked, served), (certificate, key)) as other:
        with Client(other.url, served.token) as client, pytest.raises(InputError, match="CERTIFICATE_VERIFY_FAILED"):
            client.ready()
        assert (other.asked, waits) == ([], [])
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with Client(other.url, served.token) as client:
            assert client.ready().status == "ok"


def test_no_proxy_stands_before_this_machine(served: Served, monkeypatch: pytest.MonkeyPatch, waits: list[float]):
    with stub(lambda _asked, _number: Answer(200, b"")) as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with Client(served.url, served.token) as client:
            assert client.ready().status == "ok"
        assert proxy.asked == []
        with Client("http://sweeps.invalid") as client, pytest.raises(InputError, match="as one does"):
            client.ready()
        assert [one.path for one in proxy.asked] == ["http://sweeps.invalid/readyz"]
    assert waits == []


@pytest.mark.parametrize(
    "server", ["sweeps.example", "ftp://a:1", "http://", "http://u:pw@a", "http://a?b", "http://a:x"]
)
def test_what_is_no_server_is_refused(server: str):
    with pytest.raises(InputError, match=r"a server must be http://HOST:PORT or https://HOST") as raised:
        Client(server, "lsw_x")
    assert "pw" not in str(raised.value)


def test_what_is_no_token_is_refused_and_not_shown():
    for text in ("two words", "lsw_é", "a\r\nX-Evil: 1", "x" * 501):
        with pytest.raises(InputError, match="a token must be printable") as raised:
            Client("http://127.0.0.1:1", text)
        assert text not in str(raised.value)


# -- a network that fails ----------------------------------------------------------------------------------------------


def test_a_lost_answer_makes_no_second_sweep(served: Served, waits: list[float]):
    answers: list[Answer] = []

    def losing_the_first(asked: Asked, number: int) -> Answer | None:
        answers.append(passed_on(asked, served))
        return None if number == 1 else answers[-1]

    with stub(losing_the_first) as proxy, Client(proxy.url, served.token) as client:
        accepted = client.submit(TINY_SPEC, name="once")
        client.cancel(accepted.sweep)
        assert [one.sweep for one in client.list(name="once")] == [accepted.sweep]
    assert [answer.status for answer in answers[:2]] == [201, 200]
    assert waits == [connection._WAITS_S[0]]


def test_a_service_that_is_busy_is_given_the_time_that_it_asks_for(served: Served, waits: list[float]):
    def busy_at_first(asked: Asked, number: int) -> Answer:
        if number > 3:
            return passed_on(asked, served)
        return Answer(503, b"", {"Retry-After": ("7", "3600", "soon")[number - 1]})

    with stub(busy_at_first) as proxy, Client(proxy.url, served.token) as client:
        assert client.ready().status == "ok"
    assert waits == [7.0, connection._MOST_WAIT_S, connection._WAITS_S[2]]


def test_what_must_not_be_done_twice_is_asked_for_once(waits: list[float]):
    with stub(lambda _asked, _number: None) as away, Client(away.url, "lsw_x") as client:
        with pytest.raises(InputError, match="does not"):
            client.extend("tiny", 8)
        assert len(away.asked) == 1
        with pytest.raises(InputError, match="does not"):
            client.cancel("tiny")
        assert len(away.asked) == 1 + 1 + len(connection._WAITS_S)
    with stub(lambda _asked, _number: Answer(503)) as away, Client(away.url, "lsw_x") as client:
        with pytest.raises(StateError, match="must be ready; it is not for now"):
            client.resume("tiny")
        assert len(away.asked) == 1


def test_events_go_on_after_the_service_was_restarted(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with (
        serving(tmp_path / "home", "--devices", "2", "--port", port) as first,
        Client(first.url, first.token) as client,
    ):
        sweep = first.submit()
        events = client.events(sweep)
        seen = [next(events), next(events)]
        stop(first)
        with ThreadPoolExecutor(1) as beside:
            # Nobody answers until it has started.
            second = beside.submit(start, tmp_path / "home", "--devices", "2", "--port", port)
            try:
                seen += events
                assert client.status(sweep).state == "finished"
            finally:
                stop(second.result())
        with Ledger.in_directory(tmp_path / "home") as ledger:
            assert [one.seq for one in seen] == [one.seq for one in ledger.read(sweep)]


# -- archives that are not trusted -------------------------------------------------------------------------------------


def _archive(*names: str, mode: int = stat.S_IFREG | 0o600, text: str = "x") -> io.BytesIO:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            member = zipfile.ZipInfo(name)
            member.external_attr, member.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(member, text)
    return packed


HOSTILE = {
    "a way up": _archive("adapter/../../x"),
    "a way up at once": _archive("../x"),
    "an absolute path": _archive("/tmp/x"),
    "a folder in it": _archive("adapter/a/b"),
    "a hidden file": _archive("adapter/.bashrc"),
    "a backslash": _archive("adapter/..\\x"),
    "a directory": _archive("adapter/d", mode=stat.S_IFDIR | 0o700),
    "a link": _archive("adapter/link", mode=stat.S_IFLNK | 0o777, text="/etc/passwd"),
    "a device": _archive("adapter/null", mode=stat.S_IFCHR | 0o600),
    "one name twice": _archive("adapter/a", "a"),
    "too many files": _archive(*(f"adapter/a{i}" for i in range(65))),
    "too much": _archive("adapter/a", text="0" * 2_000),
    "no archive": io.BytesIO(b"PK and nothing else"),
    "half of one": io.BytesIO(_archive("adapter/a").getvalue()[:30]),
}


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.replace(" ", "-"))
def test_a_hostile_archive_writes_nothing(case: str, tmp_path: Path):
    inside = tmp_path / "deep" / "adapter"
    with pytest.raises(InputError, match="an adapter's archive must hold"):
        unpack(HOSTILE[case], inside, most_bytes=1_000)
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


def test_a_link_that_lies_in_the_way_is_replaced_and_not_followed(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    inside = tmp_path / "adapter"
    inside.mkdir()
    (inside / "a").symlink_to(outside)
    assert unpack(_archive("adapter/a"), inside, most_bytes=1_000) == (inside / "a",)
    assert (inside / "a").read_text() == "x"
    assert not (inside / "a").is_symlink()
    assert outside.read_text() == "mine"


def test_a_server_that_sends_too_much_is_cut_off(tmp_path: Path):
    with (
        stub(lambda _asked, _number: Answer(200, bytes(3_000_000))) as other,
        Client(other.url, "lsw_x") as client,
        pytest.raises(InputError, match="at most 1,000 bytes"),
    ):
        client.adapter("tiny", tmp_path / "adapter", most_bytes=1_000)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
