"""What a machine says of a spec's model and data: what cannot be loaded from here is never said to be there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sweeps.checkup import source
from sweeps.errors import TaskError
from sweeps.source_facts import Source, SourceFacts, look
from sweeps.spec_tasks import CausalLmTask
from sweeps.tasks import pretrained
from tests.support import environment
from tests.sweeps.hf_support import lm_document, make_gpt2

MODEL, DATA = "someone/tiny", "someone/MyTexts"

LOOK = """
import json, sys
from dataclasses import asdict
from sweeps.source_facts import Source, look
print(json.dumps([asdict(found) for found in look(tuple(Source(*one) for one in json.loads(sys.argv[1])))]))
"""


def python(code: str, *arguments: str, home: Path, offline: bool = True) -> str:
    """What a Python of its own prints: caches and switches of the hub are read from the environment, once."""
    nowhere = {} if offline else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    env = environment(HF_HOME=str(home), HF_HUB_OFFLINE="1" if offline else "0", **nowhere)
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def looked(*sources: tuple[str | None, ...], home: Path, offline: bool = True) -> list[SourceFacts]:
    found = json.loads(python(LOOK, json.dumps(sources), home=home, offline=offline).splitlines()[-1])
    return [SourceFacts(**one) for one in found]


def cached(home: Path, kind: str, name: str) -> Path:
    """An empty snapshot of the hub's, where `hf download` would put it."""
    place = home / "hub" / f"{kind}--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots" / "abc").mkdir(parents=True)
    return place / "snapshots" / "abc"


def without(*patterns: str) -> Callable[[Path], None]:
    def remove(directory: Path) -> None:
        for pattern in patterns:
            for path in directory.glob(pattern):
                path.unlink()

    return remove


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def cut(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def torn(directory: Path) -> None:
    cut(directory)
    (directory / "model.safetensors.index.json").write_text("[")


ILL = [
    (without("token*"), "tokenizer"),
    (without("config.json"), "config.json"),
    (without("model.safetensors"), "weights in safetensors"),
    (pickled, "weights in safetensors, only pytorch_model.bin, which is never unpickled"),
    (cut, "model-00002-of-00002.safetensors"),
    (torn, "model.safetensors.index.json that can be read"),
]


def load(model: str) -> None:
    """What `plan` demands of a model, whatever is said of its files."""
    section = lm_document(model, "train: /no/such/train.jsonl").spec.task
    assert isinstance(section, CausalLmTask)
    pretrained.load_config(section, pretrained.CAUSAL_LM)
    pretrained.check_weights(section, pretrained.CAUSAL_LM)
    pretrained.load_tokenizer(model, None)


@pytest.mark.parametrize(("harm", "lacking"), ILL)
def test_a_models_directory_must_have_all_that_is_loaded(harm: Callable[[Path], None], lacking: str, tmp_path: Path):
    what = Source("task.model", str(make_gpt2(tmp_path / "model", layers=1)), "model")
    (well,) = look((what,))
    assert (well.there, well.lacking) == (True, "")
    assert source(what, "one", well).status == "ok"
    load(what.name)
    harm(tmp_path / "model")
    with pytest.raises(TaskError, match="model: required"):
        load(what.name)
    (ill,) = look((what,))
    assert ill.lacking == lacking
    check = source(what, "one", ill)
    assert check.status == "failed"
    assert f"has no {lacking}" in check.found
    assert "save_pretrained" in check.way_out


def test_a_model_in_the_cache_must_be_whole(tmp_path: Path):
    for i, (harm, _) in enumerate([(without(), ""), *ILL]):
        harm(make_gpt2(cached(tmp_path, "models", f"{MODEL}{i}"), layers=1))
    names = [("task.model", f"{MODEL}{i}", "model") for i in range(1 + len(ILL))]
    well, *ill = looked(*names, home=tmp_path)
    assert well.there
    assert well.bytes > 1e4
    assert not any(one.there for one in ill)
    for found, (_, lacking) in zip(ill, ILL, strict=True):
        # Without its config it is none that could lack something.
        assert found.lacking == ("" if lacking == "config.json" else lacking)
        check = source(Source("task.model", MODEL, "model"), "one", found)
        assert check.status == "failed"
        assert lacking == "config.json" or f"in the cache without {lacking}" in check.found


def test_a_data_set_is_there_once_it_is_prepared_and_not_as_the_hubs_files(tmp_path: Path):
    rows = cached(tmp_path, "datasets", DATA) / "train.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    wanted = ("task.data.train", DATA, "dataset")
    (downloaded,) = looked(wanted, home=tmp_path)
    assert not downloaded.there
    # What datasets prepares from a directory differs from what it does from the hub by the owner's name.
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "MyTexts").symlink_to(rows.parent)
    python("import datasets; datasets.load_dataset('local/MyTexts')", home=tmp_path)
    (tmp_path / "datasets" / "my_texts").rename(tmp_path / "datasets" / "someone___my_texts")
    prepared, other = looked(wanted, (*wanted, None, "another"), home=tmp_path)
    assert prepared.there
    assert not other.there
    load = f"import datasets; print(len(datasets.load_dataset({DATA!r})['train']))"
    assert python(load, home=tmp_path).split()[-1] == "2"


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_hub_that_does_not_answer_is_told_in_a_fresh_process(kind: str, tmp_path: Path):
    (found,) = looked(("task.model", "someone/none", kind), home=tmp_path, offline=False)
    assert not found.there
    assert not found.reachable
    assert "AttributeError" not in found.hub
    assert "Connect" in found.hub
    (found,) = looked(("task.model", "someone/none", kind), home=tmp_path)
    assert "HF_HUB_OFFLINE" in found.hub


def test_the_way_out_of_a_missing_data_set_is_to_load_it():
    missing = SourceFacts(False, hub="HF_HUB_OFFLINE tells not to ask the hub")
    way_out = source(Source("task.data.train", DATA, "dataset", config="en"), "one", missing).way_out
    assert f"""python -c "import datasets; datasets.load_dataset('{DATA}', 'en')\"""" in way_out
    assert "hf download" not in way_out
