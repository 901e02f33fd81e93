"""One suite for every export format: its trainer's schema takes the file, and the file says the same run.

The schemas are in `export_schemas.py`; what is said of a language model's data, in `test_export_tasks.py`.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from lora_core.gauge import scaling_of
from lora_core.laws import LAWS
from sweeps.errors import InputError
from sweeps.export import FORMATS
from tests.sweeps.export_points import ALPHA, point_of, read
from tests.sweeps.export_schemas import check_schema

WHOLE_ALPHA = ("axolotl", "llamafactory")
ON_TRANSFORMERS = ("trl", "axolotl", "llamafactory", "unsloth", "hf_trainer")

VARIETIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm-up": {"train": ", schedule: constant, warmup_steps: 4"},
    "linear": {"train": ", schedule: linear"},
    "decay": {"parameters": ", weight_decay: 0.1", "weight_decay": 0.1},
    "clip": {"train": ", clip_norm: 0.5"},
    "accumulation": {"train": ", accumulation: 2, seed: 5"},
    "rslora": {"lora": ", rslora: true"},
    "dropout": {"lora": ", dropout: 0.1"},
    "betas": {"train": ", betas: [0.8, 0.95], eps: 1e-6"},
    "adam": {"optimizer": "adam"},
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "train": ", momentum: 0.9, options: {nesterov: true}"},
    "rmsprop": {"optimizer": "rmsprop"},
    "adagrad": {"optimizer": "adagrad"},
    "bfloat16": {"train": ", dtype: bfloat16"},
}
"""Runs that every trainer can do."""

HEAD = {"task": "{type: python, entrypoint: some.module:make}", "parameters": ", head_lr: 0.1", "head_lr": 0.1}
"""Something that is trained whole beside the adapters."""

REFUSED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "muon": ({"optimizer": "muon"}, dict.fromkeys(ON_TRANSFORMERS, "muon")),
    "amsgrad": ({"train": ", options: {amsgrad: true}"}, dict.fromkeys(ON_TRANSFORMERS, "amsgrad")),
    "adam, L2": (
        {"optimizer": "adam", "parameters": ", weight_decay: 0.1", "weight_decay": 0.1},
        dict.fromkeys(ON_TRANSFORMERS, "L2 weight decay"),
    ),
    "adagrad, accumulator": (
        {"optimizer": "adagrad", "train": ", options: {initial_accumulator_value: 0.1}"},
        dict.fromkeys(ON_TRANSFORMERS, "initial_accumulator_value"),
    ),
    "LoRA+": ({"parameters": ", lr_ratio: 4", "lr_ratio": 4.0}, {"trl": "LoRA\\+"}),
    "DoRA": (
        {"lora": ", dora: true", "train": ", magnitude_lr: 1e-3"},
        dict.fromkeys(ON_TRANSFORMERS, "magnitudes") | {"loralib": "DoRA"},
    ),
    "gaussian": ({"lora": ", init: gaussian"}, dict.fromkeys(("trl", "llamafactory", "loralib"), "init: gaussian")),
    "float64": (
        {"train": ", dtype: float64"},
        dict.fromkeys(("trl", "axolotl", "llamafactory", "unsloth"), "float64"),
    ),
    "head": (HEAD, dict.fromkeys(("trl", "axolotl", "llamafactory", "unsloth"), "a head with learning rate 0.1")),
    "head, clip": (
        HEAD | {"train": ", clip_norm: 0.5"},
        dict.fromkeys(("trl", "axolotl", "llamafactory", "unsloth"), "a head")
        | {"hf_trainer": "clip_norm 1.0 of the adapters alone"},
    ),
    "one step of warm-up": ({"train": ", warmup_steps: 1"}, {"axolotl": "warmup_steps: 1"}),
}
"""Runs that some trainers cannot do, and a word of what each says."""

# -- the suite ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("variety", VARIETIES)
def test_the_trainers_schema_takes_the_file_and_the_file_says_the_run(form: str, variety: str, tmp_path: Path):
    point = point_of(**VARIETIES[variety])
    exported = FORMATS[form](point, tmp_path)
    assert exported.files
    assert all(path.parent == tmp_path for path in exported.files)
    assert all("exported-000000" in path.read_text() for path in exported.files if path.name != "adapter_config.json")
    check_schema(form, tmp_path)
    found, spec = read(form, tmp_path), point.spec
    scaling = scaling_of(found.alpha, found.rank, rslora=found.rslora)
    # alpha is 16 x 2**2 = 64 in default init: whole, and all factors powers of two, so nothing may be rounded.
    assert scaling == point.point.scaling
    assert found.alpha == (64 * 2 if form == "loralib" and spec.lora.rslora else 64)
    assert found.rank == 4
    assert exported.init_scale == 1.0
    assert list(found.targets) == ["fc1", "fc2"]
    assert (found.lr, found.lr_ratio) == (point.point.a.lr, 1.0)
    assert found.weight_decay == point.point.a.weight_decay
    if spec.train.optimizer in ("adamw", "adam"):
        assert found.eps == point.point.a.eps
    assert found.clip_norm == (point.point.clip_norm or 0.0)
    assert found.schedule == ("constant_with_warmup" if spec.train.schedule == "constant" else spec.train.schedule)
    expected = (spec.lora.dropout, spec.train.warmup_steps, spec.train.steps, 16, spec.train.accumulation)
    assert (found.dropout, found.warmup_steps, found.steps, found.batch_size, found.accumulation) == expected
    assert found.seed == spec.train.seed


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_trainer_cannot_do_is_refused_by_name(form: str, case: str, tmp_path: Path):
    pieces, words = REFUSED[case]
    point = point_of(**pieces)
    if form in words:
        with pytest.raises(InputError, match=rf"must have .*; found .*{words[form]}|{words[form]}.*; found"):
            FORMATS[form](point, tmp_path)
        assert not list(tmp_path.iterdir())
    else:
        FORMATS[form](point, tmp_path)
        check_schema(form, tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_every_number_reads_back_to_the_last_bit(form: str, tmp_path: Path):
    """PyYAML takes 1e-05 for text."""
    point = point_of(lr=1e-5 / 3, init_scale=1 / 3, train=", eps: 1e-5")
    exported = FORMATS[form](point, tmp_path)
    found = read(form, tmp_path)
    if form not in WHOLE_ALPHA:
        assert (found.lr, found.eps, found.alpha) == (point.point.a.lr, point.point.a.eps, point.alpha)
    assert type(found.lr) is type(found.eps) is float
    assert exported.alpha == found.alpha


@pytest.mark.parametrize("form", WHOLE_ALPHA)
@pytest.mark.parametrize(("optimizer", "power"), [("adamw", 2), ("sgd", 1)])
def test_a_whole_alpha_keeps_what_the_optimizer_sees_and_states_what_is_left(
    form: str, optimizer: str, power: int, tmp_path: Path
):
    point = point_of(optimizer=optimizer, init_scale=1.3)  # alpha 27.04
    exported = FORMATS[form](point, tmp_path)
    found = read(form, tmp_path)
    assert type(found.alpha) is int
    assert found.alpha == 27
    # lr**2 s for Adam, lr s for SGD
    assert found.lr**power * found.alpha == pytest.approx(point.point.a.lr**power * point.alpha, rel=1e-12)
    (left,) = exported.leftovers
    assert (left.name, left.warns) == ("init_scale", False)
    assert left.value == pytest.approx((27.04 / 27) ** 0.5)
    assert left.text in " ".join((tmp_path / f"{form}.yaml").read_text().replace("\n# ", " ").split())


@pytest.mark.parametrize("form", WHOLE_ALPHA)
def test_a_rounded_alpha_that_is_more_than_a_percent_off_is_warned_of(form: str, tmp_path: Path):
    exported = FORMATS[form](point_of(init_scale=0.3), tmp_path)  # alpha 1.44
    (left,) = exported.leftovers
    assert left.warns
    assert left.value == pytest.approx(1.2)
    assert "20 % off" in left.text
    assert "WARNING" in (tmp_path / f"{form}.yaml").read_text()
    with pytest.raises(InputError, match=r"whole numbers as alpha; found 1\.5: choose 1 or 2"):
        FORMATS[form](point_of(alpha=1.5), tmp_path)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("alpha", "value"), [(16.0, 16), ("2*rank", 8)])
def test_at_another_alpha_the_init_scale_is_named(form: str, alpha: float | str, value: int, tmp_path: Path):
    exported = FORMATS[form](point_of(init_scale=3.0, alpha=alpha), tmp_path)
    found = read(form, tmp_path)
    assert found.alpha == exported.alpha == value
    (left,) = exported.leftovers
    assert (left.name, left.warns) == ("init_scale", True)
    assert left.value == pytest.approx(3.0 * (ALPHA / value) ** 0.5)
    assert found.lr == pytest.approx(0.02 * (ALPHA / value) ** 0.5)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "trl"])
def test_lora_plus_is_written_where_the_trainer_has_it(form: str, tmp_path: Path):
    point = point_of(parameters=", lr_ratio: 4", lr_ratio=4.0)
    FORMATS[form](point, tmp_path)
    assert read(form, tmp_path).lr_ratio == pytest.approx(4.0)
    if form in ("axolotl", "llamafactory"):
        # By default 1e-6: embeddings would stand still.
        assert yaml.safe_load((tmp_path / f"{form}.yaml").read_text())["loraplus_lr_embedding"] == point.point.b.lr


@pytest.mark.parametrize("form", ["axolotl", "llamafactory", "hf_trainer"])
def test_a_searched_lr_ratio_is_brought_to_the_gauge_in_which_a_and_b_share_their_eps(form: str, tmp_path: Path):
    """In the two-parameter gauge eps and decay of A and B come apart, and trainers take one of each."""
    pieces = {"parameters": ", lr_ratio: {min: 1, max: 16}, weight_decay: 0.1", "weight_decay": 0.1}
    point = point_of(init_scale=3.0, lr_ratio=8.0, **pieces)
    assert point.point.a.constants == point.point.b.constants
    assert point.point.a.weight_decay == point.point.b.weight_decay
    FORMATS[form](point, tmp_path)


def test_trl_takes_a_single_target_module_as_an_expression_for_its_whole_name(tmp_path: Path):
    from sweeps.export.trl import _target_modules

    assert _target_modules(("q_proj", "v_proj")) == ["q_proj", "v_proj"]
    assert _target_modules("all-linear") == ["all-linear"]
    (expression,) = _target_modules(("fc1",))
    layers = torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"fc1": torch.nn.Linear(4, 4)})})
    get_peft_model(layers, LoraConfig(target_modules=expression))


@pytest.mark.parametrize(
    ("form", "targets", "words"),
    [
        ("llamafactory", "fc.*", "regular expression"),
        ("unsloth", ("q_proj", "lm_head"), "target module lm_head"),
        ("unsloth", ("model.embed_tokens",), "target module model.embed_tokens"),
        ("unsloth", ".*(_proj|embed_tokens)", "target module embed_tokens"),
        ("unsloth", "lm_head|.*_proj", "target module lm_head"),
    ],
)
def test_target_modules_that_a_trainer_cannot_take(form: str, targets: Any, words: str, tmp_path: Path):
    point = point_of()
    spec = point.spec.model_copy(update={"lora": point.spec.lora.model_copy(update={"target_modules": targets})})
    with pytest.raises(InputError, match=words):
        FORMATS[form](replace(point, spec=spec), tmp_path)


@pytest.mark.parametrize("form", ON_TRANSFORMERS)
def test_dora_is_written_where_its_magnitudes_are_trained_as_the_rest(form: str, tmp_path: Path):
    FORMATS[form](point_of(lora=", dora: true", train=", magnitude_lr: 0.02", init_scale=1.0), tmp_path)
    check_schema(form, tmp_path)
    assert re.search(r'(use_dora"?|peft_use_dora): true', "".join(path.read_text() for path in tmp_path.iterdir()))


def test_unsloth_hands_an_expression_on_to_peft(tmp_path: Path):
    FORMATS["unsloth"](point_of(targets="'.*_proj'"), tmp_path)
    check_schema("unsloth", tmp_path)
    assert read("unsloth", tmp_path).targets == ".*_proj"


@pytest.mark.parametrize("form", ["peft", "trl", "axolotl", "unsloth", "hf_trainer"])
def test_every_linear_layer_is_pefts_own_word(form: str, tmp_path: Path):
    FORMATS[form](point_of(targets="all-linear"), tmp_path)
    assert read(form, tmp_path).targets in ("all-linear", ["all-linear"])


@pytest.mark.parametrize("optimizer", LAWS)
def test_peft_is_told_every_number_of_the_optimizer_under_torchs_own_name(optimizer: str, tmp_path: Path):
    point = point_of(optimizer=optimizer)
    FORMATS["peft"](point, tmp_path)
    training = json.loads((tmp_path / "training.json").read_text())
    adam = {"eps": "adam_epsilon"} if optimizer in ("adam", "adamw") else {}
    for name, value in point.point.a.constants.items():
        assert training[adam.get(name, name)] == (list(value) if isinstance(value, tuple) else value)
        assert adam.get(name, name) in training["note"]
    assert ("adam_epsilon" in training) == bool(adam)


def test_a_heads_settings_are_written_beside_the_adapters_whatever_the_gauge(tmp_path: Path):
    point = point_of(**HEAD, alpha=4, train=", eps: 1e-6")
    assert point.point.a.eps != 1e-6
    FORMATS["peft"](point, tmp_path)
    said = json.loads((tmp_path / "training.json").read_text())
    assert (said["learning_rate_head"], said["adam_epsilon_head"], said["weight_decay_head"]) == (0.1, 1e-6, 0.0)
    assert said["learning_rate"] == point.point.a.lr
    FORMATS["loralib"](point, tmp_path)
    assert json.loads((tmp_path / "loralib.json").read_text())["head"] == {"lr": 0.1, "weight_decay": 0.0, "eps": 1e-6}


def test_the_trainers_groups_have_each_parameter_once_with_its_own_settings(tmp_path: Path):
    point = point_of(**HEAD | {"parameters": ", head_lr: 0.1, lr_ratio: 4"}, lr_ratio=4.0)
    exported = FORMATS["hf_trainer"](point, tmp_path)
    # Of a task of one's own the spec does not say which modules are its head.
    assert [each.name for each in exported.leftovers if each.warns] == ["modules_to_save", "head_lr"]
    values = yaml.safe_load((tmp_path / "parameter_groups.yaml").read_text())
    net = torch.nn.ModuleDict({"fc1": torch.nn.Linear(4, 4), "words": torch.nn.Embedding(5, 4)})
    net["classifier"] = torch.nn.Linear(4, 2)
    config = LoraConfig(r=2, target_modules=["fc1", "words"], modules_to_save=["classifier"])
    named = [(name, p) for name, p in get_peft_model(net, config).named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if re.search(pattern, name)], **settings}
        for pattern, settings in values["groups"].items()
    ]
    optimizer = getattr(torch.optim, values["optimizer_class"].rpartition(".")[2])(groups, **values["arguments"])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 2]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
    assert [group["lr"] for group in optimizer.param_groups] == [point.point.a.lr, 4 * point.point.a.lr, 0.1]
    assert [group["eps"] for group in optimizer.param_groups] == [point.point.a.eps] * 2 + [1e-8]


def test_magnitudes_beside_a_head_have_a_group_of_their_own(tmp_path: Path):
    point = point_of(**HEAD | {"lora": ", dora: true", "train": ", magnitude_lr: 0.03"})
    exported = FORMATS["hf_trainer"](point, tmp_path)
    groups = yaml.safe_load((tmp_path / "parameter_groups.yaml").read_text())["groups"]
    assert groups["lora_magnitude_vector"] == {"lr": 0.03, "weight_decay": 0.0, "eps": 1e-8}
    assert groups["lora_(embedding_)?A"]["lr"] == point.point.a.lr
    assert {"head_lr", "modules_to_save"} == {left.name for left in exported.leftovers if left.warns}


def test_peft_is_told_what_magnitudes_are_trained_with(tmp_path: Path):
    point = point_of(lora=", dora: true", train=", magnitude_lr: 1e-3", weight_decay=0.1)
    FORMATS["peft"](point, tmp_path)
    training = json.loads((tmp_path / "training.json").read_text())
    assert (training["learning_rate_magnitude"], training["weight_decay_magnitude"]) == (1e-3, 0.0)
    assert training["adam_epsilon_magnitude"] == 1e-8 != training["adam_epsilon"]
