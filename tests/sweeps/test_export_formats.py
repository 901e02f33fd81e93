"""One suite for every export format: its trainer's schema takes the file, and the file says the same run.

Schemas that can be had here are asked themselves (PEFT, transformers, loralib; TRL where it is installed). The keys
and types of the others stand in a table with the commit that they were read from.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, Trainer, TrainingArguments

from lora_core.gauge import scaling_of
from lora_core.laws import LAWS
from sweeps.errors import InputError
from sweeps.export import FORMATS
from tests.sweeps.export_points import ALPHA, point_of, read

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
    "LoRA+": ({"parameters": ", lr_ratio: 4", "lr_ratio": 4.0}, dict.fromkeys(("trl", "unsloth"), "LoRA\\+")),
    "DoRA": (
        {"lora": ", dora: true", "train": ", magnitude_lr: 1e-3"},
        dict.fromkeys(("trl", "axolotl", "llamafactory", "hf_trainer"), "magnitudes")
        | dict.fromkeys(("unsloth", "loralib"), "DoRA"),
    ),
    "gaussian": ({"lora": ", init: gaussian"}, dict.fromkeys(("trl", "llamafactory", "loralib"), "init: gaussian")),
    "float64": (
        {"train": ", dtype: float64"},
        dict.fromkeys(("trl", "axolotl", "llamafactory", "unsloth"), "float64"),
    ),
    "one step of warm-up": ({"train": ", warmup_steps: 1"}, {"axolotl": "warmup_steps: 1"}),
}
"""Runs that some trainers cannot do, and a word of what each says."""

# -- schemas -----------------------------------------------------------------------------------------------------------

NUMBER = (int, float)

AXOLOTL: dict[str, Any] = {
    # axolotl-ai-cloud/axolotl, src/axolotl/utils/schemas/peft.py at 00564c8
    "adapter": str,
    "lora_r": int,
    "lora_alpha": int,
    "lora_dropout": float,
    "lora_target_modules": (str, list),
    "lora_target_linear": bool,
    "peft_use_dora": bool,
    "peft_use_rslora": bool,
    "peft_init_lora_weights": (bool, str),
    "loraplus_lr_ratio": float,
    "loraplus_lr_embedding": float,
    # schemas/training.py at 002a637
    "gradient_accumulation_steps": int,
    "micro_batch_size": int,
    "learning_rate": float,
    "weight_decay": float,
    "optimizer": str,
    "optim_args": (str, dict),
    "lr_scheduler": str,
    "adam_epsilon": float,
    "adam_beta1": float,
    "adam_beta2": float,
    "max_grad_norm": float,
    "group_by_length": bool,
    # schemas/config.py at 70be546
    "warmup_steps": int,
    "max_steps": int,
    "dataloader_drop_last": bool,
    "seed": int,
    "bf16": (bool, str),
    "fp16": bool,
}
LLAMAFACTORY: dict[str, Any] = {
    # hiyouga/LLaMA-Factory, src/llamafactory/hparams/finetuning_args.py at 00577a8; the rest is TrainingArguments
    "stage": str,
    "finetuning_type": str,
    "lora_rank": int,
    "lora_alpha": int,
    "lora_dropout": float,
    "lora_target": str,
    "use_rslora": bool,
    "use_dora": bool,
    "loraplus_lr_ratio": float,
    "loraplus_lr_embedding": float,
}
UNSLOTH: dict[str, Any] = {
    # unslothai/unsloth, FastLlamaModel.get_peft_model in unsloth/models/llama.py at 9fbe0b6
    "r": int,
    "lora_alpha": NUMBER,
    "lora_dropout": float,
    "target_modules": list,
    "use_rslora": bool,
    "init_lora_weights": (bool, str),
    "bias": str,
    "random_state": int,
}
TRL: dict[str, Any] = {
    # TRL 1.16, trl/trainer/model_config.py; the rest is TrainingArguments. alpha: see `test_trl_itself_reads_the_file`
    "use_peft": bool,
    "lora_r": int,
    "lora_alpha": NUMBER,
    "lora_dropout": float,
    "lora_target_modules": list,
    "use_rslora": bool,
    "use_dora": bool,
    "dtype": str,
}


def check_table(values: dict[str, Any], table: dict[str, Any]) -> None:
    for key, value in values.items():
        assert key in table, f"{key} is no key of it"
        kinds = table[key] if isinstance(table[key], tuple) else (table[key],)
        assert type(value) in kinds, f"{key}: {value!r}"  # True is an int to isinstance


def check_training_arguments(values: dict[str, Any]) -> TrainingArguments:
    here = {"use_cpu": True, "report_to": [], "bf16": False}
    (read_back,) = HfArgumentParser(TrainingArguments).parse_dict(values | here)
    layer = torch.nn.Linear(2, 2)
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(read_back, layer)
    kind(layer.parameters(), **keywords)
    return read_back


def split(values: dict[str, Any], table: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of a table, and the others."""
    return {k: v for k, v in values.items() if k in table}, {k: v for k, v in values.items() if k not in table}


def check_schema(form: str, directory: Path) -> None:
    if form in ("peft", "hf_trainer"):
        config = LoraConfig.from_pretrained(str(directory))
        layers = torch.nn.ModuleDict({"fc1": torch.nn.Linear(64, 64), "fc2": torch.nn.Linear(64, 64)})
        get_peft_model(layers, config)
    if form == "hf_trainer":
        check_training_arguments(yaml.safe_load((directory / "training_args.yaml").read_text()))
    if form == "trl":
        own, rest = split(yaml.safe_load((directory / "trl_sft.yaml").read_text()), TRL)
        check_table(own, TRL)
        check_training_arguments(rest)
    if form == "axolotl":
        check_table(yaml.safe_load((directory / "axolotl.yaml").read_text()), AXOLOTL)
    if form == "llamafactory":
        own, rest = split(yaml.safe_load((directory / "llamafactory.yaml").read_text()), LLAMAFACTORY)
        check_table(own, LLAMAFACTORY)
        assert rest.pop("do_train") is True
        check_training_arguments(rest)
    if form == "unsloth":
        values = yaml.safe_load((directory / "unsloth.yaml").read_text())
        assert values.keys() == {"from_pretrained", "get_peft_model", "sft_config"}
        check_table(values["get_peft_model"], UNSLOTH)
        check_training_arguments(values["sft_config"])
    if form == "loralib":
        values = json.loads((directory / "loralib.json").read_text())
        layer = loralib.Linear(64, 64, **values["linear"])
        groups = [{"params": [getattr(layer, name)], **values[name]} for name in ("lora_A", "lora_B")]
        accumulator = groups[0].pop("initial_accumulator_value", None)
        groups[1].pop("initial_accumulator_value", None)
        kind = getattr(torch.optim, values["optimizer"].removeprefix("torch.optim."))
        kind(
            groups, **values["arguments"], **({} if accumulator is None else {"initial_accumulator_value": accumulator})
        )


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


@pytest.mark.parametrize("form", ["peft", "axolotl", "llamafactory", "hf_trainer", "loralib"])
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


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_trl_itself_reads_the_file(tmp_path: Path):
    trl = pytest.importorskip("trl", reason="TRL is not installed; its keys stand in the table TRL")
    point = point_of(init_scale=1.3, train=", warmup_steps: 4")
    FORMATS["trl"](point, tmp_path)
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))
    _, training, model = parser.parse_args_and_config(
        ["--config", str(tmp_path / "trl_sft.yaml"), "--dataset_name", "x"], fail_with_unknown_args=True
    )
    config = trl.get_peft_config(model)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, point.alpha, 0.0)
    assert config.target_modules == {"fc1", "fc2"}
    assert (training.learning_rate, training.adam_epsilon) == (point.point.a.lr, point.point.a.eps)
    assert (training.max_grad_norm, training.warmup_steps, training.bf16) == (0.0, 4, False)


@pytest.mark.parametrize(
    ("form", "targets", "words"),
    [
        ("unsloth", "fc.*", "regular expression"),
        ("llamafactory", "fc.*", "regular expression"),
        ("unsloth", ("q_proj", "lm_head"), "lm_head"),
    ],
)
def test_target_modules_that_a_trainer_cannot_take(form: str, targets: Any, words: str, tmp_path: Path):
    point = point_of()
    spec = point.spec.model_copy(update={"lora": point.spec.lora.model_copy(update={"target_modules": targets})})
    with pytest.raises(InputError, match=words):
        FORMATS[form](replace(point, spec=spec), tmp_path)


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


def test_peft_is_told_what_magnitudes_are_trained_with(tmp_path: Path):
    point = point_of(lora=", dora: true", train=", magnitude_lr: 1e-3", weight_decay=0.1)
    FORMATS["peft"](point, tmp_path)
    training = json.loads((tmp_path / "training.json").read_text())
    assert (training["learning_rate_magnitude"], training["weight_decay_magnitude"]) == (1e-3, 0.0)
    assert training["adam_epsilon_magnitude"] == 1e-8 != training["adam_epsilon"]
