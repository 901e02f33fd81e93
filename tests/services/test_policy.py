"""What a spec that was submitted to a server may say, and that nothing in it leads out of the roots."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from services.policy import REGISTERED, Places, parse_submitted, with_ids
from sweeps.errors import SpecError, TaskError
from sweeps.spec import CausalLmTask, PythonTask, SweepSpec, parse_spec, template
from sweeps.spec_tasks import Task
from sweeps.tasks import pretrained
from sweeps.tasks.entrypoint import load_entrypoint
from tests.sweeps.hf_support import make_model, write_jsonl

NOWHERE = Places(None, None)

_REST = """\
lora: {target_modules: [q_proj]}
parameters: {rank: 2, lr: 1e-3}
"""


def _text(task: str, rest: str = "") -> str:
    return f"name: x\ntask: {task}\n{_REST}{rest}"


def _task(model: str = "team/llama", data: str = "texts.jsonl", more: str = "") -> str:
    return f"{{type: causal_lm, model: {json.dumps(model)}, data: {{train: {json.dumps(data)}{more}}}}}"


def _faults(text: str, places: Places) -> dict[str, str]:
    """What is wrong with a spec, by path, as a user reads it."""
    with pytest.raises(SpecError, match="required") as refused:
        parse_submitted(text, "sweep.yaml", places)
    return {fault.path: fault.render("sweep.yaml") for fault in refused.value.faults}


def _pretend_model(directory: Path) -> Path:
    """What looks like a model from outside."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return directory


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Two roots beside each other, with something outside of them."""
    models, data = tmp_path / "models", tmp_path / "data"
    for name in ("team/llama", "team/llama-chat", "gpt2"):
        _pretend_model(models / name)
    _pretend_model(tmp_path / "outside")
    data.mkdir()
    write_jsonl(data / "texts.jsonl", [{"text": "a"}])
    (data / "sets").mkdir()
    write_jsonl(data / "sets" / "train.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "secret.jsonl", [{"text": "secret"}])
    return Places(models, data)


# -- what is taken -----------------------------------------------------------------------------------------------------


def test_ids_become_places_under_the_roots(places: Places, tmp_path: Path) -> None:
    document = parse_submitted(_text(_task(more=", eval: sets")), "sweep.yaml", places)
    task = document.spec.task
    assert isinstance(task, CausalLmTask)
    assert (task.model, task.data.train, task.data.eval) == tuple(
        str(tmp_path / place) for place in ("models/team/llama", "data/texts.jsonl", "data/sets")
    )
    assert document.source == "sweep.yaml"
    assert SweepSpec.model_validate(document.spec.model_dump(mode="json")) == document.spec  # wherever it is read again


def test_a_held_out_share_is_no_place(places: Places) -> None:
    task = parse_submitted(_text(_task(more=", eval: 0.25")), "sweep.yaml", places).spec.task
    assert isinstance(task, CausalLmTask)
    assert task.data.eval == 0.25


def test_what_init_writes_can_be_submitted_to_a_server_without_roots() -> None:
    assert parse_submitted(template(), "sweep.yaml", NOWHERE).spec == parse_spec(template(), "sweep.yaml").spec


def test_the_name_of_the_spec_and_the_working_directory_lead_nowhere(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("sweep.yaml", str(tmp_path / "sweep.yaml"), "../sweep.yaml"):
        with pytest.raises(SpecError, match=r"task\.model: required the id of a model.*found 'outside'"):
            parse_submitted(_text(_task("outside")), source, places)


def test_a_link_within_a_root_is_followed_to_where_it_leads(places: Places, tmp_path: Path) -> None:
    (tmp_path / "models" / "latest").symlink_to(tmp_path / "models" / "team" / "llama")
    task = parse_submitted(_text(_task("latest")), "sweep.yaml", places).spec.task
    assert isinstance(task, CausalLmTask)
    assert task.model == str(tmp_path / "models" / "team" / "llama")


def test_a_root_may_be_a_link_itself(places: Places, tmp_path: Path) -> None:
    (tmp_path / "mount").symlink_to(tmp_path / "models")
    linked = Places(tmp_path / "mount", places.data)
    task = parse_submitted(_text(_task()), "sweep.yaml", linked).spec.task
    assert isinstance(task, CausalLmTask)
    assert task.model == str(tmp_path / "models" / "team" / "llama")


# -- what is no id -----------------------------------------------------------------------------------------------------

NO_IDS = [
    "/etc",
    "/etc/passwd",
    "//etc",
    "~",
    "~root",
    "~/x",
    ".",
    "..",
    "../outside",
    "../models/gpt2",
    "team/../gpt2",
    "team/./llama",
    "team//llama",
    "team/llama/",
    "/gpt2",
    "gpt2/",
    "gpt2 ",
    " gpt2",
    "gpt2\n",
    "gpt2\t",
    "gpt2\0",
    "\0",
    "gpt2\0/../../outside",
    "gpt2\x7f",
    "team\\llama",
    "..\\outside",
    "%2e%2e/outside",
    "%2e%2e%2foutside",
    "..%2foutside",
    "%252e%252e/outside",
    "..;/outside",
    "\uff0e\uff0e/outside",
    "\u2024\u2024/outside",
    "gpt2\u2028",
    "gpt\u00b2",
    "https://huggingface.co/gpt2",
    "file:///etc",
    "hf://datasets/x/y",
    "s3://bucket/x",
    "C:\\models",
    "$HOME",
    "`id`",
    "$(id)",
    "-rf",
    "team/-rf",
    ".hidden",
    "team/.hidden",
    "*",
    "gpt?",
    "gpt2@main",
    "x" * 256,
    "x/" * 300 + "x",
]


@pytest.mark.parametrize("name", NO_IDS, ids=ascii)
@pytest.mark.parametrize("path", ["task.model", "task.data.train", "task.data.eval"])
def test_what_is_no_id_is_refused_and_told_as_such(name: str, path: str, places: Places) -> None:
    match path:
        case "task.model":
            task = _task(model=name)
        case "task.data.train":
            task = _task(data=name)
        case _:
            task = _task(more=f", eval: {json.dumps(name)}")
    if name == "x/" * 300 + "x":  # an id, of nothing
        assert "the id of" in _faults(_text(task), places)[path]
    else:
        faults = _faults(_text(task), places)
        assert list(faults) == [path]
        assert "letters, digits, dots, dashes and underscores" in faults[path]
        assert faults[path].isprintable()


@pytest.mark.parametrize("name", ["", "x" * 1001])
def test_an_empty_name_and_an_endless_one_are_refused(name: str, places: Places) -> None:
    assert list(_faults(_text(_task(model=name, data=name)), places)) == ["task.model", "task.data.train"]


@pytest.mark.parametrize("target", ["outside", ".", "models/nothing-of-the-kind", "/etc"])
def test_a_link_out_of_the_root_is_refused_whether_or_not_it_leads_anywhere(
    target: str, places: Places, tmp_path: Path
) -> None:
    (tmp_path / "models" / "link").symlink_to(tmp_path / target)
    faults = _faults(_text(_task("link")), places)
    said = "found 'link'" if target.startswith("models") else "a link that leads out of the server's models"
    assert list(faults) == ["task.model"]
    assert said in faults["task.model"]
    assert str(tmp_path) not in faults["task.model"]


def test_a_link_out_of_the_root_is_refused_on_the_way_too(places: Places, tmp_path: Path) -> None:
    (tmp_path / "models" / "up").symlink_to(tmp_path)
    (tmp_path / "data" / "up").symlink_to("..")
    faults = _faults(_text(_task("up/outside", "up/secret.jsonl")), places)
    assert all("a link that leads out of the server's" in faults[path] for path in ("task.model", "task.data.train"))


def test_a_link_to_itself_is_refused(places: Places, tmp_path: Path) -> None:
    (tmp_path / "models" / "loop").symlink_to("loop")
    assert "the id of a model" in _faults(_text(_task("loop")), places)["task.model"]


def test_a_link_out_of_the_root_inside_of_what_an_id_names_is_refused(places: Places, tmp_path: Path) -> None:
    (tmp_path / "models" / "gpt2" / "tokenizer.json").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "data" / "more" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "more" / "deep" / "x.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "data" / "by-way-of").mkdir()
    (tmp_path / "data" / "by-way-of" / "more").symlink_to(tmp_path / "data" / "more")
    faults = _faults(_text(_task("gpt2", "more", ", eval: by-way-of")), places)
    assert "the link 'tokenizer.json' in it, which leads out" in faults["task.model"]
    assert "the link 'x.jsonl' in it, which leads out" in faults["task.data.train"]
    assert "the link 'x.jsonl' in it, which leads out" in faults["task.data.eval"]


# -- what is not there -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [None, "missing"])
def test_without_roots_there_are_no_models_and_no_data(written: str | None, tmp_path: Path) -> None:
    root = None if written is None else tmp_path / written
    faults = _faults(_text(_task(more=", eval: x")), Places(root, root))
    assert "required no models, for this server has none" in faults["task.model"]
    assert "required no data, for this server has none" in faults["task.data.train"]
    assert "required no data, for this server has none" in faults["task.data.eval"]


def test_an_id_of_nothing_is_told_the_nearest_names(places: Places) -> None:
    faults = _faults(_text(_task("team/lama", "set/train.jsonl")), places)
    assert "did you mean 'team/llama' or 'team/llama-chat'?" in faults["task.model"]
    assert "did you mean 'sets/train.jsonl'" in faults["task.data.train"]


def test_an_id_of_the_hub_is_not_looked_up_there(places: Places) -> None:
    faults = _faults(_text(_task("Qwen/Qwen3-0.6B", "stanfordnlp/imdb")), places)
    assert "nothing is fetched from elsewhere; there are gpt2, team/llama, team/llama-chat" in faults["task.model"]
    assert "nothing is fetched from elsewhere; there are sets/train.jsonl, texts.jsonl" in faults["task.data.train"]


def test_a_loader_of_datasets_is_no_data_set(places: Places) -> None:
    # datasets.load_dataset knows these by name.
    for name in ("json", "text", "csv", "imagefolder"):
        assert "the id of a data set" in _faults(_text(_task(data=name)), places)["task.data.train"]


def test_a_file_is_no_model_and_a_pipe_is_no_data(places: Places, tmp_path: Path) -> None:
    (tmp_path / "models" / "file").write_text("")
    os.mkfifo(tmp_path / "data" / "pipe.jsonl")
    faults = _faults(_text(_task("file", "pipe.jsonl")), places)
    assert list(faults) == ["task.model", "task.data.train"]


def test_a_directory_that_the_server_may_not_read_is_refused(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.listdir

    def listdir(path: str) -> list[str]:
        # As for a user who is not root, whom no mode of a directory stops.
        if path == str(tmp_path / "models" / "gpt2"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "listdir", listdir)
    fault = _faults(_text(_task("gpt2")), places)["task.model"]
    assert fault.endswith("required a directory that the server can read; found gpt2: Permission denied")


def test_a_directory_of_models_is_no_model(places: Places) -> None:
    assert "found no config.json in team; " in _faults(_text(_task("team")), places)["task.model"]


def test_only_a_handful_of_a_thousand_models_is_listed(places: Places, tmp_path: Path) -> None:
    for i in range(1000):
        (tmp_path / "models" / f"m{i}").mkdir()
        (tmp_path / "models" / f"m{i}" / "config.json").touch()
    fault = _faults(_text(_task("Q")), places)["task.model"]
    assert len(fault) < 300
    assert fault.endswith(", ...")


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entrypoint", ["os:system", "my_package.tasks:make", "subprocess:run"])
def test_python_is_refused_where_nothing_is_allowed(entrypoint: str) -> None:
    faults = _faults(_text(f'{{type: python, entrypoint: "{entrypoint}", path: /tmp}}'), NOWHERE)
    assert list(faults) == ["task.type"]
    assert "required one of causal_lm, sequence_classification or digits; found 'python'" in faults["task.type"]


@pytest.mark.parametrize(
    "entrypoint", ["os:system", "team.tasks:other", "team.tasks:make ", "team.tasks", "TEAM.tasks:make"]
)
def test_an_entrypoint_that_is_not_allowed_is_refused(entrypoint: str) -> None:
    places = Places(None, None, frozenset({"team.tasks:make"}))
    faults = _faults(_text(f'{{type: python, entrypoint: "{entrypoint}"}}'), places)
    assert list(faults) == ["task.entrypoint"]
    assert "required an entrypoint that this server allows: team.tasks:make" in faults["task.entrypoint"]


@pytest.mark.parametrize("path", [".", "/tmp", "'~'", "''", "7"])
def test_where_a_module_lies_is_not_for_the_spec_to_say(path: str) -> None:
    places = Places(None, None, frozenset({"team.tasks:make"}))
    faults = _faults(_text(f'{{type: python, entrypoint: "team.tasks:make", path: {path}}}'), places)
    assert list(faults) == ["task.path"]
    assert "the module is installed on the server" in faults["task.path"]


def test_an_allowed_entrypoint_is_taken_from_where_it_is_installed_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(None, None, frozenset({"a_module_of_mine:make"}))
    (tmp_path / "a_module_of_mine.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    text = _text('{type: python, entrypoint: "a_module_of_mine:make"}')
    task = parse_submitted(text, str(tmp_path / "sweep.yaml"), places).spec.task
    assert isinstance(task, PythonTask)
    assert task.path is None
    before = list(sys.path)
    with pytest.raises(TaskError, match="a module that is installed; found no module a_module_of_mine"):
        load_entrypoint(task, cache=tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    assert sys.path == before


def test_a_task_that_nobody_registered_here_is_refused() -> None:
    written = {get_args(model.model_fields["type"].annotation)[0] for model in get_args(get_args(Task)[0])}
    assert written == {*REGISTERED, "python"}, "a new task: say in services/policy.py who may submit it"


@pytest.mark.parametrize(
    "key", ["trust_remote_code: true", "code_revision: x", "token: x", "attn_implementation: x/y", "device_map: auto"]
)
def test_keys_of_transformers_that_run_or_fetch_something_do_not_exist(key: str, places: Places) -> None:
    text = _text(_task().replace("type: causal_lm", f"type: causal_lm, {key}"))
    assert "found the unknown key" in _faults(text, places)[f"task.{key.partition(':')[0]}"]


def test_attention_is_none_that_would_be_fetched(places: Places) -> None:
    # transformers takes the name of a repository here, and runs the code in it.
    text = _text(_task().replace("type: causal_lm", "type: causal_lm, attention: kernels-community/flash-attn"))
    assert "required one of auto, eager" in _faults(text, places)["task.attention"]


@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "os.system", "bitsandbytes.optim:Adam8bit", "../x"])
def test_an_optimizer_is_one_of_those_that_have_a_law(optimizer: str) -> None:
    faults = _faults(_text("{type: digits}", f"train: {{optimizer: {optimizer}}}\n"), NOWHERE)
    assert list(faults) == ["train.optimizer"]


FREE_TEXT = {
    "SweepSpec.name",  # of a pattern
    "SweepSpec.preset",  # of a list
    "CausalLmTask.model",  # an id here
    "CausalLmTask.revision",  # refused here
    "SequenceClassificationTask.model",
    "SequenceClassificationTask.revision",
    "SequenceClassificationTask.labels",  # compared with those of the data
    "SequenceClassificationTask.head",  # names of modules, escaped where they are sought
    "TextData.train",  # an id here
    "TextData.config",  # compared with those of a data set
    "TextData.split",  # the same
    "TextData.eval",  # an id here
    "TextData.eval_split",
    "TextData.columns",  # compared with those of the data
    "LabelledData.train",
    "LabelledData.config",
    "LabelledData.split",
    "LabelledData.eval",
    "LabelledData.eval_split",
    "LabelledData.columns",
    "PythonTask.entrypoint",  # of a list here
    "PythonTask.path",  # refused here
    "PythonTask.options",  # for the administrator who allowed the entrypoint
    "PythonTask.metrics",  # names of what a task reports
    "PythonTask.log_metrics",
    "LoraSpec.target_modules",  # names, or a regular expression: it is matched where it can be stopped
    "TrainSpec.optimizer",  # of a list
    "TrainSpec.options",  # of a list, and values of a kind
    "MetricSpec.name",  # of a list
    "TrackingSpec.uri",  # refused here
    "TrackingSpec.experiment",  # a name in the server's MLflow
}


def _holds_text(annotation: Any) -> bool:
    return annotation in (str, Any) or any(_holds_text(part) for part in get_args(annotation) if part is not Ellipsis)


def _sections(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}.union(*(_sections(field.annotation) for field in annotation.model_fields.values()))
    return set().union(*(_sections(part) for part in get_args(annotation) if not isinstance(part, str)))


def test_every_free_text_of_a_spec_is_accounted_for() -> None:
    found = {
        f"{section.__name__}.{name}"
        for section in _sections(SweepSpec)
        for name, field in section.model_fields.items()
        if _holds_text(field.annotation)
    }
    assert found == FREE_TEXT, "a new field that takes text: what may a stranger write there?"


# -- what else may not be written --------------------------------------------------------------------------------------


def test_where_a_sweep_is_recorded_is_the_servers_to_say() -> None:
    text = _text("{type: digits}", "tracking: {uri: 'https://u:canary@elsewhere', experiment: mine}\n")
    faults = _faults(text, NOWHERE)
    assert list(faults) == ["tracking.uri"]
    assert faults["tracking.uri"].startswith(
        "sweep.yaml:5: tracking.uri: required nothing; found an address; remove it"
    )
    assert "canary" not in faults["tracking.uri"]
    spec = parse_submitted(text.replace("uri: 'https://u:canary@elsewhere'", "uri: null"), "sweep.yaml", NOWHERE).spec
    assert (spec.tracking.uri, spec.tracking.experiment) == (None, "mine")


def test_a_revision_is_refused_for_a_directory_has_none(places: Places) -> None:
    text = _text(_task().replace("type: causal_lm", "type: causal_lm, revision: main"))
    assert "required nothing; found 'main'; remove it" in _faults(text, places)["task.revision"]


def test_every_fault_is_told_at_once_with_its_line(places: Places) -> None:
    text = """\
name: "-"
task:
  type: causal_lm
  model: ../x
  revision: main
  data:
    train: /etc/passwd
    eval: "%2e%2e"
    colums: {}
lora: {target_modules: []}
parameters: {rank: 2, lr: 1e-3}
tracking: {uri: http://elsewhere}
"""
    with pytest.raises(SpecError, match="required") as refused:
        parse_submitted(text, "sweep.yaml", places)
    assert [(fault.line, fault.path) for fault in refused.value.faults] == [
        (1, "name"),
        (4, "task.model"),
        (5, "task.revision"),
        (7, "task.data.train"),
        (8, "task.data.eval"),
        (9, "task.data.colums"),
        (10, "lora.target_modules"),
        (12, "tracking.uri"),
    ]


@pytest.mark.parametrize(
    "text", ["", "x", "[]", "task: 3\ntracking: []\n", "task: {type: [python]}\ntracking: {uri: {}}\n"]
)
def test_what_is_no_spec_at_all_is_refused_as_such(text: str) -> None:
    with pytest.raises(SpecError, match="required"):
        parse_submitted(text, "sweep.yaml", NOWHERE)


# -- pickles -----------------------------------------------------------------------------------------------------------


class _Canary:
    """Makes a file as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Where the canary would be; that it really would be is made sure of."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(_Canary(path)))
    path.unlink()
    return path


PICKLES = ("pytorch_model.bin", "model.pt", "model.pkl", "model.ckpt", "model.pth", "adapter_model.bin")


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_offered_as_a_checkpoint_is_refused_and_not_read(
    name: str, form: str, places: Places, tmp_path: Path, canary: Path
) -> None:
    directory = _pretend_model(tmp_path / "models" / "pickled")
    (directory / "model.safetensors").unlink()
    if form == "torch":
        torch.save(_Canary(canary), directory / name)
    else:
        (directory / name).write_bytes(pickle.dumps(_Canary(canary)))
    fault = _faults(_text(_task("pickled")), places)["task.model"]
    assert f"required a model with its weights as safetensors; found {name} in pickled" in fault
    assert not canary.exists()


def test_a_model_without_weights_is_refused(places: Places, tmp_path: Path) -> None:
    (tmp_path / "models" / "gpt2" / "model.safetensors").unlink()
    assert "found no weights in gpt2" in _faults(_text(_task("gpt2")), places)["task.model"]


def test_a_model_with_an_adapter_in_it_is_refused(places: Places, tmp_path: Path) -> None:
    (tmp_path / "models" / "gpt2" / "adapter_config.json").write_text("{}")
    assert "required a model without an adapter" in _faults(_text(_task("gpt2")), places)["task.model"]


def _section(model: Path) -> CausalLmTask:
    return CausalLmTask.model_validate({"type": "causal_lm", "model": str(model), "data": {"train": "x.jsonl"}})


def _load(model: Path) -> Any:
    return pretrained.load_model(_section(model), pretrained.CAUSAL_LM, dtype=torch.float32)


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_the_loader_reads_no_pickle_either(form: str, tmp_path: Path, canary: Path) -> None:
    model = make_model(tmp_path / "model")
    (model / "model.safetensors").rename(tmp_path / "model.safetensors")
    for name in PICKLES:
        if form == "torch":
            torch.save(_Canary(canary), model / name)
        else:
            (model / name).write_bytes(pickle.dumps(_Canary(canary)))
    with pytest.raises(TaskError, match="weights in safetensors"):
        _load(model)
    with pytest.raises(TaskError, match=r"no model\.safetensors"):
        pretrained.check_weights(_section(model), pretrained.CAUSAL_LM)
    (tmp_path / "model.safetensors").rename(model / "model.safetensors")
    assert isinstance(_load(model), transformers.LlamaForCausalLM)  # with the pickles beside its weights
    assert not canary.exists()


# -- messages ----------------------------------------------------------------------------------------------------------


def test_messages_show_ids_in_place_of_paths(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "models").symlink_to("real")
    places = Places(tmp_path / "models", tmp_path / "models" / "data")
    said = f"no config.json in {tmp_path}/models/team/x, '{tmp_path}/real/y', {tmp_path}/models/data/z"
    other = f"; /x{tmp_path}/real/y, {tmp_path}/realm/y"
    assert with_ids(said + other, places) == f"no config.json in team/x, 'y', z{other}"
    assert with_ids(said, NOWHERE) == said
    assert with_ids("/a/b", Places(Path("/"), None)) == "/a/b"


def test_what_a_loader_says_of_a_submitted_model_is_shown_with_its_id(places: Places, tmp_path: Path) -> None:
    task = parse_submitted(_text(_task()), "sweep.yaml", places).spec.task
    assert isinstance(task, CausalLmTask)
    with pytest.raises(TaskError, match="team/llama") as refused:
        pretrained.load_config(task, pretrained.CAUSAL_LM)
    shown = with_ids(str(refused.value), places)
    assert "team/llama" in shown
    assert str(tmp_path) not in shown


# -- whatever is written -----------------------------------------------------------------------------------------------

_THERE = ("a", "b", "_", "in", "out", "up", "loop", "far", "dot", "x" * 255, "\\", "%2e%2e")
_NASTY = (
    "..",
    ".",
    "...",
    "",
    "~",
    "/",
    "%2f",
    "\0",
    " ",
    "\n",
    "a b",
    "\u2215",
    "\uff0e\uff0e",
    "-",
    "$HOME",
    "http:",
)
_PARTS = st.sampled_from((*_THERE, *_NASTY))
_NAMES = st.one_of(
    st.lists(_PARTS, min_size=1, max_size=6).map("/".join),
    st.lists(_PARTS, min_size=1, max_size=6).map("".join),
    st.text(alphabet="./\\~%2eaAf\0\n -_:", max_size=24),
    st.text(max_size=24),
)


@pytest.fixture(scope="module")
def maze(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A root with links within it, out of it, up from it, to nothing and to themselves."""
    top = tmp_path_factory.mktemp("maze")
    root = top / "root"
    for directory in ("a/a", "a/b", "b", "_"):
        _pretend_model(root / directory)
    for directory in ("a", "rootless"):
        _pretend_model(top / directory)
    for name, target in {
        "in": "a",
        "out": str(top / "a"),
        "up": "..",
        "loop": "loop",
        "far": "/",
        "dot": ".",
        "x" * 255: "../rootless",
        "a/in": "../b",
        "a/out": "../../a",
        "a/up": "../..",
        "b/up": str(root),
        "_/far": "../a/b",
    }.items():
        (root / name).symlink_to(target)
    (root / "\\").mkdir()
    (root / "%2e%2e").symlink_to("..")
    return Places(root, root)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=_NAMES)
@example(name="out")
@example(name="up/a")
@example(name="far/etc")
@example(name="%2e%2e/a")
@example(name="_/far/../../../a")
def test_whatever_passes_lies_under_the_root(name: str, maze: Places) -> None:
    assert maze.models is not None
    root = os.path.realpath(maze.models)
    for place in (_located(_task(name, "_"), maze), _located(_task("_", name), maze)):
        if place is not None:
            assert place == os.path.realpath(os.path.join(root, name))
            assert os.path.commonpath([root, place]) == root != place


@pytest.mark.parametrize("name", ["_", "_/far", "a/a"])
def test_some_names_in_the_maze_do_pass(name: str, maze: Places) -> None:
    assert _located(_task(name, "_"), maze) is not None
    assert _located(_task("_", name), maze) is not None


def _located(task: str, maze: Places) -> str | None:
    """Where the model or the data is, whichever is not `_`; None where it is refused."""
    try:
        section = parse_submitted(_text(task), "sweep.yaml", maze).spec.task
    except SpecError:
        return None
    assert isinstance(section, CausalLmTask)
    return section.data.train if section.model.endswith("/_") else section.model
