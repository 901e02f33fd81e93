"""What of `run --address http://HEAD:8265` needs no cluster: what is sent, a job's log, where a job keeps things."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from services import ray_client
from services.job_driver import drive_job
from services.job_files import check_alone, check_directory
from services.job_log import AS_JSON, BEGIN, JobLog
from services.job_place import check_has_files, check_lasts, kept_upload
from services.remote_run import Remote, Submitted, print_outcome, tracking_sent
from sweeps.errors import ClusterError, InputError, SpecError, StateError
from sweeps.home import Home
from sweeps.spec import SpecDocument, load_spec
from tests.services.ray_support import TINY, ray_setting
from tests.sweeps.support import make_created


def document_in(directory: Path, text: str) -> SpecDocument:
    path = directory / "spec.yaml"
    path.write_text(text)
    return load_spec(path)


@pytest.mark.parametrize("uri", ["http://[bad", "https://me:canary@[bad"])
def test_an_address_of_mlflow_that_is_none_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI must be .*\[bad") as caught:
        tracking_sent()
    assert "canary" not in str(caught.value)


def test_a_spec_that_names_what_lies_here_is_not_sent_alone(tmp_path: Path):
    (tmp_path / "my_task.py").touch()
    (tmp_path / "train.jsonl").touch()
    own = TINY.replace("{type: digits}", "{type: python, entrypoint: 'my_task:make'}")
    document = document_in(tmp_path, own)
    with pytest.raises(SpecError, match=r"spec\.yaml:2: task\.entrypoint: .*found my_task\.py, .*--working-dir DIR"):
        check_alone(document, tmp_path / "spec.yaml")
    text = TINY.replace("{type: digits}", "{type: causal_lm, model: gpt2, data: {train: train.jsonl}}")
    with pytest.raises(SpecError, match=r"spec\.yaml:2: task\.data\.train: .*found train\.jsonl"):
        check_alone(document_in(tmp_path, text), tmp_path / "spec.yaml")
    check_alone(document_in(tmp_path, text.replace("train.jsonl", "elsewhere.jsonl")), tmp_path / "spec.yaml")


def test_a_directory_is_sent_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_task.py").touch()
    document = document_in(tmp_path, TINY.replace("{type: digits}", "{type: python, entrypoint: 'my_task:make'}"))
    spec = tmp_path / "spec.yaml"
    monkeypatch.setenv("LORA_SWEEPS_HOME", str(tmp_path / "state"))
    assert "/state" in check_directory(document, spec, tmp_path)
    with pytest.raises(InputError, match=r"must be a directory; .* is none"):
        check_directory(document, spec, tmp_path / "absent")
    (tmp_path / "inner").mkdir()
    with pytest.raises(InputError, match="must be a directory that has the spec in it"):
        check_directory(document, spec, tmp_path / "inner")
    (tmp_path / ".gitignore").write_text("my_task.py\n")
    with pytest.raises(SpecError, match=r"task\.entrypoint: .*found my_task\.py, which a \.gitignore or \.rayignore"):
        check_directory(document, spec, tmp_path)
    (tmp_path / ".gitignore").write_text("*.yaml\n")
    with pytest.raises(InputError, match="must send the spec"):
        check_directory(document, spec, tmp_path)
    (tmp_path / ".gitignore").unlink()
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(ray_client.MOST_SENT_BYTES)  # a hole: it takes no room
    with pytest.raises(InputError, match=r"must be 100 MiB or less, .* among them weights\.bin 100 MiB"):
        check_directory(document, spec, tmp_path)
    (tmp_path / ".rayignore").write_text("*.bin\n")
    check_directory(document, spec, tmp_path)


def test_no_secret_is_sent_whatever_leads_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for directory in (root, elsewhere / ".lora-sweeps", root / "a[b]*", root / "own"):
        directory.mkdir(parents=True)
        (directory / "ray-token").write_text("canary")
    (root / "ray-token").unlink()
    document, spec = document_in(root, TINY), root / "spec.yaml"

    def refused_for(match: str, **variables: str | Path) -> None:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, str(value))
            with pytest.raises(InputError, match=f"must send no tokens.*{match}.*out with a .rayignore"):
                check_directory(document, spec, root)

    monkeypatch.chdir(root)
    for state in ("a[b]*", "own"):
        monkeypatch.setenv("LORA_SWEEPS_HOME", state)
        sent = ray_client.files_sent(root, check_directory(document, spec, root))
        assert f"{state}/ray-token" not in sent
    monkeypatch.setenv("LORA_SWEEPS_HOME", str(tmp_path / "state"))
    check_directory(document, spec, root)

    refused_for("lies in the state directory", LORA_SWEEPS_HOME=".")
    for name in ("LORA_SWEEPS_DATABASE_FILE", "LORA_SWEEPS_TOKEN_FILE", "RAY_AUTH_TOKEN_PATH"):
        refused_for(f"own/ray-token is the file that {name} names", **{name: root / "own" / "ray-token"})
    config = root / "config" / "lora-sweeps"
    config.mkdir(parents=True)
    (config / "tokens").write_text("canary")
    refused_for("lora-sweeps/tokens holds tokens", XDG_CONFIG_HOME=root / "config")
    os.link(elsewhere / ".lora-sweeps" / "ray-token", root / "hard")
    refused_for("hard is the file that", RAY_AUTH_TOKEN_PATH=elsewhere / ".lora-sweeps" / "ray-token")
    (root / "hard").unlink()
    (root / "link").symlink_to(elsewhere / ".lora-sweeps")
    refused_for("leads to .*, in a state directory")
    refused_for("lies in the state directory", LORA_SWEEPS_HOME=elsewhere / ".lora-sweeps")
    monkeypatch.setenv("LORA_SWEEPS_HOME", "link")
    assert "link/ray-token" not in ray_client.files_sent(root, check_directory(document, spec, root))


def test_a_log_is_read_once_however_often_its_connection_begins_anew():
    outcome = {"sweep": "x"}
    text = f"one\nRunning entrypoint for job x: y\ntwo\n{BEGIN}\nsweep x\nbest 1\n{AS_JSON}{json.dumps(outcome)}\nlast"
    for cut in range(len(text)):
        shown: list[str] = []
        log = JobLog(shown.append)
        assert log.read(0, text[:cut]) == cut
        assert log.read(log.read(0, text[: cut // 2]), text[cut // 2 :]) == len(text)
        log.read(0, text)
        log.close()
        assert (shown, log.words, log.outcome) == (["one", "two", "last"], "sweep x\nbest 1", outcome)


def test_an_outcome_that_was_cut_off_is_none():
    log = JobLog(lambda line: None)
    log.read(0, f"{BEGIN}\nsweep x\n")
    log.close()
    assert log.words is None


def test_an_outcome_is_read_behind_what_another_writer_has_left_of_a_line():
    shown: list[str] = []
    log = JobLog(shown.append)
    log.read(0, f"one\n\npartial{BEGIN}\nsweep x\nhalf{AS_JSON}{json.dumps({'sweep': 'x'})}\nlast\n")
    log.close()
    assert (shown, log.words, log.outcome) == (["one", "", "partial", "half", "last"], "sweep x", {"sweep": "x"})


@pytest.mark.parametrize(
    ("text", "as_json", "out", "missed"),
    [
        (f'{AS_JSON}{{"sweep": "x"}}', True, '{\n  "sweep": "x"\n}\n', False),
        (f'{AS_JSON}{{"sweep": "x"}}', False, "", True),
        (f'{BEGIN}\nsweep x\n{AS_JSON}{{"sweep": "x"}}', False, "sweep x\n", False),
        (f"{BEGIN}\nsweep x\n", True, "", True),
    ],
)
def test_an_outcome_that_is_not_there_is_missed_aloud(
    text: str, as_json: bool, out: str, missed: bool, capsys: pytest.CaptureFixture[str]
):
    log = JobLog(lambda line: None)
    log.read(0, text)
    log.close()
    print_outcome(log, Submitted("x-1", "http://head:8265", "x"), as_json=as_json, expected=True)
    printed = capsys.readouterr()
    assert printed.out == out
    assert ("see `ray job logs --follow --address http://head:8265 x-1`" in printed.err) == missed


def test_the_port_of_ray_client_goes_without_saying():
    assert ray_client.client_server("ray://head") == ("head", 10001)
    assert ray_client.client_server("ray://head:10002") == ("head", 10002)
    assert ray_client.client_server("ray://[::1]") == ("::1", 10001)
    with ray_setting(), pytest.raises(ClusterError, match="names no host, as ray://HEAD:10001 does"):
        Remote("ray://:10001")


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a job, as Ray makes one; with a state directory and a ledger elsewhere."""
    package = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    package.mkdir(parents=True)
    monkeypatch.setenv("LORA_SWEEPS_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.chdir(package)
    return package


def test_mlflows_database_is_not_left_where_checkpoints_lie_elsewhere_either(
    unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LORA_SWEEPS_CHECKPOINTS", "s3://bucket/path")
    (unpacked / "-x.yaml").write_text(TINY + "tracking: {uri: 'sqlite:///mlflow.db'}\n")
    done = CliRunner().invoke(drive_job, ["--sweep", "x-1", "--at", "http://head:8265", "--", "-x.yaml"])
    assert isinstance(done.exception, StateError), done.output
    assert "tracking.uri is sqlite:///mlflow.db, which lies with the job's files" in str(done.exception)
    assert not (tmp_path / "state" / "uploads" / "x-1").exists()


@pytest.mark.parametrize("error", [ClusterError("away"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_files_of_a_sweep_that_never_was_are_not_kept(unpacked: Path, error: BaseException):
    home = Home.open()
    (unpacked / "some.txt").write_text("sent")
    with pytest.raises(type(error)), kept_upload(home, "x-1"):  # noqa: PT012
        assert Path.cwd() == home.path / "uploads" / "x-1"
        assert Path("some.txt").read_text() == "sent"
        raise error
    assert Path.cwd() == unpacked
    assert not (home.path / "uploads" / "x-1").exists()


def test_a_sweep_whose_files_went_with_a_cluster_is_not_resumed_without_them(
    unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LORA_SWEEPS_CHECKPOINTS", "s3://bucket/path")
    home = Home.open()
    (unpacked / "my_task.py").touch()
    own = TINY.replace("{type: digits}", "{type: python, entrypoint: 'my_task:make', path: .}")
    with kept_upload(home, "x-1"), home.ledger() as ledger:
        assert Path.cwd() == unpacked
        ledger.create("x-1", make_created(document_in(unpacked, own).spec))
    check_has_files(home, "x-1", trials=None)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "session")
    copy = re.escape(str(home.path / "uploads" / "x-1"))
    with pytest.raises(StateError, match=f"{unpacked} is gone .*; copy {copy}, .*, to {unpacked} on every node"):
        check_has_files(home, "x-1", trials=None)
    shutil.copytree(home.path / "uploads" / "x-1", unpacked)
    check_has_files(home, "x-1", trials=None)


def test_state_and_tracking_of_a_job_lie_where_they_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inside = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    inside.mkdir(parents=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(inside)
    with pytest.raises(StateError, match="the state directory must outlive the Ray job"):
        check_lasts(inside / ".lora-sweeps")
    for uri in ("sqlite:///mlflow.db", f"sqlite:///{inside}/mlflow.db"):
        with pytest.raises(StateError, match=r"MLflow's database must outlive .* tracking\.uri is sqlite"):
            check_lasts(tmp_path, uri)
    check_lasts(tmp_path, "http://127.0.0.1:5000")
    check_lasts(tmp_path)
    assert os.environ.pop("MLFLOW_TRACKING_URI") == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    check_lasts(tmp_path, "sqlite:///mlflow.db")
    assert "MLFLOW_TRACKING_URI" not in os.environ
