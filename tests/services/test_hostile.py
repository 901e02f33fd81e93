"""Names that lead elsewhere, code in place of data: refused, and nothing is written outside of the state directory."""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

from tests.services.api_support import Site, open_site, posted, problem_of, trained
from tests.services.service_support import TINY_SPEC, YAML

NAMES = {
    "up": "../x",
    "up and down": "a/../../x",
    "absolute": "/etc/passwd",
    "home": "~root",
    "dots": "..",
    "dot": ".",
    "hidden": ".ssh",
    "encoded dots": "%2e%2e",
    "encoded twice": "%252e%252e%252fx",
    "NUL": "a\0b",
    "newline": "a\nb",
    "header": "a\r\nSet-Cookie: x=y",
    "blank": " ",
    "overlong": "a" * 5000,
    "full-width dots": "\uff0e\uff0e\uff0fx",
    "one dot leader": "\u2024\u2024/x",
    "right to left": "a\u202eb",
    "look-alike": "\u0430dmin",
    "combining": "e\u0301",
    "backslash": "..\\x",
    "drive": "C:\\x",
    "option": "-rf",
    "shell": "$(touch x)",
    "quote": "' or 1=1 --",
    "percent": "%s%n",
    "address": "http://127.0.0.1/x",
    "file": "file:///etc/passwd",
}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    for root in ("models", "data"):
        (tmp_path / root).mkdir()
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text("{}")
    (secret / "model.safetensors").write_text("")
    (tmp_path / "models" / "link").symlink_to(secret)
    (tmp_path / "data" / "link.jsonl").symlink_to("/etc/passwd")
    with open_site(
        tmp_path, models=tmp_path / "models", data=tmp_path / "data", entrypoints=("fine.tasks:make",)
    ) as one:
        one.service.scratch()
        one.enter("one", *trained([0.5]), state="finished")
        yield one


def everything(site: Site) -> dict[str, int]:
    """Every path around the state directory with when it was written, and every path in it."""
    found = {path: path.is_relative_to(site.home) for path in site.home.parent.rglob("*")}
    # The database's own files come and go as it is read.
    return {
        str(path): 0 if inside else path.lstat().st_mtime_ns
        for path, inside in found.items()
        if not path.name.startswith("ledger.db")
    }


def answer_to(site: Site, method: str, path: str) -> int:
    """The status of the answer to a request for a path as it stands: clients tidy it up before they send it."""
    scope = {
        "type": "http",
        "method": method,
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": b"format=peft" if path.endswith("export") else b"",
        "headers": [(b"host", b"localhost"), (b"authorization", f"Bearer {site.admin}".encode())],
    }
    said: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"trials": 9}'}

    async def send(message: Any) -> None:
        said.append(message)

    asyncio.run(site.app(scope, receive, send))
    assert said[0]["type"] == "http.response.start"
    return int(said[0]["status"])


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_hostile_name_of_a_sweep_reaches_nothing(site: Site, name: str):
    (site.home.parent / "x").write_text("not yours")
    before, rows = everything(site), site.snapshot()
    for path in {name, quote(name), quote(name, safe=""), quote(quote(name, safe=""), safe="")}:
        for tail in ("", "/events", "/logs", "/best", "/report", "/export", "/adapter"):
            status = answer_to(site, "GET", f"/v1/sweeps/{path}{tail}")
            # A slash makes another path of it, which leads nowhere.
            assert status in (404, 422) if "/" in name else status == 422
        for tail in ("cancel", "resume", "extend"):
            status = answer_to(site, "POST", f"/v1/sweeps/{path}/{tail}")
            assert status in (404, 405, 422) if "/" in name else status == 422
    assert everything(site) == before
    assert site.snapshot() == rows


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_hostile_name_in_a_query_is_refused(site: Site, name: str):
    before, rows = everything(site), site.snapshot()
    client = site.client()
    for key in ("name", "source"):
        problem_of(posted(client, **{key: name}), 422)
    problem_of(client.post("/v1/plan", content=TINY_SPEC, headers=YAML, params={"source": name}), 422)
    for path, query in (
        ("/v1/sweeps/one/report", {"format": name}),
        ("/v1/sweeps/one/export", {"format": name}),
        ("/v1/sweeps/one/export", {"format": "peft", "alpha": name}),
        ("/v1/sweeps/one/export", {"format": "peft", "trial": name}),
        ("/v1/sweeps/one/adapter", {"trial": name}),
        ("/v1/sweeps", {"name": name}),
        ("/v1/sweeps", {"owner": name}),
        ("/v1/sweeps", {"after": name}),
    ):
        answer = client.get(path, params=query)
        assert "set-cookie" not in answer.headers
        problem_of(answer, 422)
    assert everything(site) == before
    assert site.snapshot() == rows


def spec_with(**changes: str) -> str:
    """A spec of a language model with these texts as its name, its model and its data."""
    texts = {"name": "tiny", "model": "m", "train": "d.jsonl"} | changes
    quoted = {key: '"' + "".join(f"\\U{ord(character):08x}" for character in text) + '"' for key, text in texts.items()}
    return (
        f"name: {quoted['name']}\n"
        f"task: {{type: causal_lm, model: {quoted['model']}, data: {{train: {quoted['train']}}}}}\n"
        "lora: {target_modules: [q_proj]}\n"
        "parameters: {rank: {values: [2]}, lr: {min: 1e-3, max: 1e-1}, alpha: {values: [4, 16]}}\n"
        "train: {optimizer: adamw, steps: 4, batch_size: 8}\n"
        "search: {method: random, trials: 4}\n"
    )


PLACES = {"name": ("name", 1), "model": ("task.model", 2), "train": ("task.data.train", 2)}
LINKS = [("model", "link"), ("train", "link.jsonl")]


@pytest.mark.parametrize(("key", "text"), [*((key, name) for key in PLACES for name in NAMES.values()), *LINKS])
def test_a_hostile_name_in_a_spec_is_refused_at_its_place(site: Site, key: str, text: str):
    before, rows = everything(site), site.snapshot()
    for path in ("/v1/sweeps", "/v1/plan"):
        body = problem_of(site.client().post(path, content=spec_with(**{key: text}), headers=YAML), 422)
        assert PLACES[key] in [(fault["path"], fault["line"]) for fault in body["faults"]], body["detail"]
        assert str(site.home.parent) not in body["detail"]
        assert "root:x:" not in body["detail"]
    assert everything(site) == before
    assert site.snapshot() == rows


@pytest.mark.parametrize("entrypoint", ["os:system", "posix:system", "builtins:eval", "fine.tasks:make.__globals__"])
def test_code_that_the_administrator_did_not_name_is_not_run(site: Site, entrypoint: str):
    canary = site.home.parent / "canary"
    options = f"options: {{command: 'touch {canary}'}}"
    task = f"task: {{type: python, entrypoint: '{entrypoint}', {options}}}"
    spec = TINY_SPEC.replace("task: {type: digits}", task)
    for path in ("/v1/sweeps", "/v1/plan"):
        body = problem_of(site.client().post(path, content=spec, headers=YAML), 422)
        assert [fault["path"] for fault in body["faults"]] == ["task.entrypoint"]
    assert not canary.exists()
    assert site.planner.planned == 2


class Canary:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl"])
def test_a_pickle_in_place_of_weights_is_refused_unread(site: Site, file: str):
    canary = site.home.parent / "canary"
    model = site.home.parent / "models" / "m"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / file).write_bytes(pickle.dumps(Canary(canary)))
    (site.home.parent / "data" / "d.jsonl").write_text('{"text": "a"}\n')
    for path in ("/v1/sweeps", "/v1/plan"):
        body = problem_of(site.client().post(path, content=spec_with(), headers=YAML), 422)
        assert [fault["path"] for fault in body["faults"]] == ["task.model"]
        assert f"{file} in m" in body["detail"]
    assert not canary.exists()
    assert site.store.page(limit=9)[0].sweep == "one"


@pytest.mark.parametrize("key", ["", "a b", "\x7f", "k" * 256, "ä"])
def test_an_idempotency_key_is_printable_and_short(site: Site, key: str):
    problem_of(posted(site.client(), headers={"Idempotency-Key": key.encode("latin-1")}), 422)  # type: ignore[dict-item]
