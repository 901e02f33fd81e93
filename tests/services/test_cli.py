"""The command line, in this process where no sweep has to run: results, messages and exit codes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from services.cli import main
from tests.conftest import FinishedSweep
from tests.support import SMALL_SPEC, Here, run_cli


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Here) -> Here:
    """Runs a command in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("LORA_SWEEPS_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return here


def spec_with(changes: dict[str, str]) -> str:
    text = SMALL_SPEC
    for old, new in changes.items():
        assert old in text, f"the small spec has no {old!r} to change"
        text = text.replace(old, new)
    return text


def line_of(text: str, needle: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), start=1) if needle in line)


BAD_SPECS = {
    "an unknown key": ({"init_scale": "init_scal"}, "init_scal", "did you mean 'init_scale'"),
    "a wrong type": ({"steps: 40": "steps: many"}, "steps: many", "train.steps: required an integer"),
    "no choices": ({"[2, 4, 8]": "[]"}, "rank", "parameters.rank"),
    "min above max": ({"{min: 1e-3, max: 1e-1}": "{min: 1, max: 0.1}"}, "lr", "parameters.lr"),
    "a log range from 0": ({"{min: 1e-3, max: 1e-1}": "{min: 0, max: 0.1}"}, "lr", "above 0"),
    "a rank beyond the layer": ({"[2, 4, 8]": "[2, 65]"}, "rank", "at most 64, the width of fc1"),
    "no such module": ({"[fc1, fc2]": "[fc1, q_proj]"}, "target_modules", "the linear layers are fc1, fc2, head"),
    "a batch beyond the data": ({"batch_size: 16": "batch_size: 5000"}, "batch_size", "the number of training samples"),
    "radam": ({"optimizer: adamw": "optimizer: radam"}, "train", "radam has no alpha equivalence: its warm-up phase"),
    "adafactor": ({"optimizer: adamw": "optimizer: adafactor"}, "train", "adafactor has no alpha equivalence"),
    "a metric the task has not": (
        {"search:": "metric: {name: eval/f1}\nsearch:"},
        "eval/f1",
        "eval/loss or eval/accuracy",
    ),
    "a grid of ranges": ({"method: tpe": "method: grid"}, "lr", "values, because search.method is grid"),
}


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("case", BAD_SPECS, ids=lambda case: case.replace(" ", "-"))
def test_a_bad_spec_is_refused_with_its_line_and_leaves_nothing(cli: Here, case: str, command: str):
    changes, needle, words = BAD_SPECS[case]
    text = spec_with(changes)
    Path("bad.yaml").write_text(text)
    done = cli(command, "bad.yaml")
    assert done.code == 2
    assert f"bad.yaml:{line_of(text, needle)}: " in done.err
    assert words in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not Path("mlflow.db").exists()
    assert json.loads(cli("list", "--json").out) == []


def test_all_faults_of_a_spec_come_at_once(cli: Here):
    Path("bad.yaml").write_text(
        spec_with({"init_scale": "init_scal", "steps: 40": "steps: 0", "name: small": "name: a b"})
    )
    done = cli("validate", "bad.yaml")
    assert done.code == 2
    assert "3 faults" in done.err
    listed = cli("validate", "bad.yaml", "--json")
    assert listed.code == 2
    faults = json.loads(listed.out)["faults"]
    assert [fault["path"] for fault in faults] == ["name", "parameters.init_scal", "train.steps"]


def test_init_writes_a_spec_that_validates_and_does_not_overwrite(cli: Here):
    assert cli("init").code == 0
    assert cli("validate", "sweep.yaml").out == "sweep.yaml: valid\n"
    assert json.loads(cli("validate", "sweep.yaml", "--json").out)["valid"] is True
    before = Path("sweep.yaml").read_text()
    again = cli("init")
    assert again.code == 2
    assert "is there already" in again.err
    assert Path("sweep.yaml").read_text() == before
    assert cli("init", "--force").code == 0


def test_schema_is_the_schema(cli: Here):
    schema = json.loads(cli("schema").out)
    assert schema["title"] == "lora-sweeps spec"
    assert "parameters" in schema["properties"]


def test_plan_promises_its_fields(cli: Here):
    Path("small.yaml").write_text(SMALL_SPEC)
    plan = json.loads(cli("plan", "small.yaml", "--json").out)
    assert plan["configurations"] is None
    assert plan["classes"] is None
    assert plan["dimensions"]["before"] == ["rank", "alpha", "lr", "init_scale"]
    assert plan["dimensions"]["after"] == ["rank", "lr", "init_scale"]
    assert plan["trials"] == 24
    assert plan["rungs"] == [10, 20, 40]
    assert plan["optimizer"] == "adamw"
    assert "lr / sqrt(k)" in plan["law"]
    assert 0 < plan["outside"]["share"] < 1
    assert plan["warnings"] == []
    assert plan["seconds"] > 0
    words = cli("plan", "small.yaml").out
    assert "rank, alpha, lr, init_scale -> rank, lr, init_scale" in words
    assert " s of training" in words


def test_plan_lists_every_class_of_a_grid(cli: Here):
    changes = {"{min: 1e-3, max: 1e-1}": "{values: [0.1, 0.05]}", "{min: 0.25, max: 4}": "{values: [1, 2]}"}
    Path("grid.yaml").write_text(spec_with({**changes, "[4, 8, 16, 32, 64]": "[4, 16]"}))
    plan = json.loads(cli("plan", "grid.yaml", "--json", "--classes", "--no-time").out)
    # alpha 16 with lr 0.05 and init scale 1 is alpha 4 with lr 0.1 and init scale 2, at each of three ranks.
    assert plan["configurations"] == 24
    assert plan["classes"] == 21 == len(plan["classes_with_members"])
    pairs = [found["members"] for found in plan["classes_with_members"] if len(found["members"]) == 2]
    assert len(pairs) == 3
    for pair in pairs:
        assert {(m["alpha"], m["lr"], m["init_scale"]) for m in pair} == {(4.0, 0.1, 2.0), (16.0, 0.05, 1.0)}
    assert plan["seconds"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run",), "either a SPEC or --resume"),
        (("run", "small.yaml", "--resume", "last"), "either a SPEC or --resume"),
        (("run", "--resume", "last", "--name", "x"), "--name names a new sweep"),
        (("run", "small.yaml", "--trials", "32"), "--trials goes with --resume"),
        (("run", "nosuch.yaml"), "found no such file"),
        (("run", "--resume", "nosuch"), "nosuch"),
        (("plan", "."), "found a directory"),
        (("plan", "small.yaml", "--classes"), "--classes goes with --json"),
        (("best", "last"), "no sweeps yet"),
        (("report", "last"), "no sweeps yet"),
        (("export", "last", "--format", "nosuch"), "--format must be one of peft"),
        (("export", "last", "--format", "peft"), "no sweeps yet"),
        (("run", "small.yaml", "--address", "ray://head.invalid:10001"), "ray://head.invalid:10001 must answer"),
        (("run", "small.yaml", "--address", "127.0.0.1:9"), "127.0.0.1:9 does not answer"),
        (("run", "small.yaml", "--address", "nonsense"), "HOST:PORT"),
    ],
)
def test_a_wrong_request_is_refused_in_words(cli: Here, arguments: tuple[str, ...], words: str):
    Path("small.yaml").write_text(SMALL_SPEC)
    done = cli(*arguments)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_a_state_directory_that_cannot_be_made_is_refused(cli: Here, monkeypatch: pytest.MonkeyPatch):
    Path("small.yaml").write_text(SMALL_SPEC)
    Path("file").write_text("")
    monkeypatch.setenv("LORA_SWEEPS_HOME", "file/state")
    done = cli("run", "small.yaml")
    assert done.code == 2
    assert "the state directory must be one that can be written" in done.err


def test_a_tracking_server_that_does_not_answer_is_refused_before_anything_is_made(cli: Here):
    Path("small.yaml").write_text(SMALL_SPEC + "tracking: {uri: 'http://127.0.0.1:9'}\n")
    done = cli("run", "small.yaml")
    assert done.code == 2
    assert "does not answer" in done.err
    assert json.loads(cli("list", "--json").out) == []


def test_reading_commands_make_no_state(cli: Here):
    assert cli("list").code == 0
    assert cli("best", "last").code == 2
    assert list(Path().iterdir()) == []


def test_list_best_and_report_speak_of_the_sweep(finished: FinishedSweep):
    sweep = finished.output["sweep"]
    listed = run_cli("list", cwd=finished.cwd).stdout
    assert sweep in listed
    assert "nats" in listed
    best = run_cli("best", sweep, cwd=finished.cwd).stdout
    assert "eval/loss" in best
    assert "nats" in best
    markdown = run_cli("report", sweep, cwd=finished.cwd).stdout
    assert markdown.startswith(f"# Collapse report: {sweep}")
    assert "bit-identical" in markdown
    html = run_cli("report", sweep, "--format", "html", cwd=finished.cwd).stdout
    assert html.count("<svg") == 3
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?https?:""", html), "the page must work offline"


def test_a_fault_of_ours_shows_the_trace_and_exits_1(cli: Here, monkeypatch: pytest.MonkeyPatch):
    def broken(_path: Path) -> None:
        raise RuntimeError("ours")

    Path("small.yaml").write_text(SMALL_SPEC)
    monkeypatch.setattr("sweeps.spec.load_spec", broken)
    monkeypatch.setattr(sys, "argv", ["lora-sweeps", "validate", "small.yaml"])
    with pytest.raises(RuntimeError, match="ours"):
        main()
