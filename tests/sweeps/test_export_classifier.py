"""The closing test for classification: the exported files, in unmodified PEFT and Trainer, are our trial, head and all.

Shared are the checkpoint (with the head that the seed drew), the order of the data, and the initial A. The rest is what
`--format hf_trainer` wrote: `adapter_config.json`, `training_args.yaml`, and the optimizer of `parameter_groups.yaml`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from torch.utils.data import IterableDataset
from transformers import HfArgumentParser, Trainer, TrainingArguments

from lora_core.adapter import Member
from lora_core.optimizers import PackOptimizer
from lora_core.trajectory import Trajectory, compare, control_of, record_trajectories
from sweeps.deliverables import write_adapter, write_merged
from sweeps.export import FORMATS
from sweeps.export.point import ExportPoint
from sweeps.home import Home
from sweeps.recipe import bank_of, indices_of, optimizer_of, steps_of
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SpecDocument, SweepSpec
from sweeps.tasks import load_task
from sweeps.tasks.sequence_classification import SequenceClassificationTask
from tests.sweeps.export_points import record_of_one, trained
from tests.sweeps.hf_support import TEXTS, classify_document, make_checkpoint, write_jsonl

NAMES = ("negative", "neutral", "positive")
POINT = Configuration(rank=4, alpha=16.0, lr=1e-2, init_scale=2.0, head_lr=5e-3)
KINDS = {"roberta": "", "bert-without-pooler": "head: [pooler, classifier]", "gpt2": ""}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def document_of(kind: str, folder: Path) -> SpecDocument:
    rows = [{"text": text, "label": NAMES[i % 3]} for i, text in enumerate(TEXTS)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    model = make_checkpoint(folder / kind, kind)
    return classify_document(model, f"train: '{data}'", KINDS[kind], steps=24)


def load(spec: SweepSpec, folder: Path) -> SequenceClassificationTask:
    task = load_task(spec, cache=folder / "cache", device=torch.device("cpu"))
    assert isinstance(task, SequenceClassificationTask)
    return task


def ours(spec: SweepSpec, task: SequenceClassificationTask, member: Member) -> Trajectory:
    with bank_of(spec, task, [member]) as bank:
        steps = steps_of(spec, task, PackOptimizer(bank, optimizer_of(spec)), start=0, stop=spec.train.steps)
        return record_trajectories(bank, steps)[0]


class InOurOrder(IterableDataset[dict[str, Any]]):
    """Tokenised samples in the order in which a sweep's trials see them, each batch padded as ours is."""

    def __init__(self, spec: SweepSpec, task: SequenceClassificationTask) -> None:
        self.spec, self.task = spec, task

    def __iter__(self) -> Iterator[dict[str, Any]]:
        ids, starts, classes = (self.task.data[f"train {name}"] for name in ("ids", "samples", "classes"))
        indices = indices_of(self.spec, self.task)
        for batch in range(self.spec.train.steps):
            for i in indices(batch).tolist():
                yield {"input_ids": ids[starts[i] : starts[i + 1]].long(), "labels": classes[i]}


def trainers(spec: SweepSpec, task: SequenceClassificationTask, written: Path, initial: dict[str, Any]) -> list[float]:
    """The losses of what the files say, run by the Trainer."""
    classes = {"num_labels": len(NAMES), "pad_token_id": task.model.config.pad_token_id}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(spec.task.model, **classes)
    model.load_state_dict(task.model.state_dict())  # the head as the seed drew it
    adapted = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(str(written)))
    for name, module in model.named_modules():
        if f"{name}.lora_A" in initial:
            module.lora_A["default"].weight.data.copy_(initial[f"{name}.lora_A"])
    here = {"use_cpu": True, "report_to": [], "output_dir": str(written / "out"), "save_strategy": "no"}
    here |= {"disable_tqdm": True, "dataloader_pin_memory": False, "logging_strategy": "no"}
    said = yaml.safe_load((written / "training_args.yaml").read_text())
    (arguments,) = HfArgumentParser(TrainingArguments).parse_dict(said | here)
    values = yaml.safe_load((written / "parameter_groups.yaml").read_text())
    groups = [
        {"params": [p for n, p in adapted.named_parameters() if p.requires_grad and re.search(pattern, n)], **settings}
        for pattern, settings in values["groups"].items()
    ]
    kind = getattr(torch.optim, values["optimizer_class"].removeprefix("torch.optim."))
    losses: list[float] = []
    model.register_forward_hook(lambda module, args, out: losses.append(out.loss.item()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.task.model)
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=InOurOrder(spec, task),
        data_collator=transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        optimizers=(kind(groups, **values["arguments"]), None),
    )
    # The Trainer puts the model into training mode, and base dropout is off in a sweep.
    for module in adapted.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()
    return losses


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_files_in_unmodified_peft_and_trainer_are_our_trial(kind: str, tmp_path: Path):
    spec = document_of(kind, tmp_path).spec
    task, point = load(spec, tmp_path), ExportPoint.of(*record_of_one(spec, POINT))
    assert point.point.init_scale == 1.0
    exported = FORMATS["hf_trainer"](point, tmp_path / "out")
    assert {each.name for each in exported.leftovers if each.warns} == {"head_lr", "base_dropout"}
    with bank_of(spec, task, [Member(point.point, spec.train.seed)]) as bank:
        initial = bank.adapter(0)
    theirs = trainers(spec, task, tmp_path / "out", initial)

    member = Member(Reduction.of(spec).point(POINT), spec.train.seed)
    trial, *controls = (ours(spec, task, each) for each in (member, *(control_of(member, seed) for seed in range(4))))
    assert trial.losses[-1] < 0.9 * trial.losses[0]
    without_norms = [Trajectory(each.losses, each.update_norms[:, :0]) for each in (trial, *controls)]
    found = Trajectory(torch.tensor(theirs, dtype=torch.float64), without_norms[0].update_norms)
    verdict = compare(without_norms[0], found, without_norms[1:])
    assert verdict.kind != "different", verdict


def test_the_trained_folder_and_the_merged_model_have_the_head(tmp_path: Path):
    spec = document_of("bert-without-pooler", tmp_path).spec
    home = Home(tmp_path / "home")
    record, trial = trained(spec, POINT, home)
    write_adapter(record, trial, home, tmp_path / "adapter")
    write_merged(record, trial, home, tmp_path / "merged")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("SEQ_CLS", spec.task.model)
    assert config["modules_to_save"] == ["bert.pooler", "classifier"]

    base = transformers.AutoModelForSequenceClassification.from_pretrained(spec.task.model, num_labels=3)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    texts, tokenizers = (
        [TEXTS[3]],
        [transformers.AutoTokenizer.from_pretrained(each) for each in (spec.task.model, tmp_path / "merged")],
    )
    assert tokenizers[0](texts)["input_ids"] == tokenizers[1](texts)["input_ids"]
    assert [merged.config.id2label[i] for i in range(3)] == list(NAMES)
    task = load(spec, home.path)
    ids, starts, classes = (task.data[f"held-out {name}"] for name in ("ids", "samples", "classes"))
    for model in (loaded, merged):
        losses = [
            model(input_ids=ids[starts[i] : starts[i + 1]].long()[None], labels=classes[i][None]).loss.item()
            for i in range(len(classes))
        ]
        assert sum(losses) / len(losses) == pytest.approx(trial.rungs[-1].metrics["eval/loss"], rel=1e-5)
