"""How large buffers are that must not move."""

from __future__ import annotations

SMALLEST = 256
"""Tokens of the smallest bucket."""


def bucket(tokens: int) -> int:
    """The size of buffers for ``tokens``: one of four an octave, so that few sizes are ever compiled for."""
    if tokens <= SMALLEST:
        return SMALLEST
    step = 1 << ((tokens - 1).bit_length() - 3)
    return -(-tokens // step) * step
