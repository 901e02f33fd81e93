"""Every row of the table of optimizers, in every number format and gauge; see lora_core/conformance.py."""

import functools

import pytest
import torch

from lora_core.conformance import ACCUMULATED, CLIPPED, Case, cases, rows, same_bits, table
from lora_core.gauge import Gauge
from lora_core.laws import LAWS
from tests.documents import script

CASES = [case for law in LAWS.values() for case in cases(law)]

# Rprop looks at the sign of a gradient only, so it cannot tell whether it was clipped.
CHANGES_NOTHING = {("rprop", "clip_norm")}


@functools.cache
def held(case: Case) -> dict[Gauge, bool]:
    return {gauge: case.holds(gauge) for gauge in case.gauges}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_twins_in_every_gauge_are_bit_identical(case):
    assert held(case) == dict.fromkeys(case.gauges, True)


@pytest.mark.parametrize("regimen", [CLIPPED, ACCUMULATED], ids=str)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_a_twin_with_one_quantity_left_where_it_was_is_another_run(law, regimen):
    case = Case(law, {}, torch.float32, regimen)
    for name, point in case.near_twins(Gauge(2.0, 2.0)).items():
        assert same_bits(case.trajectory, case.run(point)) == ((law.name, name) in CHANGES_NOTHING), name


def test_the_table_counts_every_twin_that_was_trained():
    found = {case: {gauge: index > 0 for index, gauge in enumerate(case.gauges)} for case in cases(LAWS["muon"])}
    assert table(found).splitlines()[2:] == [
        "| muon | 16 of 19 | 12 of 14 | 12 of 14 |",
        "| muon (nesterov=False) | 12 of 14 | 12 of 14 | refused |",
        "| muon (adjust_lr_fn=match_rms_adamw) | 12 of 14 | 12 of 14 | 12 of 14 |",
    ]
    assert [row.name for row in rows(found)] == [
        "muon",
        "muon (nesterov=False)",
        "muon (adjust_lr_fn=match_rms_adamw)",
    ]


def test_the_page_on_the_law_says_what_was_found_here():
    page = script("make_law")
    text = page.PATH.read_text()
    parts = page.parts_of({case: held(case) for case in CASES})
    assert text == page.document(text, parts), "docs/law.md is out of date: make docs"
