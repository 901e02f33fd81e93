"""The templates of the pages, and the files beside them. Everything that a template is given is escaped."""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from sweeps.best import counts_in_words, unit_of

STATIC = {"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}
"""Files that pages load, and what they are."""


@cache
def static(name: str) -> str:
    """The text of a file that pages load."""
    return files("services").joinpath("static", name).read_text(encoding="utf-8")


def static_url(name: str) -> str:
    """Its address, which is another one when its text is: a browser may keep it for ever."""
    return f"/static/{name}?v={hashlib.sha256(static(name).encode()).hexdigest()[:12]}"


@cache
def policy_with_styles() -> str:
    """The content security policy of a page that has the styles within it, because nothing else can be loaded yet."""
    digest = base64.b64encode(hashlib.sha256(static("page.css").encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )


def render(name: str, **values: Any) -> str:
    """Fills in a template."""
    return _templates().get_template(f"{name}.html.j2").render(values)


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("services"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["g"] = lambda value, digits=4: "–" if value is None else f"{value:.{digits}g}"
    environment.filters["unit"] = unit_of
    environment.filters["counts"] = counts_in_words
    environment.filters["time"] = _time
    environment.globals["static_url"] = static_url
    environment.globals["styles"] = lambda: Markup(static("page.css"))  # our own file
    return environment


def _time(at: str | float) -> Markup:
    """A time, to the minute, as people and machines read it."""
    moment = datetime.fromisoformat(at) if isinstance(at, str) else datetime.fromtimestamp(at, UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        moment.isoformat(timespec="seconds"), moment.strftime("%Y-%m-%d %H:%M")
    )
