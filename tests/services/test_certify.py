"""`lora-sweeps certify` as a user meets it: results on stdout, words on stderr, exit codes, and files."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sweeps.certificates import CertificateFile
from tests.support import ROOT, Here, start_cli

SPEC = """\
name: small
task: {type: digits}
lora: {target_modules: [fc1]}
parameters:
  rank: {values: [2, 4]}
  lr: {min: 1e-3, max: 1e-1}
  init_scale: {min: 0.25, max: 4}
  alpha: {values: [4, 16, 40]}
train: {optimizer: adamw, steps: 40, batch_size: 16}
search: {trials: 3}
certify: {steps: 5}
"""
ONE = "rank=4,alpha=16,lr=0.01,init_scale=1"
TWIN = "rank=4,alpha=64,lr=0.005,init_scale=0.5"
FALSE = "rank=4,alpha=64,lr=0.0025,init_scale=0.5"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture
def cli(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch, here: Here) -> Here:
    """Runs `lora-sweeps` where there is a small spec."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_SWEEPS_HOME", str(state))
    Path("small.yaml").write_text(SPEC)
    return here


def spec_with(old: str, new: str) -> str:
    assert old in SPEC
    Path("changed.yaml").write_text(SPEC.replace(old, new))
    return "changed.yaml"


# -- what holds --------------------------------------------------------------------------------------------------------


def test_all_classes_are_certified_and_the_json_promises_its_fields(cli: Here):
    done = cli("certify", "small.yaml", "--classes", "all", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["holds"] is True
    assert found["steps"] == 5
    assert found["verdicts"] == {"bit-identical": 3, "identical up to rounding": 3}
    assert len(found["classes"]) == 3
    for each in found["classes"]:
        representative, *twins = each["members"]
        assert representative["representative"]
        assert [twin["alpha"] for twin in twins] == [4.0, 40.0]
        assert [twin["verdict"] for twin in twins] == ["bit-identical", "identical up to rounding"]
        for member in each["members"]:
            named = {"alpha", "lr", "init_scale", "verdict", "first_difference", "max_deviation", "envelope"}
            assert named <= set(member)
        exact, rounded = twins
        assert exact["lr"] == 2 * representative["lr"]
        assert (exact["first_difference"], exact["max_deviation"]) == (None, 0.0)
        assert rounded["first_difference"] >= 1
        assert rounded["max_deviation"] > 0
        assert rounded["envelope"] > 0
    assert "training 3 classes, 6 twins, 5 steps each" in done.err


def test_the_file_fits_the_schema_that_the_command_prints_and_checks_out(cli: Here):
    made = cli("certify", "small.yaml", "--classes", "1", "--steps", "3", "--output", "deep/down/c.json")
    assert made.code == 0
    assert "certificate   deep/down/c.json" in made.out
    schema = json.loads(cli("schema", "certificate").out)
    jsonschema.validate(json.loads(Path("deep/down/c.json").read_text()), schema, cls=jsonschema.Draft202012Validator)
    checked = cli("certify", "--check", "deep/down/c.json")
    assert checked.code == 0
    assert "still holds; every loss and update norm is the recorded one, to the last bit" in checked.out
    again = cli("certify", "--check", "deep/down/c.json", "--json").json
    assert (again["holds"], again["held"], again["reproduced"], again["changes"]) == (True, True, True, [])


def test_a_certificate_goes_to_the_state_directory_unless_it_is_told_where(cli: Here, state: Path):
    path = Path(cli("certify", "small.yaml", "--configuration", ONE, "--json").json["certificate"])
    assert path.parent == state / "certificates"
    assert path.name == f"small-{CertificateFile.read(path).sha256[:8]}.json"
    assert [each.name for each in Path().iterdir()] == ["small.yaml"]


def test_configurations_are_certified_by_name_each_once(cli: Here):
    other = "rank=2,alpha=4,lr=0.02,init_scale=2"
    done = cli(
        "certify", "small.yaml", *(part for each in (ONE, other, ONE) for part in ("--configuration", each)), "--json"
    )
    members = [each["members"][0] for each in done.json["classes"]]
    assert [(member["rank"], member["alpha"]) for member in members] == [(4, 16.0), (2, 4.0)]


def test_a_class_that_diverges_is_strict_json_too(cli: Here):
    spec = spec_with("adamw", "sgd")
    done = cli("certify", spec, "--configuration", ONE.replace("0.01", "1e6"), "--output", "wild.json", "--json")
    assert done.code == 0
    assert {member["verdict"] for member in done.json["classes"][0]["members"]} <= {
        "bit-identical",
        "identical up to rounding",
    }
    assert cli("certify", "--check", "wild.json").code == 0


def test_words_tell_members_of_one_alpha_apart(cli: Here):
    done = cli("certify", "small.yaml", "--configuration", ONE, "--twin", TWIN, "--twin", FALSE)
    assert done.code == 1
    assert (
        "bit-identical at alpha 64 (lr 0.005, init_scale 0.5); different at alpha 64 (lr 0.0025, init_scale 0.5)"
        in done.out
    )


# -- what does not hold ------------------------------------------------------------------------------------------------


def test_a_true_claim_exits_0_and_a_false_one_1_with_its_cause(cli: Here):
    true = cli("certify", "small.yaml", "--configuration", ONE, "--twin", TWIN)
    assert true.code == 0
    assert "bit-identical at alpha 64" in true.out
    false = cli("certify", "small.yaml", "--configuration", ONE, "--twin", FALSE, "--output", "false.json", "--json")
    assert false.code == 1
    (found,) = false.json["classes"]
    assert not found["holds"]
    assert found["members"][1]["verdict"] == "different"
    assert found["members"][1]["cause"].startswith("The cause is lr off: ")
    assert found["members"][1]["first_outside"] == 1
    checked = cli("certify", "--check", "false.json")
    assert checked.code == 1
    assert "does not hold, as when it was written" in checked.out
    assert cli("certify", "--check", "false.json", "--json").json["held"] is False


def test_a_certificate_that_a_changed_law_breaks_no_longer_holds(cli: Here, monkeypatch: pytest.MonkeyPatch):
    assert cli("certify", "small.yaml", "--configuration", ONE, "--output", "c.json").code == 0
    monkeypatch.setattr("sweeps.reduction.regauge", lambda point, gauge, law: point)
    broken = cli("certify", "--check", "c.json")
    assert broken.code == 1
    assert "no longer holds" in broken.out


# -- wrong requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "either a SPEC or --check FILE"),
        (("small.yaml", "--check", "c.json"), "either a SPEC or --check FILE"),
        (("--check", "c.json", "--steps", "3"), "takes --json only"),
        (("--check", "c.json", "--classes", "all"), "takes --json only"),
        (("nosuch.yaml",), "found no such file"),
        (("small.yaml", "--classes", "0"), "--classes must be all or a number from 1 to 999,999,999; found '0'"),
        (("small.yaml", "--classes", "-1"), "found '-1'"),
        (("small.yaml", "--classes", "1.5"), "found '1.5'"),
        (("small.yaml", "--classes", "٣"), "found '٣'"),
        (("small.yaml", "--classes", "9" * 5000), "--classes must be all or a number"),
        (("small.yaml", "--classes", "1000000"), "at most 10,000 classes can be certified at once; found 1,000,000"),
        (("small.yaml", "--steps", "0"), "0 is not in the range"),
        (("small.yaml", "--steps", "41"), "at most train.steps, which is 40; found 41"),
        (("small.yaml", "--twin", ONE), "--twin goes with one --configuration"),
        (("small.yaml", "--configuration", ONE, "--classes", "2"), "give one of them"),
        (("small.yaml", "--configuration", "rank=65,alpha=16,lr=0.01,init_scale=1"), "rank must be at most 64"),
        (("small.yaml", "--configuration", "rnk=4"), "found 'rnk=4'"),
        (("small.yaml", "--configuration", ONE, "--twin", TWIN.replace("rank=4", "rank=2")), "twins have one rank"),
        (
            ("small.yaml", "--configuration", ONE, "--output", "small.yaml"),
            "something else than a certificate is there",
        ),
        (("small.yaml", "--configuration", ONE, "--output", "."), "it is a directory"),
        (("small.yaml", "--configuration", ONE, "--output", "small.yaml/c.json"), "is no directory"),
        (("--check", "nosuch.json"), "found: No such file"),
        (("--check", "small.yaml"), "found Invalid JSON"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value)[:60],
)
def test_a_wrong_request_is_refused_in_words(cli: Here, state: Path, arguments: tuple[str, ...], words: str):
    done = cli("certify", *arguments)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert "training" not in done.err
    assert done.out == ""
    assert Path("small.yaml").read_text() == SPEC


def test_constants_that_do_not_travel_have_no_twins(cli: Here):
    done = cli("certify", spec_with("train:", "reduction: {constants: fixed}\ntrain:"))
    assert done.code == 2
    assert (
        "constants: fixed holds eps where another alpha would need another value; write constants: travel" in done.err
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["spec"]["lora"].update(target_modules=["fc9"]), "required names of linear layers"),
        (lambda d: d["certificates"][0]["representative"].update(rank=1000), "rank must be at most 64"),
        (lambda d: d["certificates"][0]["representative"].update(lr=-1.0), "must be between 1e-30 and 1e+30"),
        (lambda d: d["spec"].update(novelty={}), "check it with the version that wrote it"),
    ],
    ids=["target", "rank", "lr", "spec"],
)
def test_a_forged_certificate_that_cannot_be_trained_is_refused(
    cli: Here, change: Callable[[dict[str, Any]], None], words: str
):
    from sweeps.certificates import _sha256_of_json

    assert cli("certify", "small.yaml", "--configuration", ONE, "--steps", "1", "--output", "c.json").code == 0
    document = json.loads(Path("c.json").read_text())
    change(document)
    document["spec_sha256"] = _sha256_of_json(document["spec"])
    document["sha256"] = _sha256_of_json({name: value for name, value in document.items() if name != "sha256"})
    Path("c.json").write_text(json.dumps(document))
    done = cli("certify", "--check", "c.json")
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err


# -- files, and what interrupts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_verdicts_are_printed_though_the_disk_is_full(cli: Here, monkeypatch: pytest.MonkeyPatch, as_json: bool):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sweeps.certificates.write_atomically", full)
    done = cli("certify", "small.yaml", "--configuration", ONE, *(["--json"] if as_json else []))
    assert done.code == 2
    assert "No space left on device" in done.err
    assert done.json["certificate"] is None if as_json else "bit-identical at alpha 4" in done.out


def test_a_certificate_is_replaced_by_the_next(cli: Here):
    for seed in (0, 1):
        assert (
            cli("certify", spec_with("batch_size: 16", f"batch_size: 16, seed: {seed}"), "--output", "c.json").code == 0
        )
        assert CertificateFile.read(Path("c.json")).spec["train"]["seed"] == seed


def test_ctrl_c_exits_130_and_leaves_no_file(tmp_path: Path):
    (tmp_path / "long.yaml").write_text(
        SPEC.replace("steps: 40", "steps: 1000000").replace("steps: 5", "steps: 1000000")
    )
    process = start_cli("certify", "long.yaml", "--output", "c.json", cwd=tmp_path)
    assert process.stderr is not None
    assert "training 3 classes" in process.stderr.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped before all was trained, so there is no verdict" in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "c.json").exists()
    assert [path.name for path in tmp_path.glob(".*")] == [".lora-sweeps"]


def test_the_demo_has_twins_of_every_power_of_four(cli: Here):
    done = cli("certify", str(ROOT / "examples" / "digits.yaml"), "--classes", "4", "--steps", "5", "--json")
    assert done.code == 0
    twins = [member for each in done.json["classes"] for member in each["members"] if not member["representative"]]
    exact = {twin["alpha"] for twin in twins if twin["exact_in_binary"]}
    assert exact == {4.0, 64.0}
    assert {twin["verdict"] for twin in twins if twin["exact_in_binary"]} == {"bit-identical"}
    assert {twin["verdict"] for twin in twins if not twin["exact_in_binary"]} == {"identical up to rounding"}
