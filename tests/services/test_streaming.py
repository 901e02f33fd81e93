"""Events over HTTP as they happen: all of them, once, in order, to everybody, and again from any place on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from services import auth, streaming
from services.store import AuditEntry
from services.streaming import Hub
from sweeps.errors import StateError
from sweeps.events import DriverStarted, QueueMoved, RungReported, SweepEnded
from sweeps.ledger import Ledger
from tests.services.api_support import Site, open_site, trained

LIMIT_S = 30


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with open_site(tmp_path) as one:
        yield one


@contextlib.contextmanager
def listening(site: Site) -> Iterator[str]:
    """The application at an address, for what a client in the same process cannot do: listen, and break off."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(site.app, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            site.hub.close()
            server.should_exit = True
            thread.join()


def parsed(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Server-sent events as a browser reads them: id, event, data."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(":")
            assert name not in fields, "one line a field"
            fields[name] = value.removeprefix(" ")
        elif fields:
            yield {
                "id": int(fields["id"]),
                "event": fields["event"],
                "data": json.loads(fields["data"], parse_constant=_no),
            }
            fields = {}


def _no(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@contextlib.contextmanager
def stream(url: str, site: Site, sweep: str, *, last: int | None = None) -> Iterator[Iterator[dict[str, Any]]]:
    """A stream of events, as a browser reconnects to it."""
    headers = {"Authorization": f"Bearer {site.admin}"} | ({} if last is None else {"Last-Event-ID": str(last)})
    with httpx.stream("GET", f"{url}/v1/sweeps/{sweep}/events", headers=headers, timeout=LIMIT_S) as answer:
        assert answer.status_code == 200
        yield parsed(answer.iter_lines())


def numbers(site: Site, sweep: str) -> list[int]:
    return [record.seq for record in site.ledger.read(sweep)]


def finish(site: Site, sweep: str) -> None:
    assert site.store.move(site.store.get(sweep), "finished")


# -- what was --------------------------------------------------------------------------------------------------------


def told(site: Site, sweep: str, **how: Any) -> list[dict[str, Any]]:
    """All events of a sweep that has come to its end."""
    answer = site.client().get(f"/v1/sweeps/{sweep}/events", **how)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
    return list(parsed(iter(answer.text.splitlines())))


def test_all_events_come_in_order_and_then_the_end(site: Site):
    site.enter("one", DriverStarted(resumed=False), *trained([0.5, 0.2]), state="finished")
    site.enter("other", *trained([0.5]))
    found = told(site, "one")
    records = site.ledger.read("one")
    assert [one["id"] for one in found[:-1]] == [record.seq for record in records]
    assert [one["event"] for one in found[:-1]] == [record.event.kind for record in records]
    for one, record in zip(found, records, strict=False):
        assert one["data"]["seq"] == one["id"]
        assert one["data"]["event"] == json.loads(record.event.model_dump_json())
    assert found[-1] == {"id": records[-1].seq, "event": "end", "data": {"state": "finished"}}


@pytest.mark.parametrize("state", ["paused", "failed", "cancelled"])
def test_the_end_says_how_it_ended(site: Site, state: Any):
    site.enter("one", state=state)
    assert told(site, "one")[-1]["data"] == {"state": state}


def test_a_sweep_that_was_resumed_is_told_to_its_last_end(site: Site):
    site.enter("one", state="failed")
    assert site.client().post("/v1/sweeps/one/resume").status_code == 202
    finish(site, "one")
    found = told(site, "one")
    states = [one["data"]["event"]["state"] for one in found if one["event"] == "queue_moved"]
    assert states == ["queued", "failed", "queued", "finished"]
    assert [one["event"] for one in found].count("end") == 1


def test_what_is_no_number_is_null(site: Site):
    metrics = {"eval_loss": float("nan"), "up": float("inf"), "down": float("-inf"), "fine": 1.5}
    event = RungReported(trial=0, job=0, step=4, metrics=metrics, train_losses=((1, float("nan")), (2, 0.5)))
    site.enter("one", *trained([None]), event, state="finished")
    told_event = next(one["data"]["event"] for one in told(site, "one") if one["event"] == "rung_reported")
    assert told_event["metrics"] == {"eval_loss": None, "up": None, "down": None, "fine": 1.5}
    assert told_event["train_losses"] == [[1, None], [2, 0.5]]


@pytest.mark.parametrize("way", ["header", "query", "both"])
def test_a_stream_goes_on_after_every_event_without_gap_or_repeat(site: Site, way: str):
    site.enter("before", *trained([0.1]))
    site.enter("one", *trained([0.5, 0.2]), state="finished")
    whole = told(site, "one")
    for position in [0, *(one["id"] for one in whole)]:
        by_query = {"after": 0 if way == "header" else position}
        by_header = {} if way == "query" else {"Last-Event-ID": str(position)}
        assert told(site, "one", params=by_query, headers=by_header) == [
            one for one in whole if one["id"] > position or one["event"] == "end"
        ]


@pytest.mark.parametrize("last", ["x", "", "-1", "1.5", "²", "9" * 400])
def test_a_last_event_that_is_none_of_ours_is_no_fault(site: Site, last: str):
    site.enter("one", state="finished")
    found = told(site, "one", headers={"Last-Event-ID": last.encode()})
    assert found[-1]["event"] == "end"
    assert len(found) == (1 if last.isdecimal() and last.isascii() else 4)


def test_more_events_than_are_kept_ready_come_all(site: Site):
    site.enter("one", *trained([0.5] * 300), state="finished")
    found = told(site, "one")
    assert len(found) > 1500
    assert [one["id"] for one in found[:-1]] == numbers(site, "one")


# -- what comes --------------------------------------------------------------------------------------------------------


def test_events_come_as_they_happen_and_wherever_one_breaks_off_one_goes_on(site: Site):
    site.enter("one", state="running")
    came: list[dict[str, Any]] = []
    with listening(site) as url:
        for event in (DriverStarted(resumed=False), *trained([0.5, 0.2]), SweepEnded(state="finished")):
            # One stream an event: what was appended before it began, and what is while it lasts.
            with stream(url, site, "one", last=came[-1]["id"] if came else None) as events:
                while len(came) < len(numbers(site, "one")):
                    came.append(next(events))
                site.ledger.append("one", [event])
                came.append(next(events))
        finish(site, "one")
        with stream(url, site, "one", last=came[-1]["id"]) as events:
            rest = list(events)
    assert [one["id"] for one in [*came, *rest[:-1]]] == numbers(site, "one")
    assert [one["event"] for one in rest] == ["queue_moved", "end"]


def test_many_listen_and_all_hear_the_same(site: Site):
    site.enter("one", *trained([0.5]), state="running")
    site.enter("two", state="running")
    heard: list[list[int]] = []

    async def hear(client: httpx.AsyncClient, sweep: str, begun: list[int]) -> list[int]:
        headers = {"Authorization": f"Bearer {site.admin}"}
        ids: list[int] = []
        async with client.stream("GET", f"/v1/sweeps/{sweep}/events", headers=headers) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("id: "):
                    ids.append(int(line[4:]))
                    if len(ids) == 1:
                        begun.append(1)
        return ids

    async def all_hear(url: str) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S, limits=limits) as client:
            begun: list[int] = []
            tasks = [asyncio.ensure_future(hear(client, name, begun)) for name in ["one"] * 40 + ["two"] * 10]
            while len(begun) < len(tasks):
                await asyncio.sleep(0.01)
            assert "lora_sweeps_event_streams 50.0" in (await client.get("/metrics", headers=bearer)).text
            for _ in range(3):
                site.ledger.append("one", trained([0.3] * 120))  # more at once than are kept ready
                site.ledger.append("two", [DriverStarted(resumed=True)])
                await asyncio.sleep(0.05)
            finish(site, "one")
            finish(site, "two")
            heard.extend(await asyncio.gather(*tasks))

    bearer = {"Authorization": f"Bearer {site.admin}"}
    with listening(site) as url:
        asyncio.run(all_hear(url))
    # The end has the number of the event before it.
    expected = {name: [*numbers(site, name), numbers(site, name)[-1]] for name in ("one", "two")}
    assert heard == [expected["one"]] * 40 + [expected["two"]] * 10
    assert site.hub.listeners == 0


def test_one_who_reads_slowly_holds_nobody_up(site: Site):
    long = [RungReported(trial=0, job=0, step=4, metrics={"m": 1.0}, checkpoint="x" * 4000)]
    site.enter("one", *trained([None]), *long * 3000, state="running")
    with listening(site) as url, socket.create_connection(url.removeprefix("http://").split(":")) as slow:
        request = f"GET /v1/sweeps/one/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {site.admin}\r\n\r\n"
        slow.sendall(request.encode())
        assert slow.recv(15) == b"HTTP/1.1 200 OK"  # and no more of its 12 MB
        last = numbers(site, "one")[-1]
        with stream(url, site, "one", last=last) as events:
            site.ledger.append("one", [DriverStarted(resumed=True)])
            assert next(events)["event"] == "driver_started"
        with stream(url, site, "one") as events:
            finish(site, "one")
            assert [one["id"] for one in events][:-1] == numbers(site, "one")


def test_who_goes_away_listens_no_more(site: Site):
    site.enter("one", state="running")
    with listening(site) as url:
        with stream(url, site, "one") as events:
            next(events)
            assert site.hub.listeners == 1
        with stream(url, site, "one") as events:
            next(events)
            _until(lambda: site.hub.listeners == 1)


def _until(true: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(LIMIT_S * 20):
        if true():
            return
        waiting.wait(0.05)
    raise AssertionError("it did not come to pass")


@pytest.mark.parametrize("busy", [False, True])
def test_a_stream_ends_soon_after_its_token_was_revoked(site: Site, monkeypatch: pytest.MonkeyPatch, busy: bool):
    monkeypatch.setattr(streaming, "_KEEPALIVE_S", 0.2)
    site.enter("one", state="running")
    token = site.token("ann")
    headers = {"Authorization": f"Bearer {token}"}
    ended = threading.Event()

    def chatter() -> None:
        while not ended.wait(0.02):
            site.ledger.append("one", [DriverStarted(resumed=True)])

    talker = threading.Thread(target=chatter)
    with listening(site) as url, httpx.stream("GET", f"{url}/v1/sweeps/one/events", headers=headers) as answer:
        lines = answer.iter_lines()
        if busy:
            talker.start()
        try:
            while not next(lines).startswith("event: driver_started" if busy else ":"):
                pass
            assert site.store.revoke_token((auth.split(token) or ("",))[0], AuditEntry("ann", "token revoke"))
            assert "event: end" not in list(lines)
        finally:
            ended.set()
            if busy:
                talker.join()
        _until(lambda: site.hub.listeners == 0)


# -- the hub -----------------------------------------------------------------------------------------------------------


class Failing(Ledger):
    """A ledger whose database is away when it is asked for the first few times."""

    faults = 3
    read_once = False

    def last_seqs(self, sweeps: Any) -> dict[str, int]:
        self.faults -= 1
        if self.faults == 1:
            raise StateError("the ledger must be readable; it is not")
        if self.faults == 2:
            raise ValueError("nobody foresaw this")
        return super().last_seqs(sweeps)

    def read_raw(self, sweep: str, **how: Any) -> list[tuple[int, float, str]]:
        if not self.read_once:
            self.read_once = True
            raise StateError("the ledger must be readable; it is not")
        return super().read_raw(sweep, **how)


def test_a_database_that_is_away_for_a_moment_silences_nobody(site: Site):
    site.enter("one", state="running")
    ledger = Failing(site.ledger.database.url)
    hub = Hub(ledger)

    async def heard() -> list[bytes]:
        looking = asyncio.ensure_future(hub.run())
        stream: AsyncIterator[bytes] = hub.listen("one", after=numbers(site, "one")[-1], state="running")
        coming = asyncio.ensure_future(anext(stream))
        async with asyncio.timeout(LIMIT_S):
            while ledger.faults > 0:
                await asyncio.sleep(0.01)
            site.ledger.append("one", [QueueMoved(state="finished")])
            found = [await coming]
        found += [each async for each in stream]
        hub.close()
        await looking
        return found

    with ledger:
        moved, end = asyncio.run(heard())
        assert ledger.read_once
    assert b"event: queue_moved" in moved
    assert b"event: end" in end
