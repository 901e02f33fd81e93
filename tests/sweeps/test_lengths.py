"""Tokens of training samples: how many are trained a second, and batches of samples of like length."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sweeps.errors import SpecError
from sweeps.events import EVENT, JobEnded
from sweeps.export import FORMATS
from sweeps.jobs import JobOrder, JobResult, MemberOrder
from sweeps.recipe import indices_of
from sweeps.records import fold
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SpecDocument, SweepSpec
from sweeps.tasks import load_task
from sweeps.tasks.causal_lm import CausalLmTask
from sweeps.training import JobRunner
from tests.sweeps.export_points import lm_point_of
from tests.sweeps.hf_support import TEXTS, lm_document, make_model, write_jsonl
from tests.sweeps.support import as_records, make_created, make_spec
from tests.sweeps.test_export_formats import check_schema


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and texts of many lengths."""
    directory = tmp_path_factory.mktemp("lengths")
    make_model(directory / "model")
    write_jsonl(directory / "texts.jsonl", [{"text": text} for text in TEXTS])
    return directory


def document(place: Path, task: str = "", **train: object) -> SpecDocument:
    return lm_document(place / "model", f"train: '{place / 'texts.jsonl'}'", task, **train)


def load(spec: SweepSpec, place: Path) -> CausalLmTask:
    task = load_task(spec, cache=place / "cache", device=torch.device("cpu"))
    assert isinstance(task, CausalLmTask)
    return task


def run(spec: SweepSpec, place: Path, *lrs: float, start: int = 0, checkpoints: tuple[str, ...] = ()) -> JobResult:
    points = [Configuration(rank=2, alpha=16.0, lr=lr, init_scale=1.0) for lr in lrs]
    paths = checkpoints or (None,) * len(points)
    order = JobOrder(
        job=0,
        work="train",
        spec=spec.model_dump(mode="json"),
        cache=str(place / "cache"),
        checkpoints=str(place / "checkpoints"),
        members=tuple(
            MemberOrder(trial=i, configuration=point, class_id=Reduction.of(spec).class_id(point), checkpoint=path)
            for i, (point, path) in enumerate(zip(points, paths, strict=True))
        ),
        start=start,
        stop=start + 3,
    )
    result = JobRunner().run(order)
    assert result.error is None, result.detail
    return result


# -- tokens a second ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["", "packing: true, max_length: 64", "group_by_length: true"])
def test_a_row_is_as_long_as_its_tokens_and_padding_is_not_counted(place: Path, task: str):
    loaded = load(document(place, task).spec, place)
    starts, rows = loaded.data["train samples"], loaded.data["train rows"]
    assert loaded.lengths_S.tolist() == [int(starts[last] - starts[first]) for first, last in pairwise(rows)]
    assert len(loaded.lengths_S) == loaded.n_samples
    assert int(loaded.lengths_S.sum()) == len(loaded.data["train ids"])


def test_a_job_counts_the_tokens_of_its_batches_for_each_member(place: Path):
    spec = document(place, batch_size=3, accumulation=2).spec
    task = load(spec, place)
    indices = indices_of(spec, task)
    of_member = sum(int(task.lengths_S[indices(batch)].sum()) for batch in range(6))
    assert run(spec, place, 1e-3).tokens == of_member
    assert run(spec, place, 1e-3, 1e-2, 3e-3).tokens == 3 * of_member


def test_a_member_that_has_diverged_is_trained_on_nothing(place: Path):
    spec = document(place, optimizer="sgd").spec
    result = run(spec, place, 1e-3, 1e30)
    kept, lost = result.members
    assert (kept.diverged_at, lost.diverged_at) == (None, 2)
    task = load(spec, place)
    of_step = [int(task.lengths_S[indices_of(spec, task)(step)].sum()) for step in range(3)]
    assert result.tokens == sum(of_step) + of_step[0]


def test_a_sweep_trains_all_its_tokens_in_all_its_training_time():
    ended = [JobEnded(job=0, train_s=2.0, tokens=300), JobEnded(job=1, train_s=3.0, tokens=200)]
    others = [JobEnded(job=2, train_s=9.0), JobEnded(job=3, error="oom", setup_s=1.0)]
    created = make_created(make_spec())
    assert fold("s", as_records([created, *ended, *others])).tokens_per_s == 100.0
    assert fold("s", as_records([created, *others])).tokens_per_s is None


def test_a_ledger_from_before_tokens_were_counted_is_read():
    old = '{"kind": "job_ended", "job": 3, "setup_s": 1.0, "train_s": 2.0, "eval_s": 0.5, "wall_s": 4.0}'
    assert EVENT.validate_json(old) == JobEnded(job=3, setup_s=1.0, train_s=2.0, eval_s=0.5, wall_s=4.0)


# -- batches of like length --------------------------------------------------------------------------------------------


def padding(spec: SweepSpec, task: CausalLmTask) -> int:
    """Places of an epoch's batches that hold no token."""
    indices = indices_of(spec, task)
    rows = [task.lengths_S[indices(batch)] for batch in range(task.n_samples // spec.train.batch_size)]
    return sum(int((lengths.max() - lengths).sum()) for lengths in rows)


def test_grouped_batches_have_less_padding_and_an_epoch_the_same_samples(place: Path):
    plain, grouped = document(place, batch_size=2).spec, document(place, "group_by_length: true", batch_size=2).spec
    task = load(grouped, place)
    assert padding(grouped, task) < 0.5 * padding(plain, task)
    epochs = [torch.cat([indices_of(spec, task)(batch) for batch in range(11)]).sort() for spec in (plain, grouped)]
    assert torch.equal(epochs[0].values, epochs[1].values)


def test_a_grouped_run_in_two_jobs_is_the_run_in_one(place: Path):
    spec = document(place, "group_by_length: true").spec
    whole = JobRunner()
    first = run(spec, place, 1e-2)
    rest = run(spec, place, 1e-2, start=3, checkpoints=(first.members[0].checkpoint or "",))
    order = JobOrder(
        job=0,
        work="train",
        spec=spec.model_dump(mode="json"),
        cache=str(place / "cache"),
        checkpoints=str(place / "other"),
        members=(MemberOrder(trial=0, configuration=Configuration(2, 16.0, 1e-2), class_id=""),),
        start=0,
        stop=6,
    )
    (member,) = whole.run(order).members
    assert first.members[0].train_losses + rest.members[0].train_losses == member.train_losses
    plain = run(document(place).spec, place, 1e-2).members[0]
    assert plain.train_losses != first.members[0].train_losses


def test_rows_that_are_full_are_not_grouped(place: Path):
    words = r"3: task\.group_by_length: required false with packing, whose rows are full; found true"
    with pytest.raises(SpecError, match=words):
        document(place, "packing: true, group_by_length: true")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("form", FORMATS)
def test_every_trainer_is_told_that_batches_are_grouped(form: str, tmp_path: Path):
    exported = FORMATS[form](lm_point_of(", group_by_length: true"), tmp_path)
    if form not in ("peft", "hf_trainer"):  # whose check is on a network of other layers
        check_schema(form, tmp_path)
    assert [left.warns for left in exported.leftovers if left.name == "group_by_length"] == [False]
    key = {"axolotl": "group_by_length: true", "peft": None, "loralib": None}
    text = "\n".join(path.read_text() for path in exported.files)
    expected = key.get(form, 'train_sampling_strategy: "group_by_length"')
    assert expected is None or re.search(rf"^\s*{expected}$", text, re.M)
    exported = FORMATS[form](lm_point_of(), tmp_path / "plain")
    assert not any(left.name == "group_by_length" for left in exported.leftovers)
    assert not any("sampling_strategy" in path.read_text() for path in exported.files)
