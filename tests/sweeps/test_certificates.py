"""The certificate as a file: strict JSON of a schema, told from altered ones, and checked by training again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from lora_core import __version__
from sweeps import preflight
from sweeps.certificates import (
    CertificateFile,
    check,
    check_place,
    document_of,
    json_schema,
    sha256_of_tensors,
    spec_of,
)
from sweeps.class_choice import name_class
from sweeps.errors import InputError, SpecError
from sweeps.reduction import Reduction
from sweeps.tasks import load_task
from sweeps.tasks.digits import DigitsTask
from tests.sweeps.support import SWEPT, make_spec

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6
PARAMETERS = f"{SWEPT}, alpha: {{values: [4, 16, 40]}}"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> DigitsTask:
    task = load_task(make_spec(PARAMETERS), cache=tmp_path_factory.mktemp("cache"), device=torch.device("cpu"))
    assert isinstance(task, DigitsTask)
    return task


def nothing(done: int, of: int) -> None:
    """Hears progress."""


def made(task: DigitsTask, *, lr: float = 0.01, optimizer: str = "adamw") -> CertificateFile:
    spec = make_spec(PARAMETERS, train=f"optimizer: {optimizer}")
    classes = [name_class(Reduction.of(spec), f"rank={rank},alpha=16,lr={lr},init_scale=1") for rank in (4, 2)]
    return CertificateFile.make(spec, task, classes, steps=STEPS, pack=2, told=nothing)


@pytest.fixture(scope="module")
def file(task: DigitsTask) -> CertificateFile:
    return made(task)


@pytest.fixture(scope="module")
def diverging(task: DigitsTask) -> CertificateFile:
    return made(task, lr=1e6, optimizer="sgd")


def strict(text: str) -> Any:
    """JSON, and nothing beside it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def sealed(document: dict[str, Any]) -> str:
    """A document with the SHA-256 of what it says now, as a forger would write it."""
    rest = {name: value for name, value in document.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps({**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def written(file: CertificateFile, directory: Path) -> Path:
    path = directory / "certificate.json"
    file.write(path)
    return path


# -- written and read --------------------------------------------------------------------------------------------------


def test_a_certificate_says_what_was_run(file: CertificateFile, task: DigitsTask):
    assert file.holds
    assert file.environment.lora_sweeps == __version__
    assert file.environment.torch == torch.__version__
    assert file.environment.device.startswith("cpu (")
    assert file.environment.dtype == "float32"
    assert file.environment.threads == 1
    assert file.spec["train"]["seed"] == 0
    assert file.law.optimizer == "adamw"
    assert file.law.powers == {"lr": -1, "init_scale": -1, "clip_norm": 1, "weight_decay": 1, "eps": 1}
    assert "lr / sqrt(k)" in file.law.statement
    assert file.model_sha256 == sha256_of_tensors(task.model.state_dict())
    assert file.data_sha256 == sha256_of_tensors(task.data)
    for certificate in file.certificates:
        assert [twin.verdict for twin in certificate.twins] == ["bit-identical", "identical up to rounding"]
        for twin in certificate.twins:
            assert len(twin.deviations) == len(twin.envelopes) == len(twin.losses) == STEPS


@pytest.mark.parametrize("which", ["file", "diverging"])
def test_the_file_is_strict_json_that_fits_its_schema_and_reads_back(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
):
    file: CertificateFile = request.getfixturevalue(which)
    path = written(file, tmp_path)
    document = strict(path.read_text())
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema, cls=jsonschema.Draft202012Validator)
    assert repr(CertificateFile.read(path)) == repr(file)  # not-a-numbers are equal in words only
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_the_schema_refuses_what_is_no_certificate(file: CertificateFile, tmp_path: Path):
    document = strict(written(file, tmp_path).read_text())
    for broken in (
        {**document, "version": 2},
        {**document, "more": 1},
        {**document, "pack": 0},
        {**document, "certificates": [{**document["certificates"][0], "losses": ["much"]}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, json_schema(), cls=jsonschema.Draft202012Validator)


def test_numbers_that_json_has_not_are_words(diverging: CertificateFile, tmp_path: Path):
    text = written(diverging, tmp_path).read_text()
    assert '"Infinity"' in text or '"NaN"' in text
    assert diverging.holds
    assert {twin.verdict for each in diverging.certificates for twin in each.twins} <= {
        "bit-identical",
        "identical up to rounding",
    }


def test_a_certificate_from_before_a_key_was_there_is_no_altered_one(file: CertificateFile, tmp_path: Path):
    file.write(tmp_path / "new.json")
    document = json.loads((tmp_path / "new.json").read_text())
    configurations = 0
    for certificate in document["certificates"]:
        for run in (certificate["representative"], *(twin["configuration"] for twin in certificate["twins"])):
            assert run.pop("head_lr") == 0.0
            configurations += 1
    assert configurations > 1
    (tmp_path / "old.json").write_text(sealed(document))
    old = CertificateFile.read(tmp_path / "old.json")
    assert old.certificates == file.certificates


def test_the_sha256_is_that_of_all_the_rest(file: CertificateFile, diverging: CertificateFile, tmp_path: Path):
    for each in (file, diverging):
        document = json.loads(written(each, tmp_path).read_text())
        assert json.loads(sealed(document))["sha256"] == document["sha256"] == each.sha256


def test_the_same_made_twice_differs_in_its_date_and_hash_only(file: CertificateFile, task: DigitsTask):
    again = made(task)
    left, right = (each.model_dump(exclude={"made", "sha256"}) for each in (file, again))
    assert left == right


def test_another_layout_of_the_file_is_the_same_certificate(file: CertificateFile, tmp_path: Path):
    path = written(file, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4, sort_keys=True))
    assert CertificateFile.read(path) == file


# -- what is none ------------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    for path, found in (
        (tmp_path / "no", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "a" / "b", "No such"),
    ):
        with pytest.raises(
            InputError, match=f"required a certificate that `lora-sweeps certify` wrote; found: {found}"
        ):
            CertificateFile.read(path)


def test_an_endless_file_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sweeps.certificates._MOST_BYTES", 1000)
    with pytest.raises(InputError, match="found more than 1,000 bytes"):
        CertificateFile.read(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "found Invalid JSON: EOF"),
        (b"name: digits", "found Invalid JSON"),
        (b"\xff\xfe", "found Invalid JSON"),
        (b"[" * 100_000, "found Invalid JSON: recursion limit"),
        (b"[]", "found Input should be an object"),
        (b"{}", "found made: Field required and 10 more"),
        (b'{"format": "lora-sweeps report"}', "found format: Input should be 'lora-sweeps certificate'"),
    ],
    ids=range(7),
)
def test_what_is_no_certificate_is_refused(raw: bytes, words: str, tmp_path: Path):
    path = tmp_path / "other.json"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=words):
        CertificateFile.read(path)


def test_a_truncated_certificate_is_refused(file: CertificateFile, tmp_path: Path):
    path = written(file, tmp_path)
    raw = path.read_bytes()
    for share in (0.1, 0.5, 0.999):
        path.write_bytes(raw[: int(len(raw) * share)])
        with pytest.raises(InputError, match="found Invalid JSON: EOF"):
            CertificateFile.read(path)


def a_loss(document: dict[str, Any]) -> None:
    document["certificates"][0]["losses"][0] *= 1 + 2**-51


def a_twin(document: dict[str, Any]) -> None:
    document["certificates"][0]["twins"][0]["configuration"]["lr"] *= 2


def a_number_of_the_spec(document: dict[str, Any]) -> None:
    document["spec"]["train"]["seed"] += 1


def its_date(document: dict[str, Any]) -> None:
    document["made"] = "2020-01-01T00:00:00+00:00"


@pytest.mark.parametrize("alter", [a_loss, a_twin, a_number_of_the_spec, its_date])
def test_an_altered_certificate_is_refused(
    file: CertificateFile, alter: Callable[[dict[str, Any]], None], tmp_path: Path
):
    path = written(file, tmp_path)
    document = json.loads(path.read_text())
    alter(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"altered since \(its SHA-256 differs\)|spec_sha256 must be that of its spec"):
        CertificateFile.read(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(version=2), f"found version 2, which lora-sweeps {__version__} does not know"),
        (lambda d: d.update(pack=0), "found pack: Input should be greater than or equal to 1"),
        (lambda d: d.update(certificates=[]), "found certificates: .* at least 1 item"),
        (lambda d: d["certificates"][0].update(twins=[]), "found every class must have a twin"),
        (lambda d: d["certificates"][0].update(steps=7), "the steps of every class must be the same number"),
        (lambda d: [each.update(steps=0) for each in d["certificates"]], "must be the same number of at least 1"),
        (lambda d: d.update(holds=False), "it must hold if every class in it does, and only then"),
        (lambda d: d.update(spec_sha256="0"), "spec_sha256 must be that of its spec"),
        (lambda d: d.update(more=1), "found more: Extra inputs are not permitted"),
    ],
    ids=range(9),
)
def test_a_forged_certificate_that_cannot_be_is_refused(
    file: CertificateFile, change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
):
    path = written(file, tmp_path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(sealed(document))
    with pytest.raises(InputError, match=words):
        CertificateFile.read(path)


def test_a_spec_of_another_version_is_refused(file: CertificateFile):
    later = file.model_copy(update={"spec": {**file.spec, "novelty": {}}})
    with pytest.raises(
        InputError, match=r"understands was required; found .* unknown key 'novelty'.*version that wrote it"
    ):
        spec_of(later)


def test_a_spec_that_does_not_fit_its_model_is_refused_in_words(
    file: CertificateFile, task: DigitsTask, tmp_path: Path
):
    forged = file.model_copy(update={"spec": {**file.spec, "lora": {**file.spec["lora"], "target_modules": ["fc9"]}}})
    document = document_of(forged, "forged.json")
    with pytest.raises(SpecError, match=r"forged\.json.*lora\.target_modules: required .*; found fc9"):
        preflight.preflight(document, Reduction.of(document.spec), tmp_path)


# -- where it goes -----------------------------------------------------------------------------------------------------


def test_missing_directories_are_made(file: CertificateFile, tmp_path: Path):
    path = tmp_path / "a" / "b" / "c.json"
    check_place(path)
    assert list(tmp_path.iterdir()) == []
    file.write(path)
    assert CertificateFile.read(path) == file


def test_a_certificate_replaces_a_certificate_and_nothing_else(file: CertificateFile, tmp_path: Path):
    check_place(written(file, tmp_path))
    other = tmp_path / "spec.yaml"
    other.write_text("name: precious")
    for path in (other, Path("/dev/null")):
        with pytest.raises(InputError, match="something else than a certificate is there, and would be lost"):
            check_place(path)


def test_a_path_that_cannot_be_written_is_refused(
    file: CertificateFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(InputError, match="it is a directory; name another"):
        check_place(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file is no directory; name another"):
        check_place(tmp_path / "file" / "c.json")
    with pytest.raises(InputError, match="File name too long"):
        check_place(tmp_path / ("x" * 300))
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match="no permission to write in "):
        check_place(tmp_path / "c.json")


def test_a_write_that_fails_leaves_nothing_half_written(
    file: CertificateFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = written(file, tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        file.write(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


# -- checked -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["file", "diverging"])
def test_a_certificate_checks_out_to_the_last_bit(
    which: str, request: pytest.FixtureRequest, task: DigitsTask, tmp_path: Path
):
    file = CertificateFile.read(written(request.getfixturevalue(which), tmp_path))
    found = check(file, task, nothing)
    assert found.holds
    assert found.reproduced
    assert found.changes == ()


def test_a_check_says_what_has_changed(file: CertificateFile, task: DigitsTask):
    older = file.environment.model_copy(update={"torch": "2.0.0", "lora_sweeps": "0.0.1"})
    found = check(file.model_copy(update={"environment": older, "model_sha256": "0" * 64}), task, nothing)
    assert found.holds
    assert found.changes[0] == f"lora-sweeps: 0.0.1 then, {__version__} now"
    assert found.changes[1] == f"torch: 2.0.0 then, {torch.__version__} now"
    assert found.changes[2].startswith("model: 000000000000 then, ")


def test_a_check_takes_no_statement_on_trust(file: CertificateFile, task: DigitsTask):
    first, *rest = file.certificates
    verdict = first.twins[0].model_copy(update={"verdict": "different"})
    lie = first.model_copy(update={"class_id": "c-lie", "twins": (verdict, *first.twins[1:])})
    law = file.law.model_copy(update={"statement": "moon"})
    forged = file.model_copy(update={"certificates": (lie, *rest), "law": law, "threshold": 1e9})
    said = check(forged, task, nothing).changes
    assert [each.partition(":")[0] for each in said] == [
        "law",
        "threshold",
        "name of class 1",
        "verdict on twin 1 of class 1",
    ]
    assert said[0].startswith("law: moon then, adamw: the same training run")
    assert said[3] == f"verdict on twin 1 of class 1: different then, {first.twins[0].verdict} now"


def test_a_check_trains_no_larger_packs_than_fit(file: CertificateFile, task: DigitsTask):
    found = check(file, task, nothing, most_members=1)
    assert found.rerun.pack == 1
    assert found.holds


def test_a_loss_that_was_never_trained_is_not_reproduced(file: CertificateFile, task: DigitsTask):
    first, *rest = file.certificates
    forged = first.model_copy(update={"losses": (first.losses[0] + 1, *first.losses[1:])})
    found = check(file.model_copy(update={"certificates": (forged, *rest)}), task, nothing)
    assert found.holds
    assert not found.reproduced


def test_a_certificate_of_what_is_no_law_no_longer_holds(
    file: CertificateFile, task: DigitsTask, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sweeps.reduction.regauge", lambda point, gauge, law: point)
    found = check(file, task, nothing)
    assert file.holds
    assert not found.holds
    assert not found.reproduced


# -- hashes ------------------------------------------------------------------------------------------------------------


def test_a_hash_of_tensors_knows_names_shapes_formats_and_values():
    base = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    others = [
        {"c": base["a"], "b": base["b"]},
        {**base, "a": base["a"].view(2, 3)},
        {**base, "a": base["a"].double()},
        {**base, "a": base["a"] + 1e-6},
        {"a": base["a"]},
    ]
    hashes = {sha256_of_tensors(each) for each in (base, *others)}
    assert len(hashes) == 6
    assert sha256_of_tensors(dict(reversed(base.items()))) == sha256_of_tensors(base)
    columns = torch.arange(6.0).view(2, 3).T
    assert sha256_of_tensors({"a": columns}) == sha256_of_tensors({"a": columns.contiguous()})
    assert sha256_of_tensors({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.empty(0)})
