"""The named recipes of microsoft/LoRA, with what its files say and no more.

    name                 r    alpha   s = alpha / r   published for
    gpt2-nlg             4    128     32              GPT-2 medium: the code's own default of alpha
    gpt2-nlg-readme      4    32      8               GPT-2 medium on E2E: alpha as in the README's command
    roberta-base-nlu     8    16      2               RoBERTa base on GLUE (MNLI)
    deberta-xxl-nlu      16   32      2               DeBERTa v2 XXL on GLUE (MNLI)
    gpt2-config-default  0    128     refused         no adapter at all

**Their AdamW is not torch.optim.AdamW.** `examples/NLG/src/optimizer.py`, and the transformers 4.4 that examples/NLU
brings along, compute

    p -= lr sqrt(1 - beta2**t) / (1 - beta1**t)  m / (sqrt(v) + eps),   then   p -= lr wd p

- eps stands before the bias correction of v. In torch's terms it is eps / sqrt(1 - beta2**t): 32 times the number
  written at step 1 with beta2 = 0.999, 1.3 times at step 1,000.
- weight decay is decoupled and coupled to the scheduled lr, as in torch, but is applied after the step to the weights
  it made, where torch applies it before: a difference of lr wd times the step.
- without `--correct_bias` the two corrections are left out; both recipes have them.

So a run under torch.optim.AdamW is near the published one and not the same. The law does not mind: sqrt(v) and m scale
like the gradient at every t, lr x wd is invariant, so alpha x k is lr / sqrt(k), init scale / sqrt(k), eps x sqrt(k),
weight decay x sqrt(k) there too, bit for bit where k is a power of 4.

No torch here: a spec that names a preset is read without it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal


class PresetError(ValueError):
    """A preset that is not known, or known and no adapter; the message says which to use instead."""


@dataclass(frozen=True, slots=True)
class Preset:
    """One published recipe. None means that its sources are silent, or where it says so, that there is none.

    Attributes:
        name: as a spec or `translate` names it.
        source: the files of microsoft/LoRA that it was read from.
        base_model: what was adapted.
        rank: r.
        alpha: lora_alpha.
        lr: peak learning rate, of A and B alike.
        optimizer: its name in `laws.LAWS`; the module's docstring says how the source's own differs.
        betas: decay rates of its moments.
        eps: as the source writes it: before the bias correction.
        weight_decay: decoupled, of A and B; the sources exempt biases and LayerNorm from it, if anything.
        clip_norm: gradient clip norm; None for no clipping.
        dropout: of the adapter's input.
        schedule: kind of learning-rate schedule, after the warm-up.
        warmup_steps: length of the warm-up in steps, None if given as a ratio.
        warmup_ratio: length of the warm-up as a part of all steps, None if given in steps.
        epochs: passes over the training data.
        batch_size: samples a step, over all GPUs that the source launches.
        target_modules: layers that carry an adapter, as the source's model names them.
        also_trained: other trained weights that share the lr and the clip norm, so that the law holds only once they
            are given an lr of their own and taken out of the clip.
        remarks: what else must be known to reproduce it.
    """

    name: str
    source: tuple[str, ...]
    base_model: str
    rank: int
    alpha: float
    lr: float
    optimizer: str
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float | None
    dropout: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: int | None
    warmup_ratio: float | None
    epochs: int
    batch_size: int
    target_modules: tuple[str, ...]
    also_trained: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def scaling(self) -> float:
        """s = alpha / r; the recipes are older than rsLoRA."""
        return self.alpha / self.rank


# The shell scripts of examples/NLU give lr, warm-up, weight decay, epochs and batch; betas, eps, clip norm and schedule
# are the defaults of the TrainingArguments that run_glue.py reads, kept in the same repository. They build lora.Linear
# without lora_dropout, whose default is 0. run_glue.py freezes only what is called roberta.* or deberta.*, so the
# classification head is trained along.
_NLU_DEFAULTS = (
    "examples/NLU/src/transformers/training_args.py",
    "examples/NLU/src/transformers/trainer.py",
    "examples/NLU/examples/text-classification/run_glue.py",
)

_GPT2 = Preset(
    name="gpt2-nlg",
    source=(
        "examples/NLG/README.md",
        "examples/NLG/src/gpt2_ft.py",
        "examples/NLG/src/optimizer.py",
        "examples/NLG/src/model.py",
    ),
    base_model="gpt2-medium",
    rank=4,
    alpha=128.0,
    lr=2e-4,
    optimizer="adamw",
    betas=(0.9, 0.999),
    eps=1e-6,  # the README gives none: --adam_epislon's default in optimizer.py
    weight_decay=0.01,
    clip_norm=None,  # --clip 0.0
    dropout=0.1,
    schedule="linear",
    warmup_steps=500,
    warmup_ratio=None,
    epochs=5,
    batch_size=8,
    target_modules=("c_attn",),
    remarks=(
        "alpha 128 is the default of gpt2_ft.py's --lora_alpha and of GPT2Config; the command in the README "
        "passes --lora_alpha 32 with all else as here, which is scaling 8 and another run: gpt2-nlg-readme",
        "the adapter is a lora.MergedLinear with enable_lora=[True, False, True]: the query and the value part "
        "of c_attn have factors of rank 4 each and the key part none; a plain adapter over c_attn differs",
        "label smoothing 0.1",
    ),
)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _GPT2,
        replace(_GPT2, name="gpt2-nlg-readme", alpha=32.0, remarks=_GPT2.remarks[1:]),
        Preset(
            name="roberta-base-nlu",
            source=(
                "examples/NLU/roberta_base_mnli.sh",
                "examples/NLU/src/transformers/models/roberta/modeling_roberta.py",
                *_NLU_DEFAULTS,
            ),
            base_model="roberta-base",
            rank=8,
            alpha=16.0,
            lr=5e-4,
            optimizer="adamw",
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
            dropout=0.0,
            schedule="linear",
            warmup_steps=None,
            warmup_ratio=0.06,
            epochs=30,
            batch_size=8 * 16,
            target_modules=("query", "value"),
            also_trained=("classifier",),
            remarks=(
                "the paper's appendix D gives alpha 8, the scripts give 16 (microsoft/LoRA#37)",
                "lr, weight decay, epochs and batch are MNLI's; the other tasks of GLUE have scripts of their own",
            ),
        ),
        Preset(
            name="deberta-xxl-nlu",
            source=(
                "examples/NLU/deberta_v2_xxlarge_mnli.sh",
                "examples/NLU/README.md",
                "examples/NLU/src/transformers/models/deberta_v2/modeling_deberta_v2.py",
                *_NLU_DEFAULTS,
            ),
            base_model="microsoft/deberta-v2-xxlarge",
            rank=16,
            alpha=32.0,
            lr=1e-4,
            optimizer="adamw",
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.0,
            clip_norm=1.0,
            dropout=0.0,
            schedule="linear",
            warmup_steps=1000,
            warmup_ratio=None,
            epochs=5,
            batch_size=8 * 8,
            target_modules=("query_proj", "value_proj"),
            also_trained=("pooler", "classifier"),
            remarks=(
                "trained with --fp16: a loss scale that overflows skips steps, and it need not do so alike for twins",
                "lr, epochs and batch are MNLI's; the other tasks of GLUE have scripts of their own",
                "dropout 0.15 before the classifier (--cls_dropout)",
            ),
        ),
    )
}

WITHOUT_ADAPTER: dict[str, str] = {
    "gpt2-config-default": "GPT2Config's lora_attn_dim=0 means that there is no adapter at all (its scaling would be "
    "128 / 0) and that all weights are fine-tuned; use gpt2-nlg, the recipe that sets lora_attn_dim=4 over the same "
    "lora_attn_alpha=128",
}
"""Settings of microsoft/LoRA that look like a recipe and are none; why."""


def preset(name: str) -> Preset:
    """Returns a published recipe by its name.

    Raises:
        PresetError: the name is not known, or is `gpt2-config-default`, which has no adapter.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name in WITHOUT_ADAPTER:
        raise PresetError(f"a preset must have an adapter of rank 1 or more; found {name}: {WITHOUT_ADAPTER[name]}")
    near = difflib.get_close_matches(name, PRESETS, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise PresetError(f"a preset must be one of {', '.join(PRESETS)}; found {name!r}{meant}: use one of these names")
