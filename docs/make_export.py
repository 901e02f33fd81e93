"""Makes the outputs in docs/export.md from the exporters themselves. A test holds the page to it.

The page is written by hand but for the parts between `<!-- made by docs/make_export.py: NAME -->` and `<!-- end -->`:
what each format writes of one trial, what it says on stderr, and who can do what.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pages import with_parts

from sweeps.errors import InputError
from sweeps.events import SweepCreated
from sweeps.export import FORMATS
from sweeps.export.parts import Exported
from sweeps.export.point import ExportPoint
from sweeps.records import SweepRecord, TrialRecord
from sweeps.reduction import Reduction
from sweeps.space import Configuration
from sweeps.spec import parse_spec

PATH = Path(__file__).parent / "export.md"

SHOWN = {
    "peft": ("adapter_config.json", "json"),
    "hf_trainer": ("training_args.yaml", "yaml"),
    "trl": ("trl_sft.yaml", "yaml"),
    "axolotl": ("axolotl.yaml", "yaml"),
    "llamafactory": ("llamafactory.yaml", "yaml"),
    "unsloth": ("unsloth.yaml", "yaml"),
    "loralib": ("loralib.json", "json"),
}

RUNS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"lora": ", rslora: true"},
    "LoRA dropout": {"lora": ", dropout: 0.1"},
    "`init: gaussian`": {"lora": ", init: gaussian"},
    "target modules as a regular expression": {"targets": "'.*_proj'"},
    "DoRA with `magnitude_lr`": {"lora": ", dora: true", "train": ", magnitude_lr: 1e-3"},
    "`lr_ratio` (LoRA+)": {"ratio": 4.0},
    "a classifier's head with `head_lr`": {"classifier": True},
    "clip norm, warm-up, accumulation": {"train": ", clip_norm: 1, warmup_steps: 10, accumulation: 4"},
    "`adamw`, `adam` without decay": {},
    "`adam` with L2 decay": {"optimizer": "adam", "decay": 0.1},
    "`amsgrad`": {"train": ", options: {amsgrad: true}"},
    "`sgd`, `rmsprop`, `adagrad`": {"optimizer": "rmsprop"},
    "`muon` and the other optimizers": {"optimizer": "muon"},
    "`bfloat16`": {"train": ", dtype: bfloat16"},
    "`float64`": {"train": ", dtype: float64"},
}


_LANGUAGE_MODEL = (
    "{type: causal_lm, model: Qwen/Qwen2.5-0.5B, max_length: 512, loss: completion, "
    "data: {train: train.jsonl, format: completion}}"
)
_CLASSIFIER = "{type: sequence_classification, model: FacebookAI/roberta-base, data: {train: train.csv}}"


def point_of(
    *,
    alpha: float | str | None = None,
    optimizer: str = "adamw",
    targets: str = "[q_proj, v_proj]",
    lora: str = "",
    train: str = "",
    ratio: float = 1.0,
    decay: float = 0.0,
    init_scale: float = 1.5,
    classifier: bool = False,
) -> ExportPoint:
    """One trial at rank 8, alpha 16, lr 2e-3 and init scale 1.5, and variations of it."""
    task = _CLASSIFIER if classifier else _LANGUAGE_MODEL
    head_lr = 1e-3 if classifier else 0.0
    text = f"""\
name: sft
task: {task}
lora: {{target_modules: {targets}{lora}}}
parameters:
  {{rank: 8, lr: 2e-3, init_scale: {init_scale}, alpha: 16, lr_ratio: {ratio}, weight_decay: {decay},
  head_lr: {head_lr}}}
train: {{optimizer: {optimizer}, steps: 500, batch_size: 16{train}}}
"""
    spec = parse_spec(text, "sft.yaml").spec
    created = SweepCreated(
        name=spec.name,
        spec=spec.model_dump(mode="json"),
        spec_text=text,
        source="sft.yaml",
        plan={},
        tracking_uri="",
        experiment="",
        lanes=1,
        pack=1,
    )
    configuration = Configuration(8, 16.0, 2e-3, init_scale, ratio, decay, head_lr)
    trial = TrialRecord(41, {}, configuration, Reduction.of(spec).class_id(configuration), None, 0.0, state="finished")
    return ExportPoint.of(SweepRecord("sft-5d1c02", created, 0.0, trials={41: trial}), trial, alpha)


def written(form: str, point: ExportPoint) -> tuple[Exported, dict[str, str]]:
    """What a format wrote: its answer and the files' texts."""
    with tempfile.TemporaryDirectory() as directory:
        exported = FORMATS[form](point, Path(directory))
        return exported, {path.name: path.read_text() for path in exported.files}


def said(exported: Exported) -> str:
    """What the command prints on stderr."""
    return "\n".join(f"{'warning' if each.warns else 'note'}: {each.text}" for each in exported.leftovers)


def parts() -> dict[str, str]:
    """The made parts of the page, by name."""
    made = {}
    for form, (name, language) in SHOWN.items():
        _, texts = written(form, point_of(train=", warmup_steps: 10"))
        made[form] = f"```{language}\n{texts[name]}```"
    rounded, _ = written("axolotl", point_of(init_scale=0.3))
    chosen, _ = written("peft", point_of(alpha=16.0))
    made["rounded"] = f"```text\n{said(rounded)}\n```"
    made["chosen"] = f"```text\n{said(chosen)}\n```"
    made["refused"] = f"```text\nerror: {refused('trl', point_of(ratio=4.0))}\n```"
    made["capabilities"] = capabilities()
    return made


def refused(form: str, point: ExportPoint) -> str | None:
    """Why a format refuses a run; None where it does not."""
    try:
        written(form, point)
    except InputError as error:
        return str(error)
    return None


def capabilities() -> str:
    """Who can do what, by trying."""
    rows = [f"| | {' | '.join(f'`{form}`' for form in FORMATS)} |", f"|---{'|---' * len(FORMATS)}|"]
    for label, pieces in RUNS.items():
        cells = ["no" if refused(form, point_of(**pieces)) else "yes" for form in FORMATS]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def document(text: str) -> str:
    """The page with its made parts made anew; see `with_parts`."""
    return with_parts(text, parts(), script="make_export.py", page="export.md")


if __name__ == "__main__":
    PATH.write_text(document(PATH.read_text(encoding="utf-8")), encoding="utf-8")
