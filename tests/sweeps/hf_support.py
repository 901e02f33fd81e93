"""Small models of transformers with real tokenizers, made on the spot, and specs over them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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


def make_gpt2(directory: Path) -> Path:
    """Writes a GPT-2-shaped model, whose linear layers are Conv1D, and its tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
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
