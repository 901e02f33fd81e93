"""A job's own work, without Ray: packs between rungs, divergence, faults, certificates; the digits task under it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.layer import BankedLayer
from sweeps.collapse import Certificate
from sweeps.events import Certified, TrialTold
from sweeps.jobs import JobOrder, JobResult, MemberOrder
from sweeps.plan import trial_space
from sweeps.reduction import Reduction
from sweeps.search import PackSearcher
from sweeps.space import Configuration
from sweeps.spec import SweepSpec, parse_spec
from sweeps.tasks import load_task
from sweeps.tasks.digits import DigitsTask
from sweeps.training import JobRunner, _kind
from tests.support import ROOT, SMALL_SPEC

GOOD = Configuration(rank=4, alpha=16.0, lr=0.02, init_scale=2.0)
OTHER = Configuration(rank=8, alpha=16.0, lr=0.01, init_scale=1.0)


def spec_of(**train: Any) -> SweepSpec:
    spec = parse_spec(SMALL_SPEC, "small.yaml").spec
    return spec.model_copy(update={"train": spec.train.model_copy(update=train)})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def runner(cache: Path, tmp_path: Path):
    """Runs an order of these configurations on a fresh worker, unless one is given."""

    def run(
        *configurations: Configuration,
        start: int = 0,
        stop: int = 10,
        checkpoints: tuple[str | None, ...] = (),
        spec: SweepSpec | None = None,
        work: str = "train",
        twins: tuple[Configuration, ...] = (),
        worker: JobRunner | None = None,
    ) -> JobResult:
        spec = spec or spec_of()
        paths = checkpoints or (None,) * len(configurations)
        class_id = Reduction.of(spec).class_id
        members = tuple(
            MemberOrder(trial=i, configuration=c, class_id=class_id(c), checkpoint=path)
            for i, (c, path) in enumerate(zip(configurations, paths, strict=True))
        )
        order = JobOrder(
            job=0,
            work=work,
            spec=spec.model_dump(mode="json"),
            cache=str(cache),
            checkpoints=str(tmp_path / "checkpoints"),
            members=members,
            twins=twins,
            start=start,
            stop=stop,
        )
        return (worker or JobRunner()).run(JobOrder.model_validate_json(order.model_dump_json()))

    return run


def test_a_job_is_a_pure_function_of_its_order(runner):
    worker = JobRunner()
    first = runner(GOOD, OTHER, worker=worker)
    again = runner(GOOD, OTHER, worker=worker)
    assert first.error is None
    assert first.members == again.members == runner(GOOD, OTHER).members


def test_two_jobs_from_rung_to_rung_are_the_run_in_one_piece(runner):
    whole = runner(GOOD, stop=20)
    half = runner(GOOD, stop=10)
    rest = runner(GOOD, start=10, stop=20, checkpoints=(half.members[0].checkpoint,))
    assert rest.members[0].metrics == whole.members[0].metrics
    assert half.members[0].train_losses + rest.members[0].train_losses == whole.members[0].train_losses


def test_a_member_reports_the_same_whoever_its_pack_mates_are(runner):
    alone = runner(GOOD).members[0].metrics["eval/loss"]
    packed = runner(OTHER, GOOD, OTHER).members[1].metrics["eval/loss"]
    assert packed == pytest.approx(alone, rel=1e-5)


def test_a_diverged_member_is_told_so_and_its_pack_mates_are_not_touched(runner):
    wild = Configuration(rank=4, alpha=16.0, lr=1e6, init_scale=1.0)
    spec = spec_of(optimizer="sgd")
    calm = Configuration(rank=4, alpha=16.0, lr=1e-3, init_scale=1.0)
    result = runner(wild, calm, spec=spec)
    lost, kept = result.members
    assert lost.diverged_at is not None
    assert 1 < lost.diverged_at <= 10
    assert lost.checkpoint is None
    assert lost.metrics == {}
    assert kept.diverged_at is None
    assert kept.metrics["eval/loss"] == pytest.approx(runner(calm, spec=spec).members[0].metrics["eval/loss"], rel=1e-5)


def test_a_fault_is_part_of_the_result_and_the_worker_goes_on(runner):
    worker = JobRunner()
    broken = runner(GOOD, start=10, stop=20, checkpoints=("no/such/place",), worker=worker)
    assert broken.error == "error"
    assert "no checkpoint in" in broken.detail
    assert runner(GOOD, worker=worker).error is None


def test_memory_that_torch_cannot_have_on_the_cpu_is_told_from_other_errors():
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as full:
        torch.empty(2**60, dtype=torch.uint8)
    assert _kind(full.value) == "oom"
    assert _kind(RuntimeError("no such file")) == _kind(ValueError("DefaultCPUAllocator")) == "error"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_running_out_of_memory_is_a_kind_of_its_own(runner, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def full(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr("sweeps.training.train_members", full)
    assert runner(GOOD).error == "oom"


_SCARCE = """

class Scarce(TeacherTask):
    most = 2
    seen = []

    def losses_K(self, indices, members):
        losses_K = super().losses_K(indices, members)
        if members > self.most:
            self.seen.append(weakref.ref(losses_K.untyped_storage()))
            raise torch.OutOfMemoryError(f"CUDA out of memory with {members} members")
        return losses_K


def make_scarce(**where):
    task = make_task(**where)
    return Scarce(task.model, task._train[0].repeat(2, 1), task._train[1].repeat(2))
"""


@pytest.fixture
def scarce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepSpec:
    """A spec over a task that has no memory for more than two members."""
    source = "import weakref\n" + (ROOT / "examples" / "custom_task.py").read_text() + _SCARCE
    source = source.replace("from __future__ import annotations\n", "")
    name = "scarce_" + tmp_path.name.replace("-", "_")
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (ROOT / "examples" / "custom.yaml").read_text()
    text = text.replace("custom_task:make_task", f"{name}:make_scarce").replace("  options: {change: 0.5}\n", "")
    return parse_spec(text.replace("steps: 100", "steps: 8").replace("steps: 50", "steps: 4"), "scarce.yaml").spec


@pytest.mark.parametrize("order", ["reproducible", "asynchronous"])
def test_a_sweep_goes_on_in_smaller_packs_where_memory_runs_out(order: str, scarce: SweepSpec, cache: Path, tmp_path):
    spec = scarce.model_copy(update={"search": scarce.search.model_copy(update={"order": order})})
    reduction, events = Reduction.of(spec), []
    searcher = PackSearcher(
        spec,
        reduction,
        trial_space(spec, reduction),
        trials=16,
        rungs=(4, 8),
        pack=8,
        lanes=1,
        cache=cache,
        checkpoints=str(tmp_path / "checkpoints"),
        append=events.extend,
    )
    worker, sizes = JobRunner(), []
    while (order_ := searcher.suggest()) is not None:
        result = worker.run(order_)
        sizes.append((len(order_.members), result.error))
        searcher.complete(result)
    assert searcher.finished
    assert sizes[:3] == [(8, "oom"), (4, "oom"), (2, None)]
    assert {size for size, error in sizes[2:]} <= {1, 2}
    assert [error for _, error in sizes].count("oom") == 2
    told = [event for event in events if isinstance(event, TrialTold)]
    assert [event.state for event in told] == ["finished"] * 16
    assert any(isinstance(event, Certified) for event in events)


def test_a_worker_that_ran_out_of_memory_lets_go_of_it_and_gives_the_model_back(scarce: SweepSpec, runner):
    worker = JobRunner()
    full = runner(*[GOOD] * 3, spec=scarce, worker=worker, stop=2)
    assert full.error == "oom"
    assert "CUDA out of memory with 3 members" in full.detail
    task = worker._loaded[1]
    (held,) = task.seen
    assert held() is None
    assert not any(isinstance(module, BankedLayer) for module in task.model.modules())
    assert runner(*[GOOD] * 2, spec=scarce, worker=worker, stop=2).error is None


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_certificate_holds_to_the_last_bit_at_powers_of_four(runner, optimizer: str):
    spec = spec_of(optimizer=optimizer, clip_norm=1.0)
    reduction = Reduction.of(spec)
    point = Configuration(rank=4, alpha=16.0, lr=0.01, init_scale=2.0, weight_decay=0.1)
    twins = tuple(reduction.lift(point, alpha) for alpha in (4.0, 8.0, 64.0))
    result = runner(point, work="certify", twins=twins, stop=15, spec=spec)
    assert result.error is None, result.detail
    certificate = Certificate.model_validate(result.certificate)
    assert certificate.holds
    assert [twin.verdict for twin in certificate.twins] == [
        "bit-identical",
        "identical up to rounding",
        "bit-identical",
    ]
    assert certificate.losses[0] != certificate.losses[-1]


def test_a_certificate_refuses_what_is_no_twin(runner):
    off = Configuration(rank=4, alpha=64.0, lr=GOOD.lr / 2 * 1.01, init_scale=GOOD.init_scale / 2)
    certificate = Certificate.model_validate(runner(GOOD, work="certify", twins=(off,), stop=15).certificate)
    assert [twin.verdict for twin in certificate.twins] == ["different"]
    assert not certificate.holds
    assert certificate.twins[0].first_step is not None


# -- the digits task ---------------------------------------------------------------------------------------------------


def load(cache: Path, seed: int = 0) -> DigitsTask:
    return DigitsTask.load(seed, cache=cache, device=torch.device("cpu"), dtype=torch.float32)


def test_the_base_network_is_made_from_its_seed_alone_and_kept(tmp_path: Path):
    first, again, other = load(tmp_path / "a"), load(tmp_path / "b"), load(tmp_path / "b", seed=1)
    weights = [task.model.state_dict() for task in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    kept = load(tmp_path / "a").model.state_dict()
    assert all(torch.equal(weights[0][name], kept[name]) for name in kept)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "digits-base-0.safetensors",
        "digits-base-1.safetensors",
    ]


def test_the_base_network_is_frozen_and_does_not_read_turned_digits(cache: Path):
    task = load(cache)
    assert not any(parameter.requires_grad for parameter in task.model.parameters())
    (metrics,) = task.evaluate(1)
    assert metrics["eval/accuracy"] < 0.3  # there is something to adapt


def test_members_see_the_same_rows_in_their_own_order(cache: Path):
    task = load(cache)
    losses = task.losses_K(torch.tensor([0, 1, 2]), members=3)
    assert losses.shape == (3,)
    assert torch.equal(losses[0], losses[1])


def test_a_task_reports_what_its_spec_says_it_does(cache: Path):
    spec = spec_of()
    task = load_task(spec, cache=cache, device=torch.device("cpu"))
    assert set(task.evaluate(1)[0]) == set(spec.task.metrics)
