"""The dispute of docs/law.md; tests/lora_core/test_conformance.py holds the rest of the page to what it finds."""

from __future__ import annotations

import re

import pytest
import torch

from tests.documents import script

law = script("make_law")
STEPS = 30


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return law.dispute(tmp_path_factory.mktemp("digits"), steps=STEPS)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("optimizer", "same", "near", "others"),
    [
        ("sgd", "lr x 4, init x 2", set(), {"base", "lr x 4", "lr x 2, init x 2"}),
        ("adamw", "lr x 2, init x 2, eps / 2", {"lr x 2, init x 2"}, {"base", "lr x 4", "lr x 4, init x 2"}),
    ],
)
def test_alpha_alone_is_exactly_one_motion_of_lr_and_init(
    runs: dict[str, list], optimizer: str, same: str, near: set[str], others: set[str]
):
    of = {run.label: run for run in runs[optimizer]}
    assert of.keys() == {"alpha x 4", same} | near | others
    assert {label for label, run in of.items() if run.bit_identical} == {"alpha x 4", same}
    assert of[same].losses == of["alpha x 4"].losses
    assert len(of[same].losses) == STEPS
    for label in others:
        assert max(law.distances(of[label], of["alpha x 4"])) > 0.1, label
    for label in near:
        assert 0 < max(law.distances(of[label], of["alpha x 4"])) < 1e-3, label


def test_the_page_tells_these_runs(runs: dict[str, list]):
    """But for the numbers, which depend on the processor."""

    def in_words(text: str) -> str:
        # Steps are fewer here, and lines break elsewhere.
        return " ".join(re.sub(r"\| [0-9.e+-]+ ", "| # ", re.sub(r"\d+ steps", "# steps", text)).split())

    assert in_words(law.dispute_table(runs)) in in_words(law.PATH.read_text()), "docs/law.md is out of date: make docs"


def test_the_plot_is_the_same_text_every_time(runs: dict[str, list]):
    plot = law.dispute_plot(runs)
    assert plot == law.dispute_plot(runs)
    assert plot.startswith("<svg")
    assert law.PLOT.read_text().startswith("<svg")


def test_a_page_without_the_place_for_a_part_is_refused():
    with pytest.raises(ValueError, match=r"must have one line .* law -->'; found 0"):
        law.document("# The law\n", {"law": "new"})
    page = "before\n<!-- made by docs/make_law.py: law -->\nold\n<!-- end -->\nafter\n"
    with pytest.raises(ValueError, match="found 2"):
        law.document(page * 2, {"law": "new"})
    once = law.document(page, {"law": "new"})
    assert once == "before\n<!-- made by docs/make_law.py: law -->\n\nnew\n\n<!-- end -->\nafter\n"
    assert law.document(once, {"law": "new"}) == once
