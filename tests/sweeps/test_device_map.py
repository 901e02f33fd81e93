"""A model spread over the GPUs of one worker: what goes where, what it holds, and what is refused.

No GPU is needed: where parts go is computed from their sizes, and under accelerate's hooks the CPU does for a device.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model

from sweeps import preflight as flight
from sweeps.errors import SpecError, TaskError
from sweeps.preflight import Preflight, most_members, preflight, why_one_gpu
from sweeps.recipe import bank_of, losses_of
from sweeps.reduction import Reduction
from sweeps.spec import SweepSpec, parse_spec
from sweeps.tasks import load_task, most_on_one_gpu
from sweeps.tasks.pretrained import CAUSAL_LM, CLASSIFIER, device_map, total_bytes, without_weights
from sweeps.tasks.spread import bytes_by_gpu, device_of_answers, gpus_of
from tests.support import run_cli
from tests.sweeps.hf_support import TEXTS, classify_document, lm_document, make_checkpoint, make_model, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DIGITS = """\
name: tiny
task: {type: digits}
lora: {target_modules: [fc1, fc2]}
parameters: {rank: 2, lr: {min: 1e-3, max: 1e-1}, alpha: 16}
compute: {gpus_per_worker: 2}
"""
LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}


def outline(*, tied: bool = False, layers: int = 8, kind: Any = CAUSAL_LM, **settings: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=100, num_hidden_layers=layers, tie_word_embeddings=tied, **LLAMA, **settings
    )
    return without_weights(config, kind, dtype=torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_jsonl(tmp_path_factory.mktemp("data") / "texts.jsonl", [{"text": text} for text in TEXTS])
    return f"train: '{path}'"


def on_gpus(spec: SweepSpec, gpus: float) -> SweepSpec:
    return spec.model_copy(update={"compute": spec.compute.model_copy(update={"gpus_per_worker": gpus})})


# -- what goes where ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_each_gpu_has_some_layers_one_after_the_other(gpus: int, tied: bool):
    model = outline(tied=tied, layers=16)
    places = device_map(model, [10**9] * gpus)
    assert set(places.values()) == set(range(gpus))
    layers = [places[f"model.layers.{i}"] for i in range(16)]
    assert all(before <= after for before, after in pairwise(layers))
    taken = bytes_by_gpu(model, places)
    assert sum(taken.values()) == total_bytes(model) + sum(buffer.nbytes for buffer in model.buffers())
    assert max(taken.values()) == most_on_one_gpu(model, [10**9] * gpus)
    largest = max(sum(weight.nbytes for weight in layer.parameters()) for layer in model.model.layers)
    assert max(taken.values()) <= total_bytes(model) / gpus + 1.25 * largest + 1
    if tied:  # one weight is in one place
        assert places.get("lm_head", 0) == places["model.embed_tokens"] == 0


def test_a_classifier_is_spread_head_and_all():
    places = device_map(outline(kind=CLASSIFIER, num_labels=3, pad_token_id=0), [10**9] * 2)
    assert (places["model.embed_tokens"], places["score"]) == (0, 1)


def test_a_gpu_with_less_memory_has_less_of_the_model():
    model = outline()
    half = total_bytes(model) // 2
    taken = bytes_by_gpu(model, device_map(model, [half // 2, 10**9]))
    assert 0 < taken[0] <= half // 2 < taken[1]


def test_a_model_that_the_gpus_do_not_hold_is_refused_with_the_way_out():
    model = outline()
    share = total_bytes(model) // 4
    with pytest.raises(
        TaskError, match=r"a model that 2 GPUs hold, .*; found one of 0.0 GB, with no room for .*; raise"
    ):
        device_map(model, [share, share])


def test_only_models_of_transformers_on_gpus_are_spread(llama: Path, texts: str):
    spec = lm_document(llama, texts).spec
    asked = {gpus: on_gpus(spec, gpus) for gpus in (0.0, 0.5, 1.0, 2.0)}
    assert {gpus: gpus_of(each, GPU) for gpus, each in asked.items()} == {0.0: 1, 0.5: 1, 1.0: 1, 2.0: 2}
    assert gpus_of(spec, GPU) == 1  # auto
    assert gpus_of(asked[2.0], CPU) == gpus_of(asked[2.0], torch.device("meta")) == 1
    assert gpus_of(on_gpus(parse_spec(DIGITS.replace("worker: 2", "worker: 1"), "tiny.yaml").spec, 2.0), GPU) == 1


def test_batches_go_where_the_model_ends():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    assert device_of_answers(model, model[1]) == CPU  # on one device, that of its first weight
    model.hf_device_map = {"0": "cpu", "1": "meta"}
    assert device_of_answers(model, model[1]) == torch.device("meta")
    assert device_of_answers(model, None) == CPU


# -- training under hooks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", ["", "gradient_checkpointing: true", "packing: true"])
def test_a_language_model_under_hooks_trains_and_evaluates_to_the_same_bits(
    llama: Path, texts: str, tmp_path: Path, more: str
):
    document = lm_document(llama, texts, more, batch_size=2)
    assert _seen(document, tmp_path, hooked=True) == _seen(document, tmp_path, hooked=False)


def test_a_classifier_under_hooks_trains_and_evaluates_to_the_same_bits(tmp_path: Path):
    rows = [{"text": text, "label": ("a", "b", "c")[i % 3]} for i, text in enumerate(TEXTS)]
    data = f"train: '{write_jsonl(tmp_path / 'rows.jsonl', rows)}'"
    document = classify_document(make_checkpoint(tmp_path / "roberta", "roberta"), data)
    assert _seen(document, tmp_path, hooked=True) == _seen(document, tmp_path, hooked=False)


def _seen(document: Any, tmp_path: Path, *, hooked: bool) -> tuple[object, ...]:
    spec, reduction = document.spec, Reduction.of(document.spec)
    task = load_task(spec, cache=tmp_path, device=CPU)
    if hooked:
        places = dict.fromkeys(device_map(task.model, [10**9, 10**9]), "cpu")
        dispatch_model(task.model, places, main_device="cpu", force_hooks=True)
    members = [flight._largest(spec, reduction)] * 2
    with bank_of(spec, task, members) as bank:
        losses = losses_of(spec, task, members=2)(0)
        losses.sum().backward()
        bank.params_KP.sub_(bank.grads_KP)
        return losses.tolist(), bank.grads_KP.double().sum(dim=1).tolist(), task.evaluate(2)


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fit(llama: Path, texts: str, tmp_path: Path) -> tuple[SweepSpec, Preflight]:
    document = lm_document(llama, texts)
    found = preflight(document, Reduction.of(document.spec), tmp_path, whole=False)
    return on_gpus(document.spec, 2.0), found


def test_a_pack_is_bounded_by_the_gpu_with_most_of_the_model(fit: tuple[SweepSpec, Preflight]):
    spec, found = fit
    member = flight.member_bytes(spec, Reduction.of(spec), found)
    assert member is not None
    room = found.most_bytes // 2 + 10 * member.total

    def limit(gpus: int, most_bytes: int, spec: SweepSpec = spec) -> int | None:
        share = round(gpus * room / (1 - flight._RESERVE_ON_CPU)) + gpus
        values = {"gpus": gpus, "most_bytes": most_bytes, "memory_bytes": share}
        return most_members(spec, Preflight(**{**{key: getattr(found, key) for key in _FIELDS}, **values}), member)

    assert limit(2, found.most_bytes // 2) == 10
    assert limit(1, found.most_bytes // 2) == 10
    assert limit(2, found.most_bytes // 2 + member.total) == 9
    fixed = spec.model_copy(update={"compute": spec.compute.model_copy(update={"pack": 12})})
    assert limit(2, found.most_bytes // 2, fixed) is None  # the bound is too low to refuse by


_FIELDS = ("task", "outline", "layers", "workers", "memory_bytes", "step_flops", "too_large", "gpus", "most_bytes")


def test_a_model_that_fits_on_one_gpu_is_advised_to(fit: tuple[SweepSpec, Preflight]):
    _, found = fit
    size = found.most_bytes
    values = {key: getattr(found, key) for key in _FIELDS}
    roomy = Preflight(**{**values, "gpus": 2, "memory_bytes": 4 * size})
    assert "compute.gpus_per_worker: 1 would train packs on all of them at once" in why_one_gpu(roomy)
    assert why_one_gpu(Preflight(**{**values, "gpus": 2, "memory_bytes": 4 * size - 4})) == ""
    assert why_one_gpu(Preflight(**{**values, "gpus": 2, "memory_bytes": None})) == ""
    assert why_one_gpu(found) == ""


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task", ["{type: digits}", "{type: python, entrypoint: 'a.b:c', metrics: {eval/loss: minimize}}"]
)
def test_several_gpus_for_a_model_that_is_not_spread_are_refused(task: str):
    text = DIGITS.replace("{type: digits}", task)
    with pytest.raises(
        SpecError, match=r"compute.gpus_per_worker: required at most 1, .*is not spread.*; found 2; .*idle"
    ):
        parse_spec(text, "tiny.yaml")


def test_a_refusal_ends_the_command_with_its_line(tmp_path: Path):
    path = tmp_path / "tiny.yaml"
    path.write_text(DIGITS)
    done = run_cli("plan", path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "compute.gpus_per_worker: required at most 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_compiled_model_is_not_spread(llama: Path, texts: str):
    text = lm_document(llama, texts, "torch_compile: true").text + "compute: {gpus_per_worker: 2}\n"
    with pytest.raises(SpecError, match=r"task.torch_compile: required false with several GPUs .*; found true; set it"):
        parse_spec(text, "lm.yaml")
    assert parse_spec(text.replace("worker: 2", "worker: 1"), "lm.yaml").spec.torch_compile


# -- GPUs --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, on which a model is really spread")
def test_a_model_loaded_onto_two_gpus_answers_as_on_one(llama: Path, texts: str, tmp_path: Path):
    spec = lm_document(llama, texts).spec
    one, two = (load_task(on_gpus(spec, gpus), cache=tmp_path, device=GPU) for gpus in (1.0, 2.0))
    assert len({weight.device for weight in two.model.parameters()}) == 2
    found, expected = (task.evaluate(1)[0]["eval/loss"] for task in (two, one))
    assert found == pytest.approx(expected, rel=1e-5)
