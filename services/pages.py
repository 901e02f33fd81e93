"""Pages for people: the queue, and a sweep."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(include_in_schema=False)
