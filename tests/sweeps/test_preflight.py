"""What is known of a sweep before anything is trained: memory, models too large for this machine, every refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
import transformers

from lora_core.adapter import LoraBank
from lora_core.optimizers import PackOptimizer
from sweeps import preflight as flight
from sweeps.errors import SpecError
from sweeps.home import Home
from sweeps.plan import Plan
from sweeps.planning import plan_sweep
from sweeps.recipe import optimizer_of, steps_of
from sweeps.reduction import Reduction
from sweeps.spec import SpecDocument, SweepSpec, parse_spec
from sweeps.tasks import Task, load_task
from sweeps.tasks.hub import hub_reachable
from tests.lora_core.support import profiled_peak
from tests.support import ROOT, run_cli
from tests.sweeps.hf_support import TEXTS, lm_document, make_gpt2, make_model, make_tokenizer, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_jsonl(tmp_path_factory.mktemp("data") / "texts.jsonl", [{"text": text} for text in TEXTS])
    return f"train: '{path}'"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LORA_SWEEPS_HOME", str(tmp_path / "home"))

    def make(document: SpecDocument) -> Plan:
        return plan_sweep(document, Home.open(), timed=True)

    return make


def write_config(directory: Path, *, shards: int = 2, **settings: Any) -> Path:
    """Writes a GPT-2-shaped model of which nothing but the weights' values is there, and its tokenizer."""
    make_tokenizer().save_pretrained(directory)
    config = {"n_positions": 1024, "bos_token_id": 0, "eos_token_id": 0, "architectures": ["GPT2LMHeadModel"]}
    transformers.GPT2Config(**config | settings).save_pretrained(directory)
    files = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(files))}))
    for file in files:
        (directory / file).touch()
    return directory


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("8b"), n_embd=4096, n_layer=40, n_head=32)


# -- memory ------------------------------------------------------------------------------------------------------------


class _WithLengths:
    """A task that tells how long its samples are, or does not."""

    def __init__(self, task: Task, lengths_S: torch.Tensor | None) -> None:
        self._task, self.lengths_S = task, lengths_S

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


def counted(spec: SweepSpec, task: Any) -> int:
    fit = flight.Preflight(task, task, {}, 1, None, 0, "")
    member = flight.member_bytes(spec, Reduction.of(spec), fit)
    assert member is not None
    return member.total


def trained(spec: SweepSpec, task: Task, members: int) -> int:
    """The allocator's peak while a pack is trained for two steps and evaluated."""

    def work() -> None:
        pack = [flight._largest(spec, Reduction.of(spec))] * members
        with LoraBank.attach(task.model, spec.lora.target_modules, pack) as bank:
            for _ in steps_of(spec, task, PackOptimizer(bank, optimizer_of(spec)), start=0, stop=2):
                pass
            task.evaluate(members)

    return profiled_peak(work)


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2-shaped model that is small but for its vocabulary."""
    directory = tmp_path_factory.mktemp("wordy")
    make_tokenizer().save_pretrained(directory)
    settings = {"vocab_size": 50_257, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**settings, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def test_what_a_member_takes_is_what_the_allocator_gives_it(wordy: Path, tmp_path: Path):
    # All samples of one length, so that every batch is the widest.
    same = write_jsonl(tmp_path / "same.jsonl", [{"text": "Line 1: 1 times 1 is 1. " * 4}] * 24)
    spec = lm_document(wordy, f"train: '{same}'", targets="[c_attn, c_fc]").spec
    task = load_task(spec, cache=tmp_path / "cache", device=CPU)
    one, three = (trained(spec, task, members) for members in (1, 3))
    assert one > task.most_rows(4) * 50_257 * 4  # the vocabulary is what takes it
    found = counted(spec, task)
    for actual in (one, (three - one) / 2):
        assert 0.9 * actual <= found <= 1.6 * actual
    without_weights = load_task(spec, cache=tmp_path / "cache", device=torch.device("meta"))
    assert counted(spec, without_weights) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("task", ["packing: true, max_length: 100", "gradient_checkpointing: true", "attention: eager"])
def test_a_member_is_counted_alike_with_weights_and_without(task: str, llama: Path, texts: str, tmp_path: Path):
    spec = lm_document(llama, texts, task).spec
    with_weights, without = (
        counted(spec, load_task(spec, cache=tmp_path / "cache", device=torch.device(device)))
        for device in ("cpu", "meta")
    )
    assert without == pytest.approx(with_weights, rel=0.15)


def test_the_widest_batch_is_that_of_the_longest_samples(llama: Path, texts: str, tmp_path: Path):
    spec = lm_document(llama, texts, batch_size=3).spec
    task: Any = load_task(spec, cache=tmp_path / "cache", device=CPU)
    lengths_S = task._train.widths_R
    indices, widest = flight._widest_batch(spec, _WithLengths(task, lengths_S))
    assert widest
    assert sorted(lengths_S[indices].tolist()) == sorted(lengths_S.tolist())[-3:]
    assert flight._widest_batch(spec, _WithLengths(task, None))[1] is False
    # Without them, the first batch is scaled to the most rows there can be: close, and on the safe side.
    exact, scaled = (counted(spec, _WithLengths(task, lengths)) for lengths in (lengths_S, None))
    assert exact <= scaled <= 1.6 * exact


def test_a_pack_larger_than_memory_is_refused_by_what_was_counted(llama: Path, texts: str, plan, monkeypatch):
    monkeypatch.setattr(flight, "_memory_bytes", lambda *_: 8_000_000)
    document = lm_document(llama, texts)
    found = plan(document)
    assert found.member_bytes * found.pack + found.base_bytes < 8_000_000
    large = parse_spec(document.text + "compute: {pack: 4}\n", "lm.yaml")
    monkeypatch.setattr(flight, "_memory_bytes", lambda *_: 3 * found.member_bytes + found.base_bytes)
    with pytest.raises(ValueError, match=r"compute\.pack: required at most 2 members"):
        plan(large)


# -- models too large for this machine ---------------------------------------------------------------------------------


def test_a_model_of_eight_billion_is_planned_without_its_weights(
    eight_billion: Path, texts: str, plan, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(flight, "_memory_bytes", lambda *_: 16 * 10**9)
    text = lm_document(eight_billion, texts, targets="[c_attn, c_proj, c_fc]", dtype="bfloat16").text
    document = parse_spec(text.replace("trials: 4", "trials: 64"), "lm.yaml")
    found = plan(document)
    assert found.pack == 8
    assert found.seconds is None
    assert found.untimed == (
        "the base model takes 16.5 GB, more than half of the 16.0 GB that a worker has on this machine's CPU"
    )
    assert found.base_bytes > 16e9
    assert found.member_bytes > 1e9
    assert any("memory of the workers is not known here" in warning for warning in found.warnings)
    fit = flight.preflight(document, Reduction.of(document.spec), tmp_path, whole=False)
    assert len(fit.layers) == 40 * 4
    assert fit.layers["transformer.h.39.mlp.c_fc"] == (4096, 4 * 4096)


def test_a_large_model_that_a_worker_would_hold_gets_a_pack_that_fits(
    eight_billion: Path, texts: str, plan, monkeypatch
):
    monkeypatch.setattr(flight, "_memory_bytes", lambda *_: 24 * 10**9)
    found = plan(lm_document(eight_billion, texts, targets="[c_attn]", dtype="bfloat16"))
    assert found.untimed
    assert found.warnings == ()
    assert 1 <= found.pack <= (0.9 * 24e9 - found.base_bytes) / found.member_bytes


def test_what_is_wrong_with_a_large_model_is_told_all_the_same(eight_billion: Path, texts: str, plan, tmp_path: Path):
    settings = {"targets": "[c_attn]", "dtype": "bfloat16"}
    wide = lm_document(eight_billion, texts, **settings).text.replace("[2, 4]", "[2, 9999]")
    with pytest.raises(SpecError, match=r"parameters\.rank: required ranks of at most 4096, .*; found 9999"):
        plan(parse_spec(wide, "lm.yaml"))
    with pytest.raises(SpecError, match=r"lora\.target_modules: required names of linear layers"):
        plan(lm_document(eight_billion, texts, targets="[q_proj]", dtype="bfloat16"))
    part = write_config(tmp_path / "part", n_embd=4096, n_layer=40, n_head=32)
    (part / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SpecError, match=r"weights in safetensors; found no model-00002-of-00002\.safetensors in "):
        plan(lm_document(part, texts, **settings))
    (part / "model.safetensors.index.json").unlink()
    with pytest.raises(SpecError, match=r"weights in safetensors; found no model\.safetensors in "):
        plan(lm_document(part, texts, **settings))


def test_the_command_says_that_the_time_is_not_known(eight_billion: Path, texts: str, tmp_path: Path):
    document = lm_document(eight_billion, texts, targets="[c_attn]", dtype="float32")
    # 33.1 GB, and a hundred workers to share this machine.
    (tmp_path / "lm.yaml").write_text(document.text + "compute: {workers: 100}\n")
    done = run_cli("plan", "lm.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "member-steps; their time was not measured, for the base model takes 33.1 GB" in done.stdout
    assert re.search(r"each takes 33\.1 GB and [\d.]+ [MG]B a member", done.stdout)


def test_packing_is_tried_out_on_a_small_likeness_of_a_large_model(
    llama: Path, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = transformers.LlamaModel.forward

    def forward(self: Any, *args: Any, position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        positions = None if position_ids is None else torch.arange(position_ids.shape[1])[None]
        return plain(self, *args, position_ids=positions, **kwargs)

    monkeypatch.setattr(flight, "_memory_bytes", lambda *_: 1)
    document = lm_document(llama, texts, "packing: true, max_length: 100")
    flight.preflight(document, Reduction.of(document.spec), tmp_path, whole=False)
    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    with pytest.raises(SpecError, match=r"3: task\.packing: required false, for this model and its attention"):
        flight.preflight(document, Reduction.of(document.spec), tmp_path, whole=False)


def test_steps_that_would_take_minutes_are_not_tried(llama: Path, texts: str, plan, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flight, "_MOST_FLOPS", 1e6)
    found = plan(lm_document(llama, texts))
    assert found.seconds is None
    assert re.match(r"two steps of a pack of \d take about \de\+\d\d FLOPs, too many", found.untimed)
    assert found.member_bytes is not None


# -- the hub -----------------------------------------------------------------------------------------------------------


def test_a_hub_that_must_not_be_asked_is_not_and_the_message_is_one_line(
    texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "lm.yaml").write_text(lm_document("nobody/nothing", texts).text)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    done = run_cli("plan", "lm.yaml", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert re.search(r"lm\.yaml:3: task\.model: required a causal .*; found nobody/nothing: .*; download it", line)


def test_a_hub_that_does_not_answer_is_asked_once(texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Session:
        def head(self, *_: Any, **__: Any) -> None:
            asked.append(1)
            raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert not hub_reachable()
    document = lm_document("nobody/nothing", texts)
    with pytest.raises(SpecError, match=r"found nobody/nothing: .*; download it where there is a network"):
        flight.preflight(document, Reduction.of(document.spec), tmp_path, whole=False)
    assert len(asked) <= 3


def test_a_data_set_on_a_hub_that_does_not_answer_is_refused_at_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    switches = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr("sweeps.tasks.hub.hub_reachable", lambda: False)
    document = lm_document(llama, "train: nobody/nothing")
    # Were it asked all the same, this would take half a minute and say something else.
    with pytest.raises(SpecError, match=r"4: task\.data\.train: .*nobody/nothing: .*Offline"):
        flight.preflight(document, Reduction.of(document.spec), tmp_path)
    assert switches == (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)


# -- adapters that the layers cannot have ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "lora", "parameters", "message"),
    [
        (
            "[embed_tokens]",
            "",
            ", lr_ratio: {min: 1, max: 16}",
            r"6: parameters\.lr_ratio: .*target 'model.embed_tokens'",
        ),
        ("[embed_tokens]", "", ", lr_ratio: 4", r"6: parameters\.lr_ratio: required 1, for these .*; found 4; "),
        ("[embed_tokens]", ", dora: true", "", r"5: lora\.dora: required false, .*; found true; DoRA is for linear"),
    ],
)
def test_what_an_embedding_cannot_have_is_refused_with_its_key(
    targets: str, lora: str, parameters: str, message: str, llama: Path, texts: str, tmp_path: Path
):
    text = lm_document(llama, texts, targets=targets).text
    text = text.replace("}\nparameters", f"{lora}}}\nparameters").replace("alpha: 16", f"alpha: 16{parameters}")
    if "dora" in lora:
        text = text.replace("train: {", "train: {magnitude_lr: 1e-3, ")
    document = parse_spec(text, "lm.yaml")
    with pytest.raises(SpecError, match=message):
        flight.preflight(document, Reduction.of(document.spec), tmp_path, whole=False)


def test_tied_weights_are_refused_with_their_key(texts: str, tmp_path: Path):
    document = lm_document(make_gpt2(tmp_path / "gpt2"), texts, targets="[wte]")
    with pytest.raises(SpecError, match=r"5: lora\.target_modules: .*shares it with 'lm_head'"):
        flight.preflight(document, Reduction.of(document.spec), tmp_path / "cache")


def test_dora_over_a_row_of_zeros_is_refused_with_its_key(texts: str, tmp_path: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(make_gpt2(tmp_path / "gpt2"))
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, 5] = 0
    model.save_pretrained(tmp_path / "gpt2")
    text = lm_document(tmp_path / "gpt2", texts, targets="[c_attn], dora: true", magnitude_lr=1e-3).text
    document = parse_spec(text, "lm.yaml")
    with pytest.raises(SpecError, match=r"5: lora\.dora: required false.* found 1 rows of zeros in layer"):
        flight.preflight(document, Reduction.of(document.spec), tmp_path / "cache")


@pytest.mark.parametrize("pack", ["auto", "4"])
def test_a_model_whose_rows_are_coupled_is_trained_one_member_at_a_time(pack: str, tmp_path: Path, plan):
    source = (ROOT / "examples" / "custom_task.py").read_text()
    source = source.replace("nn.Tanh(), nn.Linear(64, 64)", "nn.BatchNorm1d(64), nn.Linear(64, 64)")
    (tmp_path / "coupled_task.py").write_text(source.replace(".requires_grad_(False).eval()", ".requires_grad_(False)"))
    text = (ROOT / "examples" / "custom.yaml").read_text()
    assert "custom_task" in text
    text = text.replace("custom_task", "coupled_task") + f"compute: {{pack: {pack}}}\n"
    (tmp_path / "spec.yaml").write_text(text)
    document = parse_spec(text, str(tmp_path / "spec.yaml"))
    if pack == "auto":
        assert plan(document).pack == 1
    else:
        with pytest.raises(SpecError, match=r"compute\.pack: required 1 or auto, .*BatchNorm1d"):
            plan(document)
