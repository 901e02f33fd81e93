"""A trial's trained adapter as a folder that PEFT loads by itself: base model, kind of task, layers and head."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from lora_core.adapter import LoraBank, Member
from lora_core.checkpoint import export_peft_adapter, load_member, save_member, split_saved_modules
from sweeps.deliverables import write_adapter
from sweeps.home import Home
from sweeps.records import SweepRecord, TrialRecord
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.tasks import load_task
from tests.sweeps.export_points import trained
from tests.sweeps.hf_support import TEXTS, lm_document, make_gpt2, make_model, write_jsonl

# PEFT 0.21 asks transformers 5.23 by the older name.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CONFIGURATION = Configuration(rank=4, alpha=16.0, lr=0.05, init_scale=2.0)
IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_jsonl(tmp_path_factory.mktemp("data") / "texts.jsonl", [{"text": text} for text in TEXTS])
    return f"train: '{path}'"


def our_logits(record: SweepRecord, trial: TrialRecord, home: Home) -> Tensor:
    """Of the bank, from the state that the trial left."""
    spec = record.spec
    task = load_task(spec, cache=home.cache, device=torch.device("cpu"))
    state = load_member(home.checkpoints(record.id) / str(trial.rungs[-1].checkpoint))
    member = Member(Reduction.of(spec).point(trial.configuration), spec.train.seed)
    with LoraBank.attach(task.model, spec.lora.target_modules, [member]) as bank, torch.no_grad():
        bank.load_adapter(0, state.adapter)
        return task.model(input_ids=IDS).logits


MODELS = {
    "gpt2": (make_gpt2, "all-linear"),
    "llama": (make_model, "[q_proj, v_proj, down_proj]"),
}


@pytest.mark.parametrize("name", MODELS)
def test_peft_finds_model_and_adapter_by_the_folder_alone(name: str, texts: str, tmp_path: Path):
    """Without a warning, which is an error here: PEFT warns where fan_in_fan_out is not the layers'."""
    make, targets = MODELS[name]
    home = Home(tmp_path / "home")
    record, trial = trained(lm_document(make(tmp_path / "model"), texts, targets=targets).spec, CONFIGURATION, home)
    write_adapter(record, trial, home, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(tmp_path / "model"))
    assert config["fan_in_fan_out"] == (name == "gpt2")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        base = model.unload()(input_ids=IDS).logits
    torch.testing.assert_close(found, our_logits(record, trial, home), rtol=1e-5, atol=1e-5)
    assert float((found - base).abs().max()) > 0.01, "the adapter must matter"


def test_the_state_of_an_earlier_release_is_still_exported(texts: str, tmp_path: Path):
    home = Home(tmp_path / "home")
    record, trial = trained(
        lm_document(make_gpt2(tmp_path / "model"), texts, targets="all-linear").spec, CONFIGURATION, home
    )
    place = home.checkpoints(record.id) / str(trial.rungs[-1].checkpoint)
    state = load_member(place)
    assert state.extra == {"trial": "7", "fan_in_fan_out": "true", "heads": "[]"}
    save_member(place, adapter=state.adapter, optimizer=state.optimizer, step=state.step, extra={"trial": "7"})
    write_adapter(record, trial, home, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False but the target module is `Conv1D`"):
        model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, our_logits(record, trial, home), rtol=1e-5, atol=1e-5)


def test_the_revision_of_a_model_goes_with_its_name(texts: str, tmp_path: Path):
    home = Home(tmp_path / "home")
    document = lm_document(make_model(tmp_path / "model"), texts)
    record, trial = trained(document.spec, CONFIGURATION, home)
    task = record.spec.task.model_copy(update={"model": "org/model", "revision": "v2"})
    spec = record.spec.model_copy(update={"task": task}).model_dump(mode="json")
    write_adapter(replace(record, created=record.created.model_copy(update={"spec": spec})), trial, home, tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.base_model_name_or_path, config.revision) == ("org/model", "v2")


# -- heads -------------------------------------------------------------------------------------------------------------


def classifier(seed: int = 0) -> Any:
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, num_labels=3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.GPT2ForSequenceClassification(config).eval()
    model.config.pad_token_id = 0
    return model


def test_a_trained_head_goes_with_the_adapter_and_peft_loads_both(tmp_path: Path):
    """The state of a classifier's trial has its head among the adapter's tensors."""
    theirs = peft.get_peft_model(
        classifier(),
        peft.LoraConfig(
            task_type=peft.TaskType.SEQ_CLS, r=4, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True
        ),
    )
    draws = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2, generator=draws)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=IDS).logits
    state = {}
    for name, value in peft.get_peft_model_state_dict(theirs).items():
        path = name.removeprefix("base_model.model.")
        if path.startswith("score"):
            state["score.weight"] = value
        else:
            layer, _, factor = path.removesuffix(".weight").rpartition(".")
            state[f"{layer}.{factor}"] = value.mT if factor == "lora_B" else value
    adapter, modules = split_saved_modules(state, ["score"])
    assert list(modules) == ["score"]
    assert not any("score" in name for name in adapter)

    export_peft_adapter(
        tmp_path,
        adapter,
        rank=4,
        alpha=16,
        target_modules=["c_attn"],
        use_rslora=False,
        task_type="SEQ_CLS",
        fan_in_fan_out=True,
        saved_modules=modules,
    )
    base = classifier()
    base.score.load_state_dict(classifier(seed=9).score.state_dict())  # as a new head would be
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_head_of_several_layers_is_one_module():
    tensors = {
        "encoder.layer.0.query.lora_A": torch.zeros(2, 3),
        "encoder.word_embeddings.lora_embedding_A": torch.zeros(2, 3),
        "encoder.layer.0.query.magnitude": torch.zeros(1, 3),
        "classifier.dense.weight": torch.zeros(3, 3),
        "classifier.dense.bias": torch.zeros(3),
        "classifier.out_proj.weight": torch.zeros(2, 3),
        "pooler.dense.weight": torch.zeros(3, 3),
    }
    adapter, modules = split_saved_modules(tensors, ["classifier", "pooler"])
    assert split_saved_modules(adapter, []) == (adapter, {})
    assert [name for name in tensors if name not in adapter] == [name for name in tensors if "encoder" not in name]
    assert {name: sorted(state) for name, state in modules.items()} == {
        "classifier": ["dense.bias", "dense.weight", "out_proj.weight"],
        "pooler": ["dense.weight"],
    }
