"""Seeds derived from what a draw is for, so that no draw depends on the order or the place in which it is made."""

from __future__ import annotations

import hashlib

import torch


def stable_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed that depends on the parts only: the same in every process, on every machine and version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Returns a fresh CPU generator for `parts`; on the CPU always, because CUDA draws other numbers for the same
    seed."""
    return torch.Generator().manual_seed(stable_seed(*parts))
