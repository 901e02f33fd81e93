"""Makes the outputs in docs/tasks.md by asking `lora-sweeps plan` for them. A test holds the page to it.

The page is written by hand but for the parts between `<!-- made by docs/make_tasks.py: NAME -->` and `<!-- end -->`:
what `plan` says of specs that the model or the data cannot serve. Both are made here, small and at random.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from pages import with_parts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from services.cli import cli
from sweeps.errors import InputError

PATH = Path(__file__).parent / "tasks.md"

ANSWERS = [{"prompt": f"{n} times {n} is ", "completion": f"{n * n}."} for n in range(12)]
REVIEWS = [{"text": f"It was {word}.", "label": label} for word, label in (("fun", "good"), ("dull", "bad"))] * 6

SAMPLES: dict[str, list[dict[str, object]]] = {
    "answers.jsonl": [*ANSWERS],
    "long.jsonl": [*ANSWERS, {"prompt": "Say a. ", "completion": 300 * "a"}],
    "chats.jsonl": [{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}] * 12,
    "empty.jsonl": [],
    "reviews.jsonl": [*REVIEWS],
    "odd.jsonl": [*REVIEWS, {"text": "It was long.", "label": "so-so"}],
}

SPEC = """\
name: shown
task:
  type: {type}
  model: {model}
  data: {{train: {data}}}{more}
lora: {{target_modules: [c_attn]}}
parameters: {{rank: {{values: [4, 8]}}, lr: {{min: 1e-4, max: 1e-2}}{parameters}}}
train: {{batch_size: 4, steps: 20}}
"""
HEAD = ", head_lr: 1e-3"

REFUSED: dict[str, dict[str, str]] = {
    "long": {"data": "long.jsonl", "more": "\n  max_length: 128"},
    "template": {"data": "chats.jsonl"},
    "empty": {"data": "empty.jsonl"},
    "model": {"data": "answers.jsonl", "model": "./no-model"},
    "label": {"type": "sequence_classification", "data": "odd.jsonl", "more": "\n  labels: [good, bad]"}
    | {"parameters": HEAD},
    "head": {"type": "sequence_classification", "data": "reviews.jsonl"},
}
"""What is refused, by name: the pieces of its spec."""


def make_model(directory: Path) -> None:
    """Writes a GPT-2-shaped model and a tokenizer of bytes."""
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")
    transformers.utils.logging.disable_progress_bar()
    tokenizer.save_pretrained(directory)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(directory)


def said(**pieces: str) -> str:
    """What `plan` says of a spec, in the current directory; its paths are shown from there."""
    spec = SPEC.format(**{"type": "causal_lm", "model": "./model", "more": "", "parameters": ""} | pieces)
    Path("shown.yaml").write_text(spec)
    try:
        cli(["plan", "shown.yaml"], standalone_mode=False)
    except InputError as error:
        return f"error: {error}".replace(f"{Path.cwd()}{os.sep}", "")
    raise RuntimeError(f"plan must refuse a spec with {pieces}; found that it did not")


def parts() -> dict[str, str]:
    """The made parts of the page, by name."""
    with _directory() as directory:
        make_model(directory / "model")
        for name, rows in SAMPLES.items():
            _write(directory / name, rows)
        return {name: f"```text\n{said(**pieces)}\n```" for name, pieces in REFUSED.items()}


def document(text: str) -> str:
    """The page with its made parts made anew; see `with_parts`."""
    return with_parts(text, parts(), script="make_tasks.py", page="tasks.md")


def _write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def _directory() -> Iterator[Path]:
    """A directory of its own to work in, with its state."""
    before, home = Path.cwd(), os.environ.pop("LORA_SWEEPS_HOME", None)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            yield Path.cwd()
        finally:
            os.chdir(before)
            if home is not None:
                os.environ["LORA_SWEEPS_HOME"] = home


if __name__ == "__main__":
    PATH.write_text(document(PATH.read_text(encoding="utf-8")), encoding="utf-8")
