"""The section `task` of a spec: one model a kind of task. What only the model and the data can tell is `sweeps.tasks`'.

What a place in a section means is for a `Whereabouts` to say: for a user's own file, a path that starts from the file's
directory; for a spec that a server was sent, an id under the server's roots (`services/policy.py`). Places are made
absolute as the spec is read, because a worker has another working directory; a spec that is read again, from the ledger
or by a worker, has them so already.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    Strict,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from sweeps.spec_faults import ByType, Mistake, Section, did_you_mean, one_of, refusal, refuse
from sweeps.spec_sections import Count, Flag, Goal, Seed, in_one

DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""Endings of the files that samples are read from."""

DEFAULT_LENGTH = 1024
"""Tokens that `max_length: null` stands for, where the model has as many positions."""

_LOOKS_LIKE_A_PATH = ("/", "./", "../", "~")

Format = Literal["text", "completion", "messages"]


class Whereabouts(Protocol):
    """What the places mean that a section names; raises what `refuse` makes for one that it will not have."""

    def model(self, name: str) -> str:
        """A model's directory as an absolute path, or the id of something elsewhere as it is."""

    def data(self, name: str) -> str:
        """The same for a file or a data set."""

    def code(self, name: str | None) -> str | None:
        """The directory that a module is found in; None: it must be installed."""


@dataclass(frozen=True, slots=True)
class InDirectory:
    """Relative paths start from a directory, the one that a spec lies in.

    Attributes:
        directory: absolute.
    """

    directory: Path

    def model(self, name: str) -> str:
        """See `Whereabouts`."""
        # os.path, for pathlib raises on names too long or unknown users, which are no faults of a kind to die of.
        path = os.path.normpath(os.path.join(self.directory, os.path.expanduser(name)))
        # An id is written like a relative path: it is one if it is there, or could be nothing else.
        is_path = os.path.exists(path) or name.startswith(_LOOKS_LIKE_A_PATH) or name.endswith(DATA_FILES)
        return path if is_path or name == "." else name

    def data(self, name: str) -> str:
        """See `Whereabouts`."""
        return self.model(name)

    def code(self, name: str | None) -> str | None:
        """See `Whereabouts`."""
        return None if name is None else self.model(name)


def context_of(whereabouts: Whereabouts) -> dict[str, Any]:
    """Returns the validation context in which places mean what somebody says that they mean."""
    return {"whereabouts": whereabouts}


def _model(name: str, read: ValidationInfo) -> str:
    return name if read.context is None else _whereabouts(read).model(name)


def _data(name: str | float, read: ValidationInfo) -> str | float:
    return name if read.context is None or isinstance(name, float) else _whereabouts(read).data(name)


def _code(name: str | None, read: ValidationInfo) -> str | None:
    return name if read.context is None else _whereabouts(read).code(name)


def _whereabouts(read: ValidationInfo) -> Whereabouts:
    assert read.context is not None
    whereabouts: Whereabouts = read.context["whereabouts"]
    return whereabouts


_Text = Annotated[str, Field(min_length=1, max_length=1000)]
_Share = Annotated[float, Strict(), Field(gt=0, lt=1)]


class DigitsTask(Section):
    """Classifies scikit-learn's 8 x 8 digits with a small frozen network: the demo, seconds on a laptop."""

    metrics: ClassVar[Mapping[str, Goal]] = {"eval/loss": "minimize", "eval/accuracy": "maximize"}
    """What the task reports, and which way is better."""
    log_metrics: ClassVar[frozenset[str]] = frozenset({"eval/loss"})
    """Those that are positive and spread over orders of magnitude: a Gaussian process models their logarithm."""
    trains_head: ClassVar[bool | None] = False
    """Whether the task trains something whole beside the adapters; None: only the task itself can tell."""

    type: Literal["digits"]
    """The name of the task."""
    base_seed: Seed = 0
    """Seed of the frozen network that the adapters are put on."""


class DataSource(Section):
    """Where samples come from."""

    meanings: ClassVar[tuple[str, ...]] = ()
    """What a column of samples can mean."""

    train: Annotated[_Text, AfterValidator(_data)] = Field(examples=["train.jsonl"])
    """A JSONL, JSON, CSV, TSV or Parquet file; or a directory or the id of a data set, as Hugging Face datasets loads
    them."""
    config: _Text | None = None
    """Of a data set with several configurations, the one that is meant."""
    split: _Text = "train"
    """Split of the data set to train on."""
    # Located outside of the union, in whose words a refused place would be lost.
    eval: (
        Annotated[_Share | _Text, in_one("a share between 0 and 1, a file or a data set"), AfterValidator(_data)] | None
    ) = None
    """What is evaluated on: another file or data set, or the share of train that is held out for it. null: eval_split
    where it is written, else 0.1."""
    eval_split: _Text | None = None
    """Split to evaluate on: of eval where that is a data set, else of train."""
    columns: dict[str, _Text] = Field(default_factory=dict)
    """Columns that go by other names in the data."""

    @field_validator("columns")
    @classmethod
    def _are_known(cls, columns: dict[str, str]) -> dict[str, str]:
        unknown = [name for name in columns if name not in cls.meanings]
        if unknown:
            raise refusal(Mistake((n,), one_of(cls.meanings), n, did_you_mean(n, cls.meanings)) for n in unknown)
        return columns

    @field_validator("eval_split")
    @classmethod
    def _has_a_data_set(cls, eval_split: str | None, read: ValidationInfo) -> str | None:
        if eval_split is not None and isinstance(read.data.get("eval"), float):
            raise refuse("none, for eval holds out a share of train", eval_split, "write eval or eval_split")
        return eval_split


class TextData(DataSource):
    """Where samples come from, and what they look like."""

    meanings: ClassVar[tuple[str, ...]] = ("text", "prompt", "completion", "messages")

    columns: dict[str, _Text] = Field(default_factory=dict)
    """Columns that go by other names in the data, such as {prompt: question, completion: answer}."""
    format: Format | None = None
    """What a sample is made of: text; completion, a prompt and its completion; or messages, a chat that the tokenizer's
    template turns into text. null: as the columns say, messages before completion before text."""


class LabelledData(DataSource):
    """Where samples come from: the columns text and label, and text_pair where a sample is two texts."""

    meanings: ClassVar[tuple[str, ...]] = ("text", "text_pair", "label")

    columns: dict[str, _Text] = Field(default_factory=dict)
    """Columns that go by other names in the data, such as {text: premise, text_pair: hypothesis}."""


class ModelTask(Section):
    """What all tasks over a model of Hugging Face transformers have."""

    type: str
    """The name of the task."""
    model: Annotated[_Text, AfterValidator(_model)] = Field(examples=["./model"])
    """Directory of a model and its tokenizer, or their id on the Hugging Face hub. Weights are read from safetensors,
    and code that comes with a model is never run."""
    revision: _Text | None = None
    """Branch, tag or commit of a model on the hub."""
    data: DataSource = Field(examples=[{"train": "train.jsonl"}])
    """Where samples come from, and what they look like."""
    max_length: Count | None = None
    """The most tokens of a sample; null: 1024, or what the model has positions for if that is less."""
    too_long: Literal["refuse", "truncate", "drop"] = "refuse"
    """What happens to longer samples."""
    group_by_length: Flag = False
    """Make batches of rows of like length, as transformers does: less padding, and an order that is less random."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Implementation of attention; auto: what transformers takes. flash_attention_2 does not go with packing."""
    gradient_checkpointing: Flag = False
    """Compute each layer twice in place of keeping what its backward pass needs: less memory, about a third slower."""
    torch_compile: Flag = False
    """Compile the model, but for its adapters, with torch.compile: takes a worker up to some minutes at its start. Not
    together with gradient_checkpointing, nor with compute.gpus_per_worker above 1."""

    @model_validator(mode="after")
    def _compiles_what_can_be(self) -> Self:
        if self.torch_compile and self.gradient_checkpointing:
            required = "false with gradient_checkpointing, whose layers are computed outside of compiled graphs"
            raise refuse(required, self.torch_compile, path=("torch_compile",))
        return self


class CausalLmTask(ModelTask):
    """Fine-tunes a causal language model of Hugging Face transformers on text."""

    metrics: ClassVar[Mapping[str, Goal]] = {"eval/loss": "minimize", "eval/perplexity": "minimize"}
    """What the task reports, and which way is better."""
    log_metrics: ClassVar[frozenset[str]] = frozenset({"eval/loss", "eval/perplexity"})
    """Those that are positive and spread over orders of magnitude: a Gaussian process models their logarithm."""
    trains_head: ClassVar[bool | None] = False
    """Whether the task trains something whole beside the adapters."""

    type: Literal["causal_lm"]
    """The name of the task."""
    data: TextData = Field(examples=[{"train": "train.jsonl"}])
    """Where samples come from, and what they look like."""
    loss: Literal["all", "completion"] = "all"
    """Which tokens are learned: all of them, or the completions alone (in chats: what the assistant says)."""
    packing: Flag = False
    """Put several short samples into one row of max_length tokens, where they do not see each other; batch_size then
    counts rows. Otherwise a row is a sample, padded to the longest of its batch."""

    @model_validator(mode="after")
    def _keeps_samples_apart(self) -> Self:
        # transformers 5: _is_packed_sequence in modeling_flash_attention_utils.py asks for a batch of one row.
        if self.packing and self.attention == "flash_attention_2":
            way_out = "transformers has it keep packed samples apart in a batch of one row only, and a pack has more"
            raise refuse(
                "sdpa, flex_attention, eager or auto with packing", self.attention, way_out, path=("attention",)
            )
        return self

    @model_validator(mode="after")
    def _knows_completions(self) -> Self:
        if self.loss == "completion" and self.data.format == "text":
            raise refuse("all, for samples of text have no completions", self.loss, path=("loss",))
        if self.packing and self.group_by_length:
            raise refuse("false with packing, whose rows are full", self.group_by_length, path=("group_by_length",))
        return self


def label_name(value: object) -> str | None:
    """Returns the name of a label: text as it is, 3 as 3, true as true; None for what is no label."""
    match value:
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case str() if value:
            return value
        case _:
            return None


def _read_label(raw: object) -> str:
    if (name := label_name(raw)) is None:
        raise refuse("a label: text, an integer, true or false", raw)
    return name


_LABEL_SCHEMA = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer"}, {"type": "boolean"}]}
_Label = Annotated[str, BeforeValidator(_read_label), WithJsonSchema(_LABEL_SCHEMA)]


class SequenceClassificationTask(ModelTask):
    """Fine-tunes a model of Hugging Face transformers, with a head on it, to classify texts or pairs of texts."""

    metrics: ClassVar[Mapping[str, Goal]] = {
        "eval/loss": "minimize",
        "eval/accuracy": "maximize",
        "eval/macro_f1": "maximize",
    }
    """What the task reports, and which way is better."""
    log_metrics: ClassVar[frozenset[str]] = frozenset({"eval/loss"})
    """Those that are positive and spread over orders of magnitude: a Gaussian process models their logarithm."""
    trains_head: ClassVar[bool | None] = True
    """Whether the task trains something whole beside the adapters."""

    type: Literal["sequence_classification"]
    """The name of the task."""
    data: LabelledData = Field(examples=[{"train": "train.jsonl"}])
    """Where samples come from, and what they look like."""
    labels: Annotated[tuple[_Label, ...], Field(json_schema_extra={"minItems": 2})] | None = None
    """Names of the classes, in the order of their ids. null: those of the data set; or of a model that was fine-tuned
    for what the samples are labelled with; or else the labels of the samples, sorted."""
    head: Annotated[tuple[_Text, ...], Field(min_length=1)] | None = None
    """Names of the modules that are trained whole, beside the adapters; null: classifier or score, as PEFT has it."""

    @field_validator("labels")
    @classmethod
    def _are_distinct(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and len(labels) < 2:
            raise refuse("two labels or more", list(labels))
        for i, label in enumerate(labels or ()):
            if labels is not None and label in labels[:i]:
                raise refuse("each label once", label, path=(i,))
        return labels


_LOSS_ALONE: dict[str, Goal] = {"eval/loss": "minimize"}
_ENTRYPOINT = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"


class PythonTask(Section):
    """Trains what a Python function of yours returns; see docs/tasks.md for what that must be."""

    trains_head: ClassVar[bool | None] = None
    """Only the task itself can tell."""

    type: Literal["python"]
    """The name of the task."""
    entrypoint: str = Field(examples=["my_package.my_module:make_task"])
    """package.module:function that makes the task."""
    path: Annotated[_Text | None, AfterValidator(_code)] = Field(".", validate_default=True)
    """Directory that the module is found in, unless it is installed; from the spec's own directory. null: nowhere but
    where it is installed."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What the function is called with, beside cache, device and dtype."""
    metrics: dict[str, Goal] = Field(_LOSS_ALONE, min_length=1)
    """What the task reports, and which way is better."""
    log_metrics: tuple[str, ...] = ("eval/loss",)
    """Those that are positive and spread over orders of magnitude: a Gaussian process models their logarithm."""

    @field_validator("entrypoint")
    @classmethod
    def _names_a_function(cls, entrypoint: str) -> str:
        if not re.fullmatch(_ENTRYPOINT, entrypoint):
            raise refuse("package.module:function", entrypoint, "such as my_package.my_module:make_task")
        return entrypoint

    @field_validator("options")
    @classmethod
    def _are_not_ours(cls, options: dict[str, Any]) -> dict[str, Any]:
        mistakes = [
            Mistake((name,), "another name", name, "lora-sweeps passes it")
            for name in ("cache", "device", "dtype")
            if name in options
        ]
        if mistakes:
            raise refusal(mistakes)
        return options


Task = Annotated[CausalLmTask | SequenceClassificationTask | PythonTask | DigitsTask, ByType()]
"""Another task is one more model here."""
