import json
import os
from pathlib import Path

import peft
import pytest
import torch

from lora_core import files
from lora_core.adapter import LoraBank, Member
from lora_core.checkpoint import (
    CheckpointError,
    export_peft_adapter,
    import_peft_adapter,
    load_member,
    save_member,
)
from lora_core.gauge import scaling_of
from lora_core.optimizers import OptimizerConfig
from tests.lora_core.support import TARGETS, Mlp, Pack, make_point, samples

CONFIGS = [
    OptimizerConfig("sgd"),
    OptimizerConfig("sgd", {"momentum": 0.9}),
    OptimizerConfig("adam"),
    OptimizerConfig("adamw"),
]
SUBJECT = Member(make_point(rank=4, lr=2e-2, weight_decay=0.05, clip_norm=0.5), seed=11)
SMALL, LARGE = (Member(make_point(rank=rank, lr=1e-2), seed=rank) for rank in (2, 12))


def save(directory: Path, value: float = 1.0, step: int = 3) -> None:
    adapter = {"blocks.0.fc1.lora_A": torch.full((2, 3), value)}
    optimizer = {
        "blocks.0.fc1.lora_A/exp_avg": torch.full((2, 3), -value),
        "blocks.0.fc1.lora_A/step": torch.tensor(3.0),
    }
    save_member(directory, adapter=adapter, optimizer=optimizer, step=step, extra={"class": "ab12"})


# -- a member's checkpoint ---------------------------------------------------------------------------------------------


def test_a_member_comes_back_as_it_was_saved(tmp_path):
    save(tmp_path / "member" / "7", value=0.1)
    state = load_member(tmp_path / "member" / "7")
    assert (state.step, state.extra) == (3, {"class": "ab12"})
    assert torch.equal(state.adapter["blocks.0.fc1.lora_A"], torch.full((2, 3), 0.1))
    assert set(state.optimizer) == {"blocks.0.fc1.lora_A/exp_avg", "blocks.0.fc1.lora_A/step"}
    assert state.optimizer["blocks.0.fc1.lora_A/step"].shape == ()


def test_a_newer_checkpoint_takes_the_place_of_the_older(tmp_path):
    for step, value in enumerate((1.0, 2.0, 2.0)):
        save(tmp_path, value, step)
    assert load_member(tmp_path).step == 2
    assert float(load_member(tmp_path).adapter["blocks.0.fc1.lora_A"][0, 0]) == 2.0
    assert len(list(tmp_path.iterdir())) == 2, "one tensor file, one manifest"


@pytest.mark.parametrize("deadly", range(14))
def test_a_crash_at_any_moment_leaves_the_old_checkpoint_or_the_new(tmp_path, monkeypatch, deadly):
    save(tmp_path, 1.0, step=1)
    calls = 0

    def dying(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > deadly:  # the dead do not tidy up either
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "open"):
            patch.setattr(files.os, name, dying(getattr(os, name)))
        patch.setattr(files.tempfile, "mkstemp", dying(files.tempfile.mkstemp))
        patch.setattr(files.Path, "unlink", dying(Path.unlink))
        try:
            save(tmp_path, 2.0, step=2)
        except KeyboardInterrupt:
            pass
        else:
            assert deadly == 13, "every step of a save must have been interrupted once"
    state = load_member(tmp_path)
    assert float(state.adapter["blocks.0.fc1.lora_A"][0, 0]) == float(state.step)
    save(tmp_path, 3.0, step=3)
    assert load_member(tmp_path).step == 3


def test_a_checkpoint_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *args, name=name, real=real: (events.append(name), real(*args))[1])
    save(tmp_path)
    assert events == ["fsync", "replace", "fsync"] * 2


def test_no_checkpoint_is_told_as_such(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*: it has no manifest\.json"):
        load_member(tmp_path / "nowhere")


def tensor_file(directory: Path) -> Path:
    return next(directory.glob("*.safetensors"))


def test_a_truncated_checkpoint_is_refused(tmp_path):
    save(tmp_path)
    data = tensor_file(tmp_path).read_bytes()
    tensor_file(tmp_path).write_bytes(data[:-5])
    with pytest.raises(
        CheckpointError, match=rf"must have {len(data)} bytes with SHA-256 .*; found {len(data) - 5} bytes"
    ):
        load_member(tmp_path)


def test_an_altered_checkpoint_is_refused(tmp_path):
    save(tmp_path)
    data = bytearray(tensor_file(tmp_path).read_bytes())
    data[-1] ^= 1
    tensor_file(tmp_path).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"SHA-256 .*; found .*; restore the directory from a copy, or delete it"):
        load_member(tmp_path)


def test_a_checkpoint_without_its_tensors_is_refused(tmp_path):
    save(tmp_path)
    tensor_file(tmp_path).unlink()
    with pytest.raises(CheckpointError, match="has lost its tensor file"):
        load_member(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"must be .*1\); found .*2\): use the release that wrote it"),
        ({"format": "other"}, "found .'other'"),
        ({"step": "3"}, "has a wrong step"),
        ({"sha256": "../../etc/passwd"}, "has a wrong sha256"),
        ({"sha256": None, "extra": 1}, "has a wrong extra, sha256"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path, change, message):
    save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(CheckpointError, match=message):
        load_member(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, text):
    save(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json (is not JSON|must be)"):
        load_member(tmp_path)
    save(tmp_path, step=9)
    assert load_member(tmp_path).step == 9, "saving anew is a way out"


# -- resuming ----------------------------------------------------------------------------------------------------------


def resumed(directory: Path, first: Pack, place: int, second: Pack, new_place: int, *, middle: int, stop: int):
    """Trains to the middle, saves, loads into another pack, goes on: the losses on the way, the weights at the end."""
    losses = [record.losses[place] for record in first.train(0, middle)]
    save_member(
        directory, adapter=first.bank.adapter(place), optimizer=first.optimizer.state(place), step=middle, extra={}
    )
    state = load_member(directory)
    second.bank.load_adapter(new_place, state.adapter)
    second.optimizer.load_state(new_place, state.optimizer)
    losses += [record.losses[new_place] for record in second.train(state.step, stop)]
    return losses, second.bank.adapter(new_place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_resumed_solo_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, config, dtype):
    whole, first, second = (Pack([SUBJECT], config, dtype=dtype) for _ in range(3))
    losses, weights = resumed(tmp_path, first, 0, second, 0, middle=17, stop=40)
    assert losses == [record.losses[0] for record in whole.train(0, 40)]
    assert all(torch.equal(value, whole.bank.adapter(0)[key]) for key, value in weights.items())
    assert all(torch.equal(value, whole.optimizer.state(0)[key]) for key, value in second.optimizer.state(0).items())


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_resumed_member_is_the_uninterrupted_one_whoever_its_new_pack_mates_are(tmp_path, config, dtype, rtol):
    whole = Pack([SUBJECT], config, dtype=dtype)
    first = Pack([SMALL, SUBJECT], config, dtype=dtype)
    second = Pack([SUBJECT, LARGE, SMALL], config, dtype=dtype)
    losses, weights = resumed(tmp_path, first, 1, second, 0, middle=17, stop=40)
    assert losses == pytest.approx([record.losses[0] for record in whole.train(0, 40)], rel=rtol)
    for key, value in whole.bank.adapter(0).items():
        assert float((value - weights[key]).norm() / value.norm()) <= rtol


# -- adapter folders as PEFT has them ----------------------------------------------------------------------------------


def trained(alpha: float, rank: int, *, rslora: bool) -> Pack:
    point = make_point(rank=rank, scaling=scaling_of(alpha, rank, rslora=rslora), lr=1e-2)
    pack = Pack([SMALL, Member(point, seed=5)], OptimizerConfig("adamw"))
    pack.train(0, 20)
    return pack


@pytest.mark.parametrize("target_modules", [list(TARGETS), r"fc\d"])
@pytest.mark.parametrize(("alpha", "rank", "rslora"), [(16, 4, False), (22.627, 8, True)])
def test_peft_loads_an_exported_adapter_and_computes_the_same(tmp_path, alpha, rank, rslora, target_modules):
    pack = trained(alpha, rank, rslora=rslora)
    export_peft_adapter(
        tmp_path, pack.bank.adapter(1), rank=rank, alpha=alpha, target_modules=target_modules, use_rslora=rslora
    )
    model = peft.PeftModel.from_pretrained(Mlp(), tmp_path).eval()
    x = samples()[0]
    ours = pack.model(x.repeat(2, 1))[len(x) :].detach()
    torch.testing.assert_close(model(x), ours, rtol=1e-5, atol=1e-5)
    assert float((ours - Mlp()(x)).detach().abs().max()) > 0.1, "the adapter must matter"


def test_an_adapter_that_peft_wrote_is_read(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(TARGETS), init_lora_weights=False, use_rslora=True)
    theirs = peft.get_peft_model(Mlp(), config)
    theirs.save_pretrained(tmp_path)
    adapter = import_peft_adapter(tmp_path)
    assert (adapter.rank, adapter.alpha, adapter.use_rslora, adapter.target_modules) == (3, 5.0, True, TARGETS)
    model = Mlp()
    scaling = scaling_of(adapter.alpha, adapter.rank, rslora=adapter.use_rslora)
    bank = LoraBank.attach(model, adapter.target_modules, [Member(make_point(rank=3, scaling=scaling), 0)])
    bank.load_adapter(0, adapter.tensors)
    x = samples()[0]
    torch.testing.assert_close(model(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_an_exported_adapter_comes_back_to_the_last_bit(tmp_path):
    adapter = trained(16, 4, rslora=False).bank.adapter(1)
    export_peft_adapter(tmp_path, adapter, rank=4, alpha=16, target_modules="fc.", use_rslora=False, base_model="org/m")
    back = import_peft_adapter(tmp_path)
    assert back.target_modules == "fc."
    assert back.tensors.keys() == adapter.keys()
    assert all(torch.equal(value, adapter[key]) for key, value in back.tensors.items())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/m"
    assert isinstance(config["lora_alpha"], int)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rank_pattern": {"fc1": 2}},
            "one rank and alpha, for that is what a member of a pack has; found rank_pattern",
        ),
        (
            {"alpha_pattern": {"fc1": 2}},
            "one rank and alpha, for that is what a member of a pack has; found alpha_pattern",
        ),
        (
            {"modules_to_save": ["head"]},
            "found modules_to_save in adapter_config.json: merge it into its base model with PEFT's merge",
        ),
        ({"init_lora_weights": "olora"}, "found init_lora_weights='olora', which changes the base model"),
        ({"bias": "all"}, "nothing but lora_A and lora_B matrices; found"),
        ({"bias": "all", "use_dora": True}, "lora_A and lora_B matrices and lora_magnitude_vectors; found"),
    ],
)
def test_an_adapter_that_is_more_than_plain_lora_is_refused(tmp_path, settings, message):
    peft.get_peft_model(Mlp(), peft.LoraConfig(target_modules=list(TARGETS), **settings)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        import_peft_adapter(tmp_path)


@pytest.mark.parametrize(
    ("has", "says", "message"),
    [
        (False, True, r"of every layer; found no fc1\.magnitude, fc2\.magnitude: save it again"),
        (True, False, r"nothing but lora_A and lora_B matrices; found '.*\.lora_magnitude_vector'"),
    ],
)
def test_an_adapter_that_has_not_what_its_config_says_is_refused(tmp_path, has, says, message):
    config = peft.LoraConfig(target_modules=list(TARGETS), use_dora=has)
    peft.get_peft_model(Mlp(), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": says}))
    with pytest.raises(CheckpointError, match=message):
        import_peft_adapter(tmp_path)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_dropout_goes_out_and_comes_back(tmp_path, dropout):
    adapter = trained(16, 4, rslora=False).bank.adapter(1)
    export_peft_adapter(tmp_path, adapter, rank=4, alpha=16, target_modules="fc.", use_rslora=False, dropout=dropout)
    assert peft.PeftConfig.from_pretrained(tmp_path).lora_dropout == dropout
    back = import_peft_adapter(tmp_path)
    assert (back.dropout, back.use_dora) == (dropout, False)


def test_a_pickled_adapter_is_not_read(tmp_path):
    config = peft.LoraConfig(target_modules=list(TARGETS))
    peft.get_peft_model(Mlp(), config).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors: save the adapter with safe_serial"):
        import_peft_adapter(tmp_path)


def test_a_broken_adapter_folder_is_refused(tmp_path):
    adapter = trained(16, 4, rslora=False).bank.adapter(1)
    export_peft_adapter(tmp_path, adapter, rank=4, alpha=16, target_modules="fc.", use_rslora=False)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot be read .*: save it again"):
        import_peft_adapter(tmp_path)
