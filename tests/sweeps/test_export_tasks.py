"""A language model's exports: the model and what is done with its data, in each trainer's words, and what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig

from sweeps.export import FORMATS
from tests.sweeps.export_points import lm_point_of, point_of, read
from tests.sweeps.export_schemas import check_schema

# transformers 5.23 has a new name for it, which TRL 1.16 and releases before do not know.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

FILES = {
    "peft": "training.json",
    "trl": "trl_sft.yaml",
    "axolotl": "axolotl.yaml",
    "llamafactory": "llamafactory.yaml",
    "unsloth": "unsloth.yaml",
    "hf_trainer": "training_args.yaml",
    "loralib": "loralib.json",
}
PACKED = ", revision: abc123, max_length: 256, packing: true, loss: completion, attention: sdpa"

WORDS: dict[tuple[str, str], dict[str, Any]] = {
    ("trl", ""): {
        "model_name_or_path": "org/model",
        "max_length": 1024,
        "packing": False,
        "completion_only_loss": False,
        "assistant_only_loss": False,
        "gradient_checkpointing": False,
    },
    ("trl", PACKED): {
        "model_name_or_path": "org/model",
        "model_revision": "abc123",
        "attn_implementation": "sdpa",
        "max_length": 256,
        "packing": True,
        "completion_only_loss": True,
        "assistant_only_loss": False,
        "gradient_checkpointing": False,
    },
    ("axolotl", ""): {
        "base_model": "org/model",
        "sequence_len": 1024,
        "excess_length_strategy": "raise",
        "sample_packing": False,
        "train_on_inputs": True,
        "gradient_checkpointing": False,
    },
    ("axolotl", PACKED): {
        "base_model": "org/model",
        "revision_of_model": "abc123",
        "attn_implementation": "sdpa",
        "sequence_len": 256,
        "excess_length_strategy": "raise",
        "sample_packing": True,
        "train_on_inputs": False,
        "gradient_checkpointing": False,
    },
    ("llamafactory", ""): {
        "model_name_or_path": "org/model",
        "flash_attn": "auto",
        "stage": "sft",
        "cutoff_len": 1024,
        "packing": False,
        "neat_packing": False,
        "train_on_prompt": True,
        "disable_gradient_checkpointing": True,
    },
    ("llamafactory", PACKED): {
        "model_name_or_path": "org/model",
        "model_revision": "abc123",
        "flash_attn": "sdpa",
        "stage": "sft",
        "cutoff_len": 257,  # it takes one off when it packs
        "packing": True,
        "neat_packing": True,
        "train_on_prompt": False,
        "disable_gradient_checkpointing": True,
    },
    ("unsloth", ""): {
        "model_name": "org/model",
        "use_exact_model_name": True,
        "max_seq_length": 1024,
        "max_length": 1024,
        "packing": False,
        "completion_only_loss": False,
        "assistant_only_loss": False,
        "use_gradient_checkpointing": False,
        "gradient_checkpointing": False,
    },
    ("unsloth", PACKED): {
        "model_name": "org/model",
        "revision": "abc123",
        "use_exact_model_name": True,
        "max_seq_length": 256,
        "max_length": 256,
        "packing": True,
        "completion_only_loss": True,
        "assistant_only_loss": False,
        "use_gradient_checkpointing": False,
        "gradient_checkpointing": False,
    },
    ("hf_trainer", ""): {},
    ("hf_trainer", ", gradient_checkpointing: true"): {"gradient_checkpointing": True},
}
"""What a format says of a language model, and of no other task."""


def written(form: str, directory: Path) -> dict[str, Any]:
    """What is in the file that names the data, its sections put together."""
    text = (directory / FILES[form]).read_text()
    values = json.loads(text) if FILES[form].endswith("json") else yaml.safe_load(text)
    return values["from_pretrained"] | values["get_peft_model"] | values["sft_config"] if form == "unsloth" else values


@pytest.mark.parametrize(("form", "task"), WORDS)
def test_a_language_models_data_is_said_in_the_trainers_words(form: str, task: str, tmp_path: Path):
    FORMATS[form](lm_point_of(task), tmp_path / "lm")
    FORMATS[form](point_of(targets="[q_proj, v_proj]"), tmp_path / "digits")
    found, without = written(form, tmp_path / "lm"), written(form, tmp_path / "digits")
    added = {name: value for name, value in found.items() if without.get(name, "not there") != value}
    assert added == {name: value for name, value in WORDS[form, task].items() if without.get(name) != value}
    assert found | WORDS[form, task] == found
    assert found.keys() >= without.keys()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("task", ["", PACKED, ", gradient_checkpointing: true", ", too_long: truncate"])
def test_the_trainers_schema_takes_a_language_models_file(form: str, task: str, tmp_path: Path):
    FORMATS[form](lm_point_of(task), tmp_path)
    if form not in ("peft", "hf_trainer"):  # whose check needs a model with these layers: see below
        check_schema(form, tmp_path)
    assert list(read(form, tmp_path).targets) == ["q_proj", "v_proj"]
    if form not in ("peft", "loralib") and "gradient" in task:
        found = written(form, tmp_path)
        assert found.get("gradient_checkpointing", not found.get("disable_gradient_checkpointing")) is True


@pytest.mark.parametrize("form", ["peft", "hf_trainer"])
def test_pefts_config_names_the_model_and_the_kind_of_task(form: str, tmp_path: Path):
    FORMATS[form](lm_point_of(PACKED), tmp_path / "lm")
    config = LoraConfig.from_pretrained(tmp_path / "lm")
    assert (config.task_type, config.base_model_name_or_path, config.revision) == ("CAUSAL_LM", "org/model", "abc123")
    FORMATS[form](point_of(), tmp_path / "digits")
    config = LoraConfig.from_pretrained(tmp_path / "digits")
    assert (config.task_type, config.base_model_name_or_path, config.revision) == (None, None, None)


@pytest.mark.parametrize("form", ["peft", "loralib"])
def test_a_file_that_no_trainer_reads_has_the_section_in_the_specs_words(form: str, tmp_path: Path):
    FORMATS[form](lm_point_of(PACKED), tmp_path / "lm")
    task = written(form, tmp_path / "lm")["task"]
    assert (task["model"], task["revision"], task["max_length"], task["packing"]) == ("org/model", "abc123", 256, True)
    assert "data" not in task
    FORMATS[form](point_of(), tmp_path / "digits")
    assert "task" not in written(form, tmp_path / "digits")


@pytest.mark.parametrize("form", ["trl", "unsloth"])
@pytest.mark.parametrize(("data", "chats"), [("format: messages", True), ("format: completion", False)])
def test_the_loss_on_answers_has_one_key_for_chats_and_one_for_completions(
    form: str, data: str, chats: bool, tmp_path: Path
):
    exported = FORMATS[form](lm_point_of(", loss: completion", data), tmp_path)
    found = written(form, tmp_path)
    assert (found["assistant_only_loss"], found["completion_only_loss"]) == (chats, not chats)
    assert not [left for left in exported.leftovers if left.name == "loss"]


def test_texts_are_llamafactorys_stage_pt(tmp_path: Path):
    FORMATS["llamafactory"](lm_point_of("", "format: text"), tmp_path)
    found = written("llamafactory", tmp_path)
    assert (found["stage"], found["packing"]) == ("pt", False)
    # Which it refuses there.
    assert not {"train_on_prompt", "neat_packing"} & found.keys()


def test_packed_samples_do_not_see_each_other_in_axolotl(tmp_path: Path):
    """Without a name for its attention it lets them."""
    FORMATS["axolotl"](lm_point_of(", packing: true, max_length: 64"), tmp_path)
    assert written("axolotl", tmp_path)["attn_implementation"] == "sdpa"


LEFT: list[tuple[str, str, str, set[str]]] = [
    ("trl", "", "format: completion", set()),
    ("axolotl", "", "format: completion", set()),
    ("unsloth", "", "format: completion", set()),
    ("hf_trainer", "", "format: completion", {"task"}),
    ("llamafactory", "", "format: completion", {"dtype"}),
    ("llamafactory", "", "split: train", {"dtype", "format"}),
    ("llamafactory", ", packing: true, max_length: 64", "format: text", {"dtype", "packing"}),
    ("trl", ", loss: completion", "split: train", {"loss"}),
    ("unsloth", ", loss: completion", "split: train", {"loss"}),
    ("trl", ", too_long: drop, max_length: 64", "format: completion", {"too_long"}),
    ("trl", ", too_long: truncate, max_length: 64", "format: completion", set()),
    ("trl", ", too_long: truncate", "format: completion", {"max_length"}),
    ("axolotl", ", too_long: drop, max_length: 64", "format: completion", set()),
    ("llamafactory", ", too_long: truncate, max_length: 64", "format: completion", {"dtype", "too_long"}),
    ("llamafactory", ", too_long: truncate, max_length: 64", "format: text", {"dtype"}),
    ("llamafactory", ", attention: flex_attention", "format: completion", {"dtype", "attention"}),
    ("unsloth", ", attention: sdpa", "format: completion", {"attention"}),
    ("axolotl", ", packing: true, max_length: 64", "format: completion", {"packing"}),
    ("trl", ", packing: true", "format: completion", {"packing", "max_length"}),
]


@pytest.mark.parametrize(("form", "task", "data", "names"), LEFT)
def test_what_a_trainer_does_another_way_is_named(form: str, task: str, data: str, names: set[str], tmp_path: Path):
    exported = FORMATS[form](lm_point_of(task, data), tmp_path)
    assert {left.name for left in exported.leftovers} == names | {"base_dropout"}
    written_text = " ".join((tmp_path / FILES[form]).read_text().replace("\n# ", " ").split())
    for left in exported.leftovers:
        assert f"{'WARNING' if left.warns else 'Note'}: {left.text}." in written_text


@pytest.mark.parametrize(
    ("config", "warns", "words"),
    [
        (
            {"attn_pdrop": 0.1, "resid_pdrop": 0.0, "hidden_dropout_prob": 0.2},
            True,
            "(attn_pdrop, hidden_dropout_prob) was",
        ),
        ({"attention_dropout": 0.0, "num_layers": 2}, None, ""),
        (None, False, "if its config has any"),
    ],
)
def test_dropout_of_the_base_model_is_named_where_it_can_be_read(
    config: dict[str, Any] | None, warns: bool | None, words: str, tmp_path: Path
):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    task = f"{{type: causal_lm, model: '{tmp_path}', data: {{train: org/data}}}}"
    exported = FORMATS["hf_trainer"](point_of(task=task, targets="[q_proj]"), tmp_path / "out")
    found = [left for left in exported.leftovers if left.name == "base_dropout"]
    assert [left.warns for left in found] == ([] if warns is None else [warns])
    assert all(words in left.text for left in found)


def test_a_classifiers_accumulated_losses_may_be_added_up(tmp_path: Path):
    task = "{type: sequence_classification, model: org/model, data: {train: org/data}}"
    head = {"task": task, "parameters": ", head_lr: 0.1", "head_lr": 0.1}
    for accumulation, warned in ((1, []), (2, [True])):
        exported = FORMATS["hf_trainer"](point_of(**head, train=f", accumulation: {accumulation}"), tmp_path)
        assert [left.warns for left in exported.leftovers if left.name == "accumulation"] == warned


@pytest.mark.parametrize("form", ["trl", "axolotl", "llamafactory", "unsloth", "hf_trainer"])
def test_the_mean_over_accumulated_batches_is_another_one(form: str, tmp_path: Path):
    exported = FORMATS[form](lm_point_of(train=", accumulation: 2"), tmp_path / "lm")
    assert [left.warns for left in exported.leftovers if left.name == "accumulation"] == [True]
    exported = FORMATS[form](point_of(train=", accumulation: 2"), tmp_path / "digits")
    assert not exported.leftovers


def test_weight_decay_under_lora_plus_is_warned_of_in_axolotl(tmp_path: Path):
    ratio = {"parameters": ", lr_ratio: 4, weight_decay: 0.1", "lr_ratio": 4.0, "weight_decay": 0.1}
    (left,) = FORMATS["axolotl"](point_of(**ratio), tmp_path).leftovers
    assert (left.name, left.warns) == ("weight_decay", True)
    assert not FORMATS["llamafactory"](point_of(**ratio), tmp_path).leftovers
