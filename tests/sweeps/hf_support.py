"""Small models of transformers with real tokenizers, made on the spot, and specs over them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sweeps.spec import SpecDocument, parse_spec

TEXTS = [
    f"{'The quick brown fox jumps over the lazy dog. ' * (i % 3)}Line {i}: {i} times {i} is {i * i}." for i in range(24)
]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(chat_template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(directory: Path, *, chat_template: str | None = None, seed: int = 0, **changes: Any) -> Path:
    """Writes a Llama-shaped model of random weights and its tokenizer."""
    tokenizer = make_tokenizer(chat_template)
    tokenizer.save_pretrained(directory)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "attention_dropout": 0.1,
        "initializer_range": 0.1,
        "eos_token_id": 0,
        "bos_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes))
    model.save_pretrained(directory)
    return directory


def make_gpt2(directory: Path, *, positions: int = 256, layers: int = 2) -> Path:
    """Writes a GPT-2-shaped model, whose linear layers are Conv1D, and its tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=32,
        n_layer=layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lm_document(
    model: Path | str, data: str, task: str = "", *, targets: str = "[q_proj, v_proj, down_proj]", **train: Any
) -> SpecDocument:
    """A spec over a model: `data` and `task` are the insides of their braces, lines 3 and 4 of its text."""
    settings = {"steps": 6, "batch_size": 4, "schedule": "constant", **train}
    body = ", ".join(f"{key}: {value}" for key, value in settings.items())
    text = f"""\
name: lm
task:
  {{type: causal_lm, model: "{model}", {task + ", " if task else ""}
  data: {{{data}}}}}
lora: {{target_modules: {targets}}}
parameters: {{rank: {{values: [2, 4]}}, lr: {{min: 1e-4, max: 1e-1}}, init_scale: {{min: 0.25, max: 4}}, alpha: 16}}
train: {{{body}}}
search: {{trials: 4, pruner: {{type: none}}}}
certify: {{steps: 6}}
"""
    return parse_spec(text, "lm.yaml")


# -- for classification ------------------------------------------------------------------------------------------------


def make_encoder_tokenizer(*, types: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE that puts texts together as RoBERTa's does, or with token types as BERT's does."""
    tokens = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(tokens.values())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s>:0 $A:0 </s>:0 $B:1 </s>:1" if types else "<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    inputs = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, model_input_names=inputs, **tokens)


_TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 130,
}
_DISENTANGLED = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}


def make_checkpoint(directory: Path, kind: str, *, fine_tuned: tuple[str, ...] = (), **changes: Any) -> Path:
    """Writes a checkpoint of random weights and its tokenizer.

    Args:
        directory: where.
        kind: roberta, bert, bert-without-pooler, deberta, gpt2 or t5.
        fine_tuned: the classes that it has a head for, if any.
        changes: of its config.
    """
    tokenizer = make_tokenizer() if kind == "gpt2" else make_encoder_tokenizer(types=kind.startswith("bert"))
    tokenizer.save_pretrained(directory)
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    common: dict[str, Any] = {"vocab_size": len(tokenizer)} | (ids if kind != "gpt2" else {"eos_token_id": 0})
    if fine_tuned:
        common |= {"id2label": dict(enumerate(fine_tuned)), "label2id": {name: i for i, name in enumerate(fine_tuned)}}
    t = transformers
    match kind:
        case "roberta":
            config, base = t.RobertaConfig(**common | _TINY | changes), t.RobertaForMaskedLM
        case "bert" | "bert-without-pooler":
            config, base = t.BertConfig(**common | _TINY | changes), t.BertForMaskedLM if "-" in kind else t.BertModel
        case "deberta":
            config, base = t.DebertaV2Config(**common | _TINY | _DISENTANGLED | changes), t.DebertaV2ForMaskedLM
        case "gpt2":
            sizes = {"n_positions": 130, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0}
            config, base = t.GPT2Config(**common | sizes | {"initializer_range": 0.2} | changes), t.GPT2LMHeadModel
        case "t5":
            sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 4} | {
                "decoder_start_token_id": 1
            }
            config, base = t.T5Config(**common | sizes | changes), t.T5ForConditionalGeneration
        case _:
            raise ValueError(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = t.AutoModelForSequenceClassification.from_config(config) if fine_tuned else base(config)
    model.save_pretrained(directory)
    return directory


def classify_document(
    model: Path | str, data: str, task: str = "", *, targets: str = "all-linear", **train: Any
) -> SpecDocument:
    """A spec over a model: `data` and `task` are the insides of their braces, lines 3 and 4 of its text."""
    settings = {"steps": 6, "batch_size": 4, "schedule": "constant", **train}
    body = ", ".join(f"{key}: {value}" for key, value in settings.items())
    text = f"""\
name: classify
task:
  {{type: sequence_classification, model: "{model}", {task + ", " if task else ""}
  data: {{{data}}}}}
lora: {{target_modules: {targets}}}
parameters: {{rank: {{values: [2, 4]}}, lr: {{min: 1e-4, max: 1e-1}}, alpha: 16, head_lr: {{min: 1e-4, max: 1e-1}}}}
train: {{{body}}}
search: {{trials: 4, pruner: {{type: none}}}}
certify: {{steps: 6}}
"""
    return parse_spec(text, "classify.yaml")
