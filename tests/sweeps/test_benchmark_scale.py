"""The benchmark of scale runs the real search, ledger and tracking to their end, and its simulated workers are fair."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.scale_cluster import Workers, in_use_at_best
from benchmarks.scale_sim import Setting, main, measure

FEW = Workers(6, node=3, job_s=60.0, fits=2, deaths=0.1, diverging=0.1, node_hours=0.2, losses=3)


def test_its_small_mode_measures_every_figure(capsys: pytest.CaptureFixture[str]):
    found = main(["--small", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    reproducible, asynchronous = found["sizes"]
    assert (reproducible["order"], asynchronous["order"]) == ("reproducible", "asynchronous")
    for size in (reproducible, asynchronous):
        assert size["trials"] == 40
        assert set(size["errors"]) == {"oom", "worker_died"}
        assert 0 < size["in_use"] <= 1
        # A trial is asked, reports and is told; jobs begin and end.
        assert size["events"] > 4
        assert size["ledger_bytes"] > 0
        assert size["growth"][-1]["trials"] == 40
    assert reproducible["mlflow_after_end_s"] > 0
    assert asynchronous["mlflow_ms"] is None


def test_it_says_what_an_ask_takes(capsys: pytest.CaptureFixture[str]):
    found = main(["--ask", "random", "tpe", "--known", "15", "30"])
    assert {method: list(known) for method, known in found["ask_s"].items()} == {"random": [15, 30], "tpe": [15, 30]}
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["random", "random", "tpe", "tpe"]
    assert all(line.endswith("ms an ask") for line in lines)


@pytest.mark.parametrize("order", ["reproducible", "asynchronous"])
def test_a_driver_that_takes_no_time_meets_the_same_cluster_again(order: str):
    setting = Setting(30, FEW, order=order, pack=4, free_driver=True)
    one, other = measure(setting), measure(setting)
    for name in ("jobs", "errors", "in_use", "makespan_s", "events", "transactions"):
        assert getattr(one, name) == getattr(other, name)
    assert one.errors["worker_died"] > 0


def test_a_driver_that_takes_its_time_leaves_workers_idle():
    quiet = replace(FEW, deaths=0.0, node_hours=float("inf"), fits=4)
    free = measure(Setting(30, quiet, pack=4, order="asynchronous", free_driver=True))
    slow = measure(Setting(30, quiet, pack=4, order="asynchronous", sync_ms=60_000.0))
    assert free.errors == slow.errors == {}
    assert slow.in_use < 0.5 < free.in_use
    assert slow.keeps_busy < 6 < free.keeps_busy


def test_the_reproducible_order_waits_for_the_slowest_unless_it_looks_further_ahead(
    capsys: pytest.CaptureFixture[str],
):
    assert in_use_at_best(10, 11, 0.0, 200) == pytest.approx(1.0)
    narrow, wide = (in_use_at_best(10, lanes, 0.5, 400) for lanes in (11, 40))
    assert narrow < 0.8 < 0.95 < wide <= 1
    main(["--lanes"])
    assert len(capsys.readouterr().out.splitlines()) == 10
