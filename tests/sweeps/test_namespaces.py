"""Sweeps over machines with addresses of their own, one of which is cut off from the others while it trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster_support import ray_cluster, until
from tests.network_support import Machine, network
from tests.sweeps.spread_sweep import sweep_on, undisturbed

# A node that does not answer for four seconds is asked again, and given up the third time: others are only slow.
QUICK = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
}

CUT_S = 30


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    with network(3) as made:
        yield made


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[int, tuple[Any, ...]]:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))


def test_half_a_minute_without_a_network_delays_a_sweep_and_changes_nothing(
    machines: list[Machine], expected: dict[int, tuple[Any, ...]], tmp_path: Path
):
    head, *workers = machines
    with ray_cluster(head.address, inside=head.inside) as cluster:
        nodes = cluster.join(*[worker.address for worker in workers], inside={w.address: w.inside for w in workers})
        run = ("spread.yaml", "--address", cluster.address)
        with sweep_on(tmp_path, *run, inside=head.inside, **cluster.access) as sweep:
            sweep.hold()
            sweep.wait_until_held_on(*nodes)
            workers[0].cut_off()
            sweep.let_go()
            time.sleep(CUT_S)  # the one thing that is about time
            assert sweep.process.poll() is None, sweep.said
            workers[0].plug_in()
            assert sweep.wait() == 0, sweep.said
        sweep.check_whole(expected)


def test_a_machine_that_was_given_up_and_comes_back_takes_jobs_again_once_it_is_started_anew(
    machines: list[Machine], expected: dict[int, tuple[Any, ...]], tmp_path: Path
):
    head, *workers = machines
    with ray_cluster(head.address, inside=head.inside, **QUICK) as cluster:
        insides = {worker.address: worker.inside for worker in workers}
        cut, other = cluster.join(*insides, inside=insides)
        run = ("spread.yaml", "--address", cluster.address)
        with sweep_on(tmp_path, *run, inside=head.inside, **cluster.access) as sweep:
            sweep.hold()
            sweep.wait_until_held_on(cut, other)
            workers[0].cut_off()
            sweep.until(sweep.lost)
            workers[0].plug_in()
            until(lambda: cut.process.poll() is not None)  # Ray ends a node that the others have given up
            (anew,) = cluster.join(cut.address, inside=insides)
            sweep.wait_until_held_on(anew)
            sweep.let_go()
            assert sweep.wait() == 0, sweep.said
        sweep.check_whole(expected)
