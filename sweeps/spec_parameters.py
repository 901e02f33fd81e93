"""The searched parameters of a spec, normalised: whatever the user writes becomes a `Choice` or a `Range`.

written                                     becomes
1e-3                                        Choice((0.001,))
{values: [4, 8, 16]}                        Choice(values=(4, 8, 16))
{min: 1e-4, max: 1e-1}                      Range(min=0.0001, max=0.1, distribution="log_uniform")
"""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from lora_core.gauge import ALPHA_RULE_PATTERN, AlphaRule
from sweeps.spec_faults import Mistake, Section, is_number, mistakes_of, nearest, refusal, refuse, without_tag
from sweeps.yaml_text import shown

T = TypeVar("T")
N = TypeVar("N", bound=float)

# No layer that a LoRA adapter fits has so great a width; unbounded, a range of ranks could be listed until memory ends.
MAX_RANK = 65_536

Rank = Annotated[int, Strict(), Field(ge=1, le=MAX_RANK)]
Positive = Annotated[float, Strict(), Field(gt=0)]
NotNegative = Annotated[float, Strict(), Field(ge=0)]


@dataclass(frozen=True, slots=True)
class Choice:
    """A parameter that takes one of some values; a constant is a choice of one.

    Attributes:
        values: each once, in the order in which they are written; ints for the rank, floats and the text of rules for
            alpha, else floats.
    """

    values: tuple[Any, ...]

    @property
    def constant(self) -> bool:
        """Whether there is nothing to search."""
        return len(self.values) == 1


@dataclass(frozen=True, slots=True)
class Range:
    """A parameter that takes any value between two.

    Attributes:
        min: the smallest value; an int for the rank.
        max: the largest value; an int for the rank.
        distribution: how values spread between them: evenly in the logarithm (log_uniform), or evenly.
    """

    min: float
    max: float
    distribution: Literal["log_uniform", "uniform"] = "log_uniform"

    @property
    def constant(self) -> bool:
        """False: a range always is something to search."""
        return False


# -- as they are written -----------------------------------------------------------------------------------------------


class _WrittenChoice(Section, Generic[T]):
    values: tuple[T, ...] = Field(min_length=1, json_schema_extra={"uniqueItems": True})
    """The values to choose from, each once."""

    def plain(self) -> Choice:
        return Choice(self.values)

    @field_validator("values")
    @classmethod
    def _each_once(cls, values: tuple[T, ...]) -> tuple[T, ...]:
        identities = [AlphaRule.parse(value) if isinstance(value, str) else value for value in values]
        first = {identity: index for index, identity in reversed(list(enumerate(identities)))}
        again = [index for index, identity in enumerate(identities) if first[identity] != index]
        if again:
            raise refusal(
                Mistake((index,), "each value once", f"{shown(values[index])} again", "remove it") for index in again
            )
        return values


class _WrittenRange(Section, Generic[N]):
    min: N
    """The smallest value."""
    max: N
    """The largest value."""
    distribution: Literal["log_uniform", "uniform"] = "log_uniform"
    """How the values between are spread: evenly in the logarithm (log_uniform) or evenly (uniform)."""

    def plain(self) -> Range:
        return Range(self.min, self.max, self.distribution)

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        if self.min >= self.max:
            raise refuse(f"a number below max, which is {shown(self.max)}", self.min, path=("min",))
        if self.min <= 0 and self.distribution == "log_uniform":
            hint = "a logarithm has no zero: raise min, or write distribution: uniform"
            raise refuse("a number above 0", self.min, hint, path=("min",))
        return self


_SHAPES = "a value, {values: [...]} or {min: ..., max: ...}"
_RANGE_KEYS = tuple(_WrittenRange.model_fields)


@dataclass(frozen=True)
class AsWritten:
    """Annotation of `Choice | Range` that reads the three forms in which a parameter is written.

    Attributes:
        choice: what values may be.
        range: what the ends may be.
    """

    choice: type[_WrittenChoice[Any]]
    range: type[_WrittenRange[Any]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        arms = {"values": handler.generate_schema(self.choice), "range": handler.generate_schema(self.range)}
        return core_schema.no_info_wrap_validator_function(
            _read_parameter,
            core_schema.tagged_union_schema(arms, discriminator=_shape),
            serialization=core_schema.plain_serializer_function_ser_schema(asdict),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        choice, range_ = (dict(handler.resolve_ref_schema(arm)) for arm in handler(schema)["oneOf"])
        constant = choice["properties"]["values"]["items"]
        return {"anyOf": [constant, {**choice, "title": "Choice"}, {**range_, "title": "Range"}]}


def _shape(raw: dict[Any, Any]) -> str | None:
    """Returns the arm of the union that a mapping is meant to be."""
    for key in raw:
        meant = nearest(str(key), ("values", *_RANGE_KEYS))
        if meant is not None:
            return "values" if meant == "values" else "range"
    return None


def _read_parameter(raw: Any, validate: ValidatorFunctionWrapHandler) -> Choice | Range:
    if isinstance(raw, list | tuple):
        raise refuse(_SHAPES, raw, f"write {{values: {shown(raw)}}}")
    if isinstance(raw, Choice | Range):
        raw = asdict(raw)
    if raw is None or (isinstance(raw, dict) and _shape(raw) is None):
        raise refuse(_SHAPES, raw)
    if not isinstance(raw, dict):
        return _read_constant(raw, validate)
    if "values" in raw and any(key in raw for key in _RANGE_KEYS):
        raise refuse("either values, or min and max", raw)
    try:
        read: _WrittenChoice[Any] | _WrittenRange[Any] = validate(raw)
    except ValidationError as error:
        raise without_tag(error) from None
    return read.plain()


def _read_constant(raw: object, validate: ValidatorFunctionWrapHandler) -> Choice:
    try:
        read: _WrittenChoice[Any] = validate({"values": [raw]})
    except ValidationError as error:
        # The path leads through a list that the user did not write.
        raise refusal(mistake._replace(path=()) for mistake in mistakes_of(error)) from None
    return read.plain()


_ALPHA = 'a number above 0, or a rule such as "2*rank" or "8*sqrt(rank)"'


def _read_alpha(raw: object) -> float | str:
    if isinstance(raw, str):
        return _read_alpha_rule(raw)
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not 0 < raw <= sys.float_info.max:
        raise refuse(_ALPHA, raw)
    return float(raw)


def _read_alpha_rule(text: str) -> str:
    if is_number(text):
        raise refuse(_ALPHA, text, f"drop the quotes: {text.strip()}")
    # Fraction("1e999999999") would fill the memory, so the exponent is bounded before anything is computed.
    if len(text) > 64 or re.search(r"[eE][-+]?\d{4}", text):
        raise refuse(_ALPHA, text)
    try:
        rule = AlphaRule.parse(text)
        computable = rule.half_powers > 0 and rule.at(1) > 0
    except (ValueError, OverflowError, ZeroDivisionError):
        computable = False
    if not computable:
        raise refuse(_ALPHA, text)
    return text


AlphaValue = Annotated[
    float | str,
    PlainValidator(_read_alpha),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": ALPHA_RULE_PATTERN}]}
    ),
]


class Parameters(Section):
    """What is searched: a value is a constant, {values: [...]} a choice, {min: ..., max: ...} a range."""

    rank: Annotated[Choice | Range, AsWritten(_WrittenChoice[Rank], _WrittenRange[Rank])] = Field(
        examples=[{"values": [2, 4, 8, 16]}]
    )
    """r, the rank of the adapters."""
    lr: Annotated[Choice | Range, AsWritten(_WrittenChoice[Positive], _WrittenRange[Positive])] = Field(
        examples=[{"min": 0.0001, "max": 0.1}]
    )
    """The peak learning rate: of A and B, or of A where lr_ratio is not 1."""
    init_scale: Annotated[Choice | Range, AsWritten(_WrittenChoice[Positive], _WrittenRange[Positive])] = Choice((1.0,))
    """c, which multiplies the standard deviation of A's initialisation."""
    alpha: Annotated[Choice | Range, AsWritten(_WrittenChoice[AlphaValue], _WrittenRange[Positive])] = Choice((32.0,))
    """alpha, which is eliminated: numbers, or rules such as 2*rank and 8*sqrt(rank)."""
    lr_ratio: Annotated[Choice | Range, AsWritten(_WrittenChoice[Positive], _WrittenRange[Positive])] = Choice((1.0,))
    """The learning rate of B as a multiple of that of A (LoRA+)."""
    weight_decay: Annotated[Choice | Range, AsWritten(_WrittenChoice[NotNegative], _WrittenRange[NotNegative])] = (
        Choice((0.0,))
    )
    """Weight decay of the adapters at the reference alpha."""
    head_lr: Annotated[Choice | Range, AsWritten(_WrittenChoice[NotNegative], _WrittenRange[Positive])] = Choice((0.0,))
    """The peak learning rate of what is trained whole beside the adapters, such as a classifier, which alpha does not
    move; it has no weight decay and stays outside the clip. Required by tasks with a head; 0 where there is none."""
