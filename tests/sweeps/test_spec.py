from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from lora_core.laws import LAWS
from lora_core.presets import PRESETS
from sweeps.errors import InputError, SpecError
from sweeps.spec import (
    CausalLmTask,
    Choice,
    Range,
    SpecDocument,
    SweepSpec,
    TrainSpec,
    json_schema,
    load_spec,
    parse_spec,
    template,
)
from sweeps.yaml_text import read_yaml

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"

# One section a line, so that a line number names the section; a test replaces or appends lines.
_LINES = {
    "name": "digits",
    "task": "{type: digits}",
    "lora": "{target_modules: [fc1, fc2]}",
    "parameters": "{rank: {values: [2, 4]}, lr: {min: 1e-4, max: 1}, init_scale: {min: 0.25, max: 4}}",
}


def _text(**sections: str) -> str:
    return "".join(f"{key}: {value}\n" for key, value in {**_LINES, **sections}.items())


def _spec(**sections: str) -> SweepSpec:
    return parse_spec(_text(**sections), "sweep.yaml").spec


def _parameters(rest: str) -> str:
    return "{rank: 4, lr: 1e-3, " + rest + "}"


# -- what is read ------------------------------------------------------------------------------------------------------


def test_a_spec_of_the_required_sections_gets_the_documented_defaults() -> None:
    spec = _spec()
    assert spec.parameters.alpha == Choice((32.0,))
    assert spec.parameters.lr_ratio == Choice((1.0,))
    assert spec.parameters.weight_decay == Choice((0.0,))
    assert (spec.train.optimizer, spec.train.steps, spec.train.batch_size) == ("adamw", 200, 32)
    assert (spec.metric.name, spec.metric.goal) == ("eval/loss", "minimize")
    assert (spec.search.method, spec.search.trials, spec.search.pruner.type) == ("gp", None, "successive_halving")
    assert (spec.certify.classes, spec.certify.steps) == (4, 50)
    assert (spec.reduction.ranges, spec.reduction.constants) == ("keep", "travel")


@pytest.mark.parametrize(
    ("written", "normalised"),
    [
        ("1e-5", Choice((1e-5,))),
        ("3", Choice((3.0,))),
        ("{values: [1, 0.5]}", Choice((1.0, 0.5))),
        ("{min: 1, max: 2}", Range(1.0, 2.0, "log_uniform")),
        ("{min: 1, max: 2, distribution: uniform}", Range(1.0, 2.0, "uniform")),
    ],
)
def test_the_three_ways_to_write_a_parameter_become_two_types(written: str, normalised: Choice | Range) -> None:
    spec = _spec(parameters=f"{{rank: 4, lr: {written}}}")
    assert spec.parameters.lr == normalised
    assert spec.parameters.lr.constant == (written in {"1e-5", "3"})


def test_ranks_stay_integers() -> None:
    spec = _spec(parameters="{rank: {min: 2, max: 64}, lr: 1}")
    assert spec.parameters.rank == Range(2, 64)
    assert isinstance(spec.parameters.rank, Range)
    assert type(spec.parameters.rank.min) is int


def test_alpha_takes_numbers_and_rules_side_by_side() -> None:
    spec = _spec(parameters=_parameters('alpha: {values: [16, "2*rank", sqrt(rank)]}'))
    assert spec.parameters.alpha == Choice((16.0, "2*rank", "sqrt(rank)"))


@pytest.mark.parametrize(
    ("train", "pruner", "rungs"),
    [
        ("{steps: 200}", "{type: successive_halving}", (50, 100, 200)),
        ("{steps: 3}", "{type: median}", (1, 3)),
        ("{steps: 1}", "{type: successive_halving}", (1,)),
        ("{steps: 200}", "{type: none}", (200,)),
        ("{steps: 200}", "{type: none, rungs: [10, 200]}", (10, 200)),
    ],
)
def test_rungs_are_the_written_ones_or_derived_from_the_steps(train: str, pruner: str, rungs: tuple[int, ...]) -> None:
    spec = _spec(train=train, search=f"{{pruner: {pruner}}}")
    assert spec.search.rungs(spec.train.steps) == rungs


@pytest.mark.parametrize(
    ("metric", "goal"),
    [
        ("{name: eval/accuracy}", "maximize"),
        ("{name: eval/accuracy, goal: minimize}", "minimize"),
        ("{goal: maximize}", "maximize"),
    ],
)
def test_the_goal_is_what_the_spec_says_else_what_the_task_says(metric: str, goal: str) -> None:
    assert _spec(metric=metric).metric.goal == goal


@pytest.mark.parametrize("certify", ["{}", "{classes: 2}"])
def test_the_default_of_certify_steps_is_never_more_than_the_training(certify: str) -> None:
    assert _spec(train="{steps: 20}", certify=certify).certify.steps == 20


@given(
    st.fixed_dictionaries(
        {
            "rank": st.lists(st.integers(1, 512), min_size=1, max_size=3, unique=True).map(tuple).map(Choice),
            "lr": st.floats(1e-6, 1).map(lambda low: Range(low, low * 2, "uniform")),
            "alpha": st.sampled_from([Choice((16.0, "2*rank")), Range(4.0, 64.0)]),
            "weight_decay": st.floats(0, 1).map(lambda value: Choice((value,))),
        }
    )
)
def test_a_spec_equals_itself_after_json(parameters: dict[str, Choice | Range]) -> None:
    spec = _spec(metric="{name: eval/accuracy}", compute="{gpus_per_worker: 0.5}", train="{clip_norm: 1, steps: 30}")
    spec = SweepSpec.model_validate({**spec.model_dump(mode="json"), "parameters": parameters})
    assert SweepSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert SweepSpec.model_validate_json(spec.model_dump_json()) == spec


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        _spec().name = "other"  # type: ignore[misc]


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_completes_a_spec_without_lora_and_parameters(name: str) -> None:
    recipe = PRESETS[name]
    spec = parse_spec(f"name: x\ntask: {{type: digits}}\npreset: {name}\n", "f").spec
    parameters, train = spec.parameters, spec.train
    for key in ("rank", "alpha", "lr", "weight_decay"):
        assert getattr(parameters, key) == Choice((getattr(recipe, key),)), key
    for key in ("optimizer", "betas", "eps", "clip_norm", "schedule"):
        assert getattr(train, key) == getattr(recipe, key), key
    assert (spec.lora.target_modules, spec.lora.dropout) == (recipe.target_modules, recipe.dropout)
    plain = _spec()
    assert (train.steps, train.batch_size, train.warmup_steps) == (200, 32, 0)
    assert (spec.lora.init, spec.lora.rslora, parameters.init_scale) == (plain.lora.init, False, Choice((1.0,)))


def test_what_is_written_wins_over_the_preset() -> None:
    spec = _spec(
        preset="roberta-base-nlu",
        lora="{target_modules: [fc1], dropout: 0.3}",
        parameters="{rank: {values: [2, 4]}, lr: {min: 1e-4, max: 1}}",
        train="{clip_norm: null, eps: null, schedule: constant, warmup_steps: 5}",
    )
    assert (spec.lora.target_modules, spec.lora.dropout) == (("fc1",), 0.3)
    assert (spec.parameters.rank, spec.parameters.lr) == (Choice((2, 4)), Range(1e-4, 1.0))
    assert (spec.parameters.alpha, spec.parameters.weight_decay) == (Choice((16.0,)), Choice((0.1,)))
    assert (spec.train.clip_norm, spec.train.eps, spec.train.schedule) == (None, None, "constant")
    assert (spec.train.betas, spec.train.warmup_steps) == ((0.9, 0.999), 5)


@pytest.mark.parametrize("optimizer", LAWS)
def test_another_optimizer_takes_from_a_preset_only_what_it_has(optimizer: str) -> None:
    spec = _spec(preset="roberta-base-nlu", parameters="{}", train=f"{{optimizer: {optimizer}}}")
    law = LAWS[optimizer]
    assert (spec.train.optimizer, spec.train.unused) == (optimizer, ())
    assert spec.train.eps == (1e-8 if "eps" in law.absolute else None)
    assert spec.train.betas == ((0.9, 0.999) if "betas" in law.options else None)
    assert spec.parameters.weight_decay == Choice((0.0 if law.decay is None else 0.1,))


def test_without_a_preset_nothing_is_filled_in() -> None:
    assert _spec(preset="null") == _spec()
    assert _spec().preset is None


@pytest.mark.parametrize("name", PRESETS)
def test_a_spec_with_a_preset_stays_the_same_when_it_is_read_again(name: str) -> None:
    spec = _spec(preset=name, parameters="{lr: {min: 1e-4, max: 1}}", train="{clip_norm: null, steps: 30}")
    assert SweepSpec.model_validate(spec.model_dump()) == spec
    assert SweepSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert SweepSpec.model_validate_json(spec.model_dump_json()) == spec
    assert SweepSpec.model_validate(spec) == spec


def test_a_preset_changes_nothing_that_it_is_given() -> None:
    raw = {"name": "x", "task": {"type": "digits"}, "preset": "gpt2-nlg", "parameters": {"rank": 2}}
    train = TrainSpec(steps=7)
    spec = SweepSpec.model_validate({**raw, "train": train})
    assert raw["parameters"] == {"rank": 2}
    assert "train" not in raw
    assert spec.train == train  # a section that is already one is left alone


def test_the_schema_lists_the_presets() -> None:
    assert json_schema()["properties"]["preset"]["enum"] == [*PRESETS, None]
    text = _text(preset="gpt2-nlg")
    _validator().validate(read_yaml(text, "f").value)
    assert not _validator().is_valid(read_yaml(_text(preset="bert"), "f").value)


def test_a_fault_in_what_a_preset_filled_in_has_the_line_of_the_preset() -> None:
    document = parse_spec(_text(preset="gpt2-nlg", parameters="{lr: 1e-3}"), "f")
    assert document.fault("parameters.rank", "at most 2", "4").line == 5
    assert document.fault("parameters.lr", "less", "1e-3").line == 4
    assert document.fault("lora.target_modules[1]", "a layer", "fc2").line == 3
    assert document.fault("train.clip_norm", "none", "1").line == 5
    assert document.fault("train.batch_size", "less", "32").line == 1


# -- the optimizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "constants", "settings"),
    [
        ("{}", {"eps": 1e-8}, {"betas": (0.9, 0.999), "amsgrad": False}),
        ("{eps: 1e-6, options: {amsgrad: true}}", {"eps": 1e-6}, {"betas": (0.9, 0.999), "amsgrad": True}),
        ("{optimizer: muon}", {"eps": 1e-7}, {"momentum": 0.95, "nesterov": True}),
        (
            "{optimizer: sgd, momentum: 0.9, options: {nesterov: true}}",
            {},
            {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
        ),
        ("{optimizer: rprop, options: {step_sizes: [1e-5, 1]}}", {"step_sizes": (1e-5, 1)}, {"etas": (0.5, 1.2)}),
        ("{optimizer: adagrad, options: {initial_accumulator_value: 0.1}}", {"initial_accumulator_value": 0.1}, {}),
        ("{optimizer: sgd, eps: 1e-6, betas: [0.8, 0.9]}", {}, {"momentum": 0.0}),
    ],
)
def test_what_an_optimizer_is_built_with_is_what_is_written_else_its_default(train, constants, settings) -> None:
    spec = _spec(train=train)
    assert constants.items() <= spec.train.constants.items()
    assert settings.items() <= spec.train.settings.items()
    again = SweepSpec.model_validate(spec.model_dump(mode="json"))
    assert (again.train.constants, again.train.settings) == (spec.train.constants, spec.train.settings)


# -- what is refused ---------------------------------------------------------------------------------------------------

_LM = "type: causal_lm, model: x, data: {train: x}"
_CLS = "type: sequence_classification, model: x, data: {train: x}"

_FAULTS: list[tuple[dict[str, str], int, str, str]] = [
    # names and shapes
    ({"name": "-x"}, 1, "name", "with a letter or digit first; found '-x'"),
    ({"name": "a" * 65}, 1, "name", "1 to 64"),
    ({"name": "3"}, 1, "name", "text; found 3"),
    ({"task": "digits"}, 2, "task", "keys with values; found 'digits'; write {type: digits}"),
    ({"task": "{type: digit}"}, 2, "task.type", "digits; found 'digit'; did you mean 'digits'?"),
    ({"task": "{base_seed: 1}"}, 2, "task.type", "digits; found nothing"),
    ({"task": "{type: digits, seed: 1}"}, 2, "task.seed", "one of type or base_seed; found the unknown key 'seed'"),
    ({"task": "{type: causal_lm, data: {train: x}}"}, 2, "task.model", "no default; found nothing; such as './model'"),
    ({"task": "{type: causal_lm, model: x}"}, 2, "task.data", "such as {train: 'train.jsonl'}"),
    ({"task": f"{{{_LM}, packing: 1}}"}, 2, "task.packing", "true or false; found 1"),
    ({"task": f"{{{_LM}, lenght: 1}}"}, 2, "task.lenght", "found the unknown key 'lenght'"),
    ({"task": f"{{{_LM}, attention: flash}}"}, 2, "task.attention", "flash_attention_2 or flex_attention"),
    ({"task": "{type: causal_lm, model: x, data: {trian: x}}"}, 2, "task.data.trian", "did you mean 'train'?"),
    (
        {"task": "{type: causal_lm, model: x, data: {train: x, eval: 1.5}}"},
        2,
        "task.data.eval",
        "a share between 0 and 1, a file or a data set; found 1.5",
    ),
    (
        {"task": "{type: causal_lm, model: x, data: {train: x, eval: 0.1, eval_split: test}}"},
        2,
        "task.data.eval_split",
        "none, for eval holds out a share of train; found 'test'",
    ),
    (
        {"task": "{type: causal_lm, model: x, loss: completion, data: {train: x, format: text}}"},
        2,
        "task.loss",
        "all, for samples of text have no completions; found 'completion'",
    ),
    ({"task": f"{{{_CLS}, labels: [a]}}"}, 2, "task.labels", "two labels or more; found ['a']"),
    ({"task": f"{{{_CLS}, labels: [1, b, '1']}}"}, 2, "task.labels[2]", "each label once; found '1'"),
    ({"task": f"{{{_CLS}, labels: [a, 0.5]}}"}, 2, "task.labels[1]", "an integer, true or false; found 0.5"),
    (
        {"task": "{type: sequence_classification, model: x, data: {train: x, columns: {lable: a}}}"},
        2,
        "task.data.columns.lable",
        "one of text, text_pair or label; found lable; did you mean 'label'?",
    ),
    (
        {"task": "{type: causal_lm, model: x, data: {train: x, columns: {promt: a}}}"},
        2,
        "task.data.columns.promt",
        "one of text, prompt, completion or messages; found promt; did you mean 'prompt'?",
    ),
    ({"task": "{type: python}"}, 2, "task.entrypoint", "such as 'my_package.my_module:make_task'"),
    ({"task": "{type: python, entrypoint: 'os.system'}"}, 2, "task.entrypoint", "package.module:function; found"),
    ({"task": "{type: python, entrypoint: 'a:b', metrics: {}}"}, 2, "task.metrics", "at least 1 entry"),
    ({"task": "{type: python, entrypoint: 'a:b', metrics: {x: up}}"}, 2, "task.metrics.x", "minimize or maximize"),
    ({"task": "{type: python, entrypoint: 'a:b', options: {dtype: 1}}"}, 2, "task.options.dtype", "another name"),
    ({"serch": "{}"}, 5, "serch", "found the unknown key 'serch'; did you mean 'search'?"),
    ({"train": ""}, 5, "train", "keys with values; found nothing; give it keys, or leave it out"),
    # preset
    (
        {"preset": "roberta-base"},
        5,
        "preset",
        "deberta-xxl-nlu; found 'roberta-base'; did you mean 'roberta-base-nlu'?",
    ),
    (
        {"preset": "bert"},
        5,
        "preset",
        "one of gpt2-nlg, gpt2-nlg-readme, roberta-base-nlu or deberta-xxl-nlu; found 'bert'",
    ),
    ({"preset": "3"}, 5, "preset", "text; found 3"),
    ({"preset": "[gpt2-nlg]"}, 5, "preset", "text; found ['gpt2-nlg']"),
    ({"preset": "bert", "lora": "{}", "parameters": "{}"}, 5, "preset", "found 'bert'"),
    ({"preset": "gpt2-config-default"}, 5, "preset", "found 'gpt2-config-default'; GPT2Config's lora_attn_dim=0 means"),
    ({"preset": "gpt2-nlg", "parameters": "{lr: -1}"}, 4, "parameters.lr", "a number above 0; found -1"),
    ({"preset": "gpt2-nlg", "lora": ""}, 3, "lora", "keys with values; found nothing"),
    ({"preset": "gpt2-nlg", "train": "{optimizer: AdamW}"}, 6, "train.optimizer", "did you mean 'adamw'?"),
    # lora
    ({"lora": "{}"}, 3, "lora.target_modules", "such as ['q_proj', 'v_proj']"),
    ({"lora": "{target_modules: []}"}, 3, "lora.target_modules", "a list of module names, or one regular expression"),
    ({"lora": "{target_modules: [fc1, 3]}"}, 3, "lora.target_modules[1]", "a module name; found 3"),
    ({"lora": "{target_modules: (}"}, 3, "lora.target_modules", "a regular expression that compiles; found '('"),
    ({"lora": "{target_modules: a, init: gausian}"}, 3, "lora.init", "did you mean 'gaussian'?"),
    ({"lora": "{target_modules: a, rslora: yes}"}, 3, "lora.rslora", "true or false; found 'yes'"),
    # parameters
    ({"parameters": "{lr: 1}"}, 4, "parameters.rank", "no default; found nothing; such as {values: [2, 4, 8, 16]}"),
    ({"parameters": "{rnk: 4, lr: 1}"}, 4, "parameters.rnk", "unknown key 'rnk'; did you mean 'rank'?"),
    ({"parameters": "{r: 4, lr: 1}"}, 4, "parameters.r", "did you mean 'rank'?"),
    ({"parameters": "{rank: 4, learning_rate: 1}"}, 4, "parameters.learning_rate", "did you mean 'lr'?"),
    ({"parameters": _parameters("init_scal: 3")}, 4, "parameters.init_scal", "did you mean 'init_scale'?"),
    ({"parameters": "{rank: 0, lr: 1}"}, 4, "parameters.rank", "a number of at least 1; found 0"),
    ({"parameters": "{rank: 2.5, lr: 1}"}, 4, "parameters.rank", "an integer; found 2.5"),
    ({"parameters": "{rank: true, lr: 1}"}, 4, "parameters.rank", "an integer; found true"),
    ({"parameters": "{rank: 99999999, lr: 1}"}, 4, "parameters.rank", "at most 65,536"),
    ({"parameters": "{rank: {values: [2, '4']}, lr: 1}"}, 4, "parameters.rank.values[1]", "drop the quotes: 4"),
    ({"parameters": "{rank: {min: 2, max: 4.5}, lr: 1}"}, 4, "parameters.rank.max", "an integer; found 4.5"),
    ({"parameters": "{rank: 4, lr: '1e-4'}"}, 4, "parameters.lr", "a number; found '1e-4'; drop the quotes: 1e-4"),
    ({"parameters": "{rank: 4, lr: high}"}, 4, "parameters.lr", "a number; found 'high'"),
    ({"parameters": "{rank: 4, lr: -1}"}, 4, "parameters.lr", "a number above 0; found -1"),
    ({"parameters": "{rank: 4, lr: [1, 2]}"}, 4, "parameters.lr", "write {values: [1, 2]}"),
    ({"parameters": "{rank: 4, lr: }"}, 4, "parameters.lr", "a value, {values: [...]} or {min: ..., max: ...}"),
    ({"parameters": "{rank: 4, lr: {}}"}, 4, "parameters.lr", "a value, {values: [...]} or {min: ..., max: ...}"),
    ({"parameters": "{rank: 4, lr: {values: []}}"}, 4, "parameters.lr.values", "at least 1 entry; found []"),
    ({"parameters": "{rank: 4, lr: {values: 3}}"}, 4, "parameters.lr.values", "a list; found 3"),
    ({"parameters": "{rank: 4, lr: {value: [3]}}"}, 4, "parameters.lr.value", "did you mean 'values'?"),
    ({"parameters": "{rank: 4, lr: {values: [1, 2, 1]}}"}, 4, "parameters.lr.values[2]", "each value once"),
    ({"parameters": "{rank: 4, lr: {values: [1], min: 2}}"}, 4, "parameters.lr", "either values, or min and max"),
    ({"parameters": "{rank: 4, lr: {min: 1}}"}, 4, "parameters.lr.max", "found nothing"),
    ({"parameters": "{rank: 4, lr: {min: 2, max: 1}}"}, 4, "parameters.lr.min", "a number below max, which is 1.0"),
    ({"parameters": "{rank: 4, lr: {min: 1, max: 2, distribution: log}}"}, 4, "parameters.lr.distribution", "uniform"),
    ({"parameters": _parameters("weight_decay: {min: 0, max: 1}")}, 4, "parameters.weight_decay.min", "has no zero"),
    ({"parameters": _parameters("weight_decay: -1")}, 4, "parameters.weight_decay", "at least 0; found -1"),
    ({"parameters": _parameters("alpha: '16'")}, 4, "parameters.alpha", "found '16'; drop the quotes: 16"),
    ({"parameters": _parameters("alpha: 2*rnk")}, 4, "parameters.alpha", 'a rule such as "2*rank"'),
    ({"parameters": _parameters("alpha: 1/2")}, 4, "parameters.alpha", "a number above 0, or a rule"),
    ({"parameters": _parameters("alpha: 0*rank")}, 4, "parameters.alpha", "a number above 0, or a rule"),
    ({"parameters": _parameters("alpha: 1e999999999*rank")}, 4, "parameters.alpha", "a number above 0, or a rule"),
    ({"parameters": _parameters("alpha: true")}, 4, "parameters.alpha", "a number above 0, or a rule"),
    ({"parameters": _parameters("alpha: {values: [r, 1*rank]}")}, 4, "parameters.alpha.values[1]", "each value once"),
    (
        {"parameters": _parameters("alpha: {values: [r, 1.00000000000000000001*rank]}")},
        4,
        "parameters.alpha.values[1]",
        "each value once",
    ),
    # train
    (
        {"train": "{optimizer: radam}"},
        5,
        "train.optimizer",
        "found 'radam'; radam has no alpha equivalence: its warm-up",
    ),
    ({"train": "{optimizer: AdamW}"}, 5, "train.optimizer", "did you mean 'adamw'?"),
    ({"train": "{steps: 1.5}"}, 5, "train.steps", "an integer; found 1.5"),
    ({"train": "{steps: 10, warmup_steps: 10}"}, 5, "train.warmup_steps", "fewer than train.steps, which is 10"),
    ({"train": "{momentum: 0.9}"}, 5, "train.momentum", "no momentum for adamw; found 0.9"),
    ({"train": "{optimizer: adagrad, momentum: 0.9}"}, 5, "train.momentum", "no momentum for adagrad; found 0.9"),
    ({"train": "{options: {nesterov: true}}"}, 5, "train.options.nesterov", "amsgrad, as adamw has it"),
    ({"train": "{options: {amsgrat: true}}"}, 5, "train.options.amsgrat", "did you mean 'amsgrad'?"),
    ({"train": "{options: {amsgrad: 1}}"}, 5, "train.options.amsgrad", "true or false; found 1"),
    ({"train": "{options: {eps: 1}}"}, 5, "train.options.eps", "it as train.eps; found 1"),
    ({"train": "{options: {lr: 1}}"}, 5, "train.options.lr", "it as parameters.lr; found 1"),
    (
        {"train": "{optimizer: nadam, options: {decoupled_weight_decay: true}}"},
        5,
        "train.options.decoupled_weight_decay",
        "momentum_decay",
    ),
    ({"train": "{optimizer: sgd, options: {nesterov: true}}"}, 5, "train.options", "nesterov takes a momentum above 0"),
    ({"train": "{optimizer: rprop, options: {step_sizes: [1, 0.1]}}"}, 5, "train.options.step_sizes", "two rising"),
    ({"train": "{optimizer: rprop, warmup_steps: 3}"}, 5, "train.warmup_steps", "reads lr at its first step only"),
    (
        {"train": "{optimizer: rprop}", "parameters": "{rank: 4, lr: 1, weight_decay: 0.1}"},
        4,
        "parameters.weight_decay",
        "rprop has no weight decay",
    ),
    ({"train": "{accumulation: 0}"}, 5, "train.accumulation", "at least 1; found 0"),
    ({"lora": "{target_modules: [fc1], dropout: 1}"}, 3, "lora.dropout", "below 1; found 1"),
    ({"lora": "{target_modules: [fc1], dora: true}"}, 1, "train.magnitude_lr", "no gauge moves its magnitudes"),
    ({"train": "{magnitude_lr: 1e-3}"}, 5, "train.magnitude_lr", "none, for lora.dora is false; found 0.001"),
    (
        {"lora": "{target_modules: [fc1], dora: true}", "train": "{optimizer: muon}"},
        3,
        "lora.dora",
        "false, for muon takes matrices only",
    ),
    ({"train": "{optimizer: sgd, momentum: 1}"}, 5, "train.momentum", "a number below 1; found 1"),
    ({"train": "{betas: [0.9]}"}, 5, "train.betas", "two numbers; found [0.9]; such as [0.9, 0.999]"),
    ({"train": "{betas: [0.9, 1]}"}, 5, "train.betas[1]", "a number below 1; found 1"),
    ({"train": "{clip_norm: 0}"}, 5, "train.clip_norm", "a number above 0; found 0"),
    ({"train": "{eps: '1e-8'}"}, 5, "train.eps", "drop the quotes: 1e-8"),
    ({"train": "{dtype: float16}"}, 5, "train.dtype", "one of float32, float64, bfloat16 or auto; found 'float16'"),
    ({"train": "{seed: -1}"}, 5, "train.seed", "at least 0; found -1"),
    # PEFT's words
    (
        {"lora": "{target_modules: [a], rank_pattern: {a: 2}}"},
        3,
        "lora.rank_pattern",
        "so all its layers have one rank",
    ),
    ({"lora": "{target_modules: [a], alpha_pattern: {a: 2}}"}, 3, "lora.alpha_pattern", "all layers have one alpha"),
    ({"lora": "{target_modules: [a], lora_alpha: 2}"}, 3, "lora.lora_alpha", "alpha is parameters.alpha"),
    ({"lora": "{target_modules: [a], r: 2}"}, 3, "lora.r", "the rank is parameters.rank"),
    # metric, search, certify
    (
        {"metric": "{name: eval/los}"},
        5,
        "metric.name",
        "which the task reports; found 'eval/los'; did you mean 'eval/loss'?",
    ),
    ({"metric": "{direction: minimize}"}, 5, "metric.direction", "did you mean 'goal'?"),
    ({"search": "{method: tep}"}, 5, "search.method", "one of gp, tpe, random, grid or cmaes; found 'tep'; did you"),
    ({"search": "{trials: 1000001}"}, 5, "search.trials", "at most 1,000,000"),
    ({"search": "{pruner: none}"}, 5, "search.pruner", "keys with values; found 'none'; write {type: none}"),
    ({"search": "{pruner: {type: [none]}}"}, 5, "search.pruner.type", "one of successive_halving, median or none"),
    ({"search": "{pruner: {type: median, keep: 1}}"}, 5, "search.pruner.keep", "one of rungs, type or warmup_trials"),
    ({"search": "{pruner: {type: none, rungs: [50, 20, 200]}}"}, 5, "search.pruner.rungs[1]", "more than 50"),
    ({"search": "{pruner: {type: none, rungs: [50, 100]}}"}, 5, "search.pruner.rungs[1]", "train.steps, which is 200"),
    ({"search": "{method: grid}"}, 4, "parameters.lr", "values, because search.method is grid; found a range"),
    ({"certify": "{steps: 201}"}, 5, "certify.steps", "at most train.steps, which is 200; found 201"),
    # compute, tracking
    ({"compute": "{workers: many}"}, 5, "compute.workers", "an integer from 1 to 4096, or auto; found 'many'"),
    ({"compute": "{workers: 4097}"}, 5, "compute.workers", "an integer from 1 to 4096, or auto; found 4097"),
    ({"compute": "{pack: 1000000000}"}, 5, "compute.pack", "an integer from 1 to 4096, or auto; found 1000000000"),
    ({"compute": "{pack: 0}"}, 5, "compute.pack", "an integer from 1 to 4096, or auto; found 0"),
    ({"compute": "{gpus_per_worker: -1}"}, 5, "compute.gpus_per_worker", "a number of at least 0, or auto"),
    ({"compute": "{gpus_per_worker: 1.5}"}, 5, "compute.gpus_per_worker", "found 1.5; Ray splits no GPU among workers"),
    ({"tracking": "{uri: 'http://u:secret@h'}"}, 5, "tracking.uri", "an address without a password"),
]


@pytest.mark.parametrize(
    ("sections", "line", "path", "words"), _FAULTS, ids=[f"{row[2]}-{i}" for i, row in enumerate(_FAULTS)]
)
def test_a_wrong_spec_is_told_where_and_what_in_its_own_words(
    sections: dict[str, str], line: int, path: str, words: str
) -> None:
    with pytest.raises(SpecError, match=re.escape(words)) as caught:
        _spec(**sections)
    faults = [fault for fault in caught.value.faults if fault.path == path]
    assert [fault.line for fault in faults] == [line], caught.value
    assert not re.search(r"secret|[Ii]nput should|validation|_Written|DigitsTask|literal\[", str(caught.value))


@pytest.mark.parametrize(
    ("sections", "line", "path", "words"), [row for row in _FAULTS if row[0] != {"search": "{method: grid}"}]
)
def test_one_mistake_is_one_fault(sections: dict[str, str], line: int, path: str, words: str) -> None:
    with pytest.raises(SpecError, match="required") as caught:
        _spec(**sections)
    assert len(caught.value.faults) == 1, caught.value


def test_all_faults_of_all_sections_come_at_once_in_the_order_of_the_lines() -> None:
    with pytest.raises(SpecError, match=r"sweep\.yaml:1: name") as caught:
        _spec(
            name="''",
            lora="{target_modules: [], init: x}",
            train="{steps: 20, warmup_steps: 30}",
            search="{method: grid}",
            certify="{steps: 0}",
            metric="{name: x}",
        )
    assert [(fault.line, fault.path) for fault in caught.value.faults] == [
        (1, "name"),
        (3, "lora.target_modules"),
        (3, "lora.init"),
        (4, "parameters.lr"),
        (4, "parameters.init_scale"),
        (5, "train.warmup_steps"),
        (7, "certify.steps"),
        (8, "metric.name"),
    ]


@pytest.mark.parametrize(
    ("parameters", "accepted"),
    [
        (_parameters("init_scale: 1"), False),
        (_parameters("init_scale: {min: 1, max: 2}"), False),
        (_parameters("init_scale: {min: 1, max: 2}, alpha: {min: 1, max: 2}"), False),
        ("{rank: 4, lr: {min: 1, max: 2}, alpha: {min: 1, max: 2}}", True),
        ("{rank: {values: [2, 4]}, lr: {min: 1, max: 2}}", True),
    ],
)
def test_cmaes_needs_two_parameters_and_alpha_is_none_beside_a_searched_init_scale(
    parameters: str, accepted: bool
) -> None:
    if accepted:
        assert _spec(parameters=parameters, search="{method: cmaes}").search.method == "cmaes"
        return
    with pytest.raises(SpecError, match=r"search\.method: required two searched parameters or more for cmaes"):
        _spec(parameters=parameters, search="{method: cmaes}")


def test_pydantic_itself_speaks_the_same_words() -> None:
    with pytest.raises(ValidationError, match=r"required an integer; found 1\.5"):
        SweepSpec.model_validate({**_spec().model_dump(), "train": {"steps": 1.5}})


def test_later_stages_report_faults_at_the_line_of_the_text() -> None:
    document = parse_spec(_text(), "sweep.yaml")
    error = document.error("parameters.rank.values[1]", "at most 2, the width of fc1", "4", "remove it")
    assert str(error) == (
        "sweep.yaml:4: parameters.rank.values[1]: required at most 2, the width of fc1; found 4; remove it"
    )
    assert document.fault("train.batch_size", "less", "32").line == 1


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_reads_as_its_text_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + _text().replace("\n", "\r\n").encode())
    document = load_spec(path)
    assert isinstance(document, SpecDocument)
    assert document.source == str(path)
    assert document.spec == _spec()


def test_what_cannot_be_read_as_a_file_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found no such file; `lora-sweeps init` writes one"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="found a directory; name the YAML file inside it"):
        load_spec(tmp_path)
    (tmp_path / "file").write_bytes(b"name: \xff\n")
    with pytest.raises(InputError, match="required UTF-8 text; found the byte 0xff at offset 6"):
        load_spec(tmp_path / "file")
    with pytest.raises(InputError, match="found: Not a directory"):
        load_spec(tmp_path / "file" / "sweep.yaml")
    with pytest.raises(InputError, match="found: embedded null byte"):
        load_spec(tmp_path / "\0")
    with pytest.raises(InputError, match=r"zero: required a spec of at most 1,048,576 bytes; found a larger file"):
        load_spec(Path("/dev/zero"))


# -- schema, template, example -----------------------------------------------------------------------------------------


def _validator() -> Any:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


_TASKS = (
    ("{type: causal_lm, model: x, data: {train: x, eval: 0.2}}", {}),
    (
        "{type: sequence_classification, model: x, data: {train: x}, labels: [a, 1, true], head: [score]}",
        {"parameters": _parameters("head_lr: {min: 1e-4, max: 1e-2}")},
    ),
    ("{type: python, entrypoint: 'a.b:c', path: src}", {"parameters": _parameters("head_lr: 0.1")}),
)


def test_paths_start_from_the_specs_directory_and_ids_stay_ids(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    text = _text(task="{type: causal_lm, model: org/x, data: {train: data, eval: more/eval.csv}}")
    task = parse_spec(text, str(tmp_path / "sweep.yaml")).spec.task
    assert isinstance(task, CausalLmTask)
    places = (task.model, task.data.train, task.data.eval)
    assert places == ("org/x", str(tmp_path / "data"), str(tmp_path / "more" / "eval.csv"))
    text = _text(task="{type: causal_lm, model: ../x, data: {train: org/data}}")
    spec = parse_spec(text, str(tmp_path / "sub" / "sweep.yaml")).spec
    assert isinstance(spec.task, CausalLmTask)
    assert (spec.task.model, spec.task.data.train) == (str(tmp_path / "x"), "org/data")
    assert SweepSpec.model_validate(spec.model_dump(mode="json")) == spec  # wherever it is read again


@pytest.mark.parametrize(
    "text",
    [template(), EXAMPLE.read_text(), _text(), *(_text(task=task, **more) for task, more in _TASKS)],
    ids=["template", "example", "shortest", "causal_lm", "sequence_classification", "python"],
)
def test_schema_and_parser_accept_the_same_specs(text: str) -> None:
    _validator().validate(read_yaml(text, "f").value)
    spec = parse_spec(text, "f").spec
    _validator().validate(spec.model_dump(mode="json"))


@pytest.mark.parametrize(
    "sections",
    [
        {"name": "-x"},
        {"serch": "{}"},
        {"task": "{type: digit}"},
        {"lora": "{target_modules: []}"},
        {"parameters": "{rank: 4}"},
        {"parameters": "{rank: 0, lr: 1}"},
        {"parameters": "{rank: 4, lr: '1'}"},
        {"parameters": "{rank: 4, lr: {values: [1, 1]}}"},
        {"parameters": "{rank: 4, lr: {min: 1}}"},
        {"parameters": _parameters("alpha: '16'")},
        {"train": "{optimizer: radam}"},
        {"train": "{betas: [0.9]}"},
        {"search": "{pruner: {type: nope}}"},
        {"compute": "{workers: many}"},
    ],
    ids=str,
)
def test_schema_and_parser_refuse_the_same_specs(sections: dict[str, str]) -> None:
    assert not _validator().is_valid(read_yaml(_text(**sections), "f").value)
    with pytest.raises(SpecError, match="required"):
        _spec(**sections)


def test_every_key_is_described_in_the_schema() -> None:
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    undescribed = [
        f"{section['title']}.{key}"
        for section in sections
        for key, entry in section["properties"].items()
        if "description" not in entry and "$ref" not in entry  # a section is described where it is defined
    ]
    assert undescribed == []


def test_the_template_shows_every_key_and_its_default() -> None:
    shown = read_yaml(template(), "template.yaml").value
    spec = parse_spec(template(), "template.yaml").spec
    assert isinstance(shown, dict)
    assert set(shown) == set(SweepSpec.model_fields)
    for name, section in spec:
        if isinstance(section, BaseModel):
            assert set(shown[name]) == set(type(section).model_fields), name
    plain = _spec(parameters="{rank: 4, lr: 1}")
    for name in ("reduction", "train", "metric", "certify", "compute", "tracking"):
        assert getattr(spec, name) == getattr(plain, name), name
    assert spec.search.rungs(spec.train.steps) == plain.search.rungs(plain.train.steps)


def test_the_example_is_the_sweep_of_the_demo() -> None:
    spec = load_spec(EXAMPLE).spec
    assert spec.parameters.rank == Choice((2, 4, 8, 16))
    assert spec.parameters.lr == Range(1e-4, 1.0)
    assert spec.parameters.init_scale == Range(0.0625, 16.0)
    assert spec.parameters.alpha == Choice((4.0, 8.0, 16.0, 32.0, 64.0))
    assert (spec.search.trials, spec.search.rungs(spec.train.steps)) == (64, (50, 100, 200))
