"""Heads through a sweep: a learning rate of their own, which the reduction keeps and alpha does not move."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.adapter import Member
from lora_core.gauge import FactorSettings
from lora_core.optimizers import PackOptimizer
from sweeps.certifying import ClassOrder, certify
from sweeps.class_choice import read_configuration
from sweeps.errors import InputError, SpecError
from sweeps.jobs import JobOrder, JobResult, MemberOrder
from sweeps.preflight import preflight, task_loader
from sweeps.recipe import bank_of, optimizer_of, steps_of
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SpecDocument, parse_spec
from sweeps.training import JobRunner
from tests.support import ROOT
from tests.sweeps.support import make_reduction

MODULE = """
import copy

from examples.custom_task import TeacherTask, make_task


class Headed(TeacherTask):
    heads = ("4",)


def make(*, heads=True, **given):
    task = make_task(**given)
    return Headed(task.model, torch_rows(task, 0), torch_rows(task, 1)) if heads else task


def torch_rows(task, part):
    import torch

    return torch.stack([task._train[part], task._held_out[part]], dim=1).flatten(0, 1)
"""
SPEC = """
name: headed
task: {{type: python, entrypoint: headed_task_of_mine:make, options: {options}}}
lora: {{target_modules: ["0", "2"]}}
parameters: {{rank: 4, lr: {{min: 1e-3, max: 1e-1}}, alpha: {{values: [4, 16, 64]}}{parameters}}}
train: {{steps: 30, batch_size: 16, clip_norm: 1}}
"""
POINT = Configuration(rank=4, alpha=16.0, lr=0.01, head_lr=0.003)


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "headed_task_of_mine.py").write_text(MODULE)
    monkeypatch.setattr("sys.path", [str(ROOT), *sys.path])
    monkeypatch.delitem(sys.modules, "headed_task_of_mine", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def document(folder: Path, parameters: str = ", head_lr: {min: 1e-4, max: 1e-2}", options: str = "{}") -> SpecDocument:
    return parse_spec(SPEC.format(parameters=parameters, options=options), str(folder / "headed.yaml"))


def run(made: SpecDocument, folder: Path, *points: Configuration) -> JobResult:
    members = tuple(MemberOrder(trial=i, configuration=point, class_id="") for i, point in enumerate(points))
    places: dict[str, Any] = {"cache": str(folder / "cache"), "checkpoints": str(folder / "checkpoints")}
    order = JobOrder(
        job=0, work="train", spec=made.spec.model_dump(mode="json"), members=members, start=0, stop=30, **places
    )
    result = JobRunner().run(JobOrder.model_validate_json(order.model_dump_json()))
    assert result.error is None, result.detail
    return result


def test_a_member_with_a_head_ends_as_it_does_alone_and_its_head_was_trained(tmp_path: Path):
    made = document(tmp_path)
    others = (replace(POINT, rank=2, head_lr=0.01), POINT, replace(POINT, head_lr=1e-9))
    packed = run(made, tmp_path, *others).members
    (alone,) = run(made, tmp_path, POINT).members
    losses = [member.metrics["eval/loss"] for member in packed]
    assert losses[1] == pytest.approx(alone.metrics["eval/loss"], rel=1e-5)
    assert losses[1] != pytest.approx(losses[2], rel=0.01)


def test_alpha_does_not_move_a_heads_settings():
    parameters = "rank: 4, lr: {values: [0.1, 0.2]}, alpha: {values: [4, 16]}, head_lr: 0.5"
    reduction = make_reduction(parameters, train="eps: 1e-6")
    points = [reduction.point(Configuration(4, alpha, 0.1, head_lr=0.5)) for alpha in (4.0, 16.0)]
    assert [point.head for point in points] == [FactorSettings(0.5, 0.0, {"eps": 1e-6})] * 2
    assert points[0].a.eps != points[1].a.eps
    assert reduction.point(Configuration(4, 4.0, 0.1)).head is None


@pytest.mark.parametrize("ratio", ["", ", lr_ratio: {values: [1, 4]}"], ids=["shared", "two-parameter"])
def test_every_head_lr_has_the_classes_of_the_grid_without_it(ratio):
    grid = (
        "rank: {values: [2, 4]}, lr: {values: [0.1, 0.2]}, alpha: {values: [4, 16, 64]}, init_scale: {values: [1, 2]}"
    )
    without = make_reduction(grid + ratio)
    reduction = make_reduction(f"{grid}{ratio}, head_lr: {{values: [0.01, 0.03]}}")
    expected = {
        frozenset(2 * index + place for index in found.members) for found in without.classes for place in (0, 1)
    }
    assert {frozenset(found.members) for found in reduction.classes} == expected
    assert len({found.id for found in reduction.classes}) == 2 * len(without.classes)
    for found in reduction.classes:
        assert {reduction.class_id(member) for member in found.configurations} == {found.id}


def test_twins_with_a_head_are_bit_identical_and_another_head_lr_is_told_by_its_name(tmp_path: Path):
    made = document(tmp_path)
    reduction = Reduction.of(made.spec)
    twins = reduction.twins(POINT)
    assert {(twin.alpha, twin.head_lr) for twin in twins} == {(4.0, 0.003), (64.0, 0.003)}
    wrong = replace(twins[0], head_lr=0.006)
    task = task_loader(tmp_path)(made.spec)
    found = certify(made.spec, task, [ClassOrder("c-1", POINT, (*twins, wrong))], steps=20)
    verdicts = [(twin.verdict, twin.cause) for twin in next(iter(found)).twins]
    assert [verdict for verdict, _ in verdicts] == ["bit-identical", "bit-identical", "different"]
    assert verdicts[2][1].startswith("The cause is lr of the head off: with that alone put right")


def test_merged_weights_are_the_member_in_the_models_own_layers(tmp_path: Path):
    made = document(tmp_path)
    task, reduction = task_loader(tmp_path)(made.spec), Reduction.of(made.spec)
    members = [Member(reduction.point(point), 0) for point in (POINT, replace(POINT, rank=2, alpha=4.0))]
    with bank_of(made.spec, task, members) as bank:
        list(steps_of(made.spec, task, PackOptimizer(bank, optimizer_of(made.spec)), start=0, stop=30))
        trained, merged = task.evaluate(2), [bank.merged_weights(k) for k in range(2)]
    assert {"0.weight", "2.weight", "4.weight", "4.bias"} == set(merged[0])
    for metrics, weights in zip(trained, merged, strict=True):
        fresh = task_loader(tmp_path)(made.spec)
        fresh.model.load_state_dict(dict(fresh.model.state_dict()) | weights)
        assert fresh.evaluate(1)[0] == pytest.approx(metrics, rel=1e-5)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_head_without_a_learning_rate_is_refused_and_the_other_way_round(tmp_path: Path):
    made = document(tmp_path, parameters="")
    with pytest.raises(SpecError, match=r"parameters\.head_lr: required a learning rate for 4, .*such as \{min"):
        preflight(made, Reduction.of(made.spec), tmp_path / "cache")
    made = document(tmp_path, options="{heads: false}")
    with pytest.raises(SpecError, match=r"parameters\.head_lr: required a task with a head; found .*or leave head_lr"):
        preflight(made, Reduction.of(made.spec), tmp_path / "cache")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "task: {type: digits}\nlora: {target_modules: [fc1]}\nparameters: {rank: 2, lr: 0.1, head_lr: 0.1}",
            r"4: parameters\.head_lr: required none, for digits trains no head; found 0\.1; remove it",
        ),
        (
            "task: {type: python, entrypoint: a:b}\nlora: {target_modules: [fc1]}\n"
            "parameters: {rank: 2, lr: 0.1, head_lr: {values: [0, 0.1]}}",
            r"parameters\.head_lr: required learning rates above 0; found \{values: \[0\.0, 0\.1\]\}",
        ),
        (
            "task: {type: python, entrypoint: a:b}\nlora: {target_modules: [fc1]}\n"
            "parameters: {rank: 2, lr: 0.1, head_lr: {min: 0, max: 0.1}}",
            r"parameters\.head_lr\.min: required a number above 0",
        ),
        (
            "task: {type: python, entrypoint: a:b}\nlora: {target_modules: [fc1]}\n"
            "parameters: {rank: 2, lr: 0.1, head_lr: 0.1}\ntrain: {optimizer: muon}",
            r"parameters\.head_lr: required none, for muon takes matrices only; found 0\.1; a head has vectors",
        ),
    ],
)
def test_a_head_lr_that_cannot_be_is_refused_with_the_spec(spec: str, words: str):
    with pytest.raises(SpecError, match=words):
        parse_spec(f"name: x\n{spec}\n", "x.yaml")


def test_a_configuration_names_a_head_lr_where_there_is_a_head_and_only_there():
    with_head = make_reduction("rank: 4, lr: 0.1, alpha: 16, head_lr: {min: 0.01, max: 0.1}")
    assert read_configuration(with_head, "rank=4,head_lr=0.02").head_lr == 0.02
    with pytest.raises(InputError, match=r"head_lr must be above 0, for this task trains a head; found 0 in"):
        read_configuration(with_head, "rank=4,head_lr=0")
    without = make_reduction("rank: 4, lr: 0.1, alpha: 16")
    assert read_configuration(without, "rank=4,head_lr=0").head_lr == 0
    with pytest.raises(InputError, match=r"head_lr must be 0, for no head is trained; found 0\.1 in"):
        read_configuration(without, "rank=4,head_lr=0.1")
