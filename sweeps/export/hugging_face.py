"""A run in the words of transformers' Trainer, on which TRL, Axolotl, LLaMA-Factory and Unsloth are built.

Keys and what they do: transformers 5.23, `training_args.py`, `trainer.py`, `trainer_optimizer.py`; PEFT 0.21,
`optimizers/loraplus.py`. Every key is written whose default would make another run:

    max_grad_norm           clips at 1.0 by default; 0.0 does not clip
    warmup_steps            a number below 1 is a fraction of the run
    lr_scheduler_type       `constant` passes over the warm-up
    dataloader_drop_last    an epoch's last batch would be a smaller one
    train_sampling_strategy transformers 5's name of what 4 called `group_by_length: true`
    optim                   names of transformers', of which few are torch.optim's
"""

from __future__ import annotations

from typing import Any

from sweeps.export.parts import Leftover, refusal
from sweeps.export.point import ExportPoint

_OWN_OPTIMIZER = "--format peft and --format loralib write torch.optim's own keywords for a loop of yours"


def training_arguments(point: ExportPoint, trainer: str, *, loraplus: bool, heads: bool = False) -> dict[str, Any]:
    """The keyword arguments of `TrainingArguments`, without lr of B.

    Args:
        point: the run.
        trainer: its name, for messages.
        loraplus: whether the trainer takes another lr for B (LoRA+).
        heads: whether it can train something whole beside the adapters, with an lr of its own.

    Raises:
        InputError: the trainer cannot do the run.
    """
    train, settings = point.spec.train, point.point.a
    _check_head(point, trainer, heads=heads)
    if point.point.head is None:  # else each has a group of its own
        _check_factors(point, trainer, loraplus=loraplus)
        _check_dora(point, trainer)
    return {
        "learning_rate": settings.lr,
        "weight_decay": settings.weight_decay,
        **_optimizer(point, trainer),
        "max_grad_norm": point.point.clip_norm or 0.0,
        "lr_scheduler_type": scheduler(point),
        "warmup_steps": train.warmup_steps,
        "max_steps": train.steps,
        "per_device_train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "dataloader_drop_last": True,
        **({"train_sampling_strategy": "group_by_length"} if point.spec.group_by_length else {}),
        "seed": train.seed,
        "bf16": train.dtype == "bfloat16",
        "fp16": False,
    }


def scheduler(point: ExportPoint) -> str:
    """transformers' name of the schedule."""
    train = point.spec.train
    return "constant_with_warmup" if train.schedule == "constant" and train.warmup_steps else train.schedule


def loraplus_keys(point: ExportPoint) -> dict[str, Any]:
    """LoRA+'s keys; empty with one lr for A and B.

    The lr of adapters on embeddings is set too: by default it is 1e-6, whatever lr is.
    """
    if point.point.a.lr == point.point.b.lr:
        return {}
    return {"loraplus_lr_ratio": point.lr_ratio, "loraplus_lr_embedding": point.point.b.lr}


def refuse_float64(point: ExportPoint, trainer: str) -> None:
    """Refuses a run in float64, for a trainer that loads no model in it."""
    if point.spec.train.dtype == "float64":
        raise refusal(trainer, "dtype float32 or bfloat16", "float64", "--format hf_trainer or peft")


def refuse_gaussian(point: ExportPoint, trainer: str) -> None:
    """Refuses another init than PEFT's default, for a trainer that has no key for it."""
    if point.spec.lora.init != "kaiming_uniform":
        raise refusal(
            trainer, "PEFT's default init, for it has no key for another", f"lora.init: {point.spec.lora.init}"
        )


def optimizer_leftovers(point: ExportPoint, trainer: str) -> list[Leftover]:
    """What of the optimizer depends on the version of transformers: `Trainer.get_optimizer_cls_and_kwargs` of 4.57.6
    makes these three of lr alone."""
    if "optim_args" not in _optimizer(point, trainer):
        return []
    text = "optim_args of sgd, rmsprop and adagrad are read by transformers 5; transformers 4 passes over them silently"
    return [Leftover("optim_args", None, True, text)]


def _check_factors(point: ExportPoint, trainer: str, *, loraplus: bool) -> None:
    a, b = point.point.a, point.point.b
    if (a.weight_decay, a.constants) != (b.weight_decay, b.constants):
        raise refusal(
            trainer,
            "one eps and weight decay for A and B",
            f"weight decay {a.weight_decay!r} and {b.weight_decay!r}, {dict(a.constants)} and {dict(b.constants)}",
        )
    if a.lr != b.lr and not loraplus:
        raise refusal(
            trainer,
            "one learning rate for A and B, for it has no LoRA+",
            f"lr of B / lr of A = {point.lr_ratio:.6g}",
            "--format peft, hf_trainer, axolotl, llamafactory or unsloth has it",
        )


def _check_dora(point: ExportPoint, trainer: str) -> None:
    """Magnitudes share everything with A in these trainers."""
    own, a = point.point.magnitude, point.point.a
    if own is None:
        return
    one_lr = own.lr == a.lr == point.point.b.lr
    if not (one_lr and own.constants == a.constants and a.weight_decay == 0 and point.point.clip_norm is None):
        raise refusal(
            trainer,
            "DoRA's magnitudes trained as A is (learning rate, eps, weight decay, clip), for it has no keys for them",
            f"learning rate {own.lr!r} for them and {a.lr!r} for A",
        )


def _check_head(point: ExportPoint, trainer: str, *, heads: bool) -> None:
    head = point.point.head
    if head is None:
        return
    if not heads:
        required = "adapters alone to train, for it has no learning rate for a head"
        raise refusal(trainer, required, f"a head with learning rate {head.lr!r}", "--format hf_trainer or peft")
    if point.point.clip_norm is not None:
        required = "no clip where there is a head, for it clips both by one norm"
        raise refusal(trainer, required, f"clip_norm {point.point.clip_norm!r} of the adapters alone")


def _optimizer(point: ExportPoint, trainer: str) -> dict[str, Any]:
    train, settings = point.spec.train, point.point.a
    options, constants = train.settings, settings.constants
    optimizers = "adamw, adam without weight decay, sgd, rmsprop or adagrad"
    match train.optimizer:
        case "adamw" | "adam":
            if train.optimizer == "adam" and settings.weight_decay:
                found = f"adam with L2 weight decay {settings.weight_decay!r}"
                raise refusal(trainer, f"an optimizer that it has ({optimizers})", found, _OWN_OPTIMIZER)
            if options["amsgrad"]:
                raise refusal(trainer, "AdamW without amsgrad, for it has no key for it", "amsgrad", _OWN_OPTIMIZER)
            beta1, beta2 = options["betas"]
            # Without weight decay Adam and AdamW are one. Fused, as the trials were.
            named = {"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": constants["eps"]}
            return {"optim": "adamw_torch_fused"} | named
        case "sgd":
            given = {"momentum": options["momentum"], "dampening": options["dampening"]}
            # Plain SGD has nothing to say that transformers' default does not.
            changed = (
                {"optim_args": _arguments(given | {"nesterov": options["nesterov"]})} if any(given.values()) else {}
            )
            return {"optim": "sgd"} | changed
        case "rmsprop":
            return {"optim": "rmsprop", "optim_args": _arguments({**options, **constants})}
        case "adagrad":
            if constants["initial_accumulator_value"]:
                found = f"initial_accumulator_value {constants['initial_accumulator_value']!r}"
                raise refusal(trainer, "an Adagrad that starts from 0", found, _OWN_OPTIMIZER)
            given = {"lr_decay": options["lr_decay"], "eps": constants["eps"]}
            return {"optim": "adagrad", "optim_args": _arguments(given)}
    raise refusal(trainer, f"an optimizer that it has ({optimizers})", train.optimizer, _OWN_OPTIMIZER)


def _arguments(values: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items())
