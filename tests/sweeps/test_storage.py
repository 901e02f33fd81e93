"""Places for checkpoints: whatever holds them, a checkpoint is there whole, found again, and waited for."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_core.checkpoint import CheckpointError, load_member, save_member
from sweeps import storage
from sweeps.errors import StorageError
from sweeps.ledger import Ledger
from sweeps.storage import RemoteFiles, below, configured_place, files_in, probe
from tests.s3_support import BUCKET, S3, s3_server
from tests.support import SMALL_SPEC, free_port, record_of, run_cli

PLACES = ("directory", "memory", "s3", "s3 with settings")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    match request.param:
        case "directory":
            return str(tmp_path / "checkpoints")
        case "memory":
            return f"memory://{tmp_path.name}"
        case _:
            s3: S3 = request.getfixturevalue("s3")
            settings = f"?endpoint_override={s3.url}&region=us-east-1" if request.param != "s3" else ""
            return f"s3://{BUCKET}/{tmp_path.name}{settings}"


def save(files: object, value: float) -> None:
    tensors = {"fc1.lora_A": torch.full((2, 3), value)}
    save_member(files, adapter=tensors, optimizer={"step": torch.ones(())}, step=10, extra={"trial": "7"})  # type: ignore[arg-type]


# -- every place alike -------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was_saved_and_the_later_one_counts(place: str):
    files = files_in(below(place, "sweep-1"), "trial-000007/step-00000010")
    for value in (1.0, 2.0):
        save(files, value)
        state = load_member(files)
        assert torch.equal(state.adapter["fc1.lora_A"], torch.full((2, 3), value))
        assert (state.step, state.extra) == (10, {"trial": "7"})


def test_of_a_replaced_checkpoint_nothing_is_left(place: str):
    files = files_in(place, "member")
    save(files, 1.0)
    first = json.loads(files.read("manifest.json"))["sha256"]
    save(files, 2.0)
    with pytest.raises(FileNotFoundError):
        files.read(f"{first}.safetensors")


def test_what_is_not_there_is_named(place: str):
    files = files_in(place, "nowhere")
    files.remove("nothing")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere.*: it has no manifest\.json"):
        load_member(files)


def test_a_checkpoint_that_was_altered_is_refused(place: str):
    files = files_in(place, "altered")
    save(files, 1.0)
    name = json.loads(files.read("manifest.json"))["sha256"] + ".safetensors"
    files.write(name, files.read(name)[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"must have .* bytes with SHA-256"):
        load_member(files)


def test_a_place_that_works_is_found_fit_and_left_as_it_was(place: str):
    probe(place)
    storage.leave_mark(place, "mark")
    storage.check_mark(place, "mark")
    storage.remove_mark(place, "mark")
    with pytest.raises(StorageError, match=r"what was written to .* elsewhere is not there"):
        storage.check_mark(place, "mark")


# -- places that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("checkpoints", "an absolute path or a URL such as s3://bucket/path; found 'checkpoints'"),
        ("s3://key:secret@bucket/path", r"no secret; found one in s3://\*\*\*@bucket/path"),
        ("s3://bucket/path?secret_key=hidden", r"no secret; found one in s3://bucket/path\?secret_key=\*\*\*"),
    ],
)
def test_a_place_is_a_path_or_a_url_without_a_secret(written: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LORA_SWEEPS_CHECKPOINTS", written)
    with pytest.raises(StorageError, match=message):
        configured_place()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("", None),
        ("/nfs/checkpoints/", "/nfs/checkpoints"),
        ("file:///nfs/with%20space", "/nfs/with space"),
        ("s3://bucket/path", "s3://bucket/path"),
    ],
)
def test_the_environment_names_the_place(written: str, meant: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LORA_SWEEPS_CHECKPOINTS", written)
    assert configured_place() == meant


def test_a_scheme_that_nothing_opens_says_what_does():
    with pytest.raises(
        StorageError, match=r"pyarrow or fsspec opens; foo://bucket is not: .*use s3://, gs:// or abfss://"
    ):
        probe("foo://bucket")


def test_a_setting_that_is_none_is_refused_in_pyarrows_words():
    with pytest.raises(StorageError, match=r"s3://bucket/x\?regoin=us-east-1 is not: .*regoin"):
        probe("s3://bucket/x?regoin=us-east-1")


def test_a_bucket_that_is_not_there_is_refused_with_the_reason(s3: S3):
    with pytest.raises(StorageError, match=r"s3://nobody-has-it/x cannot be written to: .*bucket does not exist"):
        probe("s3://nobody-has-it/x")


def test_a_directory_that_cannot_be_made_is_refused_with_the_reason(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/checkpoints cannot be written to: .*LORA_SWEEPS_CHECKPOINTS"):
        probe(str(tmp_path / "file" / "checkpoints"))


# -- stores that are away ----------------------------------------------------------------------------------------------


def test_a_store_that_is_away_for_a_while_is_waited_for():
    port = free_port()
    place = f"s3://{BUCKET}/away?endpoint_override=http://127.0.0.1:{port}&region=us-east-1"
    saved = threading.Thread(target=save, args=(RemoteFiles(place, "member", patience_s=120), 3.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
        saved.start()
        saved.join(timeout=2)
        assert saved.is_alive()
        with s3_server(port):
            saved.join(timeout=120)
            assert torch.equal(load_member(RemoteFiles(place, "member")).adapter["fc1.lora_A"], torch.full((2, 3), 3.0))


def test_what_a_store_refuses_for_a_moment_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    refusals, put = ["busy", "busy", "still busy"], storage._put

    def flaky(filesystem: object, path: str, data: bytes) -> None:
        if refusals:
            raise OSError(refusals.pop())
        put(filesystem, path, data)

    monkeypatch.setattr(storage, "_put", flaky)
    files = RemoteFiles("memory://flaky", "member", patience_s=60)
    files.write("name", b"data")
    assert (refusals, files.read("name")) == ([], b"data")


def test_whose_patience_ends_is_told_why():
    place = f"s3://{BUCKET}/away?endpoint_override=http://127.0.0.1:{free_port()}&region=us-east-1"
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        RemoteFiles(place, "member", patience_s=0).write("name", b"data")


# -- a sweep -----------------------------------------------------------------------------------------------------------


def test_a_sweep_keeps_its_checkpoints_in_a_bucket_and_finds_them_there(s3: S3, tmp_path: Path):
    (tmp_path / "small.yaml").write_text(SMALL_SPEC)
    place = f"s3://{BUCKET}/team"
    done = run_cli("run", "small.yaml", cwd=tmp_path, LORA_SWEEPS_CHECKPOINTS=place, **s3.environment)
    assert done.returncode == 0, done.stderr
    record = record_of(tmp_path)
    assert record.created.checkpoints == place
    assert not (tmp_path / ".lora-sweeps" / "checkpoints").exists()
    later = [trial for trial in record.trained if len(trial.rungs) > 1]
    assert later, "some trials must have gone on from a checkpoint"
    for trial in later:
        assert (
            load_member(files_in(below(place, record.id), trial.rungs[-1].checkpoint or "")).step
            == trial.rungs[-1].step
        )
    # Where they lie is the ledger's to know; the environment need not say it again.
    exported = run_cli("export", "last", "--format", "peft", "--adapter", "adapter", cwd=tmp_path, **s3.environment)
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0


def test_a_sweep_whose_bucket_is_not_there_is_refused_before_it_begins(s3: S3, tmp_path: Path):
    (tmp_path / "small.yaml").write_text(SMALL_SPEC)
    refused = run_cli("run", "small.yaml", cwd=tmp_path, LORA_SWEEPS_CHECKPOINTS="s3://no-such/x", **s3.environment)
    assert refused.returncode == 2
    assert "s3://no-such/x cannot be written to" in refused.stderr
    assert "Traceback" not in refused.stderr
    with Ledger.in_directory(tmp_path / ".lora-sweeps") as ledger:
        assert ledger.sweeps() == []


def test_a_place_of_one_machine_is_tried_out_too(tmp_path: Path):
    (tmp_path / "small.yaml").write_text(SMALL_SPEC)
    (tmp_path / "file").touch()
    refused = run_cli("run", "small.yaml", cwd=tmp_path, LORA_SWEEPS_CHECKPOINTS=str(tmp_path / "file" / "x"))
    assert refused.returncode == 2
    assert "file/x cannot be written to" in refused.stderr


def test_a_url_that_can_only_be_read_is_refused_in_words():
    pytest.importorskip("aiohttp", reason="fsspec opens https:// with aiohttp")
    with pytest.raises(StorageError, match=r"https://127\.0\.0\.1:1/x cannot be written to: "):
        probe("https://127.0.0.1:1/x")


def test_a_google_bucket_that_does_not_answer_is_given_up():
    place = f"gs://bucket/x?endpoint_override=127.0.0.1:{free_port()}&scheme=http&retry_limit_seconds=1"
    with pytest.raises(StorageError, match="cannot be written to"):
        probe(place)
