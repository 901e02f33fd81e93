"""The calculator: one run written another way, against the law and numbers worked out by hand."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.conformance import CLIPPED, Case, Regimen, same_bits
from lora_core.gauge import FactorSettings, Gauge, Point, default_init, regauge
from lora_core.laws import LAWS
from lora_core.presets import PRESETS
from sweeps.errors import InputError
from sweeps.translate import Run, Target, Written, translate
from tests.support import ROOT, Here, run_cli

KEYS = {
    *("rank", "alpha", "rslora", "scaling", "lr", "lr_ratio", "init_scale", "weight_decay"),
    *("eps", "clip_norm", "optimizer", "bit_exact", "gauge"),
}


@pytest.fixture
def cli(here: Here) -> Here:
    """Runs `translate`, in this process."""
    return lambda line: here("translate", *line.split())


@pytest.fixture
def answer(cli: Here) -> Callable[[str], dict[str, Any]]:
    """The JSON that `translate` prints."""

    def run(line: str) -> dict[str, Any]:
        done = cli(f"{line} --json")
        assert done.code == 0, done.err
        found: dict[str, Any] = json.loads(done.out)
        assert set(found) - {"constants"} == KEYS
        return found

    return run


def run_of(**written: Any) -> Run:
    return Run.of(Written(**{"rank": 8, "alpha": 16.0, "lr": 2e-4, **written}))


def line_of(printed: dict[str, Any]) -> str:
    """The command line that gives a run as `translate` printed it."""
    options = {"optimizer", "rank", "alpha", "lr", "lr_ratio", "init_scale", "weight_decay", "eps", "clip_norm"}
    words = [f"--{name.replace('_', '-')} {printed[name]!r}" for name in options if printed[name] is not None]
    for name, value in printed.get("constants", {}).items():
        words.append(f"--constant {name}={','.join(map(repr, value)) if isinstance(value, list) else value!r}")
    return " ".join(words).replace("'", "") + (" --rslora" if printed["rslora"] else "")


# -- the numbers -------------------------------------------------------------------------------------------------------

# alpha x 4, worked out by hand from the table in DESIGN.md's section on the law.
_ALL = "--rank 8 --alpha 16 --lr 2e-4 --weight-decay 0.01 --clip-norm 1 --to-alpha 64"
_BY_HAND: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {"lr": 1e-4, "init_scale": 0.5, "weight_decay": 0.02, "eps": 2e-8, "clip_norm": 2.0}),
    ("nadamw", {"lr": 1e-4, "init_scale": 0.5, "weight_decay": 0.02, "eps": 2e-8, "clip_norm": 2.0}),
    ("adam", {"lr": 1e-4, "init_scale": 0.5, "weight_decay": 0.04, "eps": 2e-8, "clip_norm": 2.0}),
    ("sgd", {"lr": 5e-5, "init_scale": 0.5, "weight_decay": 0.04, "eps": None, "clip_norm": 2.0}),
    ("muon", {"lr": 1e-4, "init_scale": 0.5, "weight_decay": 0.02, "eps": 2e-7, "clip_norm": 2.0}),
    ("asgd", {"lr": 5e-5, "weight_decay": 0.04, "eps": None, "constants": {"lambd": 4e-4}}),
    (
        "adagrad --constant initial_accumulator_value=0.5",
        {"lr": 1e-4, "weight_decay": 0.04, "eps": 2e-10, "constants": {"initial_accumulator_value": 2.0}},
    ),
]


@pytest.mark.parametrize(("optimizer", "numbers"), _BY_HAND, ids=[row[0].split()[0] for row in _BY_HAND])
def test_alpha_x_4_is_the_numbers_worked_out_by_hand(
    answer: Callable[[str], dict[str, Any]], optimizer: str, numbers: dict[str, Any]
) -> None:
    found = answer(f"--optimizer {optimizer} {_ALL}")
    same = {"rank": 8, "alpha": 64.0, "scaling": 8.0, "lr_ratio": 1.0, "rslora": False, "gauge": {"a": 2.0, "b": 2.0}}
    expected = {**same, "optimizer": optimizer.split()[0], "bit_exact": True, **numbers}
    assert {name: found[name] for name in expected} == expected
    assert ("constants" in found) == ("constants" in numbers)


def test_rprop_moves_its_step_sizes_and_has_no_weight_decay(answer: Callable[[str], dict[str, Any]]) -> None:
    found = answer("--optimizer rprop --rank 8 --alpha 16 --lr 1e-2 --to-alpha 64")
    assert (found["weight_decay"], found["eps"], found["clip_norm"]) == (None, None, None)
    assert found["constants"] == {"step_sizes": [5e-7, 25.0]}


@pytest.mark.parametrize("k", [1 / 16, 1 / 3, 1.0, 2.0, 4.0, 256.0])
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_run_in_another_alpha_is_regauge_of_its_point(law: Any, k: float) -> None:
    decay = 0.0 if law.decay is None else 0.25
    constants = {name: constant.telling for name, constant in law.absolute.items()}
    run = run_of(optimizer=law.name, weight_decay=decay, constants=constants, clip_norm=0.5, lr_ratio=4.0)
    found = translate(run, Target(alpha=16.0 * k))
    # sqrt(2) squared is not 2 in floating point; alpha is what was asked for.
    assert found.run.point == replace(regauge(run.point, Gauge.of_alpha(k), law), scaling=2.0 * k)
    assert found.bit_exact == (math.log2(k) % 2 == 0)


@pytest.mark.parametrize("to_alpha", [1, 4, 64, 256, 1024])
@pytest.mark.parametrize("optimizer", LAWS)
def test_translating_back_gives_the_input(
    answer: Callable[[str], dict[str, Any]], optimizer: str, to_alpha: int
) -> None:
    given_run = f"--optimizer {optimizer} --rank 6 --alpha 16 --lr 3e-4 --init-scale 0.7 --lr-ratio 3 --clip-norm 0.3"
    given_run += "" if LAWS[optimizer].decay is None else " --weight-decay 0.1"
    as_given = answer(f"{given_run} --to-alpha 16")
    there = answer(f"{given_run} --to-alpha {to_alpha}")
    assert there["bit_exact"]
    assert there["gauge"] == dict.fromkeys("ab", math.sqrt(to_alpha / 16))
    back = answer(f"{line_of(there)} --to-alpha 16")
    assert {**back, "gauge": as_given["gauge"]} == as_given


@given(
    rank=st.integers(1, 512),
    alpha=st.floats(0.1, 1e3),
    to_alpha=st.floats(0.1, 1e3),
    lr=st.floats(1e-6, 1.0),
    init_scale=st.floats(0.01, 100.0),
    rslora=st.booleans(),
    to_rslora=st.booleans(),
)
def test_bit_exact_is_what_a_trainer_would_compute(
    rank: int, alpha: float, to_alpha: float, lr: float, init_scale: float, rslora: bool, to_rslora: bool
) -> None:
    run = run_of(rank=rank, alpha=alpha, lr=lr, init_scale=init_scale, rslora=rslora, weight_decay=0.1)
    found = translate(run, Target(alpha=to_alpha, rslora=to_rslora))
    new = found.run
    scaling = new.alpha / (math.sqrt(rank) if to_rslora else rank)
    assert (new.alpha, new.point.scaling, new.rslora) == (to_alpha, scaling, to_rslora)
    exact = regauge(run.point, found.gauge, run.law)
    assert found.bit_exact == (found.gauge.exact_in_binary and new.point == exact)
    assert new.point.a.lr**2 * new.point.scaling == pytest.approx(lr**2 * run.point.scaling)
    assert new.point.init_scale**2 * new.point.scaling == pytest.approx(init_scale**2 * run.point.scaling)


# -- targets -----------------------------------------------------------------------------------------------------------

_ADAMW = "--rank 8 --alpha 16 --lr 2e-4"
_TARGETS: list[tuple[str, dict[str, Any]]] = [
    (f"{_ADAMW} --to-alpha 8*rank", {"alpha": 64.0, "lr": 1e-4, "init_scale": 0.5}),
    (f"{_ADAMW} --to-scaling 8", {"alpha": 64.0, "scaling": 8.0, "lr": 1e-4, "init_scale": 0.5}),
    (f"{_ADAMW} --to-lr 1e-4", {"alpha": 64.0, "lr": 1e-4, "init_scale": 0.5, "eps": 2e-8}),
    (f"{_ADAMW} --optimizer sgd --to-lr 5e-5", {"alpha": 64.0, "lr": 5e-5, "init_scale": 0.5}),
    (f"{_ADAMW} --to-init-scale 0.5", {"alpha": 64.0, "lr": 1e-4, "init_scale": 0.5}),
    (f"{_ADAMW} --init-scale 0.5 --to-default-init", {"alpha": 4.0, "lr": 4e-4, "init_scale": 1.0, "eps": 5e-9}),
    (f"{_ADAMW} --lr-ratio 16 --to-alpha 64", {"alpha": 64.0, "lr": 1e-4, "lr_ratio": 16.0}),
    # rsLoRA: the same scaling is alpha / sqrt(16) x 4.
    ("--rank 16 --alpha 16 --lr 1 --to-rslora", {"alpha": 4.0, "scaling": 1.0, "lr": 1.0, "rslora": True}),
    ("--rank 16 --alpha 4 --rslora --lr 1 --to-lora", {"alpha": 16.0, "scaling": 1.0, "lr": 1.0, "rslora": False}),
    ("--rank 16 --alpha 4 --rslora --lr 1 --to-rslora", {"alpha": 4.0, "lr": 1.0, "rslora": True}),
    ("--rank 16 --alpha 4 --rslora --lr 1 --to-alpha 16", {"alpha": 16.0, "scaling": 4.0, "lr": 0.5, "rslora": True}),
    (
        "--rank 16 --alpha 16 --lr 1 --to-rslora --to-alpha 16",
        {"alpha": 16.0, "scaling": 4.0, "lr": 0.5, "init_scale": 0.5, "rslora": True},
    ),
    (
        "--rank 16 --alpha 16 --lr 1 --to-rslora --to-scaling 4",
        {"alpha": 16.0, "scaling": 4.0, "lr": 0.5, "rslora": True},
    ),
]


@pytest.mark.parametrize(("line", "numbers"), _TARGETS, ids=[row[0] for row in _TARGETS])
def test_every_target_is_met_bit_for_bit(
    answer: Callable[[str], dict[str, Any]], line: str, numbers: dict[str, Any]
) -> None:
    found = answer(line)
    assert {name: found[name] for name in numbers} == numbers
    assert found["bit_exact"]


def test_the_default_init_is_gauge_default_init() -> None:
    run = run_of(init_scale=0.25, weight_decay=0.1, clip_norm=1.0)
    assert translate(run, Target(init_scale=1.0)).run.point == default_init(run.point, run.law)


def test_alpha_and_init_scale_together_change_lr_ratio(answer: Callable[[str], dict[str, Any]]) -> None:
    # By hand: k = 4 and a = 1 / (1/2) = 2 leave b = 2 for c / 2; c as it is leaves a = 1, b = 4.
    shared = answer(f"{_ADAMW} --to-alpha 64 --to-init-scale 0.5 --clip-norm 1")
    assert (shared["lr_ratio"], shared["lr"], shared["clip_norm"]) == (1.0, 1e-4, 2.0)
    apart = answer(f"{_ADAMW} --weight-decay 0.1 --to-alpha 64 --to-default-init")
    assert apart["gauge"] == {"a": 1.0, "b": 4.0}
    assert (apart["alpha"], apart["lr"], apart["lr_ratio"], apart["init_scale"]) == (64.0, 2e-4, 0.25, 1.0)
    assert apart["weight_decay"] == {"a": 0.1, "b": 0.4}
    assert apart["eps"] == {"a": 1e-8, "b": 4e-8}
    assert apart["bit_exact"]
    rprop = answer("--optimizer rprop --rank 8 --alpha 16 --lr 1 --to-scaling 8 --to-init-scale 1")
    assert rprop["constants"] == {"step_sizes": {"a": [1e-6, 50.0], "b": [2.5e-7, 12.5]}}
    assert rprop["weight_decay"] is None


def test_a_rounded_number_is_not_called_bit_exact(cli: Here, answer: Callable[[str], dict[str, Any]]) -> None:
    # 0.3 x 7 / 7 is another float than 0.3.
    found = answer("--rank 7 --alpha 49 --lr 1 --rslora --to-lora")
    as_trained = 49 / math.sqrt(7)
    assert found["bit_exact"] == (found["alpha"] / 7 == as_trained)
    inexact = [rank for rank in range(2, 100) if 16 / rank * math.sqrt(rank) / math.sqrt(rank) != 16 / rank]
    line = f"--rank {inexact[0]} --alpha 16 --lr 1 --to-rslora"
    assert not answer(line)["bit_exact"]
    assert "had to be rounded to be written down" in cli(line).out


def test_a_number_that_loses_digits_is_not_called_bit_exact(answer: Callable[[str], dict[str, Any]]) -> None:
    assert not answer("--rank 8 --alpha 16 --lr 1 --eps 3e-324 --to-alpha 4e10")["bit_exact"]
    found = answer("--rank 8 --alpha 16 --lr 1 --eps 1.1e-310 --to-alpha 0.00390625")
    assert found["gauge"]["a"] == 2.0**-6
    assert not found["bit_exact"]


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_what_is_not_given(answer: Callable[[str], dict[str, Any]], name: str) -> None:
    recipe = PRESETS[name]
    found = answer(f"--from-preset {name} --to-scaling {recipe.scaling}")
    numbers = ("rank", "alpha", "lr", "weight_decay", "eps", "clip_norm", "optimizer")
    assert {one: found[one] for one in numbers} == {one: getattr(recipe, one) for one in numbers}
    given_too = answer(f"--from-preset {name} --lr 0.5 --weight-decay 0.25 --eps 1e-3 --clip-norm 3 --to-lr 0.5")
    assert [given_too[one] for one in ("lr", "weight_decay", "eps", "clip_norm")] == [0.5, 0.25, 1e-3, 3.0]


def test_a_preset_with_another_optimizer_gives_it_only_what_it_has(answer: Callable[[str], dict[str, Any]]) -> None:
    found = answer("--from-preset roberta-base-nlu --optimizer rprop --to-alpha 16")
    assert (found["weight_decay"], found["eps"], found["clip_norm"]) == (None, None, 1.0)


def test_a_head_trained_along_is_warned_of(cli: Here) -> None:
    done = cli("--from-preset roberta-base-nlu --to-alpha 64")
    assert "warning: roberta-base-nlu trains classifier too" in done.out
    assert "an lr of its own (0.0005, as it was) and keep it outside the clip" in done.out
    as_json = cli("--from-preset deberta-xxl-nlu --to-alpha 64 --json")
    assert "trains pooler and classifier too" in as_json.err
    assert json.loads(as_json.out)["alpha"] == 64.0
    assert "trains" not in cli("--from-preset gpt2-nlg --to-alpha 32").out


# -- refusals ----------------------------------------------------------------------------------------------------------

_REFUSED: list[tuple[str, str]] = [
    (f"{_ADAMW} --to-rank 16", "no gauge changes it: products B A of another rank are another class of functions"),
    ("--to-rank 16", "to compare ranks, sweep over them"),
    (_ADAMW, "translate needs a target: --to-alpha"),
    ("--alpha 16 --lr 1 --to-alpha 4", "a run must have rank, alpha and lr, or a preset; found no rank"),
    ("--rank 8 --lr 1 --to-alpha 4", "found no alpha"),
    ("--rank 8 --alpha 16 --to-alpha 4", "found no lr"),
    (f"{_ADAMW} --optimizer radam --to-alpha 4", "radam has no alpha equivalence: its warm-up phase"),
    (f"{_ADAMW} --optimizer sparseadam --to-alpha 4", "sparseadam has no alpha equivalence"),
    (f"{_ADAMW} --optimizer nosuch --to-alpha 4", "no law is known for the optimizer 'nosuch'; use one of sgd"),
    # contradictions
    (f"{_ADAMW} --to-alpha 4 --to-scaling 4", "alpha or scaling, for each gives the other; found both"),
    (f"{_ADAMW} --to-alpha 4 --to-lr 4", "found lr beside alpha: leave one out"),
    (f"{_ADAMW} --to-scaling 4 --to-lr 4 --to-init-scale 1", "found lr beside scaling and init_scale"),
    (f"{_ADAMW} --to-lr 4 --to-default-init", "found lr beside init_scale"),
    (f"{_ADAMW} --to-rslora --to-lora", "--to-rslora and --to-lora contradict each other"),
    (f"{_ADAMW} --to-default-init --to-init-scale 1", "--to-default-init and --to-init-scale contradict each other"),
    (f"{_ADAMW} --clip-norm 1 --to-alpha 64 --to-default-init", "only where A and B are scaled alike; found a=1.0, b="),
    (f"{_ADAMW} --eps 1e-8 --constant eps=1e-8 --to-alpha 4", "each constant must be given once; found eps again"),
    # numbers
    ("--rank 0 --alpha 16 --lr 1 --to-alpha 4", "rank must be a whole number from 1 to 2,147,483,648; found 0"),
    ("--rank -8 --alpha 16 --lr 1 --to-alpha 4", "rank must be a whole number from 1"),
    ("--rank 8.5 --alpha 16 --lr 1 --to-alpha 4", "required a whole number; found '8.5'"),
    ("--rank nan --alpha 16 --lr 1 --to-alpha 4", "required a whole number; found 'nan'"),
    (f"--rank {10**400} --alpha 16 --lr 1 --to-alpha 4", "rank must be a whole number from 1"),
    ("--rank 8 --alpha 0 --lr 1 --to-alpha 4", "alpha must be a positive number, or a rule"),
    ("--rank 8 --alpha nan --lr 1 --to-alpha 4", "alpha must be a positive number, or a rule"),
    ("--rank 8 --alpha 2*rnk --lr 1 --to-alpha 4", "found '2*rnk'"),
    ("--rank 8 --alpha 1e308*rank --lr 1 --to-alpha 4", "alpha must be a number that a float holds"),
    ("--rank 8 --alpha 16 --lr 0 --to-alpha 4", "lr must be a number above 0; found 0.0"),
    ("--rank 8 --alpha 16 --lr -1 --to-alpha 4", "lr must be a number above 0; found -1.0"),
    ("--rank 8 --alpha 16 --lr inf --to-alpha 4", "lr must be a number above 0; found inf"),
    ("--rank 8 --alpha 16 --lr high --to-alpha 4", "required a number; found 'high'"),
    (f"{_ADAMW} --lr-ratio 0 --to-alpha 4", "lr_ratio must be a number above 0; found 0.0"),
    (f"{_ADAMW} --lr-ratio 1e-323 --to-alpha 4", "scaling and lr of B must be numbers that a float holds"),
    (f"{_ADAMW} --init-scale nan --to-alpha 4", "init_scale must be a number above 0; found nan"),
    (f"{_ADAMW} --clip-norm 0 --to-alpha 4", "clip_norm must be a number above 0; found 0.0"),
    (f"{_ADAMW} --weight-decay -1 --to-alpha 4", "weight_decay must be a number of at least 0; found -1.0"),
    (f"{_ADAMW} --weight-decay nan --to-alpha 4", "weight_decay must be a number of at least 0; found nan"),
    (f"{_ADAMW} --optimizer rprop --weight-decay 1 --to-alpha 4", "rprop has none; found 1.0"),
    (f"{_ADAMW} --eps 0 --to-alpha 4", "eps of adamw must be a number above 0; found 0.0"),
    (f"{_ADAMW} --optimizer sgd --eps 1e-8 --to-alpha 4", "must be one that it has (none); found 'eps'"),
    (f"{_ADAMW} --constant lambd=1 --to-alpha 4", "must be one that it has (eps); found 'lambd'"),
    (f"{_ADAMW} --constant lambd --to-alpha 4", "required NAME=VALUE with a number"),
    (f"{_ADAMW} --constant lambd=x --to-alpha 4", "required NAME=VALUE with a number"),
    (f"{_ADAMW} --optimizer rprop --constant step_sizes=1 --to-alpha 4", "two rising numbers above 0; found 1.0"),
    (f"{_ADAMW} --to-alpha 0", "alpha must be a positive number, or a rule"),
    (f"{_ADAMW} --to-scaling 0", "the target scaling must be a number above 0; found 0.0"),
    (f"{_ADAMW} --to-lr nan", "the target lr must be a number above 0; found nan"),
    (f"{_ADAMW} --to-init-scale -1", "the target init_scale must be a number above 0; found -1.0"),
    # numbers of the answer
    ("--rank 8 --alpha 1e-300 --lr 1 --to-alpha 1e300", "numbers a float holds"),
    ("--rank 8 --alpha 1 --lr 1 --eps 1e-320 --to-alpha 1e-30", "numbers a float holds"),
    ("--rank 8 --alpha 1 --lr 1e300 --to-alpha 1e-30", "numbers a float holds"),
    ("--optimizer sgd --rank 8 --alpha 1 --lr 1 --to-init-scale 1e200", "numbers a float holds"),
    # presets
    ("--from-preset gpt2-config-default --to-alpha 4", "found gpt2-config-default: GPT2Config's lora_attn_dim=0"),
    ("--from-preset roberta-nlu --to-alpha 4", "did you mean roberta-base-nlu?"),
]


@pytest.mark.parametrize(("line", "words"), _REFUSED, ids=[f"{i}-{row[0][-40:]}" for i, row in enumerate(_REFUSED)])
def test_a_wrong_request_is_refused_in_words(cli: Here, line: str, words: str) -> None:
    done = cli(f"{line} --json")
    assert done.code == 2
    assert words in done.err
    assert re.search(r"found|contradict|needs a target|no law|no alpha equivalence", done.err)
    assert "Traceback" not in done.err
    assert done.out == ""


def test_a_rank_that_is_no_integer_is_refused_in_python_too() -> None:
    with pytest.raises(InputError, match=r"rank must be a whole number from 1 to .*; found 2\.5"):
        run_of(rank=2.5)
    with pytest.raises(InputError, match="found True"):
        run_of(rank=True)


# -- in words ----------------------------------------------------------------------------------------------------------


def test_the_program_prints_a_table_and_what_it_rests_on(tmp_path: Path) -> None:
    arguments = "translate --optimizer adamw --rank 8 --alpha 16 --lr 2e-4 --to-alpha 64"
    done = run_cli(*arguments.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "               given    the same run",
        "rank           8        8",
        "alpha          16       64",
        "scaling        2        8",
        "lr             0.0002   0.0001",
        "init scale     1        0.5",
        "weight decay   0        0",
        "eps            1e-08    2e-08",
        "",
        "bit-exact: the factor 2 on A and B is a power of two, so rounding is the same in both runs",
        "unchanged: rank, betas, amsgrad, the schedule's shape and warm-up, steps, batch size, seeds, data order",
        "warning: set by hand in the trainer, or it is another run: init scale 0.5 (multiply A by it once it is "
        "drawn); eps 2e-08",
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_words_say_what_moved_and_whether_it_is_exact(cli: Here) -> None:
    rough = cli(f"{_ADAMW} --to-alpha 32 --weight-decay 0.1").out
    assert "not bit-exact: the factor 1.4142135623730951 on A and B is no power of two" in rough
    assert "weight decay 0.1414213562373095" in rough
    apart = cli(f"{_ADAMW} --to-alpha 64 --to-default-init").out
    assert re.search(r"^lr ratio +1 +0\.25$", apart, re.MULTILINE)
    assert re.search(r"^eps of B +1e-08 +4e-08$", apart, re.MULTILINE)
    assert "the factors 1 on A and 4 on B are powers of two" in apart
    assert "eps 1e-08 for A and 4e-08 for B" in apart
    clipped = cli(f"{_ADAMW} --to-alpha 64 --clip-norm 1").out
    assert re.search(r"^clip norm +1 +2$", clipped, re.MULTILINE)
    assert "clip_grad_norm_ adds 1e-6" in clipped
    rslora = cli("--rank 16 --alpha 16 --lr 1 --to-rslora").out
    assert re.search(r"^alpha read as +LoRA +rsLoRA$", rslora, re.MULTILINE)
    assert "warning" not in rslora
    assert "unchanged: rank, momentum, dampening, nesterov, " in cli(f"{_ADAMW} --optimizer sgd --to-alpha 64").out


def test_nothing_heavy_is_loaded() -> None:
    heavy = ("torch", "pydantic", "ray", "numpy", "optuna", "mlflow", "ruamel.yaml")
    probe = (
        "import sys\nfrom services.cli import cli\n"
        "try:\n    cli('translate --from-preset gpt2-nlg --to-alpha 32 --json'.split())\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# -- the runs ----------------------------------------------------------------------------------------------------------


def _point_of(printed: dict[str, Any]) -> Point:
    """A point as a trainer reads it from what was printed."""

    def settings(of: str, lr: float) -> FactorSettings:
        def own(value: Any) -> Any:
            return value[of] if isinstance(value, dict) else value

        constants = {"eps": printed["eps"], **printed.get("constants", {})}
        return FactorSettings(lr, own(printed["weight_decay"]), {name: own(value) for name, value in constants.items()})

    return Point(
        printed["rank"],
        printed["alpha"] / printed["rank"],
        printed["init_scale"],
        settings("a", printed["lr"]),
        settings("b", printed["lr"] * printed["lr_ratio"]),
        printed["clip_norm"],
    )


@pytest.mark.parametrize(
    ("regimen", "target"),
    [
        (CLIPPED, "--clip-norm 0.05 --to-alpha 32"),
        (CLIPPED, "--clip-norm 0.05 --to-init-scale 4"),
        (Regimen("cosine"), "--to-alpha 128 --to-init-scale 0.5"),
    ],
)
def test_what_is_printed_trains_alike_to_the_last_bit(
    answer: Callable[[str], dict[str, Any]], regimen: Regimen, target: str
) -> None:
    case = Case(LAWS["adamw"], {}, torch.float32, regimen)
    own = case.point
    run = f"--rank {own.rank} --alpha {own.rank * own.scaling} --lr {own.a.lr} --eps {own.a.eps}"
    found = answer(f"{run} --weight-decay {own.a.weight_decay} {target}")
    assert found["bit_exact"]
    assert found["alpha"] != own.rank * own.scaling
    assert same_bits(case.trajectory, case.run(_point_of(found)))
    # A number left where it was is another run.
    assert not same_bits(case.trajectory, case.run(_point_of({**found, "eps": own.a.eps})))
