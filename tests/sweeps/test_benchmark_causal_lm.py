"""The benchmark of packs beside PEFT does the same work on both sides, and needs neither Ray nor MLflow."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks.causal_lm import Packed, Setting, Solo, main, make_model
from tests.support import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-5), (torch.float64, 1e-6), (torch.bfloat16, 2e-2)])
def test_both_sides_train_the_same_members(dtype: torch.dtype, rel: float):
    setting = Setting(members=3, batch=2, width=16, steps=4)
    ours, theirs = (make_model("tiny", torch.device("cpu"), dtype) for _ in range(2))
    packed = Packed(ours, ["c_attn", "c_fc"], setting, rank=4)
    solo = Solo(theirs, ["c_attn", "c_fc"], packed, setting, rank=4)
    for _ in range(2):  # a round begins where the one before began
        _, losses = packed.round()
        for k in range(3):
            assert losses[:, k].tolist() == pytest.approx(solo.round(k)[1].tolist(), rel=rel)
        assert len(set(losses[-1].tolist())) == 3


def test_it_prints_a_ratio_for_every_setting(capsys: pytest.CaptureFixture[str]):
    arguments = ["--shape", "tiny", "--members", "1", "3", "--batch", "2", "--width", "16", "--rounds", "1"]
    before = torch.get_num_threads()
    measured = main(arguments)
    torch.set_num_threads(before)
    head, names, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("tiny, cpu, float32, 1 CPU threads")
    assert names.split()[:3] == ["K", "batch", "width"]
    assert [line.split()[:3] for line in lines] == [["1", "2", "16"], ["3", "2", "16"]]
    assert all(each.ratio == each.packed / each.solo > 0 for each in measured)


def test_work_that_is_not_the_same_is_no_measurement(monkeypatch: pytest.MonkeyPatch):
    honest = Solo.round

    def other(self: Solo, k: int) -> tuple[float, torch.Tensor]:
        seconds, losses = honest(self, k)
        return seconds, 1.001 * losses

    monkeypatch.setattr(Solo, "round", other)
    with pytest.raises(SystemExit, match=r"losses must agree to 0\.0001, or it is not the same work; found 0\.00"):
        main(["--shape", "tiny", "--members", "2", "--batch", "2", "--width", "16", "--rounds", "1"])


def test_cpu_time_is_of_one_thread(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["--clock", "process", "--threads", "2"])
    assert "--clock process counts one CPU thread; found more, or a GPU" in capsys.readouterr().err


def test_it_needs_neither_ray_nor_mlflow():
    code = "import sys, benchmarks.causal_lm; print([m for m in ('ray', 'mlflow', 'optuna') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
