"""The example that makes its own language model: much smaller, but all of it; and the one for a cluster, as a spec."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sweeps.jobs import JobOrder, MemberOrder
from sweeps.preflight import member_bytes, most_members, preflight
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import CausalLmTask, SpecDocument, load_spec
from sweeps.training import JobRunner
from tests.documents import script
from tests.support import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--steps", "12", "--width", "32", "--batch", "8", "--vocabulary", "400", "--files", "6"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SpecDocument:
    """The spec, beside what its script made."""
    folder = tmp_path_factory.mktemp("examples")
    script("make_sft_model", "examples").main(["--output", str(folder / "sft"), *SMALL])
    shutil.copy(ROOT / "examples" / "sft.yaml", folder)
    return load_spec(folder / "sft.yaml")


def test_the_example_finds_what_its_script_made(made: SpecDocument, tmp_path: Path):
    fit = preflight(made, Reduction.of(made.spec), tmp_path / "cache")
    assert fit.task.n_samples > 20
    member = member_bytes(made.spec, Reduction.of(made.spec), fit)
    assert (most_members(made.spec, fit, member) or 0) >= 1


def test_the_example_learns(made: SpecDocument, tmp_path: Path):
    points = [Configuration(rank=rank, alpha=16.0, lr=0.02, init_scale=1.0) for rank in (2, 8)]
    order = JobOrder(
        job=0,
        work="train",
        spec=made.spec.model_dump(mode="json"),
        cache=str(tmp_path / "cache"),
        checkpoints=str(tmp_path / "checkpoints"),
        members=tuple(MemberOrder(trial=i, configuration=point, class_id="") for i, point in enumerate(points)),
        start=0,
        stop=20,
    )
    result = JobRunner().run(order)
    assert result.error is None, result.detail
    for member in result.members:
        losses = [loss for _, loss in member.train_losses]
        assert sum(losses[-5:]) < sum(losses[:5])
        assert 1 < member.metrics["eval/perplexity"] < 400


def test_the_cluster_example_asks_for_what_it_says():
    spec = load_spec(ROOT / "examples" / "llama.yaml").spec
    assert isinstance(spec.task, CausalLmTask)
    assert (spec.task.model, spec.task.data.train) == ("meta-llama/Llama-3.1-8B-Instruct", "HuggingFaceH4/no_robots")
    assert (spec.compute.workers, spec.compute.gpus_per_worker, spec.train.dtype) == (8, 1, "bfloat16")
