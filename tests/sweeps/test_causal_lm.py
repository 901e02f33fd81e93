"""Causal language models: losses against plain transformers and PEFT, packs, twins, masks, and every refusal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import peft
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from torch import Tensor

from lora_core.adapter import LoraBank, Member
from lora_core.checkpoint import export_peft_adapter
from sweeps.collapse import Certificate
from sweeps.errors import SpecError
from sweeps.jobs import JobOrder, JobResult, MemberOrder
from sweeps.preflight import preflight
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SpecDocument, SweepSpec
from sweeps.tasks import load_task
from sweeps.tasks.causal_lm import CausalLmTask
from sweeps.tasks.tokens import Rows, Tokens
from sweeps.training import JobRunner
from tests.support import run_cli
from tests.sweeps.hf_support import (
    CHAT_TEMPLATE,
    TEXTS,
    lm_document,
    make_gpt2,
    make_model,
    make_tokenizer,
    write_jsonl,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [{"prompt": f"What is {i} times {i}?", "completion": f" It is {i * i}."} for i in range(12)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}]} for i in range(6)
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_jsonl(tmp_path_factory.mktemp("data") / "texts.jsonl", [{"text": text} for text in TEXTS])
    return f"train: '{path}'"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)
    return f"train: '{path}'"


@pytest.fixture
def load(tmp_path: Path) -> Callable[[SpecDocument], CausalLmTask]:
    def task(document: SpecDocument) -> CausalLmTask:
        loaded = load_task(document.spec, cache=tmp_path / "cache", device=torch.device("cpu"))
        assert isinstance(loaded, CausalLmTask)
        return loaded

    return task


def samples_of(task: CausalLmTask, which: str = "train") -> list[tuple[list[int], list[bool]]]:
    """Tokens of each sample, and which of them are learned."""
    ids, learned, starts = (task.data[f"{which} {name}"] for name in ("ids", "learned", "samples"))
    spans = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    return [(ids[start:stop].tolist(), learned[start:stop].tolist()) for start, stop in spans]


def naive_loss(model: Any, samples: list[tuple[list[int], list[bool]]]) -> Tensor:
    """Mean over all learned tokens, a sample at a time, by transformers' own rules."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, learned in samples:
        labels = torch.tensor([[i if one else -100 for i, one in zip(ids, learned, strict=True)]])
        n = int((labels[:, 1:] != -100).sum())
        total = total + model(input_ids=torch.tensor([ids]), labels=labels).loss.double() * n
        count += n
    return (total / count).detach()


def with_dropout(spec: SweepSpec) -> SweepSpec:
    return spec.model_copy(update={"lora": spec.lora.model_copy(update={"dropout": 0.1})})


def members_of(spec: SweepSpec, *configurations: Configuration) -> list[Member]:
    reduction = Reduction.of(spec)
    return [Member(reduction.point(each), spec.train.seed) for each in configurations]


POINTS = [Configuration(rank=rank, alpha=16.0, lr=lr, init_scale=1.0) for rank, lr in ((2, 1e-2), (4, 3e-3), (2, 1e-3))]


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["", "packing: true", "gradient_checkpointing: true", "attention: eager"])
def test_losses_are_those_of_plain_transformers_sample_by_sample(model: Path, texts: str, load, task: str):
    loaded = load(lm_document(model, texts, task))
    reference = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    rows = min(2, loaded.n_samples)
    starts = loaded.data["train rows"].tolist()
    expected = naive_loss(reference, samples_of(loaded)[: starts[rows]])
    losses = loaded.losses_K(torch.arange(rows), members=3)
    assert losses.detach().tolist() == pytest.approx([float(expected)] * 3, rel=1e-6)
    (metrics,) = loaded.evaluate(1)
    assert metrics["eval/loss"] == pytest.approx(float(naive_loss(reference, samples_of(loaded, "held-out"))), rel=1e-6)
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(metrics["eval/loss"]))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_each_member_has_the_loss_of_its_adapter_under_peft(model: Path, pairs: str, load, tmp_path: Path):
    document = lm_document(model, pairs, "loss: completion")
    task, spec = load(document), document.spec
    with LoraBank.attach(task.model, spec.lora.target_modules, members_of(spec, *POINTS)) as bank:
        bank.params_KP[:, bank.split :].normal_(generator=torch.Generator().manual_seed(0), std=0.3)
        for k, slot in ((k, slot) for k in range(3) for slot in bank.slots):
            row = bank.params_KP[k, slot.offset : slot.offset + bank.rank * slot.width]
            row[bank.members[k].point.rank * slot.width :] = 0
        losses, evaluated = task.losses_K(torch.arange(4), members=3).tolist(), task.evaluate(3)
        for k, point in enumerate(POINTS):
            export_peft_adapter(
                tmp_path / str(k),
                bank.adapter(k),
                rank=point.rank,
                alpha=point.alpha,
                target_modules=spec.lora.target_modules,
                use_rslora=False,
            )
    for k in range(3):
        base = transformers.AutoModelForCausalLM.from_pretrained(model)
        reference = peft.PeftModel.from_pretrained(base, tmp_path / str(k)).eval()
        assert losses[k] == pytest.approx(float(naive_loss(reference, samples_of(task)[:4])), rel=1e-6)
        held_out = float(naive_loss(reference, samples_of(task, "held-out")))
        assert evaluated[k]["eval/loss"] == pytest.approx(held_out, rel=1e-6)
    assert len(set(losses)) == 3


def test_gradient_checkpointing_changes_no_bit_of_losses_and_gradients(model: Path, texts: str, load):
    found = []
    for task in ("gradient_checkpointing: false", "gradient_checkpointing: true"):
        document = lm_document(model, texts, task)
        loaded = load(document)
        spec = with_dropout(document.spec)
        with LoraBank.attach(loaded.model, spec.lora.target_modules, members_of(spec, *POINTS)) as bank:
            bank.params_KP.add_(0.01)
            bank.batch = 0
            losses = loaded.losses_K(torch.arange(4), members=3)
            losses.sum().backward()
            found.append((losses.detach(), bank.grads_KP.clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].abs().max() > 0


def test_the_base_models_dropout_is_off(model: Path, texts: str, load):
    task = load(lm_document(model, texts))
    assert task.model.config.attention_dropout > 0
    assert torch.equal(task.losses_K(torch.arange(4), 1), task.losses_K(torch.arange(4), 1))


def test_evaluation_in_chunks_is_evaluation_in_one(model: Path, texts: str, load, monkeypatch: pytest.MonkeyPatch):
    task = load(lm_document(model, f"{texts}, eval: 0.5"))
    (whole,) = task.evaluate(1)
    monkeypatch.setattr("sweeps.tasks.causal_lm._EVAL_TOKENS", 70)
    chunks = task._chunks()
    assert sorted(row for chunk in chunks for row in chunk) == list(range(12))
    assert len(chunks) > 3
    (chunked,) = task.evaluate(1)
    assert chunked["eval/loss"] == pytest.approx(whole["eval/loss"], rel=1e-6)
    assert task.most_rows(1) >= max(len(ids) for ids, _ in samples_of(task))


@pytest.mark.parametrize(("dtype", "rel"), [("bfloat16", 0.02), ("float64", 1e-5)])
def test_the_model_computes_in_the_dtype_of_the_spec(model: Path, texts: str, load, dtype: str, rel: float):
    task = load(lm_document(model, texts, dtype=dtype))
    assert next(task.model.parameters()).dtype == getattr(torch, dtype)
    single = load(lm_document(model, texts)).evaluate(1)[0]["eval/loss"]
    assert task.evaluate(1)[0]["eval/loss"] == pytest.approx(single, rel=rel)


# -- jobs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., JobResult]:
    def job(spec: SweepSpec, *points: Configuration, twins: tuple[Configuration, ...] = ()) -> JobResult:
        class_id = Reduction.of(spec).class_id
        order = JobOrder(
            job=0,
            work="certify" if twins else "train",
            spec=spec.model_dump(mode="json"),
            cache=str(tmp_path / "cache"),
            checkpoints=str(tmp_path / "checkpoints"),
            members=tuple(MemberOrder(trial=i, configuration=p, class_id=class_id(p)) for i, p in enumerate(points)),
            twins=twins,
            start=0,
            stop=spec.train.steps,
        )
        result = JobRunner().run(JobOrder.model_validate_json(order.model_dump_json()))
        assert result.error is None, result.detail
        return result

    return job


@pytest.mark.parametrize("task", ["", "packing: true, max_length: 64"])
def test_a_packed_member_trains_as_it_does_alone(model: Path, texts: str, run, task: str):
    spec = lm_document(model, texts, task, dtype="float32").spec
    packed = run(spec, *POINTS).members
    for point, member in zip(POINTS, packed, strict=True):
        (alone,) = run(spec, point).members
        assert member.metrics["eval/loss"] == pytest.approx(alone.metrics["eval/loss"], rel=1e-5)
        losses = [[loss for _, loss in each.train_losses] for each in (member, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert member.metrics.keys() == spec.task.metrics.keys()


@pytest.mark.parametrize("task", ["loss: completion", "packing: true, gradient_checkpointing: true"])
def test_twins_at_powers_of_four_are_bit_identical(model: Path, pairs: str, run, task: str):
    spec = lm_document(model, pairs, task, clip_norm=0.5, batch_size=2 if "packing" not in task else 1).spec
    spec = with_dropout(spec)
    point = Configuration(rank=4, alpha=16.0, lr=0.01, init_scale=2.0, weight_decay=0.1)
    twins = tuple(Reduction.of(spec).lift(point, alpha) for alpha in (4.0, 64.0))
    certificate = Certificate.model_validate(run(spec, point, twins=twins).certificate)
    assert [twin.verdict for twin in certificate.twins] == ["bit-identical", "bit-identical"]
    assert certificate.losses[0] != certificate.losses[-1]


def test_a_gpt2_shaped_model_is_adapted_on_all_its_linear_layers(texts: str, run, tmp_path: Path):
    document = lm_document(make_gpt2(tmp_path / "gpt2"), texts, targets="all-linear")
    fit = preflight(document, Reduction.of(document.spec), tmp_path / "cache")
    assert {name.rpartition(".")[2] for name in fit.layers} == {"c_attn", "c_proj", "c_fc"}
    point = Configuration(rank=4, alpha=16.0, lr=0.01, init_scale=2.0)
    twins = (Reduction.of(document.spec).lift(point, 64.0),)
    certificate = Certificate.model_validate(run(document.spec, point, twins=twins).certificate)
    assert [twin.verdict for twin in certificate.twins] == ["bit-identical"]
    assert set(certificate.update_norms) == set(fit.layers)


# -- what is learned ---------------------------------------------------------------------------------------------------


def shown(task: CausalLmTask, tokenizer: Any) -> list[tuple[str, str]]:
    """The text of each training sample, and of what is learned of it."""
    decode = tokenizer.decode
    return [
        (decode(ids), decode([i for i, one in zip(ids, learned, strict=True) if one]))
        for ids, learned in samples_of(task)
    ]


def test_all_but_the_first_token_of_a_text_is_learned_up_to_its_end(model: Path, texts: str, load):
    task = load(lm_document(model, texts))
    for ids, learned in samples_of(task):
        assert ids[-1] == 0
        assert ids.count(0) == 1
        assert learned == [False] + [True] * (len(ids) - 1)
    assert {text for text, _ in shown(task, make_tokenizer())} <= {f"{text}<eos>" for text in TEXTS}


def test_of_pairs_the_completion_alone_is_learned(model: Path, pairs: str, load):
    for text, learned in shown(load(lm_document(model, pairs, "loss: completion")), make_tokenizer()):
        prompt, completion = text.split("?")
        assert learned == completion, prompt
    for text, learned in shown(load(lm_document(model, pairs)), make_tokenizer()):
        assert text.endswith(learned)
        assert len(learned) > len(text.split("?")[1]) + 3


def test_a_token_across_the_border_belongs_to_the_completion(model: Path, load, tmp_path: Path):
    tokenizer = make_tokenizer()
    assert len(tokenizer(" quick")["input_ids"]) == 1
    rows = [{"prompt": "The qu", "completion": "ick fox"}] * 3
    task = load(lm_document(model, f"train: '{write_jsonl(tmp_path / 'x.jsonl', rows)}'", "loss: completion"))
    assert {learned for _, learned in shown(task, tokenizer)} == {" quick fox<eos>"}


def test_of_chats_what_the_assistant_says_is_learned(model: Path, load, tmp_path: Path):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    data = f"train: '{write_jsonl(tmp_path / 'x.jsonl', [chat] * 3)}'"
    for text, learned in shown(load(lm_document(model, data, "loss: completion")), make_tokenizer()):
        assert text == "<|user|>one<|end|><|assistant|>two<|end|><|user|>three<|end|><|assistant|>four<|end|>"
        assert learned == "two<|end|>four<|end|>"
    for text, learned in shown(load(lm_document(model, data)), make_tokenizer()):
        assert text == f"<|user|>{learned}"


def test_longer_samples_are_cut_or_left_out_as_the_spec_says(model: Path, texts: str, load):
    whole = samples_of(load(lm_document(model, texts)))
    cut = samples_of(load(lm_document(model, texts, "max_length: 30, too_long: truncate")))
    assert cut == [(ids[:30], learned[:30]) for ids, learned in whole]
    dropped = samples_of(load(lm_document(model, texts, "max_length: 30, too_long: drop")))
    assert dropped == [(ids, learned) for ids, learned in whole if len(ids) <= 30]
    assert 0 < len(dropped) < len(whole)


def test_a_batch_is_not_padded_beyond_the_positions_that_a_model_has(texts: str, load, tmp_path: Path):
    task = load(
        lm_document(make_gpt2(tmp_path / "gpt2", positions=30), texts, "too_long: truncate", targets="all-linear")
    )
    assert int(task.lengths_S.max()) == 30
    assert task.losses_K(task.lengths_S.argsort()[-2:], 1).isfinite().all()
    assert math.isfinite(task.evaluate(1)[0]["eval/loss"])


def test_packed_rows_are_full_and_hold_every_sample_once():
    lengths = [5, 9, 3, 1, 10, 5, 4, 2, 1]
    tokens = Tokens.of([([i] * length, [True] * length) for i, length in enumerate(lengths)])
    rows = Rows.packed_into(tokens, 10)
    assert rows.widths_R.tolist() == [10, 10, 10, 10]
    assert sorted(rows.tokens.ids_T.unique_consecutive().tolist()) == list(range(9))
    batch = rows.batch([1, 3], multiple=8)
    assert batch.ids.shape == (2, 16)
    assert batch.positions is not None
    assert batch.positions[0].tolist() == [*range(9), 0, *range(6)]
    assert (batch.targets[0, :8] == 1).all()
    assert batch.targets[0, 8:].tolist() == [-100] * 8  # a sample's first token is nobody's to predict
    assert Rows.padded(tokens).batch([0, 3], multiple=8).positions is None


# -- where samples come from -------------------------------------------------------------------------------------------

_ROWS = [{"text": text} for text in TEXTS]


def _write(kind: str, folder: Path) -> Path:
    path = folder / f"x.{kind}"
    match kind:
        case "jsonl":
            write_jsonl(path, _ROWS)
        case "json":
            path.write_text(json.dumps(_ROWS))
        case "csv" | "tsv":
            path.write_text("text\n" + "".join(f"{row['text']}\n" for row in _ROWS))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_ROWS), path)
        case "saved":
            datasets.Dataset.from_list(_ROWS).save_to_disk(path)
        case "folder":
            path.mkdir()
            write_jsonl(path / "train.jsonl", _ROWS)
            write_jsonl(path / "validation.jsonl", _ROWS[:5])
    return path


@pytest.mark.parametrize("kind", ["json", "csv", "tsv", "parquet", "saved"])
def test_the_same_samples_are_the_same_data_whatever_holds_them(model: Path, load, tmp_path: Path, kind: str):
    found = [load(lm_document(model, f"train: '{_write(each, tmp_path)}'")).data for each in ("jsonl", kind)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert len(list((tmp_path / "cache").iterdir())) == 2  # both sets, once


def test_a_data_set_has_splits(model: Path, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = _write("folder", tmp_path)
    task = load(lm_document(model, f"train: '{folder}', eval_split: validation"))
    assert (task.n_samples, len(samples_of(task, "held-out"))) == (24, 5)
    with pytest.raises(SpecError, match=r"lm.yaml:4: task.data.eval_split: required a split .*; found valid"):
        fit(lm_document(model, f"train: '{folder}', eval_split: valid"), tmp_path)


def test_what_is_evaluated_on_is_a_share_or_a_file_of_its_own(model: Path, texts: str, load, tmp_path: Path):
    task = load(lm_document(model, f"{texts}, eval: 0.25"))
    both = [tuple(ids) for ids, _ in samples_of(task) + samples_of(task, "held-out")]
    assert (task.n_samples, len(set(both))) == (18, 24)
    path = write_jsonl(tmp_path / "eval.jsonl", _ROWS[:3])
    task = load(lm_document(model, f"{texts}, eval: '{path}'"))
    assert (task.n_samples, len(samples_of(task, "held-out"))) == (24, 3)


def test_tokens_are_made_once(model: Path, texts: str, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = load(lm_document(model, texts)).data
    (one, _) = sorted((tmp_path / "cache").iterdir())
    one.write_bytes(b"cut off")
    again = load(lm_document(model, texts)).data
    assert all(torch.equal(first[name], again[name]) for name in first)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("sweeps.tasks.tokens._encode", never)
    kept = load(lm_document(model, texts, "max_length: 200")).data
    assert all(torch.equal(first[name], kept[name]) for name in first)
    with pytest.raises(AssertionError, match="tokenised again"):
        load(lm_document(model, f"{texts}, eval: 0.5"))


# -- refusals ----------------------------------------------------------------------------------------------------------


def fit(document: SpecDocument, tmp_path: Path) -> None:
    preflight(document, Reduction.of(document.spec), tmp_path / "cache")


def _file(name: str, content: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_text(content)
        return f"train: '{folder / name}'"

    return write


_TEXT = '{"text": "some text"}\n'
_LONG = json.dumps({"text": "word " * 400}) + "\n"

_REFUSALS: list[tuple[Callable[[Path], str], str, str]] = [
    (lambda folder: f"train: '{folder}/no.jsonl'", "", "4: task.data.train: required a file, or a directory .*no such"),
    (lambda _: "train: org/none", "", "4: task.data.train: required a file, a directory that datasets .*org/none"),
    (_file("x.txt", "text"), "", "task.data.train: required a file that ends with one of .jsonl.*; found x.txt"),
    (_file("x.jsonl", ""), "", "task.data.train: required at least one sample; found none in .*x.jsonl"),
    (_file("x.jsonl", _TEXT + "{"), "", r"task.data.train: required a jsonl file; found .*line 2 is no JSON \("),
    (_file("x.jsonl", "3"), "", "line 1 is no object with columns"),
    (_file("x.json", "[3]"), "", "entry 1 is no object"),
    (_file("x.csv", 'text\n"open'), "", "task.data.train: required a csv file; found .*unexpected end of data"),
    (_file("x.parquet", "PAR"), "", "task.data.train: required a parquet file"),
    (
        _file("x.jsonl", '{"body": "x", "id": 3}'),
        "",
        "4: task.data.columns: required columns text, or prompt and completion, or messages; found body, id in .*such",
    ),
    (_file("x.jsonl", '{"text": 3}'), "", "required text in the column text; found a value of type int in sample 1"),
    (_file("x.jsonl", _TEXT + '{"txt": ""}'), "", "required text in the column text; found nothing in sample 2"),
    (_file("x.jsonl", '{"messages": []}'), "", "a list of messages, .* found an empty list in sample 1"),
    (_file("x.jsonl", _TEXT), "", "task.data.train: required two samples or more.*name data.eval"),
    (_file("x.jsonl", _TEXT * 2), "loss: completion", "3: task.loss: required all, for samples of text have no"),
    (_file("x.jsonl", _TEXT * 9), "", "7: train.batch_size: required at most 8, the number of training samples"),
    (
        _file("x.jsonl", _TEXT * 9 + _LONG),
        "max_length: 64",
        r"3: task.max_length: required room for every sample; found 1 of \d+ samples longer than 64, the longest "
        r"[\d,]+; raise it, or write too_long: truncate or too_long: drop",
    ),
    (_file("x.jsonl", _LONG * 2), "max_length: 8, too_long: drop", "required room for some sample; found all 1 longer"),
    (_file("x.jsonl", _TEXT), "max_length: 257", "3: task.max_length: required at most 256, the positions that the"),
    (
        _file("x.jsonl", '{"text": ""}\n' * 4),
        "",
        "a token to learn in every sample; found none in . of . samples, the first of them sample 1; remove them",
    ),
    (
        _file("x.jsonl", '{"prompt": "a long prompt", "completion": "b"}\n' * 4),
        "loss: completion, max_length: 3, too_long: truncate",
        "a token to learn in every sample; .* or raise max_length",
    ),
    (
        lambda folder: _file("x.jsonl", _TEXT)(folder) + ", split: validation",
        "",
        "4: task.data.split: required none, for x.jsonl is a file; found validation; name a file for each split",
    ),
    (
        lambda folder: _file("x.jsonl", _TEXT)(folder) + ", eval_split: test",
        "",
        "4: task.data.eval_split: required none, for x.jsonl is a file; found test",
    ),
    (
        lambda folder: _file("x.jsonl", _TEXT)(folder) + f", eval: '{folder}/no.csv'",
        "",
        "4: task.data.eval: required a file, or a directory with a data set; found no such file",
    ),
    (_file("x.jsonl", _TEXT * 9), "attention: flash_attention_2", "3: task.attention: required an attention that runs"),
]


@pytest.mark.parametrize(("data", "task", "words"), _REFUSALS, ids=map(str, range(len(_REFUSALS))))
def test_what_cannot_be_trained_on_is_refused_with_the_line_of_its_key(
    model: Path, tmp_path: Path, data: Callable[[Path], str], task: str, words: str
):
    document = lm_document(model, data(tmp_path), task, batch_size=9)
    with pytest.raises(SpecError, match=words) as caught:
        fit(document, tmp_path)
    (fault,) = caught.value.faults
    assert fault.line in (3, 4, 8) if fault.path.startswith("task") else fault.line is not None


def test_models_and_data_that_cannot_be_had_are_refused(model: Path, texts: str, tmp_path: Path):
    with pytest.raises(SpecError, match=r"3: task\.model: required a model's directory, or its id .*no directory"):
        fit(lm_document(tmp_path / "none", texts), tmp_path)
    for odd in ("x" * 300, "./" + "x" * 300, "~nobody-by-that-name/x"):
        with pytest.raises(SpecError, match=r"3: task\.model: required a "):
            fit(lm_document(odd, texts), tmp_path)
        with pytest.raises(SpecError, match=r"4: task\.data\.train: required a "):
            fit(lm_document(model, f"train: '{odd}'"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match=r"3: task\.model: required a model's directory; found no config\.json in"):
        fit(lm_document(tmp_path / "empty", texts), tmp_path)
    with pytest.raises(SpecError, match=r"3: task\.model: required a causal .*org/none: .*; download it"):
        fit(lm_document("org/none", texts), tmp_path)
    roberta = tmp_path / "encoder"
    transformers.T5Config(num_layers=1).save_pretrained(roberta)
    make_tokenizer().save_pretrained(roberta)
    with pytest.raises(SpecError, match=r"3: task\.model: required a causal language model; found .* is a t5 model"):
        fit(lm_document(roberta, texts), tmp_path)


def test_a_model_that_brings_its_own_code_is_not_run(model: Path, texts: str, tmp_path: Path):
    own = tmp_path / "own"
    make_tokenizer().save_pretrained(own)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "own.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(SpecError, match=r"3: task\.model: required a causal language model"):
        fit(lm_document(own, texts), tmp_path)


def test_weights_are_never_unpickled(model: Path, texts: str, tmp_path: Path):
    pickled = make_model(tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(SpecError, match=r"3: task\.model: required a causal .* with weights in safetensors"):
        fit(lm_document(pickled, texts), tmp_path)


def test_tokenizers_that_do_not_serve_are_refused(texts: str, tmp_path: Path):
    bare = make_model(tmp_path / "bare")
    chats = write_jsonl(tmp_path / "chats.jsonl", CHATS)
    with pytest.raises(SpecError, match=r"3: task\.model: required a tokenizer with a chat template, .*; found"):
        fit(lm_document(bare, f"train: '{chats}'"), tmp_path)
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    with pytest.raises(SpecError, match=r"3: task\.model: required a model with its tokenizer beside it"):
        fit(lm_document(bare, texts), tmp_path)
    small = make_model(tmp_path / "small", vocab_size=50)
    with pytest.raises(SpecError, match=r"a tokenizer that is the model's own; found token \d+, and a model"):
        fit(lm_document(small, texts), tmp_path)


def test_chat_templates_that_fail_or_rewrite_the_past_are_refused(tmp_path: Path):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHATS[0]["messages"] * 2}] * 4)
    fails = make_model(tmp_path / "fails", chat_template="{{ raise_exception('roles must take turns') }}")
    with pytest.raises(SpecError, match=r"messages that the tokenizer's .*sample 1 of .*: roles must take turns"):
        fit(lm_document(fails, f"train: '{chats}'"), tmp_path)
    template = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    rewrites = make_model(tmp_path / "rewrites", chat_template=template)
    with pytest.raises(SpecError, match=r"3: task\.loss: required a chat template in which later messages"):
        fit(lm_document(rewrites, f"train: '{chats}'", "loss: completion"), tmp_path)


def test_a_model_that_mixes_packed_samples_is_refused(
    model: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = transformers.LlamaModel.forward

    def forward(self: Any, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        positions = None if position_ids is None else torch.arange(position_ids.shape[1])[None]
        return plain(self, *args, position_ids=positions, **kwargs)

    def without_positions(self: Any, input_ids: Tensor, use_cache: bool) -> None:
        raise NotImplementedError

    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "forward", without_positions)
        with pytest.raises(SpecError, match=r"3: task\.packing: required false, for this model takes no position ids"):
            fit(lm_document(model, texts, "packing: true"), tmp_path)
    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    with pytest.raises(SpecError, match=r"3: task\.packing: required false, for this model and its attention"):
        fit(lm_document(model, texts, "packing: true"), tmp_path)
    fit(lm_document(model, texts), tmp_path)


def test_flash_attention_does_not_go_with_packing(model: Path, texts: str):
    # transformers knows packed samples by their positions in a batch of one row only: on a GPU it would mix them.
    with pytest.raises(SpecError, match=r"task\.attention: required sdpa, .* packing; found 'flash_attention_2'; "):
        lm_document(model, texts, "packing: true, attention: flash_attention_2")
    assert lm_document(model, texts, "attention: flash_attention_2").spec.task.attention == "flash_attention_2"


def test_plan_refuses_before_anything_is_started(model: Path, tmp_path: Path):
    document = lm_document(model, "train: none.jsonl")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "lm.yaml").write_text(document.text)
    done = run_cli("plan", "sub/lm.yaml", cwd=tmp_path)
    assert done.returncode == 2
    place = re.escape(str(tmp_path / "sub" / "none.jsonl"))  # from the spec's directory, wherever one stands
    assert re.search(rf"sub/lm\.yaml:4: task\.data\.train: required a file.*{place}", done.stderr)
