"""`train.dtype: auto` is what the model was saved in, and is found out before anything is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from sweeps.dtypes import with_dtype
from sweeps.errors import SpecError
from sweeps.home import Home
from sweeps.planning import plan_sweep
from sweeps.spec import SpecDocument, parse_spec
from sweeps.tasks import load_task
from tests.support import SMALL_SPEC, run_cli
from tests.sweeps.hf_support import TEXTS, lm_document, make_model, write_jsonl


def saved_in(directory: Path, dtype: torch.dtype, *, in_config: bool = True) -> SpecDocument:
    """A spec with `dtype: auto` over a model that was saved in a dtype."""
    model = transformers.AutoModelForCausalLM.from_pretrained(make_model(directory / "model"), dtype=dtype)
    model.save_pretrained(directory / "model")
    path = directory / "model" / "config.json"
    config = json.loads(path.read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    if not in_config:
        del config["dtype"]
        path.write_text(json.dumps(config))
    texts = write_jsonl(directory / "texts.jsonl", [{"text": text} for text in TEXTS])
    return lm_document(directory / "model", f"train: '{texts}'", dtype="auto")


@pytest.mark.parametrize("in_config", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_auto_is_the_dtype_that_transformers_auto_takes(tmp_path: Path, dtype: torch.dtype, in_config: bool):
    document = saved_in(tmp_path, dtype, in_config=in_config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert theirs.dtype == dtype
    resolved = with_dtype(document)
    assert getattr(torch, resolved.spec.train.dtype) == dtype
    assert resolved.spec.model_copy(update={"train": document.spec.train}) == document.spec
    task = load_task(resolved.spec, cache=tmp_path / "cache", device=torch.device("cpu"))
    assert next(task.model.parameters()).dtype == dtype


@pytest.mark.parametrize("in_config", [True, False])
def test_a_model_saved_in_float16_is_refused_with_the_way_out(tmp_path: Path, in_config: bool):
    document = saved_in(tmp_path, torch.float16, in_config=in_config)
    words = (
        r"lm\.yaml:\d+: train\.dtype: required a model saved in float32, float64 or bfloat16; found auto, and one "
        r"saved in float16, which needs loss scaling; name the dtype to train in: bfloat16, or float32"
    )
    with pytest.raises(SpecError, match=words):
        with_dtype(document)


def test_a_model_that_is_not_there_is_named_by_its_own_key(tmp_path: Path):
    with pytest.raises(SpecError, match=r"3: task\.model: required a model's directory, .*no directory"):
        with_dtype(lm_document(tmp_path / "none", "train: x.jsonl", dtype="auto"))


def test_without_a_saved_model_auto_is_float32_and_what_is_named_stays():
    for written, dtype in (("auto", "float32"), ("bfloat16", "bfloat16")):
        text = SMALL_SPEC.replace("train: {", f"train: {{dtype: {written}, ")
        document = parse_spec(text, "small.yaml")
        assert document.spec.train.dtype == written
        assert with_dtype(document).spec.train.dtype == dtype


def test_the_plan_says_what_auto_became(tmp_path: Path):
    document = saved_in(tmp_path, torch.bfloat16)
    assert plan_sweep(document, Home(tmp_path / "home"), workers=1).dtype == "bfloat16"
    (tmp_path / "lm.yaml").write_text(document.text)
    words = run_cli("plan", "lm.yaml", "--no-time", cwd=tmp_path)
    assert words.returncode == 0, words.stderr
    assert any(line.split() == ["dtype", "bfloat16"] for line in words.stdout.splitlines())
