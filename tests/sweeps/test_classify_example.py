"""The example that makes its own encoder and classifies with it: much smaller, but all of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from sweeps.spec import SequenceClassificationTask
from sweeps.tasks.sequence_classification import SequenceClassificationTask as Classification
from tests.documents import script

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--steps", "12", "--width", "32", "--batch", "8", "--vocabulary", "400", "--files", "12"]
KINDS = ("code", "comment", "docstring", "message")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "classify"
    script("make_classify_model", "examples").main(["--output", str(folder), *SMALL])
    return folder


def test_the_samples_are_of_four_kinds_and_each_is_there_once(made: Path):
    rows = [
        json.loads(line) for name in ("train", "eval") for line in (made / f"{name}.jsonl").read_text().splitlines()
    ]
    assert Counter(row["label"] for row in rows).keys() == set(KINDS)
    assert len(set(Counter(row["label"] for row in rows).values())) == 1
    assert len({row["text"] for row in rows}) == len(rows)


def test_the_task_finds_what_its_script_made(made: Path, tmp_path: Path):
    data = {"train": str(made / "train.jsonl"), "eval": str(made / "eval.jsonl")}
    section = SequenceClassificationTask(
        type="sequence_classification", model=str(made / "model"), data=data, labels=KINDS, too_long="truncate"
    )
    task = Classification.load(section, cache=tmp_path, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    assert task.n_samples > 50
    assert task.heads == ("classifier",)
    (metrics,) = task.evaluate(1)
    assert 1.2 < metrics["eval/loss"] < 1.6  # four kinds, and nothing learned of them yet
