"""Makes what examples/sft.yaml fine-tunes, out of nothing but the Python that runs it, in about a minute.

docstrings of the standard library           -> tokenizer and a small Llama-shaped model, trained on them
its functions, each with its docstring's     -> train.jsonl and eval.jsonl: from the signature, say what the
first line                                      function does

python examples/make_sft_model.py            writes examples/sft/
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"


def functions(files: int | None) -> Iterator[tuple[str, str]]:
    """Signature and docstring of the standard library's functions and classes, in the order of their files."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py"))[:files]:
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                rest = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
                yield f"{'def' if rest else 'class'} {node.name}{rest}:", text


def make_tokenizer(texts: list[str], size: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE, as GPT-2's and Llama 3's are."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def train(
    tokenizer: transformers.PreTrainedTokenizerFast,
    texts: list[str],
    *,
    width: int,
    length: int,
    steps: int,
    batch: int,
) -> transformers.LlamaForCausalLM:
    """A model that has read the texts."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2 * length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.LlamaForCausalLM(config)
    stream = torch.tensor([i for text in texts for i in tokenizer(text + END, verbose=False)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    started_s = time.perf_counter()
    for step in range(steps):
        starts = torch.randint(len(stream) - length, (batch,))
        rows = torch.stack([stream[start : start + length] for start in starts.tolist()])
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started_s
            print(f"step {step + 1:4d} of {steps}  {loss.item():.3f} nats a token  {seconds:.0f} s")
    return model


def main(arguments: list[str] | None = None) -> None:
    """Writes the model with its tokenizer, and the samples to fine-tune it on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "sft")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--files", type=int, help="of the standard library to read; all of them by default")
    chosen = parser.parse_args(arguments)
    pairs = list(functions(chosen.files))
    texts = [text for _, text in pairs]
    tokenizer = make_tokenizer(texts, chosen.vocabulary)
    model = train(tokenizer, texts, width=chosen.width, length=chosen.length, steps=chosen.steps, batch=chosen.batch)
    tokenizer.save_pretrained(chosen.output / "model")
    model.save_pretrained(chosen.output / "model")
    samples = [{"prompt": f"{signature}\n", "completion": text.splitlines()[0]} for signature, text in pairs]
    whole = [one["prompt"] + one["completion"] for one in samples]
    lengths = map(len, tokenizer(whole, verbose=False)["input_ids"])
    samples = [one for one, length in zip(samples, lengths, strict=True) if length < 2 * chosen.length]
    random.Random(0).shuffle(samples)
    held_out = len(samples) // 10
    for name, some in (("eval", samples[:held_out]), ("train", samples[held_out:])):
        lines = "".join(json.dumps(one) + "\n" for one in some)
        (chosen.output / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    print(f"{chosen.output}: a model, {len(samples) - held_out:,} samples to train on and {held_out:,} to evaluate on")


if __name__ == "__main__":
    main()
