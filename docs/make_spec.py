"""Writes docs/spec.md from the JSON schema of a spec: `make docs`. A test holds the file to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sweeps.spec import json_schema

PATH = Path(__file__).parent / "spec.md"

HEAD = """\
# The spec

A sweep is one YAML file. `lora-sweeps init` writes a commented one; `lora-sweeps schema > sweep.schema.json` gives
editors the schema; `lora-sweeps validate SPEC` names every fault with its line.

A parameter is a constant (`rank: 8`), a choice (`{values: [2, 4, 8]}`) or a range (`{min: 1e-4, max: 1e-1}`, spread
evenly in the logarithm unless `distribution: uniform`). `1e-5` is a number. Anchors, tags, duplicate and unknown keys
are refused.

This page is made from the schema by `make docs`.
"""


def document() -> str:
    """The whole page."""
    schema = json_schema()
    lines = [HEAD]
    # Defaults that depend on another section are not in the schema; their descriptions say what they are.
    for name, field in schema["properties"].items():
        lines += _section(name, field, schema["$defs"], required=name in schema["required"])
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str, field: dict[str, Any], definitions: dict[str, Any], *, required: bool) -> list[str]:
    note = "" if required else " (optional)"
    about = field.get("description") or _resolve(field, definitions).get("description", "")
    lines = [f"## `{name}`{note}\n", f"{about}\n"]
    variants = [_resolve(one, definitions) for one in field.get("oneOf", field.get("anyOf", [field]))]
    for variant in variants:
        properties = variant.get("properties")
        if not properties:
            continue
        if "const" in properties.get("type", {}):
            lines.append(f"`type: {properties['type']['const']}`: {variant.get('description', '')}\n")
        lines += ["| key | default | |", "|---|---|---|"]
        for key, value in properties.items():
            if key != "type":
                lines += _rows(key, value, definitions, required=key in variant.get("required", ()))
        lines.append("")
    return lines


def _rows(key: str, value: dict[str, Any], definitions: dict[str, Any], *, required: bool) -> list[str]:
    default = "required" if required else f"`{_shown(value['default'])}`" if "default" in value else ""
    about = _words(value) or _words(_resolve(value, definitions))
    rows = [f"| `{key}` | {default} | {about} |"]
    for name, inner in _resolve(value, definitions).get("properties", {}).items() if "$ref" in value else ():
        rows += _rows(f"{key}.{name}", inner, definitions, required=name in _resolve(value, definitions)["required"])
    for one in value.get("oneOf", ()):
        variant = _resolve(one, definitions)
        rows.append(f"| `{key}: {{type: {variant['properties']['type']['const']}}}` | | {variant['description']} |")
        for name, inner in variant["properties"].items():
            if name != "type":
                rows.append(f"| `{key}.{name}` | `{_shown(inner.get('default'))}` | {_words(inner)} |")
    return rows


def _resolve(value: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    return definitions[value["$ref"].rpartition("/")[2]] if "$ref" in value else value


def _words(value: dict[str, Any]) -> str:
    text = " ".join(str(value.get("description", "")).split())
    choices = value.get("enum")
    return f"{' or '.join(f'`{choice}`' for choice in choices)}. {text}" if choices else text


def _shown(default: Any) -> str:
    match default:
        case None:
            return "null"
        case bool():
            return str(default).lower()
        case {"values": [only]}:
            return f"{only:g}"
        case list():
            return f"[{', '.join(map(_shown, default))}]"
        case dict():
            return ", ".join(f"{key}: {_shown(inner)}" for key, inner in default.items() if inner is not None)
        case _:
            return str(default)


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
