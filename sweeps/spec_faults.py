"""Faults of a spec in its user's words: pydantic's errors, translated where they arise.

Every section of a spec derives from `Section`, which restates pydantic's errors as *mistakes*: what was required, what
was found, and the way out, at the path that the user wrote. Doing so in the section, and not at the end, is what makes
the names of its other keys known, and keeps pydantic's words for union arms out of the paths.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, InitErrorDetails, PydanticCustomError, core_schema

from sweeps.yaml_text import Path, shown

_REQUIRED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_too_long": "at most {max_length} characters",
    "tuple_type": "a list",
    "model_type": "keys with values",
    "greater_than": "a number above {gt:,.12g}",
    "greater_than_equal": "a number of at least {ge:,.12g}",
    "less_than": "a number below {lt:,.12g}",
    "less_than_equal": "a number of at most {le:,.12g}",
    "too_short": "at least {min_length} entry",
    "too_long": "at most {max_length} entries",
}
_NUMBERS = {"int_type", "float_type"}

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

# Other tools' names for the same things, too unlike ours for difflib.
_ELSEWHERE = {"r": "rank", "lora_r": "rank", "learning_rate": "lr", "direction": "goal", "max_steps": "steps"}


class Mistake(NamedTuple):
    """One thing wrong, at a path relative to the section in which it was found."""

    path: Path
    required: str
    found: str
    hint: str | None = None
    absolute: bool = False
    """Whether the path is from the root of the spec, because the fault lies in another section."""


def refusal(mistakes: Iterable[Mistake]) -> ValidationError:
    """Returns the exception that carries mistakes through pydantic, which puts outer keys in front of their paths."""
    return ValidationError.from_exception_data(
        "spec", [InitErrorDetails(type=_carrier(mistake), loc=mistake.path, input=None) for mistake in mistakes]
    )


def _carrier(mistake: Mistake) -> PydanticCustomError:
    context = {**mistake._asdict(), "tail": f"; {mistake.hint}" if mistake.hint else ""}
    return PydanticCustomError("mistake", "required {required}; found {found}{tail}", context)


def refuse(required: str, found: object, hint: str | None = None, path: Path = ()) -> ValidationError:
    """Returns the exception for a single mistake; `found` is a value of the spec."""
    return refusal([Mistake(path, required, shown(found), hint)])


_MEANT = {
    "r": "the rank is parameters.rank",
    "lora_r": "the rank is parameters.rank",
    "lora_alpha": "alpha is parameters.alpha",
    "learning_rate": "the learning rate is parameters.lr",
    "modules_to_save": "a task's head is trained with parameters.head_lr",
    "rank_pattern": "a pack keeps the adapters of a trial in one tensor, so all its layers have one rank",
    "alpha_pattern": "alpha is eliminated by one law for all layers, so all layers have one alpha",
}
"""Keys of PEFT's and of trainers that people write from habit, and what is here in their place."""


def mistakes_of(error: ValidationError, section: type[BaseModel] | None = None) -> list[Mistake]:
    """Returns pydantic's errors as mistakes, one for each thing that the user got wrong.

    Args:
        error: what pydantic raised.
        section: the model that raised it, whose fields are the valid names.
    """
    fields = {} if section is None else section.model_fields
    details = error.errors(include_url=False)
    # A misspelt key is one mistake, although pydantic finds an unknown key and a missing one.
    misspelt = {nearest(str(one["loc"][-1]), fields) for one in details if one["type"] == "extra_forbidden"}
    return [
        _translated(one, fields)
        for one in details
        if not (one["type"] == "missing" and one["loc"][-1] in misspelt) and not _follows_from_another(one)
    ]


def _follows_from_another(error: ErrorDetails) -> bool:
    # pydantic counts the entries that were valid, so that a wrong entry makes a list too short as well.
    return error["type"] == "too_short" and len(error["input"]) > 0


def _translated(error: ErrorDetails, fields: Mapping[str, Any]) -> Mistake:
    kind, path, value, context = error["type"], error["loc"], error["input"], error.get("ctx", {})
    if kind == "mistake":
        # The outer keys were added by pydantic; the path inside the context lacks them.
        where = context["path"] if context["absolute"] else path
        return Mistake(where, context["required"], context["found"], context["hint"], context["absolute"])
    if kind == "missing":
        examples = fields[str(path[-1])].examples if path[-1] in fields else None
        return Mistake(
            path, "a value, for it has no default", "nothing", f"such as {shown(examples[0])}" if examples else None
        )
    if kind == "extra_forbidden":
        key = str(path[-1])
        hint = did_you_mean(key, fields) or _MEANT.get(key)
        return Mistake(path, one_of(fields), f"the unknown key {shown(key)}", hint)
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        return Mistake(path, one_of(names), shown(value), did_you_mean(value, names))
    required = _REQUIRED[kind].format(**context) if kind in _REQUIRED else error["msg"]
    return Mistake(path, required, shown(value), _way_out(kind, value))


def _way_out(kind: str, value: object) -> str | None:
    if kind == "model_type" and value is None:
        return "give it keys, or leave it out"
    if kind in _NUMBERS and isinstance(value, str) and is_number(value):
        return f"drop the quotes: {value.strip()}"
    return None


def is_number(text: str) -> bool:
    """Whether a text would be a number without its quotes."""
    return _NUMBER.fullmatch(text.strip()) is not None


def one_of(names: Iterable[str]) -> str:
    """Returns the requirement of a name out of a list."""
    *rest, last = names
    return f"one of {', '.join(rest)} or {last}" if rest else last


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Returns the valid name that was probably meant."""
    valid = list(valid)
    if (translated := _ELSEWHERE.get(name.lower())) in valid:
        return translated
    # Comparing is quadratic in the length, and a name this long is no slip of the pen.
    close = difflib.get_close_matches(name.lower(), valid, n=1) if len(name) <= 64 else []
    return close[0] if close else None


def did_you_mean(name: object, valid: Iterable[str]) -> str | None:
    """Returns the hint for a wrong name, if a valid one is near."""
    close = nearest(name, valid) if isinstance(name, str) else None
    return f"did you mean {close!r}?" if close else None


class Section(BaseModel):
    """A part of the spec: frozen, without unknown keys, and plain in what it refuses."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        # What was found is in the message, unless it is a secret.
        hide_input_in_errors=True,
    )

    @model_validator(mode="wrap")
    @classmethod
    def _speak_plainly(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            raise refusal(mistakes_of(error, cls)) from None


def without_tag(error: ValidationError) -> ValidationError:
    """Returns a discriminated union's error without the tag of the arm, which is not in the spec, in its paths."""
    return refusal(mistake._replace(path=mistake.path[1:]) for mistake in mistakes_of(error))


class ByType:
    """Annotation of a union whose arms are told apart by their key `type`; one arm is a union too.

    The pydantic discriminator would do for two arms and more, were it not for its words.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        models: Sequence[type[BaseModel]] = get_args(source) or (source,)
        arms = {get_args(model.model_fields["type"].annotation)[0]: model for model in models}

        def read(raw: Any, validate: ValidatorFunctionWrapHandler) -> Any:
            if not isinstance(raw, BaseModel):
                _refuse_type(raw, list(arms))
            try:
                return validate(raw)
            except ValidationError as error:
                raise without_tag(error) from None

        union = core_schema.tagged_union_schema(
            {name: handler.generate_schema(model) for name, model in arms.items()}, discriminator="type"
        )
        return core_schema.no_info_wrap_validator_function(read, union)


def _refuse_type(raw: object, names: list[str]) -> None:
    if not isinstance(raw, dict):
        name = raw if isinstance(raw, str) and raw in names else names[0]
        raise refuse("keys with values", raw, f"write {{type: {name}}}")
    found = raw.get("type")
    if found not in names:
        raise refuse(one_of(names), found, did_you_mean(found, names), path=("type",))
