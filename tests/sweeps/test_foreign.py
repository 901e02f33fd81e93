"""`certify SPEC --optimizer`: the law of an optimizer that the table does not have, on the spec's own task."""

import json
from pathlib import Path

import pytest

from sweeps.errors import InputError
from sweeps.foreign import load_optimizer, middle_of
from tests.support import SMALL_SPEC, run_cli
from tests.sweeps.support import make_reduction

OWN = """
import torch

class SignDescent(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(p.grad.sign(), alpha=-group["lr"])

class Capped(SignDescent):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.clamp(-0.01, 0.01), alpha=-group["lr"])

def broken():
    raise RuntimeError
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "wrong.py").write_text("1 / 0")
    (tmp_path / "small.yaml").write_text(SMALL_SPEC)
    return tmp_path


def test_an_optimizer_of_ones_own_gets_its_law(here):
    done = run_cli("certify", "small.yaml", "--optimizer", "own:SignDescent", "--steps", "10", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["verdict"], found["steps"]) == ("bit-identical", 10)
    assert (found["powers"]["lr_power"], found["powers"]["decay_power"]) == (-1, 1)
    assert "lr / sqrt(k), init_scale / sqrt(k), weight_decay x sqrt(k)" in found["text"]


def test_one_that_has_no_law_is_said_to_have_none(here):
    done = run_cli("certify", "small.yaml", "--optimizer", "own:Capped", "--steps", "10", cwd=here)
    assert done.returncode == 1
    assert done.stdout.startswith("Capped: it has no law with half-integer exponents")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AdamW", "must be package.module:Class, a torch.optim.Optimizer; found 'AdamW'; such as torch.optim:AdamW"),
        ("nowhere:AdamW", "cannot be imported .*No module named 'nowhere'"),
        ("wrong:AdamW", "cannot be imported .*ZeroDivisionError"),
        ("torch.optim:AdamV", "found no 'AdamV' in torch.optim"),
        (
            "torch.nn:Linear",
            "must be a subclass of torch.optim.Optimizer, or a callable that returns one; found Linear",
        ),
        ("own:broken", "must take a learning rate as lr"),
        ("torch.optim:SGD.step", "must take a learning rate as lr"),
    ],
)
def test_what_is_no_optimizer_is_refused(here, name, message):
    with pytest.raises(InputError, match=message):
        load_optimizer(name)


def test_a_wrong_name_is_a_fault_of_the_users(here):
    done = run_cli("certify", "small.yaml", "--optimizer", "torch.optim:AdamV", cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --optimizer must be package.module:Class")


def test_options_that_certify_classes_do_not_go_with_it(here):
    done = run_cli("certify", "small.yaml", "--optimizer", "torch.optim:SGD", "--classes", "3", cwd=here)
    assert done.returncode == 2
    assert "--optimizer goes with --steps, --json and at most one --configuration" in done.stderr


def test_the_middle_of_a_space_is_one_of_its_configurations():
    reduction = make_reduction("rank: {values: [2, 4, 8]}, lr: {min: 1e-4, max: 1e-2}, alpha: {values: [4, 16, 64]}")
    middle = middle_of(reduction)
    assert (middle.rank, middle.alpha, middle.init_scale) == (4, 16.0, 1.0)
    assert middle.lr == pytest.approx(1e-3)
