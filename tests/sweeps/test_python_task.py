"""Tasks that a user's own function makes: the example as a sweep runs it, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeps.collapse import Certificate
from sweeps.errors import SpecError
from sweeps.jobs import JobOrder, JobResult, MemberOrder
from sweeps.preflight import preflight
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SpecDocument, SweepSpec, load_spec, parse_spec
from sweeps.tasks import load_task
from sweeps.training import JobRunner
from tests.support import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = ROOT / "examples" / "custom.yaml"
POINTS = [Configuration(rank=rank, alpha=16.0, lr=0.01, init_scale=2.0) for rank in (2, 8)]


def run(spec: SweepSpec, folder: Path, *points: Configuration, **order: Any) -> JobResult:
    members = tuple(MemberOrder(trial=i, configuration=point, class_id="") for i, point in enumerate(points))
    places = {"cache": str(folder / "cache"), "checkpoints": str(folder / "checkpoints")}
    work: dict[str, Any] = {"work": "train", "start": 0, "stop": 30} | order
    made = JobOrder(job=0, spec=spec.model_dump(mode="json"), members=members, **places, **work)
    result = JobRunner().run(JobOrder.model_validate_json(made.model_dump_json()))
    assert result.error is None, result.detail
    return result


def test_the_example_learns_packed_as_alone(tmp_path: Path):
    spec = load_spec(EXAMPLE).spec
    before = load_task(spec, cache=tmp_path, device=torch.device("cpu")).evaluate(1)[0]["eval/loss"]
    for point, member in zip(POINTS, run(spec, tmp_path, *POINTS).members, strict=True):
        (alone,) = run(spec, tmp_path, point).members
        assert member.metrics["eval/loss"] == pytest.approx(alone.metrics["eval/loss"], rel=1e-5)
        assert member.metrics["eval/loss"] < before / 2


def test_the_examples_twins_are_bit_identical(tmp_path: Path):
    spec = load_spec(EXAMPLE).spec
    twins = tuple(Reduction.of(spec).lift(POINTS[0], alpha) for alpha in (4.0, 64.0))
    found = Certificate.model_validate(run(spec, tmp_path, POINTS[0], work="certify", twins=twins).certificate)
    assert [twin.verdict for twin in found.twins] == ["bit-identical"] * 2


def test_options_reach_the_function(tmp_path: Path):
    spec = load_spec(EXAMPLE).spec
    other = spec.model_copy(update={"task": spec.task.model_copy(update={"options": {"change": 0.0}})})
    losses = [
        load_task(each, cache=tmp_path, device=torch.device("cpu")).evaluate(1)[0]["eval/loss"]
        for each in (spec, other)
    ]
    assert losses[1] == 0 < losses[0]


# -- refusals ----------------------------------------------------------------------------------------------------------

_MODULE = """
class Task:
    n_samples = 3

def make(**_):
    return Task()

def takes_nothing():
    return None

number = 3
"""


def document(folder: Path, entrypoint: str) -> SpecDocument:
    text = EXAMPLE.read_text().replace("custom_task:make_task", entrypoint).replace("{change: 0.5}", "{}")
    return parse_spec(text, str(folder / "custom.yaml"))


@pytest.mark.parametrize(
    ("entrypoint", "words"),
    [
        (
            "no_such_module_of_mine:make",
            r"5: task\.entrypoint: required a module in .*; found no module no_such",
        ),
        ("module_of_mine:mak", "a function of module_of_mine; found no mak in .*module_of_mine.py"),
        ("module_of_mine:number", "a function of module_of_mine; found no number in"),
        (
            "module_of_mine:make",
            "a function that returns a task, .*; found a Task without model, data, most_rows",
        ),
    ],
)
def test_an_entrypoint_that_makes_no_task_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entrypoint: str, words: str
):
    monkeypatch.setattr("sys.path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "module_of_mine", raising=False)
    (tmp_path / "module_of_mine.py").write_text(_MODULE)
    made = document(tmp_path, entrypoint)
    with pytest.raises(SpecError, match=words):
        preflight(made, Reduction.of(made.spec), tmp_path / "cache")


def test_what_goes_wrong_inside_the_users_code_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.path", ["", *sys.path])
    (tmp_path / "broken_module_of_mine.py").write_text("import no_such_dependency\n")
    made = document(tmp_path, "broken_module_of_mine:make")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        preflight(made, Reduction.of(made.spec), tmp_path / "cache")


def test_a_task_must_report_the_metric_that_is_searched_for(tmp_path: Path):
    text = EXAMPLE.read_text().replace("  options:", "  metrics: {eval/error: minimize}\n  options:")
    spec = parse_spec(text + "metric: {name: eval/error}\n", str(EXAMPLE)).spec
    with pytest.raises(AssertionError, match=r"the task must report metric\.name, eval/error; found eval/loss"):
        run(spec, tmp_path, POINTS[0])
