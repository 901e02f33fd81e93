"""Makes the tables in docs/service.md: settings from their model, routes from OpenAPI. A test holds the page.

The page is written by hand but for the parts between `<!-- made by docs/make_service.py: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pages import with_parts
from pydantic import SecretStr

from services import routes
from services.settings import Settings

PATH = Path(__file__).parent / "service.md"


def settings() -> str:
    """The table of settings."""
    rows = ["| variable | default | what it is |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = "" if default in (None, (), {}) or isinstance(default, SecretStr) else f"`{default}`"
        rows.append(f"| `LORA_SWEEPS_{name.upper()}` | {shown} | {_cell(field.description or '')} |")
    return "\n".join(rows)


def routes_table() -> str:
    """The table of routes."""
    app = FastAPI()
    app.include_router(routes.root)
    app.include_router(routes.v1)
    rows = ["| route | what it does |", "|---|---|"]
    for path, methods in app.openapi()["paths"].items():
        for method, operation in methods.items():
            rows.append(f"| `{method.upper()} {path}{_query(operation)}` | {_cell(operation['description'])} |")
    return "\n".join(rows)


def _query(operation: dict[str, Any]) -> str:
    names = [one["name"] for one in operation.get("parameters", []) if one["in"] == "query"]
    return f"?{'&'.join(names)}" if names else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def document(text: str) -> str:
    """The page with its made parts made anew; see `with_parts`."""
    parts = {"settings": settings(), "routes": routes_table()}
    return with_parts(text, parts, script="make_service.py", page="service.md")


if __name__ == "__main__":
    PATH.write_text(document(PATH.read_text(encoding="utf-8")), encoding="utf-8")
