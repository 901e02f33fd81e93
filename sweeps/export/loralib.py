"""loralib (microsoft/LoRA): `loralib.json`, the keyword arguments of `lora.Linear` and of torch.optim.

Keys: loralib 0.1.2, `layers.py`. It divides alpha by r, so rsLoRA's alpha is written as the plain one of the same
scaling. Whoever uses loralib writes the training loop, so there is nothing of the optimizer that it cannot do.
"""

from __future__ import annotations

from pathlib import Path

from sweeps.export.hugging_face import refuse_gaussian, scheduler
from sweeps.export.parts import Exported, json_text, leftovers_of, refusal, save, torch_group
from sweeps.export.peft import whole
from sweeps.export.point import ExportPoint
from sweeps.export.task import task_settings


def write(point: ExportPoint, directory: Path) -> Exported:
    """Writes the file.

    Raises:
        InputError: loralib cannot do the run.
    """
    refuse_gaussian(point, "loralib")
    lora, train = point.spec.lora, point.spec.train
    if lora.dora:
        raise refusal("loralib", "no DoRA, which it does not have", "lora.dora: true")
    left = leftovers_of(point, "loralib")
    decays, head = point.law.decay is not None, point.point.head
    targets = lora.target_modules
    values = {
        "note": "lora.Linear(..., **linear) for the target modules; one parameter group for lora_A and one for lora_B.",
        "linear": {
            "r": point.point.rank,
            "lora_alpha": whole(point.point.scaling * point.point.rank if lora.rslora else point.alpha),
            "lora_dropout": lora.dropout,
            # By default it merges at every evaluation and takes apart afterwards, which rounds the frozen weights away.
            "merge_weights": False,
        },
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "optimizer": f"torch.optim.{point.law.kind}",
        "arguments": {**train.settings, **point.law.fixed},
        "lora_A": torch_group(point.point.a, decays=decays),
        "lora_B": torch_group(point.point.b, decays=decays),
        **({} if head is None else {"head": torch_group(head, decays=decays)}),
        "clip_norm": point.point.clip_norm,
        "schedule": scheduler(point),
        "warmup_steps": train.warmup_steps,
        "steps": train.steps,
        "batch_size": train.batch_size,
        "accumulation": train.accumulation,
        "seed": train.seed,
        "dtype": train.dtype,
        **task_settings(point),
        "leftovers": {each.name: each.text for each in left},
        "reached": point.metrics,
        "from": {"sweep": point.sweep, "trial": point.trial, "class": point.class_id},
    }
    return save(point, directory, {"loralib.json": json_text(values)}, left)
