"""Classification: losses against plain transformers, packs, pairs, padding, labels, heads, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import sklearn.metrics
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lora_core.adapter import Member
from lora_core.optimizers import PackOptimizer
from sweeps.errors import SpecError
from sweeps.jobs import JobOrder, MemberOrder
from sweeps.preflight import preflight
from sweeps.recipe import bank_of, optimizer_of, steps_of
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import SpecDocument
from sweeps.tasks import load_task
from sweeps.tasks.sequence_classification import SequenceClassificationTask
from sweeps.training import JobRunner
from tests.support import run_cli
from tests.sweeps.hf_support import (
    TEXTS,
    classify_document,
    make_checkpoint,
    make_encoder_tokenizer,
    make_tokenizer,
    write_jsonl,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("negative", "neutral", "positive")
SINGLES = [{"text": text, "label": NAMES[i % 3]} for i, text in enumerate(TEXTS)]
PAIRS = [{"text": text, "text_pair": TEXTS[-1 - i // 2], "label": i % 4 == 0} for i, text in enumerate(TEXTS)]
KINDS = ("roberta", "bert", "deberta", "gpt2")
TASK = {"deberta": "head: [pooler, classifier]"}
TARGETS = {"deberta": "[query_proj, value_proj, attention.output.dense]"}
"""all-linear has DeBERTa's projections of positions in it, which belong to no member."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints without a head, by kind."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_checkpoint(folder / kind, kind) for kind in (*KINDS, "bert-without-pooler", "t5")}


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"train: '{write_jsonl(tmp_path_factory.mktemp('data') / 'singles.jsonl', SINGLES)}'"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"train: '{write_jsonl(tmp_path_factory.mktemp('data') / 'pairs.jsonl', PAIRS)}'"


@pytest.fixture
def load(tmp_path: Path) -> Callable[[SpecDocument], SequenceClassificationTask]:
    def task(document: SpecDocument) -> SequenceClassificationTask:
        loaded = load_task(document.spec, cache=tmp_path / "cache", device=torch.device("cpu"))
        assert isinstance(loaded, SequenceClassificationTask)
        return loaded

    return task


def document_of(models: dict[str, Path], kind: str, data: str, task: str = "", **train: Any) -> SpecDocument:
    both = ", ".join(part for part in (task, TASK.get(kind, "")) if part)
    return classify_document(models[kind], data, both, targets=TARGETS.get(kind, "all-linear"), **train)


def samples_of(task: SequenceClassificationTask, which: str = "train") -> list[tuple[list[int], list[int], int]]:
    """Tokens, their types and the class of each sample."""
    ids, types, starts, classes = (task.data[f"{which} {name}"] for name in ("ids", "types", "samples", "classes"))
    spans = zip(starts[:-1].tolist(), starts[1:].tolist(), classes.tolist(), strict=True)
    return [(ids[start:stop].tolist(), types[start:stop].tolist(), label) for start, stop, label in spans]


def naive_loss(model: Any, samples: Sequence[tuple[list[int], list[int], int]]) -> float:
    """Mean of transformers' own loss, a sample at a time and so without any padding."""
    has_types = getattr(model.config, "type_vocab_size", 0) > 1
    losses = []
    for ids, types, label in samples:
        more = {"token_type_ids": torch.tensor([types])} if has_types else {}
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([label]), **more).loss
        losses.append(loss.double().item())
    return sum(losses) / len(losses)


POINTS = [Configuration(rank, 16.0, lr, head_lr=3 * lr) for rank, lr in ((2, 1e-2), (4, 3e-3), (2, 1e-3))]


def members_of(document: SpecDocument, points: Sequence[Configuration]) -> list[Member]:
    reduction = Reduction.of(document.spec)
    return [Member(reduction.point(each), document.spec.train.seed) for each in points]


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["singles", "pairs"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_plain_transformers_sample_by_sample(
    models: dict[str, Path], kind: str, data: str, load, request: pytest.FixtureRequest, tmp_path: Path
):
    task = load(document_of(models, kind, request.getfixturevalue(data), "attention: eager"))
    task.model.save_pretrained(tmp_path / "model")
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    losses = task.losses_K(torch.arange(5), members=3).tolist()
    assert losses == pytest.approx([naive_loss(reference, samples_of(task)[:5])] * 3, rel=1e-5)
    (metrics,) = task.evaluate(1)
    assert metrics["eval/loss"] == pytest.approx(naive_loss(reference, samples_of(task, "held-out")), rel=1e-5)


@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_member_has_the_loss_and_gradient_that_it_has_alone(
    models: dict[str, Path], kind: str, singles: str, load, dtype: str, rel: float
):
    document = document_of(models, kind, singles, dtype=dtype)
    task, members = load(document), members_of(document, POINTS)
    batch = torch.tensor([7, 0, 3, 1])
    with bank_of(document.spec, task, members) as bank:
        for k, slot in ((k, slot) for k in range(3) for slot in bank.slots):
            generator = torch.Generator().manual_seed(k)
            slot.of_member(bank.params_KP[k], members[k].point.rank).normal_(generator=generator, std=0.05)
        losses = task.losses_K(batch, members=3)
        losses.sum().backward()
        evaluated = task.evaluate(3)
        adapters = [{key: value.clone() for key, value in bank.adapter(k).items()} for k in range(3)]
        grads = bank.grads_KP.clone()
        slots = bank.slots
    assert len({round(loss, 6) for loss in losses.tolist()}) == 3
    for k, member in enumerate(members):
        with bank_of(document.spec, task, [member]) as alone:
            alone.load_adapter(0, adapters[k])
            loss = task.losses_K(batch, members=1)
            loss.sum().backward()
            assert loss.item() == pytest.approx(losses[k].item(), rel=rel)
            assert task.evaluate(1)[0] == pytest.approx(evaluated[k], rel=rel)
            for slot, own in zip(slots, alone.slots, strict=True):
                expected = own.of_member(alone.grads_KP[0], member.point.rank)
                found = slot.of_member(grads[k], member.point.rank)
                assert torch.allclose(found, expected, rtol=100 * rel, atol=100 * rel * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_the_samples_beside_it_change_no_samples_loss(models: dict[str, Path], kind: str, pairs: str, load):
    task = load(document_of(models, kind, pairs, dtype="float64"))
    lengths = task.data["train samples"].diff()
    order = lengths.argsort()[[0, 1, -1]]
    assert int(lengths[order[2]]) > int(lengths[order[0]]) + 16
    together = task.losses_K(order, members=1)
    apart = torch.stack([task.losses_K(index[None], members=1) for index in order])
    assert together.item() == pytest.approx(apart.mean().item(), rel=1e-12)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_no_bit_of_losses_and_gradients(models: dict[str, Path], singles: str, load):
    found = []
    for task in ("gradient_checkpointing: false", "gradient_checkpointing: true"):
        document = document_of(models, "roberta", singles, task)
        loaded = load(document)
        with bank_of(document.spec, loaded, members_of(document, POINTS)) as bank:
            bank.params_KP.add_(0.01)
            losses = loaded.losses_K(torch.arange(4), members=3)
            losses.sum().backward()
            found.append((losses.detach(), bank.grads_KP.clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].abs().max() > 0


def test_the_base_models_dropout_is_off_and_its_loss_is_in_float32(models: dict[str, Path], singles: str, load):
    task = load(document_of(models, "roberta", singles, dtype="bfloat16"))
    assert task.model.config.hidden_dropout_prob > 0
    assert next(task.model.parameters()).dtype == torch.bfloat16
    one, other = (task.losses_K(torch.arange(4), 2) for _ in range(2))
    assert one.dtype == torch.float32
    assert torch.equal(one, other)
    single = load(document_of(models, "roberta", singles)).evaluate(1)[0]["eval/loss"]
    assert task.evaluate(1)[0]["eval/loss"] == pytest.approx(single, rel=0.05)


def test_metrics_are_those_of_scikit_learn_over_all_labels(models: dict[str, Path], singles: str, load):
    labels = "labels: [negative, neutral, positive, unheard]"
    task = load(document_of(models, "roberta", f"{singles}, eval: 0.5", labels))
    (metrics,) = task.evaluate(1)
    truth = [label for *_, label in samples_of(task, "held-out")]
    guesses = [
        int(task.model(input_ids=torch.tensor([ids])).logits.argmax()) for ids, *_ in samples_of(task, "held-out")
    ]
    assert metrics["eval/accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, guesses))
    expected = sklearn.metrics.f1_score(truth, guesses, labels=range(4), average="macro", zero_division=0)
    assert metrics["eval/macro_f1"] == pytest.approx(expected)
    assert metrics.keys() == document_of(models, "roberta", singles).spec.task.metrics.keys()


def test_evaluation_in_chunks_is_evaluation_in_one(
    models: dict[str, Path], singles: str, load, monkeypatch: pytest.MonkeyPatch
):
    task = load(document_of(models, "gpt2", f"{singles}, eval: 0.5", dtype="float64"))
    whole = task.evaluate(2)
    monkeypatch.setattr("sweeps.tasks.sequence_classification._EVAL_TOKENS", 70)
    chunked = task.evaluate(2)
    assert [one["eval/loss"] for one in chunked] == pytest.approx([one["eval/loss"] for one in whole], rel=1e-12)
    assert [one["eval/macro_f1"] for one in chunked] == [one["eval/macro_f1"] for one in whole]
    longest = int(task.data["train samples"].diff().max())
    assert task.most_rows(3) >= 3 * longest


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_pairs_are_tokenised_as_the_models_tokenizer_does_it(
    models: dict[str, Path], kind: str, singles: str, pairs: str, load
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[kind])
    for data, rows in ((singles, SINGLES), (pairs, PAIRS)):
        task = load(document_of(models, kind, data))
        names, expected = sorted({str(row["label"]) for row in rows}), []
        for row in rows:
            made = tokenizer(row["text"], row.get("text_pair"))
            types = made.get("token_type_ids") or [0] * len(made["input_ids"])
            expected.append((made["input_ids"], types, names.index(str(row["label"]))))
        found = samples_of(task) + samples_of(task, "held-out")
        assert sorted(found) == sorted(expected)
    assert ({t for _, types, _ in found for t in types} == {0, 1}) == (kind == "bert")


def test_longer_samples_are_cut_as_transformers_does_it_or_left_out(models: dict[str, Path], pairs: str, load):
    whole = samples_of(load(document_of(models, "bert", pairs)))
    assert max(len(ids) for ids, *_ in whole) > 40
    cut = samples_of(load(document_of(models, "bert", pairs, "max_length: 40, too_long: truncate")))
    tokenizer = make_encoder_tokenizer(types=True)
    for index, (ids, types, label) in enumerate(cut):
        sample = next(row for row in PAIRS if tokenizer(row["text"], row["text_pair"])["input_ids"] == whole[index][0])
        made = tokenizer(sample["text"], sample["text_pair"], truncation="longest_first", max_length=40)
        assert (ids, types) == (made["input_ids"], made["token_type_ids"])
        assert ids[-1] == tokenizer.eos_token_id
        assert label == whole[index][2]
    dropped = samples_of(load(document_of(models, "bert", pairs, "max_length: 40, too_long: drop")))
    assert dropped == [sample for sample in whole if len(sample[0]) <= 40]
    assert 0 < len(dropped) < len(whole)


def test_rows_as_long_as_a_model_has_positions_are_not_padded_beyond_them(load, tmp_path: Path):
    rows = [{"text": "word " * 80, "label": i % 2} for i in range(8)]
    data = f"train: '{write_jsonl(tmp_path / 'x.jsonl', rows)}'"
    for kind, positions, most in (("bert", 61, 61), ("roberta", 63, 61)):  # RoBERTa counts from behind the padding
        model = make_checkpoint(tmp_path / kind, kind, max_position_embeddings=positions)
        task = load(classify_document(model, data, "too_long: truncate"))
        assert {len(ids) for ids, *_ in samples_of(task)} == {most}
        assert torch.isfinite(task.losses_K(torch.arange(4), 2)).all()
        with pytest.raises(SpecError, match=r"3: task\.max_length: required at most 61, the positions that the model"):
            fit(classify_document(model, data, "max_length: 62"), tmp_path)


def test_tokens_are_made_once(
    models: dict[str, Path], pairs: str, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for task in ("", "max_length: 40, too_long: truncate"):
        document = document_of(models, "bert", pairs, task)
        first = load(document).data
        with monkeypatch.context() as patch:
            patch.setattr("sweeps.tasks.labelled._encode", lambda *_: pytest.fail("tokenised again"))
            again = load(document).data
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert len(list((tmp_path / "cache").iterdir())) == 4
    one = sorted((tmp_path / "cache").iterdir())[0]
    one.write_bytes(b"cut off")
    again = load(document).data
    assert all(torch.equal(first[name], again[name]) for name in first)


# -- labels ------------------------------------------------------------------------------------------------------------


def labels_of(task: SequenceClassificationTask) -> list[str]:
    config = task.model.config
    assert config.label2id == {name: i for i, name in config.id2label.items()}
    return [config.id2label[i] for i in range(config.num_labels)]


def rows_with(labels: Sequence[object]) -> list[dict[str, object]]:
    return [{"text": TEXTS[i % len(TEXTS)], "label": labels[i % len(labels)]} for i in range(24)]


@pytest.mark.parametrize(
    ("found", "task", "names"),
    [
        (["spam", "ham"], "", ["ham", "spam"]),
        (["spam", "ham"], "labels: [spam, ham]", ["spam", "ham"]),
        ([10, 9, 2], "", ["2", "9", "10"]),
        ([10, 9, 2], "labels: [10, 9, 2]", ["10", "9", "2"]),
        ([True, False], "", ["false", "true"]),
        ([True, False], "labels: [true, false]", ["true", "false"]),
        ([1, 0], "labels: [ham, spam]", ["ham", "spam"]),
        (["spam", 1, "ham"], "labels: [ham, spam]", ["ham", "spam"]),
        (["b", "c"], "labels: [a, b, c]", ["a", "b", "c"]),
    ],
)
def test_classes_are_the_labels_of_the_samples_or_those_that_the_spec_lists(
    models: dict[str, Path], load, tmp_path: Path, found: list[object], task: str, names: list[str]
):
    data = f"train: '{write_jsonl(tmp_path / 'x.jsonl', rows_with(found))}'"
    loaded = load(document_of(models, "gpt2", data, task))
    assert labels_of(loaded) == names
    by_text = dict(zip([tuple(make_tokenizer()(text)["input_ids"]) for text in TEXTS], range(24), strict=True))
    for ids, _, label in samples_of(loaded):
        own = found[by_text[tuple(ids)] % len(found)]
        expected = names[own] if type(own) is int and "ham" in names else str(own).lower()
        assert names[label] == expected


def test_a_rare_class_may_have_been_held_out(models: dict[str, Path], load, tmp_path: Path):
    everywhere = {}
    for rare in range(24):
        rows = [{"text": text, "label": "rare" if i == rare else NAMES[i % 2]} for i, text in enumerate(TEXTS)]
        path = write_jsonl(tmp_path / f"{rare}.jsonl", rows)
        if rare in (0, 5, 20):
            task = load(document_of(models, "gpt2", f"train: '{path}', eval: 0.5"))
            everywhere[rare] = labels_of(task), 2 in [label for *_, label in samples_of(task)]
    assert {tuple(names) for names, _ in everywhere.values()} == {("negative", "neutral", "rare")}
    assert {trained for _, trained in everywhere.values()} == {True, False}


def test_a_data_set_knows_the_names_of_its_labels(models: dict[str, Path], load, tmp_path: Path):
    classes = datasets.ClassLabel(names=["world", "sports", "business"])
    features = datasets.Features({"body": datasets.Value("string"), "topic": classes})
    rows = [{"body": text, "topic": i % 2} for i, text in enumerate(TEXTS)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "set")
    data = f"train: '{tmp_path / 'set'}', columns: {{text: body, label: topic}}"
    assert labels_of(load(document_of(models, "gpt2", data))) == ["world", "sports", "business"]
    other = load(document_of(models, "gpt2", data, "labels: [sports, world]"))
    ours = load(document_of(models, "gpt2", data))
    assert [1 - label for *_, label in samples_of(ours)] == [label for *_, label in samples_of(other)]
    rows[3]["topic"] = -1  # how data sets say that a label is not known
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(SpecError, match=r"one of the labels world, sports, business; found -1 in sample 4 of"):
        fit(document_of(models, "gpt2", data.replace("/set'", "/unlabelled'")), tmp_path)


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "task", "heads"),
    [
        ("roberta", "", ("classifier",)),
        ("bert", "", ("classifier",)),
        ("bert-without-pooler", "head: [classifier, pooler]", ("bert.pooler", "classifier")),
        ("deberta", "head: [classifier, pooler]", ("pooler", "classifier")),
        ("gpt2", "", ("score",)),
        ("t5", "head: [classification_head]", ("classification_head",)),
    ],
)
def test_the_head_is_pefts_or_what_the_spec_names(
    models: dict[str, Path], singles: str, load, kind: str, task: str, heads: tuple[str, ...]
):
    loaded = load(classify_document(models[kind], singles, task))
    assert loaded.heads == heads
    for name in heads:
        loaded.model.get_submodule(name)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def head_of(task: SequenceClassificationTask) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name in task.heads
        for key, value in task.model.get_submodule(name).state_dict().items()
    }


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "bert-without-pooler"])
def test_a_new_head_is_drawn_from_the_seed_alone(models: dict[str, Path], singles: str, load, kind: str):
    task = "head: [classifier, pooler]" if "-" in kind else ""
    before = torch.random.get_rng_state()
    first = head_of(load(classify_document(models[kind], singles, task)))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    again = head_of(load(classify_document(models[kind], singles, task)))
    double = head_of(load(classify_document(models[kind], singles, task, dtype="float64")))
    other = head_of(load(classify_document(models[kind], singles, task, seed=1)))
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight.double(), double[name])
        if name.endswith("weight"):
            assert not torch.equal(weight, other[name])
            assert weight.std().item() == pytest.approx(0.2, rel=0.3)  # the initializer_range of the config
        else:
            assert not weight.any()


def test_a_checkpoint_that_was_fine_tuned_for_these_labels_keeps_its_head(load, tmp_path: Path):
    own = make_checkpoint(tmp_path / "own", "roberta", fine_tuned=("positive", "negative", "neutral"))
    kept = load_file(own / "model.safetensors")
    named = f"train: '{write_jsonl(tmp_path / 'named.jsonl', SINGLES)}'"
    ids = f"train: '{write_jsonl(tmp_path / 'ids.jsonl', rows_with([0, 1, 2]))}'"
    few = f"train: '{write_jsonl(tmp_path / 'few.jsonl', rows_with(['neutral', 'positive']))}'"
    for data in (named, ids, few):
        task = load(classify_document(own, data))
        assert labels_of(task) == ["positive", "negative", "neutral"]
        assert all(torch.equal(weight, kept[name]) for name, weight in head_of(task).items())
    assert {label for *_, label in samples_of(load(classify_document(own, few)))} == {0, 2}
    other = load(classify_document(own, few, "labels: [neutral, positive]"))
    assert labels_of(other) == ["neutral", "positive"]
    head = head_of(other)
    assert head["classifier.out_proj.weight"].shape == (2, 32)
    assert torch.equal(head["classifier.dense.weight"], kept["classifier.dense.weight"])
    with pytest.raises(SpecError, match=r"3: task\.labels: required the order in which the model's own head has them"):
        fit(classify_document(own, named, "labels: [negative, neutral, positive]"), tmp_path)


def test_a_saved_model_knows_its_labels_and_its_padding(models: dict[str, Path], singles: str, load, tmp_path: Path):
    load(classify_document(models["gpt2"], singles)).model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "neutral", "2": "positive"}
    assert config["problem_type"] == "single_label_classification"
    assert config["pad_token_id"] == 0  # the end-of-sequence token, for it has no other


@pytest.mark.parametrize(("kind", "task"), [("roberta", ""), ("bert-without-pooler", "head: [pooler, classifier]")])
def test_packed_members_learn_as_they_do_alone_each_with_a_head_of_its_own(
    models: dict[str, Path], singles: str, load, kind: str, task: str
):
    document = document_of(models, kind, singles, task, steps=30, dtype="float64")
    loaded = load(document)

    def trained(points: Sequence[Configuration]) -> tuple[list[tuple[float, ...]], list[dict[str, torch.Tensor]]]:
        with bank_of(document.spec, loaded, members_of(document, points)) as bank:
            assert tuple(bank.heads) == loaded.heads
            steps = steps_of(document.spec, loaded, PackOptimizer(bank, optimizer_of(document.spec)), start=0, stop=30)
            return [record.losses for record in steps], [bank.adapter(k) for k in range(len(points))]

    losses, adapters = trained(POINTS)
    assert losses[-1][0] < 0.5 * losses[0][0]
    before = head_of(loaded)
    for k, point in enumerate(POINTS):
        alone, (adapter,) = trained([point])
        assert [step[k] for step in losses] == pytest.approx([step[0] for step in alone], rel=1e-9)
        for name, value in adapter.items():
            assert torch.allclose(adapters[k][name], value, rtol=1e-7, atol=1e-9)
        assert all(not torch.equal(adapters[k][name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("kind", "head", "words"),
    [
        ("roberta", "[layer.1, classifier]", "encoder.layer.1, classifier: .*unexpected keyword argument"),
        ("gpt2", "[wpe, score]", "wpe, score: .*a batch of 2 times the same rows; found 1"),
        ("deberta", "[rel_embeddings, pooler, classifier]", "no attribute 'weight'"),
    ],
)
def test_modules_that_are_no_function_of_a_members_rows_are_refused_as_heads(
    models: dict[str, Path], singles: str, tmp_path: Path, kind: str, head: str, words: str
):
    document = classify_document(models[kind], singles, f"head: {head}", targets=TARGETS.get(kind, "all-linear"))
    if kind == "roberta":
        document = classify_document(models[kind], singles, f"head: {head}", targets="['0.attention.self.query']")
    with pytest.raises(SpecError, match=rf"task\.head: required modules that make one tensor of one tensor.*{words}"):
        fit(document, tmp_path)


def test_a_worker_that_goes_on_to_another_seed_draws_the_head_anew(
    models: dict[str, Path], singles: str, tmp_path: Path
):
    member = MemberOrder(trial=0, configuration=replace(POINTS[0], lr=1e-9, head_lr=1e-9), class_id="")
    places = {"cache": str(tmp_path / "cache"), "checkpoints": str(tmp_path / "checkpoints")}

    def first_metrics(runner: JobRunner, seed: int) -> dict[str, float]:
        spec = classify_document(models["roberta"], singles, seed=seed).spec.model_dump(mode="json")
        result = runner.run(JobOrder(job=0, work="train", spec=spec, members=(member,), start=0, stop=1, **places))
        assert result.error is None, result.detail
        return result.members[0].metrics

    worker = JobRunner()
    found = [first_metrics(worker, seed) for seed in (0, 1, 0)]
    assert found[0] == found[2] != found[1] == first_metrics(JobRunner(), 1)


def test_modules_without_weights_of_their_own_are_refused_as_heads(
    models: dict[str, Path], singles: str, tmp_path: Path
):
    document = classify_document(models["roberta"], singles, "head: [classifier.dropout]")
    words = r"task\.head: required modules with weights of their own; found .*parameters to train; found none in"
    with pytest.raises(SpecError, match=words):
        fit(document, tmp_path)


def test_embeddings_may_be_trained_whole_beside_the_head(models: dict[str, Path], singles: str, load):
    document = classify_document(models["gpt2"], singles, "head: [wte, score]", targets="[c_attn]")
    task = load(document)
    before = task.losses_K(torch.arange(4), 1).item()
    with bank_of(document.spec, task, members_of(document, POINTS[:2])) as bank:
        assert set(bank.heads) == {"transformer.wte", "score"}
        losses = task.losses_K(torch.arange(4), 2)
        losses.sum().backward()
        assert losses.tolist() == pytest.approx([before] * 2, rel=1e-5)
        assert bank.member_tensors(1)["transformer.wte.weight"].grad.any()


# -- refusals ----------------------------------------------------------------------------------------------------------


def fit(document: SpecDocument, tmp_path: Path) -> None:
    preflight(document, Reduction.of(document.spec), tmp_path / "cache")


def _file(name: str, content: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_text(content)
        return f"train: '{folder / name}'"

    return write


def _rows(*rows: dict[str, object]) -> Callable[[Path], str]:
    return _file("x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


_A, _B = {"text": "one text", "label": "a"}, {"text": "another", "label": "b"}
_AB = [_A, _B] * 8
_LONG = {"text": "word " * 100, "label": "a"}

_REFUSALS: list[tuple[Callable[[Path], str], str, str]] = [
    (lambda folder: f"train: '{folder}/no.jsonl'", "", "4: task.data.train: required a file, or a directory .*no such"),
    (lambda _: "train: org/none", "", "4: task.data.train: required a file, a directory that datasets .*org/none"),
    (_file("x.jsonl", ""), "", "4: task.data.train: required at least one sample; found none in .*x.jsonl"),
    (
        _rows({"body": "x", "label": 1}),
        "",
        "4: task.data.columns: required the column text; found body, label in .*; say which column it is",
    ),
    (_rows({"text": "x", "stars": 1}), "", "required the column label; found text, stars"),
    (
        lambda folder: _rows(*_AB)(folder) + ", columns: {text_pair: second}",
        "",
        "4: task.data.columns: required the column second; found text, label",
    ),
    (_rows(_A, {"label": "b"}), "", "required text that is not empty in the column text; found nothing in sample 2"),
    (_rows(_A, {**_B, "text": " "}), "", "text that is not empty in the column text; found empty text in sample 2"),
    (_rows(_A, {**_B, "text": 3}), "", "found a value of type int in sample 2"),
    (
        _rows({**_A, "text_pair": "x"}, {**_B, "text_pair": ""}),
        "",
        "text that is not empty in the column text_pair; found empty text in sample 2",
    ),
    (
        _rows(_A, {"text": "x"}),
        "",
        "a label, which is text or an integer, in the column label; found nothing in sample 2",
    ),
    (_rows(_A, {**_B, "label": 0.5}), "", "in the column label; found a value of type float in sample 2"),
    (_rows(_A, {**_B, "label": ""}), "", "in the column label; found empty text in sample 2"),
    (_rows(_A), "", "4: task.data.train: required two samples or more.*name data.eval"),
    (_rows(*[_A] * 9), "", "4: task.data.train: required samples of two classes or more; found a alone in .*x.jsonl"),
    (_rows(*[_A] * 9), "labels: [a, b]", "required samples of two classes or more; found a alone in"),
    (
        _rows(*_AB, {**_A, "label": "c"}),
        "labels: [a, b]",
        "4: task.data.train: required one of the labels a, b; found c in sample 17 of .*x.jsonl; correct it, or list",
    ),
    (_rows(*_AB, {**_A, "label": 2}), "labels: [a, b]", "one of the labels a, b; found 2 in sample 17"),
    (
        _rows(*_AB, {**_A, "label": "c"}),
        f"labels: {[f'l{i}' for i in range(12)]}",
        r"one of the labels l0, .*, l9, \.\.\. \(12 in all\); found a in sample",
    ),
    (
        lambda folder: _rows(*_AB)(folder) + f", eval: '{write_jsonl(folder / 'e.jsonl', [_A, {**_B, 'label': 'c'}])}'",
        "",
        "4: task.data.eval: required one of the labels a, b; found c in sample 2 of .*e.jsonl",
    ),
    (
        lambda folder: _rows(*_AB)(folder) + f", eval: '{write_jsonl(folder / 'e.jsonl', [{**_A, 'text_pair': 'x'}])}'",
        "",
        "4: task.data.eval: required single texts, as in .*x.jsonl; found pairs of texts in .*e.jsonl",
    ),
    (
        _rows(*_AB, _LONG, _LONG),
        "max_length: 64",
        r"3: task.max_length: required room for every sample; found \d of 16 samples longer than 64, the longest \d{3};"
        " raise it, or write too_long: truncate or too_long: drop",
    ),
    (_rows(*_AB), "max_length: 2, too_long: drop", "3: task.max_length: required room for some sample; found all"),
    (
        _rows(*_AB),
        "max_length: 2, too_long: truncate",
        "3: task.max_length: required at least 3, for 2 of a sample's tokens are the tokenizer's own; found 2",
    ),
    (_rows(*_AB), "max_length: 129", "3: task.max_length: required at most 128, the positions that the model has"),
    (_rows(*_AB), "attention: flash_attention_2", "3: task.attention: required an attention that runs"),
    (
        _rows(*_AB),
        "head: [pooler]",
        "3: task.head: required names of the model's modules; found no pooler in a Roberta",
    ),
    (
        _rows(*_AB),
        "head: [out_proj]",
        r"3: task.head: .* modules that the checkpoint does not have; found a checkpoint without classifier, which",
    ),
]


@pytest.mark.parametrize(("data", "task", "words"), _REFUSALS, ids=map(str, range(len(_REFUSALS))))
def test_what_cannot_be_trained_on_is_refused_with_the_line_of_its_key(
    models: dict[str, Path], tmp_path: Path, data: Callable[[Path], str], task: str, words: str
):
    document = classify_document(models["roberta"], data(tmp_path), task)
    with pytest.raises(SpecError, match=words) as caught:
        fit(document, tmp_path)
    (fault,) = caught.value.faults
    assert fault.line in (2, 3, 4)  # 2 is the whole section's: of a key that is not written


def test_models_that_cannot_classify_as_they_are_are_refused_with_the_way_out(
    models: dict[str, Path], singles: str, tmp_path: Path
):
    def refused(model: Path | str, words: str, task: str = "") -> None:
        with pytest.raises(SpecError, match=words):
            fit(classify_document(model, singles, task), tmp_path)

    refused(tmp_path / "none", r"3: task\.model: required a model's directory, or its id .*no directory")
    refused("org/none", r"3: task\.model: required a model that transformers .*org/none: .*; download it")
    transformers.VitsConfig().save_pretrained(tmp_path / "vits")
    make_encoder_tokenizer().save_pretrained(tmp_path / "vits")
    refused(tmp_path / "vits", r"3: task\.model: required a model that transformers can put .* is a vits model")
    refused(
        models["t5"],
        r"2: task\.head: required a module called classifier or score; found none in a T5ForSequenceClassification; "
        r"write task\.head: \[classification_head\]",
    )
    refused(
        models["bert-without-pooler"],
        r"2: task\.head: required names of all modules that .*; found a checkpoint without bert\.pooler, which would "
        r"stay as they are drawn; write task\.head: \[pooler, classifier\]",
    )
    refused(models["deberta"], r"without pooler, which would .*; write task\.head: \[pooler, classifier\]")


def test_a_checkpoint_that_lacks_layers_is_refused(singles: str, tmp_path: Path):
    model = make_checkpoint(tmp_path / "model", "roberta")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    words = r"3: task\.model: required all weights of a Roberta\w+ but its head; found a checkpoint without 16 of them"
    with pytest.raises(SpecError, match=words):
        fit(classify_document(model, singles), tmp_path)


def test_tokenizers_that_do_not_serve_are_refused(singles: str, tmp_path: Path):
    model = make_checkpoint(tmp_path / "model", "gpt2")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    with pytest.raises(SpecError, match=r"3: task\.model: required a tokenizer with a padding token, or an end-of-seq"):
        fit(classify_document(model, singles), tmp_path)
    small = make_checkpoint(tmp_path / "small", "roberta", vocab_size=50)
    with pytest.raises(SpecError, match=r"a tokenizer that is the model's own; found token \d+, and a model"):
        fit(classify_document(small, singles), tmp_path)
    (small / "tokenizer.json").unlink()
    (small / "tokenizer_config.json").unlink()
    with pytest.raises(SpecError, match=r"3: task\.model: required a model with its tokenizer beside it"):
        fit(classify_document(small, singles), tmp_path)


def test_a_model_whose_answer_depends_on_padding_is_refused(
    models: dict[str, Path], singles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = transformers.RobertaForSequenceClassification.forward

    def forward(self: Any, *args: Any, attention_mask: Tensor, **kwargs: Any) -> Any:
        return plain(self, *args, attention_mask=torch.ones_like(attention_mask), **kwargs)

    monkeypatch.setattr(transformers.RobertaForSequenceClassification, "forward", forward)
    with pytest.raises(SpecError, match=r"3: task\.model: required a model whose answer does not depend on"):
        fit(classify_document(models["roberta"], singles), tmp_path)


def test_a_model_that_needs_more_than_text_is_refused(singles: str, tmp_path: Path):
    model = make_checkpoint(tmp_path / "model", "t5", decoder_start_token_id=None)
    with pytest.raises(SpecError, match=r"3: task\.model: required a model that classifies text as it is; found a T5"):
        fit(classify_document(model, singles, "head: [classification_head]"), tmp_path)


def test_plan_refuses_before_anything_is_started(models: dict[str, Path], tmp_path: Path):
    data = write_jsonl(tmp_path / "x.jsonl", [_A, _B, {**_A, "label": "c"}])
    document = classify_document(models["roberta"], f"train: '{data}'", "labels: [a, b]")
    (tmp_path / "classify.yaml").write_text(document.text)
    done = run_cli("plan", "classify.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "classify.yaml:4: task.data.train: required one of the labels a, b; found c in sample 3" in done.stderr
