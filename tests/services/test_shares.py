"""What one user may have among others: sweeps that a name means, plans under way, trials together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from services.auth import Principal
from services.planning import BusyError
from services.service import Order
from tests.services.api_support import Site, open_site, posted, problem_of, trained
from tests.services.service_support import TINY_SPEC

ANN, BOB = Principal("ann", "submit", "a"), Principal("bob", "submit", "b")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with open_site(tmp_path) as one:
        yield one


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["tiny", "last"])
def test_a_name_is_first_that_of_ones_own_sweep(site: Site, reference: str):
    site.enter("bobs", owner="bob", state="failed")
    site.enter("roots", owner="admin", state="failed")
    site.enter("anns", owner="ann", shared=True, state="failed")
    bob, carol = site.client(site.token("bob")), site.client(site.token("carol"))
    assert bob.get(f"/v1/sweeps/{reference}").json()["sweep"] == "bobs"
    assert site.client().get(f"/v1/sweeps/{reference}").json()["sweep"] == "roots"
    assert carol.get(f"/v1/sweeps/{reference}").json()["sweep"] == "anns"
    assert bob.post(f"/v1/sweeps/{reference}/resume").json()["sweep"] == "bobs"
    assert site.client().post(f"/v1/sweeps/{reference}/cancel").json()["sweep"] == "roots"


@pytest.mark.parametrize("reference", ["tiny", "last"])
def test_anothers_sweep_is_changed_by_its_id_only(site: Site, reference: str):
    site.enter("anns", owner="ann", shared=True, state="failed")
    before = site.snapshot()
    for action in ("resume", "cancel"):
        detail = problem_of(site.client().post(f"/v1/sweeps/{reference}/{action}"), 404)["detail"]
        assert "by its id, or one of your own by its name" in detail
        problem_of(site.client(site.token("bob")).post(f"/v1/sweeps/{reference}/{action}"), 404)
    assert site.store.get("anns").state == "failed"
    assert site.snapshot()["submissions"] == before["submissions"]
    assert site.client().post("/v1/sweeps/anns/resume").status_code == 202


# -- work under way ----------------------------------------------------------------------------------------------------


class Slow:
    """A planner whose work ends when it is told to."""

    def __init__(self) -> None:
        self.begun, self.go = 0, asyncio.Event()

    async def _wait(self, *_arguments: Any, **_options: Any) -> Any:
        self.begun += 1
        await self.go.wait()
        raise ValueError("done")

    plan = report = adapter = _wait


Ask = Callable[[Site, Principal], Any]


@pytest.mark.parametrize(
    ("asks", "words"),
    [
        (
            [
                lambda site, who: site.service.plan(who, TINY_SPEC, "x", timed=False),
                lambda site, who: site.service.submit(who, Order(TINY_SPEC, "x")),
            ],
            "4 plans under way at once, and ann has",
        ),
        (
            [
                lambda site, who: site.service.report(who, site.store.get("anns"), "md"),
                lambda site, who: site.service.adapter(who, site.store.get("anns"), None, Path("x")),
            ],
            "4 reports and adapters under way at once, and ann has",
        ),
    ],
)
def test_one_user_has_few_pieces_of_heavy_work_at_a_time(site: Site, asks: list[Ask], words: str):
    site.enter("anns", owner="ann")

    async def crowd() -> None:
        slow = Slow()
        site.service.planner = slow  # type: ignore[assignment]
        tasks = [asyncio.ensure_future(asks[number % 2](site, ANN)) for number in range(4)]
        while slow.begun < 4:
            await asyncio.sleep(0.001)
        for ask in asks:
            with pytest.raises(BusyError, match=words):
                await ask(site, ANN)
        tasks.append(asyncio.ensure_future(asks[0](site, BOB)))
        while slow.begun < 5:
            await asyncio.sleep(0.001)
        slow.go.set()
        assert {str(one) for one in await asyncio.gather(*tasks, return_exceptions=True)} == {"done"}
        with pytest.raises(ValueError, match="done"):
            await asks[1](site, ANN)

    asyncio.run(crowd())


# -- trials together ---------------------------------------------------------------------------------------------------


def test_sweeps_that_are_submitted_at_once_have_no_more_trials_than_their_user_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import time

    with open_site(tmp_path, user_trials=10) as site:
        real = site.store.in_states

        def slowly(*states: Any) -> Any:
            found = real(*states)
            time.sleep(0.1)
            return found

        monkeypatch.setattr(site.store, "in_states", slowly)
        ann = site.token("ann")
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda _: posted(site.client(ann)).status_code, range(4)))
        assert sorted(answers) == [201, 201, 429, 429]


def test_a_queued_sweep_that_is_extended_counts_once(tmp_path: Path):
    with open_site(tmp_path, user_trials=9) as site:
        site.enter("one", *trained([0.5]))
        assert site.client().post("/v1/sweeps/one/extend", json={"trials": 9}).status_code == 202
        problem_of(site.client().post("/v1/sweeps/one/extend", json={"trials": 10}), 422)


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_the_text_that_is_kept_is_the_planners(site: Site):
    secret = "# postgresql://ann:canary@host/db\n"
    sweep = posted(site.client(), TINY_SPEC + secret).json()["sweep"]
    with site.service.record(site.store.get(sweep)) as record:
        assert record.created.spec_text == TINY_SPEC + secret.replace("canary", "***")
