"""The trainers themselves read what was exported for them, each where it is installed.

pip install --no-deps trl==1.16.0                       reads trl_sft.yaml
pip install --no-deps axolotl==0.19.0                   its schema needs nothing else
pip install --no-deps llamafactory==0.9.5 omegaconf     its arguments; DISABLE_VERSION_CHECK=1 for a newer transformers
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser

from sweeps.export import FORMATS
from sweeps.export.point import ExportPoint
from tests.sweeps.export_points import lm_point_of, point_of
from tests.sweeps.export_schemas import check_training_arguments

PACKED = ", max_length: 256, packing: true, loss: completion, attention: sdpa"
POINTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"task": PACKED, "train": ", warmup_steps: 4"},
    "texts": {"data": "format: text", "task": ", too_long: truncate, max_length: 64"},
    "chats": {"data": "format: messages", "task": ", loss: completion"},
    "decay": {"parameters": ", weight_decay: 0.1", "weight_decay": 0.1, "train": ", dtype: bfloat16"},
}
LORAPLUS = {"parameters": ", lr_ratio: 4", "lr_ratio": 4.0}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", POINTS)
def test_trl_itself_reads_the_file(name: str, tmp_path: Path):
    trl = pytest.importorskip("trl", reason="TRL is not installed; its keys stand in export_schemas.py")
    point = lm_point_of(init_scale=1.3, **POINTS[name])
    FORMATS["trl"](point, tmp_path)
    written = yaml.safe_load((tmp_path / "trl_sft.yaml").read_text())
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))
    # bf16 as it is stated, but where there is no GPU for it.
    here = ["--config", str(tmp_path / "trl_sft.yaml"), "--dataset_name", "x", "--use_cpu", "True"]
    _, training, model = parser.parse_args_and_config(here, fail_with_unknown_args=True)
    config = trl.get_peft_config(model)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, point.alpha, 0.0)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert model.model_name_or_path == "org/model"
    for key in ("learning_rate", "adam_epsilon", "max_grad_norm", "warmup_steps", "bf16", "max_length", "packing"):
        assert getattr(training, key) == written[key]
    for key in ("completion_only_loss", "assistant_only_loss", "gradient_checkpointing"):
        assert getattr(training, key) == written[key]


def read_by_axolotl(point: ExportPoint, directory: Path) -> tuple[Any, dict[str, Any]]:
    FORMATS["axolotl"](point, directory)
    written = yaml.safe_load((directory / "axolotl.yaml").read_text())
    schema = pytest.importorskip("axolotl.utils.schemas.config", reason="Axolotl is not installed")
    unknown = written.keys() - schema.AxolotlInputConfig.model_fields.keys()
    assert not unknown, "it drops a key that it does not know"
    data = {"datasets": [{"path": "org/data", "type": "chat_template"}], "base_model": "org/model"}
    return schema.AxolotlInputConfig.model_validate(data | written, strict=None), written


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [*POINTS, "LoRA+", "sgd"])
def test_axolotl_itself_reads_the_file(name: str, tmp_path: Path):
    pytest.importorskip(
        "axolotl.utils.schemas.config", reason="Axolotl is not installed; export_schemas.py has its keys"
    )
    if name in POINTS:
        point = lm_point_of(**POINTS[name])
    else:
        point = point_of(**LORAPLUS) if name == "LoRA+" else point_of(optimizer="sgd", train=", momentum: 0.9")
    config, written = read_by_axolotl(point, tmp_path)
    for key, value in written.items():
        found = getattr(config, key)
        assert found == value, key
        assert type(found) is type(value) or isinstance(found, str), key


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_llamafactory_itself_reads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    hparams = pytest.importorskip("llamafactory.hparams", reason="LLaMA-Factory is not installed")
    for name, pieces in POINTS.items():
        FORMATS["llamafactory"](lm_point_of(**pieces), tmp_path / name)
        written = yaml.safe_load((tmp_path / name / "llamafactory.yaml").read_text())
        own = {"dataset": "x", "template": "default"}
        kinds = (hparams.ModelArguments, hparams.DataArguments, hparams.FinetuningArguments)
        known = {field for kind in kinds for field in kind.__dataclass_fields__}
        given = {key: value for key, value in (written | own).items() if key in known}
        model, data, finetuning = HfArgumentParser(kinds).parse_dict(given)
        assert (finetuning.lora_rank, finetuning.lora_alpha, finetuning.lora_target) == (4, 64, ["q_proj", "v_proj"])
        most = 256 if name == "packed" else 64 if name == "texts" else 1024
        assert (data.cutoff_len, data.packing) == (most, name == "packed")
        assert model.disable_gradient_checkpointing
        rest = {key: value for key, value in written.items() if key not in known and key != "do_train"}
        check_training_arguments(rest)
