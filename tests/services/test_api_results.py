"""Routes by hand: logs, reports, exports and adapters."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sweeps.errors import InputError
from tests.services.api_support import Site, open_site, problem_of, trained


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with open_site(tmp_path) as one:
        yield one


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
