"""What the scripts that make parts of a page share."""

from __future__ import annotations

from collections.abc import Mapping

_END = "<!-- end -->"


def with_parts(text: str, parts: Mapping[str, str], *, script: str, page: str) -> str:
    """A page with some of its parts made anew: those between `<!-- made by docs/SCRIPT: NAME -->` and `<!-- end -->`.

    Args:
        text: of the page.
        parts: by name.
        script: the file's name.
        page: the file's name.

    Raises:
        ValueError: the page has no place, or more than one, for one of them.
    """
    for name, part in parts.items():
        head = f"<!-- made by docs/{script}: {name} -->\n"
        if text.count(head) != 1:
            raise ValueError(f"{page} must have one line {head.strip()!r}; found {text.count(head)}")
        before, _, rest = text.partition(head)
        # An empty line on either side, or Markdown would take a table for HTML.
        text = f"{before}{head}\n{part}\n\n{_END}{rest[rest.index(_END) + len(_END) :]}"
    return text
