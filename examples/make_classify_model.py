"""Makes what examples/classify.yaml fine-tunes, out of nothing but the Python that runs it, in about a minute.

lines of the standard library         -> tokenizer and a small RoBERTa-shaped encoder, trained to fill in masked tokens
as many of each of four kinds         -> train.jsonl and eval.jsonl: from the words alone, tell what a line is

python examples/make_classify_model.py       writes examples/classify/
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


def labelled_lines(files: int | None) -> Iterator[tuple[str, str]]:
    """Lines of the standard library and what they are, in the order of its files: comments without their #, the first
    lines of docstrings, the words of exceptions, and code."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py"))[:files]:
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        for line in source.splitlines():
            if line.lstrip().startswith("# "):
                yield "comment", line.strip()[2:]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                yield "docstring", text.splitlines()[0]
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                words = [part.value for part in node.exc.args if isinstance(part, ast.Constant)]
                yield from (("message", word) for word in words if isinstance(word, str))
            if isinstance(node, ast.Assign | ast.Return | ast.AugAssign):
                yield "code", ast.unparse(node).splitlines()[0]


def make_tokenizer(texts: list[str], size: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE that puts texts together as RoBERTa's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), list(SPECIAL.values())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    ends = [(token, special.index(token)) for token in ("<s>", "</s>")]
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    names = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, model_input_names=names, **SPECIAL)


def train(
    tokenizer: transformers.PreTrainedTokenizerFast,
    texts: list[str],
    *,
    width: int,
    length: int,
    steps: int,
    batch: int,
) -> transformers.RobertaForMaskedLM:
    """A model that has read the texts, with gaps in them."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length + 2,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.RobertaForMaskedLM(config)
    rows = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    started_s = time.perf_counter()
    for step in range(steps):
        picked = torch.randint(len(rows), (batch,)).tolist()
        loss = model(**collate([{"input_ids": rows[i]} for i in picked])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started_s
            print(f"step {step + 1:4d} of {steps}  {loss.item():.3f} nats a gap  {seconds:.0f} s")
    return model


def main(arguments: list[str] | None = None) -> None:
    """Writes the model with its tokenizer, and the samples to fine-tune it on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "classify")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--files", type=int, help="of the standard library to read; all of them by default")
    chosen = parser.parse_args(arguments)
    # Each once, so that none to evaluate on was trained on.
    kinds = {text: kind for kind, text in labelled_lines(chosen.files) if len(text.split()) > 2}
    texts = list(kinds)
    tokenizer = make_tokenizer(texts, chosen.vocabulary)
    tokenizer.model_max_length = chosen.length
    model = train(tokenizer, texts, width=chosen.width, length=chosen.length, steps=chosen.steps, batch=chosen.batch)
    tokenizer.save_pretrained(chosen.output / "model")
    model.save_pretrained(chosen.output / "model")
    random.Random(0).shuffle(texts)
    by_kind = {kind: [text for text in texts if kinds[text] == kind] for kind in sorted(set(kinds.values()))}
    fewest = min(map(len, by_kind.values()))
    samples = [{"text": text, "label": kind} for kind, some in by_kind.items() for text in some[:fewest]]
    random.Random(0).shuffle(samples)
    held_out = len(samples) // 5
    for name, some in (("eval", samples[:held_out]), ("train", samples[held_out:])):
        lines = "".join(json.dumps(one) + "\n" for one in some)
        (chosen.output / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    print(f"{chosen.output}: a model, {len(samples) - held_out:,} samples to train on and {held_out:,} to evaluate on")


if __name__ == "__main__":
    main()
