"""Models compiled by torch.compile: the same losses up to rounding, and graphs that are used again by other packs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo.utils

from sweeps.errors import SpecError
from sweeps.jobs import JobOrder, JobResult, MemberOrder
from sweeps.preflight import preflight
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SweepSpec
from sweeps.training import JobRunner
from tests.sweeps.hf_support import TEXTS, lm_document, make_gpt2, write_jsonl

# Of torch's own modules as they are imported, and of what Dynamo looks at where a graph begins.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
]

POINTS = [Configuration(rank=rank, alpha=16.0, lr=0.01, init_scale=2.0) for rank in (2, 4, 8)]


@pytest.fixture(scope="module", autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def order(spec: SweepSpec, folder: Path, points: list[Configuration]) -> JobOrder:
    return JobOrder(
        job=0,
        work="train",
        spec=spec.model_dump(mode="json"),
        cache=str(folder / "cache"),
        checkpoints=str(folder / "checkpoints"),
        members=tuple(MemberOrder(trial=i, configuration=point, class_id="") for i, point in enumerate(points)),
        start=0,
        stop=spec.train.steps,
    )


def losses(result: JobResult) -> list[float]:
    assert result.error is None, result.detail
    return [loss for member in result.members for _, loss in member.train_losses]


def test_a_compiled_model_has_the_same_losses_and_its_graphs_serve_other_packs(tmp_path: Path):
    data = f"train: '{write_jsonl(tmp_path / 'texts.jsonl', [{'text': text} for text in TEXTS])}'"
    model = make_gpt2(tmp_path / "gpt2", layers=1)  # compiling takes most of a second a graph
    plain = lm_document(model, data, targets="all-linear").spec
    compiled = lm_document(model, data, "torch_compile: true", targets="all-linear").spec
    expected, runner = JobRunner(), JobRunner()
    counts = torch._dynamo.utils.counters["stats"]
    graphs = []
    for points in (POINTS[:2], POINTS, POINTS[:2]):
        found = losses(runner.run(order(compiled, tmp_path / "compiled", points)))
        assert found == pytest.approx(losses(expected.run(order(plain, tmp_path / "plain", points))), rel=1e-4)
        graphs.append(counts["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[-2] <= 2 * graphs[0]


def test_without_a_compiler_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = f"train: '{write_jsonl(tmp_path / 'texts.jsonl', [{'text': text} for text in TEXTS])}'"
    document = lm_document(make_gpt2(tmp_path / "gpt2"), data, "torch_compile: true", targets="all-linear")
    monkeypatch.setattr("torch.compile", _fails)
    words = r"3: task\.torch_compile: required a compiler that torch can use; found no g\+\+ found; install"
    with pytest.raises(SpecError, match=words):
        preflight(document, Reduction.of(document.spec), tmp_path / "cache", whole=False)


def _fails(function: object) -> None:
    raise RuntimeError("no g++ found\nand much more")


def test_checkpointed_layers_are_not_compiled(tmp_path: Path):
    with pytest.raises(SpecError, match=r"task\.torch_compile: required false with gradient_checkpointing"):
        lm_document(tmp_path, "train: x.jsonl", "torch_compile: true, gradient_checkpointing: true")
